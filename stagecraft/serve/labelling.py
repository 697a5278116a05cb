"""Verdicts of people on pairs of answers: what is shown to whom, and what was said.

Every verdict is a line of the journal, synced before the next pair shows. The records
are a function of the journal:

    records.jsonl    {"prompt", "chosen", "rejected"}: one verdict a pair, the mean of
                     its raters', with "preference" where it is not certain (a tie is
                     .5) and "margin" where strength was given
    unpaired.jsonl   {"prompt", "completion", "label": false}: both answers of pairs
                     that most of their raters call bad
"""

import collections
import json
import statistics
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stagecraft import storage
from stagecraft.data import readers
from stagecraft.errors import UserError
from stagecraft.stages import records
from stagecraft.stages.records import Journal

CHOICES = ("first", "second", "tie", "both_bad", "skip")  # of what was shown first, ...
STRENGTHS = (1, 2, 3)  # slightly, clearly, much better
LEASE = 600.0  # seconds for which a pair is one tab's
# Verdicts between a pair and the same pair with its sides swapped, at least.
APART = 5
UNPAIRED = "unpaired.jsonl"
_TEXT = 2000  # characters of a reason that are stored


class Item(NamedTuple):
    """A prompt with two answers.

    Attributes:
        prompt: a text or messages.
        answers: two of (text, whether it ended by itself).
    """

    prompt: str | list
    answers: list

    @property
    def id(self) -> str:
        """Returns what names the item in the journal."""
        return storage.digest([self.prompt, [text for text, _ in self.answers]])[:16]


class Showing(NamedTuple):
    """A place in a rater's list.

    Attributes:
        item: number of the item.
        first: which of its answers stands first, 0 or 1.
        again: whether the rater sees the item for the second time, sides swapped.
    """

    item: int
    first: int
    again: bool


