"""Which answers are shown to whom, in which order, and what people say of them.

Every verdict is a line of the journal, synced before the next answers show; what the
verdicts come to is a function of the journal (`label_records`).
"""

import collections
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stagecraft import storage
from stagecraft.errors import UserError
from stagecraft.serve.items import Item
from stagecraft.stages import records
from stagecraft.stages.records import Journal

# Of two answers: which is better, as they were shown. Of more: their ranking.
CHOICES = ("first", "second", "rank", "tie", "both_bad", "skip")
STRENGTHS = (1, 2, 3)  # slightly, clearly, much better
LEASE = 600.0  # seconds for which an item is one tab's
# Verdicts between an item and the same item in another order, at least.
APART = 5
_TEXT = 2000  # characters of a reason that are stored


class Showing(NamedTuple):
    """A place in a rater's list.

    Attributes:
        item: number of the item.
        shown: the numbers of its answers, in the order in which they are shown.
        again: whether the rater sees the item for the second time, in the reverse
            order.
    """

    item: int
    shown: tuple[int, ...]
    again: bool


def schedule(
    sizes: Sequence[int], rater: str, *, seed: int, repeats: float
) -> list[Showing]:
    """Returns what a rater is shown, in order: a function of its arguments alone.

    Args:
        sizes: how many answers each item has.
        rater: the name.
        seed: of the order, the sides and the choice of what is shown again.
        repeats: share of the items that are shown twice.
    """
    rng = np.random.default_rng([seed, zlib.crc32(rater.encode("utf-8"))])
    count, order = len(sizes), rng.permutation(len(sizes))
    sides = [tuple(rng.permutation(size).tolist()) for size in sizes]
    showings = [Showing(int(i), sides[i], False) for i in order]
    again = {int(i) for i in rng.permutation(count)[: round(repeats * count)]}
    out, waiting = [], collections.deque()
    for number, showing in enumerate(showings):
        out.append(showing)
        if showing.item in again:
            swapped = Showing(showing.item, showing.shown[::-1], True)
            waiting.append((number + APART + int(rng.integers(APART)), swapped))
        while waiting and waiting[0][0] <= number:
            out.append(waiting.popleft()[1])
    return out + [showing for _, showing in waiting]