def schedule(count: int, rater: str, *, seed: int, repeats: float) -> list[Showing]:
    """Returns what a rater is shown, in order: a function of its arguments alone.

    Args:
        count: of the items.
        rater: the name.
        seed: of the order, the sides and the choice of what is shown again.
        repeats: share of the items that are shown twice.
    """
    rng = np.random.default_rng([seed, zlib.crc32(rater.encode("utf-8"))])
    order, sides = rng.permutation(count), rng.integers(2, size=count)
    showings = [Showing(int(i), int(sides[i]), False) for i in order]
    again = {int(i) for i in rng.permutation(count)[: round(repeats * count)]}
    out, waiting = [], collections.deque()
    for number, showing in enumerate(showings):
        out.append(showing)
        if showing.item in again:
            swapped = Showing(showing.item, 1 - showing.first, True)
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
            self._schedules[rater] = schedule(len(self.items), rater, **how)
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
            **more: strength (of `STRENGTHS`) or None, reason, seconds.

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
        entry = {
            "rater": rater,
            "place": place,
            "item": self.items[showing.item].id,
            "first": showing.first,
            "choice": choice,
            "strength": strength if choice in ("first", "second") else None,
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

    # -- what was said -----------------------------------------------------------------

    def verdicts(self, rater: str) -> list[tuple[Showing, dict]]:
        """Returns a rater's verdicts in the order of its schedule."""
        places, said = self.schedule(rater), self._said.get(rater, {})
        return [(places[place], said[place]) for place in sorted(said)]

    def write(self) -> dict[str, int]:
        """Writes records.jsonl and unpaired.jsonl, each whole; returns their lines."""
        pairs, unpaired = self.records()
        records.write(self.folder, pairs)
        lines = "".join(storage.to_json(row) + "\n" for row in unpaired)
        storage.write_text(self.folder / UNPAIRED, lines)
        return {records.RECORDS: len(pairs), UNPAIRED: len(unpaired)}

    def records(self) -> tuple[list[dict], list[dict]]:
        """Returns the pairs and the judged answers of all verdicts, by item."""
        by_item = collections.defaultdict(lambda: collections.defaultdict(list))
        for rater in self.raters():
            for showing, entry in self.verdicts(rater):
                by_item[showing.item][rater].append(entry)
        pairs, unpaired = [], []
        for number in sorted(by_item):
            item, said = self.items[number], by_item[number]
            opinions = [_opinion(entries) for entries in said.values()]
            chances = [o.chance for o in opinions if o.chance is not None]
            bad = sum(opinion.both_bad for opinion in opinions)
            source = {"signal": "people", "raters": len(chances) + bad}
            source |= {"generator": self.generator} if self.generator else {}
            if bad and bad >= len(chances):
                unpaired += [
                    {"prompt": item.prompt, "completion": text, "label": False} | source
                    for text, _ in item.answers
                ]
            elif chances:
                strengths = [o.strength for o in opinions if o.strength is not None]
                pairs.append(_record(item, chances, strengths) | source)
        return pairs, unpaired


class _Opinion(NamedTuple):
    """What one rater says of an item: the mean of its verdicts on it.

    Attributes:
        chance: that answer 0 is better; None without such a verdict.
        both_bad: whether that is what the rater said, each time but for skips.
        strength: above 0 where answer 0 is better; None where none was given.
    """

    chance: float | None
    both_bad: bool
    strength: float | None


def _opinion(entries):
    chances = [c for entry in entries if (c := chance(entry)) is not None]
    bad = any(entry["choice"] == "both_bad" for entry in entries) and not chances
    signed = [
        entry["strength"] * (1 if chance(entry) == 1 else -1)
        for entry in entries
        if entry["strength"]
    ]
    return _Opinion(
        statistics.fmean(chances) if chances else None,
        bad,
        statistics.fmean(signed) if signed else None,
    )


def chance(entry: dict) -> float | None:
    """Returns a verdict as the chance that answer 0 is better: 1, .5, 0, or None."""
    if entry["choice"] == "tie":
        return 0.5
    if entry["choice"] not in ("first", "second"):
        return None
    return float((entry["choice"] == "first") == (entry["first"] == 0))


def _record(item, chances, strengths):
    probability = statistics.fmean(chances)
    better = 0 if probability >= 0.5 else 1
    sides = (("chosen", item.answers[better]), ("rejected", item.answers[1 - better]))
    record = {"prompt": item.prompt, **{side: text for side, (text, _) in sides}}
    certain = record["probability"] = max(probability, 1 - probability)
    if certain < 1:
        record["preference"] = certain
    if strengths:
        margin = statistics.fmean(strengths) * (1 if better == 0 else -1)
        record["margin"] = max(margin, 0.0)
    for side, (_, ended) in sides:
        if not ended:  # an answer that was cut off is not learned as one that ended
            record[f"{side}_ended"] = False
    return record


def _is_time(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < 1e6


# -- the items -------------------------------------------------------------------------


def sample(run, stage, prompts, folder, *, count, seed, settings) -> list[Item]:
    """Samples two answers of a finished stage to each prompt, or reads them again.

    What was sampled before a stop is not sampled again.

    Args:
        run: a `runs.Run`, inside its mesh.
        stage: name of a finished stage that writes text.
        prompts: texts or messages, taken in turn in a shuffled order.
        folder: of the labelling.
        count: pairs to sample; those whose answers are alike are left out.
        seed: of the order and the sampling.
        settings: fields of `sampling.SamplingParams`.
    """
    rng, order = np.random.default_rng(seed), []
    while len(order) < count:
        order += rng.permutation(len(prompts)).tolist()
    asked = [prompts[i] for i in order[:count]]
    header = {
        "journal": records.VERSION,
        "kind": "answers",
        "model": run.source(stage).id(),
        "prompts": storage.digest(asked),
        "seed": seed,
        "sampling": settings,
    }
    rows, items = 32, {}
    language, chat = run.language(stage, 2 * rows), run.chat_format(stage)

    def answers(number, part):
        texts = [prompt for prompt in part for _ in range(2)]
        given = language.complete(texts, chat=chat, seed=seed + number, **settings)
        return {"answers": [given[i : i + 2] for i in range(0, len(given), 2)]}

    with Journal(Path(folder) / "answers.jsonl", header) as journal:
        for start in range(0, len(asked), rows):
            part = asked[start : start + rows]
            entry, _ = journal.once(answers, start, part)
            for prompt, pair in zip(part, entry["answers"], strict=True):
                item = Item(prompt, [tuple(answer) for answer in pair])
                if pair[0][0] != pair[1][0]:
                    items[item.id] = item
    if not items:
        raise UserError(
            f"{stage}: the two answers to each of {len(asked)} prompts are alike; give "
            "a --temperature above 0"
        )
    return list(items.values())


def read(spec: str) -> list[Item]:
    """Reads items from files of pairs; which answer they call better is not shown.

    Args:
        spec: files of {"prompt", "chosen", "rejected"}.
    """
    items = {}
    for one in readers.comparisons(spec):
        answers = [
            (a[-1]["content"], a[-1].get("ended", True)) for a in one.answers[:2]
        ]
        item = Item(one.prompt, answers)
        if all(len(answer) == 1 for answer in one.answers):
            items[item.id] = item
    if not items:
        raise UserError(
            f"{spec}: no pair to show; expected answers of one turn, as in "
            '{"prompt": "...", "chosen": "...", "rejected": "..."}'
        )
    return list(items.values())


def as_json(item: Item, showing: Showing) -> dict:
    """Returns what a page is given of an item: nothing that tells the sides apart."""
    shown = [item.answers[showing.first], item.answers[1 - showing.first]]
    return json.loads(
        storage.to_json(
            {
                "prompt": item.prompt,
                "answers": [{"text": text, "ended": ended} for text, ended in shown],
            }
        )
    )