class Labelling:
    """The items of a labelling, and the journal of its verdicts.

    Args:
        folder: where its files lie.
        items: list of Item, no two alike.
        seed, repeats: see `schedule`.
        generator: id of the model that wrote the answers, "" where it is not known.
        clock: seconds; a test's own.
    """

    def __init__(
        self,
        folder: str | Path,
        items: Sequence[Item],
        *,
        seed: int = 0,
        repeats: float = 0.1,
        generator: str = "",
        clock=time.time,
    ):
        self.folder, self.items = Path(folder), list(items)
        self.generator = generator
        self.seed, self.repeats, self._clock = seed, repeats, clock
        header = {
            "journal": records.VERSION,
            "kind": "labels",
            "items": storage.digest([item.id for item in self.items]),
            "answers": max(len(item.answers) for item in self.items),
            "seed": seed,
            "repeats": repeats,
        }
        self._journal = Journal(self.folder / records.JOURNAL, header)
        self._said: dict[str, dict[int, dict]] = {}  # {rater: {place: verdict}}
        self._order: dict[str, list[int]] = {}  # {rater: places in order of verdicts}
        self._leases: dict[tuple[str, int], tuple[str, float]] = {}
        self._schedules: dict[str, list[Showing]] = {}
        for entry in self._journal.held():
            self._take(entry)

    def close(self) -> None:
        """Closes the journal."""
        self._journal.__exit__()

    def raters(self) -> list[str]:
        """Returns the names of those who have given a verdict, sorted."""
        return sorted(name for name, said in self._said.items() if said)

    def schedule(self, rater: str) -> list[Showing]:
        """Returns what a rater is shown, in order."""
        if rater not in self._schedules:
            how = dict(seed=self.seed, repeats=self.repeats)
            sizes = [len(item.answers) for item in self.items]
            self._schedules[rater] = schedule(sizes, rater, **how)
        return self._schedules[rater]

    def next(self, rater: str, tab: str) -> tuple[int, Showing] | None:
        """Returns the first place without a verdict that no other tab holds.

        Args:
            rater: the name.
            tab: names the page that asks; the place is its own for `LEASE` seconds.

        Returns:
            (place, what to show there), or None where nothing is left.
        """
        now, said = self._clock(), self._said.get(rater, {})
        places = self.schedule(rater)
        held = {
            place
            for (name, place), (owner, until) in self._leases.items()
            if name == rater and owner != tab and until > now
        }
        for key in [k for k, (owner, _) in self._leases.items() if owner == tab]:
            del self._leases[key]
        for place, showing in enumerate(places):
            if place not in said and place not in held:
                self._leases[rater, place] = tab, now + LEASE
                return place, showing
        return None

    def say(self, rater: str, place: int, choice: str, **more: Any) -> None:
        """Appends a verdict to the journal, and syncs it.

        Args:
            rater: the name.
            place: in its schedule.
            choice: one of `CHOICES`; first and second are as they were shown.
            **more: strength (of `STRENGTHS`) or None, reason, seconds; for "rank" the
                order: places of answers as shown, the best first; those that are left
                out are equal, behind the others.

        Raises:
            UserError: it is no verdict, or the place has one already.
        """
        places = self.schedule(rater)
        if choice not in CHOICES:
            raise UserError(f"choice={choice!r}: expected one of {', '.join(CHOICES)}")
        if not isinstance(place, int) or not 0 <= place < len(places):
            raise UserError(f"place={place!r}: expected 0 to {len(places) - 1}")
        strength = more.get("strength")
        if strength is not None and strength not in STRENGTHS:
            raise UserError(f"strength={strength!r}: expected 1, 2, 3 or none")
        if place in self._said.get(rater, {}):
            raise UserError(f"place {place} has a verdict of {rater!r} already")
        showing, seconds = places[place], more.get("seconds")
        order = _order(choice, more.get("order"), len(showing.shown))
        entry = {
            "rater": rater,
            "place": place,
            "item": self.items[showing.item].id,
            "shown": list(showing.shown),
            "choice": choice,
            "strength": strength if choice in ("first", "second") else None,
            **({"order": order} if choice == "rank" else {}),
            "reason": str(more.get("reason") or "")[:_TEXT],
            "seconds": round(seconds, 2) if _is_time(seconds) else None,
            "at": round(self._clock(), 3),
        }
        self._take(self._journal.append(entry))

    def undo(self, rater: str, tab: str) -> tuple[int, Showing] | None:
        """Takes a rater's last verdict back; returns its place, None where none is."""
        if not self._order.get(rater):
            return None
        place = self._order[rater][-1]
        self._take(self._journal.append({"rater": rater, "undo": place}))
        self._leases[rater, place] = tab, self._clock() + LEASE
        return place, self.schedule(rater)[place]

    def progress(self, rater: str) -> tuple[int, int]:
        """Returns how many places have a verdict, and how many there are."""
        return len(self._said.get(rater, {})), len(self.schedule(rater))

    def _take(self, entry):
        """Follows an entry of the journal."""
        said = self._said.setdefault(entry["rater"], {})
        order = self._order.setdefault(entry["rater"], [])
        if "undo" in entry:
            said.pop(entry["undo"], None)
            order.remove(entry["undo"])
            return
        said[entry["place"]] = entry
        order.append(entry["place"])

    def verdicts(self, rater: str) -> list[tuple[Showing, dict]]:
        """Returns a rater's verdicts in the order of its schedule."""
        places, said = self.schedule(rater), self._said.get(rater, {})
        return [(places[place], said[place]) for place in sorted(said)]


def _order(choice, order, size):
    """Returns the order of a ranking; refuses what does not go with as many answers."""
    if choice != "rank":
        if choice in ("first", "second") and size > 2:
            raise UserError(
                f"choice={choice!r}: of {size} answers; expected 'rank' and an order"
            )
        return None
    places = order if isinstance(order, list) else []
    whole = all(type(place) is int and 0 <= place < size for place in places)
    if not whole or len({*places}) != len(places) or not 0 < len(places) <= size:
        raise UserError(
            f"order={order!r}: expected different places from 0 to {size - 1}, the "
            "best answer first"
        )
    return places


def as_json(item: Item, showing: Showing) -> dict:
    """Returns what a page is given of an item: nothing that tells the sides apart."""
    shown = [item.answers[number] for number in showing.shown]
    answers = [{"text": text, "ended": ended} for text, ended in shown]
    return json.loads(storage.to_json({"prompt": item.prompt, "answers": answers}))


def _is_time(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < 1e6
