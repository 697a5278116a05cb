"""Rows of several sources in given shares, in an order that is f(seed, step).

Where a source's next row comes in the stream of all rows is known in closed form: the
stream is cut into blocks, each with the same count of every source spread evenly over
it, so that the row of any step is found without going through those before it. Shares
change at steps (a curriculum), and where a source has been seen as often as it may.
"""

import logging
import math
from typing import NamedTuple

import grain
import numpy as np

from stagecraft import schema
from stagecraft.errors import UserError

# Rows of a block: shares are kept to within half a row of it.
BLOCK = 2**16
# Sources of up to this many rows are shuffled an epoch at a time.
_SMALL = 2**17
SHARE_BY = ("tokens", "examples")
_log = logging.getLogger("stagecraft.data")


class _Segment(NamedTuple):
    """Rows from `start` on (until the next segment) with the same counts in a block."""

    start: int
    quotas: np.ndarray  # i64[S], rows of each source in a block
    before: np.ndarray  # i64[S], rows of each source before `start`


class _Order:
    """Numbers below `size` in epochs, each shuffled anew.

    Grain finds the number at any place without making the others, but for small sizes
    it takes a millisecond: there a whole epoch is made at once.
    """

    def __init__(self, size, seed):
        self.size, self.seed = size, seed
        self._shuffled = -1, None  # an epoch and its permutation
        self._large = None
        if size > _SMALL:
            self._large = grain.MapDataset.range(size).seed(seed).shuffle().repeat()

    def __getitem__(self, place):
        if self._large is not None:
            return self._large[place]
        epoch, at = divmod(place, self.size)
        number, order = self._shuffled
        if number != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(self.size)
            self._shuffled = epoch, order
        return int(order[at])


class Mixture:
    """Which row comes at which place of the stream.

    Args:
        members: for each source, the numbers of its rows.
        phases: [(first place in the stream, weight of each source's rows)].
        caps: how often each source may be seen through, 0 for no limit.
        seed: int; source i is shuffled by seed + i.
    """

    def __init__(self, members, phases, caps, seed):
        self.members = [np.asarray(rows, np.int64) for rows in members]
        self.seed = seed
        self.limits = [
            math.floor(cap * len(rows) + 1e-9) if cap else None
            for cap, rows in zip(caps, self.members, strict=True)
        ]
        self._orders = [
            _Order(len(rows), seed + i) for i, rows in enumerate(self.members)
        ]
        self._open = None, None, None  # the block last looked into
        self.end = None  # the place where every source is used up
        self._segments = []
        self._lay_out(phases)

    def rows(self, places):
        """Returns the numbers of the rows at some places of the stream."""
        return np.array([self._row(place) for place in places], np.int64)

    def counts(self, place):
        """Returns the rows of each source before a place, i64[S]."""
        number = self._at(place)
        return self._before(number, place)

    def __getstate__(self):
        return self.__dict__ | {"_open": (None, None, None)}

    def _row(self, place):
        if self.end is not None and place >= self.end:
            raise UserError(
                f"data.epochs: every source is used up after {self.end} rows, but row "
                f"{place + 1} is asked for; raise a cap, or take fewer steps"
            )
        number = self._at(place)
        segment = self._segments[number]
        block, at = divmod(place - segment.start, int(segment.quotas.sum()))
        sources, ranks = self._block(number, block)
        source = sources[at]
        turn = segment.before[source] + block * segment.quotas[source] + ranks[at]
        return self.members[source][self._orders[source][int(turn)]]

    def _at(self, place):
        starts = [segment.start for segment in self._segments]
        return int(np.searchsorted(starts, place, side="right")) - 1

    def _before(self, number, place):
        segment = self._segments[number]
        block, at = divmod(place - segment.start, int(segment.quotas.sum()))
        part = np.bincount(
            self._block(number, block)[0][:at], minlength=len(self.members)
        )
        return segment.before + block * segment.quotas + part

    def _block(self, number, block):
        """Returns the sources of the rows of a block, and the rank of each in it."""
        key, sources, ranks = self._open
        if key == (number, block):
            return sources, ranks
        quotas = self._segments[number].quotas
        # Each source evenly spaced, from an offset by chance.
        shift = np.random.default_rng([self.seed, number, block]).random(len(quotas))
        places = [
            (np.arange(n) + u) / n for n, u in zip(quotas, shift, strict=True) if n
        ]
        order = np.argsort(np.concatenate(places), kind="stable")
        sources = np.repeat(np.arange(len(quotas)), quotas)[order]
        ranks = np.concatenate([np.arange(n) for n in quotas])[order]
        self._open = (number, block), sources, ranks
        return sources, ranks

    def _lay_out(self, phases):
        """Lays out the phases as segments, each cut where a source is used up."""
        place, before = 0, np.zeros(len(self.members), np.int64)
        ends = [start for start, _ in phases[1:]] + [None]
        for (_, weights), end in zip(phases, ends, strict=True):
            while end is None or place < end:
                weights = [
                    0.0 if limit is not None and count >= limit else weight
                    for weight, limit, count in zip(
                        weights, self.limits, before, strict=True
                    )
                ]
                if not any(weights):
                    self.end = place
                    return
                number = len(self._segments)
                self._segments.append(_Segment(place, _quotas(weights), before))
                stops = [self._used_up(number, i) for i in range(len(weights))]
                stops = [stop for stop in [*stops, end] if stop is not None]
                if not stops:
                    return
                place = min(stops)
                before = self._before(number, place)

    def _used_up(self, number, source):
        """Returns the place after which a source has reached its limit, or None."""
        segment, limit = self._segments[number], self.limits[source]
        quota = int(segment.quotas[source])
        if limit is None or not quota:
            return None
        block, rank = divmod(limit - int(segment.before[source]) - 1, quota)
        sources, ranks = self._block(number, block)
        at = int(np.flatnonzero((sources == source) & (ranks == rank))[0])
        return segment.start + block * int(segment.quotas.sum()) + at + 1


def _quotas(weights):
    """Returns the rows of a block for each weight, by the largest remainder."""
    exact = np.array(weights) / sum(weights) * BLOCK
    quotas = np.floor(exact).astype(np.int64)
    missing = BLOCK - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    # However small its share, a source that has one comes.
    return np.maximum(quotas, np.array(weights) > 0)


# -- from a stage's data config --------------------------------------------------------


def wanted(data):
    """Whether a data config asks for a mixture."""
    return "shares" in data and bool(data.shares or data.curriculum)


def check(data):
    """Refuses a mixture that cannot be meant; some kinds of stages know none."""
    if "shares" not in data:
        return
    schema.choice("data.share_by", _share_by(data), SHARE_BY)
    count = len(schema.listed(data.files))
    if data.shares and data.curriculum:
        raise UserError(
            f"data.shares={tuple(data.shares)} with data.curriculum="
            f"{data.curriculum!r}: give the shares of step 0 there, and no data.shares"
        )
    if data.shares:
        check_shares("data.shares", data.shares, count)
    if data.curriculum:
        curriculum(data.curriculum, count)
    caps = data.epochs
    if caps and not wanted(data):
        raise UserError(
            f"data.epochs={tuple(caps)}: caps sources that are mixed; give data.shares "
            "or data.curriculum"
        )
    if caps and (len(caps) != count or not all(map(_is_amount, caps))):
        raise UserError(
            f"data.epochs={tuple(caps)}: expected for each of the {count} parts of "
            "data.files how often it may be seen, 0 for no limit"
        )


def make(data, members, held, steps, size, seed):
    """Returns the mixture a data config asks for and its shares, which are logged.

    Args:
        data: a stage's data config.
        members: for each part of data.files, the numbers of its rows.
        held: {"tokens", "examples"}: what a row of each part holds on average, f64[S].
            Records, a row each, need none.
        steps: of the stage.
        size: rows of a batch.
        seed: of the order.

    Returns:
        a `Mixture`; {"share_by", "sources": [{"files", "rows", "epochs",
        "share_of_tokens", ...}]}.
    """
    parts, by = schema.listed(data.files), _share_by(data)
    held = held or {"examples": np.ones(len(parts))}
    phases = [(0, tuple(data.shares))]
    if data.curriculum:
        phases = curriculum(data.curriculum, len(parts))
    for part, rows, *shares in zip(
        parts, members, *(shares for _, shares in phases), strict=True
    ):
        if any(shares) and not len(rows):
            raise UserError(
                f"{part}: has a share, but no row to learn from; set it to 0"
            )
    one = np.maximum(held[by], 1e-12)
    mixed = Mixture(
        members,
        [(step * size, np.array(shares) / one) for step, shares in phases],
        data.epochs or (0,) * len(parts),
        seed,
    )
    if mixed.end is not None and mixed.end < steps * size:
        raise UserError(
            f"data.epochs={tuple(data.epochs)}: every source is used up after "
            f"{mixed.end // size} of {steps} steps; raise a cap, or take fewer steps"
        )
    return mixed, {"share_by": by, "sources": _shares(mixed, parts, held, steps * size)}


def _shares(mixed, parts, held, places):
    """Returns and logs what each source comes to over all steps."""
    seen, sources = mixed.counts(places), []
    totals = {name: seen * values for name, values in held.items()}
    for number, part in enumerate(parts):
        one = {"files": part, "rows": len(mixed.members[number])}
        one["epochs"] = float(seen[number] / max(one["rows"], 1))
        for name, values in totals.items():
            one[f"share_of_{name}"] = float(values[number] / values.sum())
        sources.append(one)
        shares = [f"{one[f'share_of_{name}']:.3f} of the {name}" for name in totals]
        _log.info("%s: %s; %.2f epochs", part, ", ".join(shares), one["epochs"])
    return sources


def _share_by(data):
    # Records come a row each: there is nothing else to count.
    return data.get("share_by", "examples")


def _is_amount(value):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def curriculum(text, sources):
    """Returns [(step, shares)] of "0: .9, .1; 1000: .5, .5".

    >>> curriculum("0: 3, 1; 10: 1, 1", 2)
    [(0, (3.0, 1.0)), (10, (1.0, 1.0))]
    """
    phases = []
    for part in text.split(";"):
        step, _, words = part.partition(":")
        try:
            phases.append((int(step), tuple(float(w) for w in words.split(","))))
        except ValueError:
            raise UserError(
                f"data.curriculum={text!r}: {part.strip()!r} is not a step and its "
                "shares; expected '0: .9, .1; 1000: .5, .5'"
            ) from None
        check_shares(f"data.curriculum, step {step.strip()}", phases[-1][1], sources)
    steps = [step for step, _ in phases]
    if steps[0] != 0 or steps != sorted(set(steps)):
        raise UserError(
            f"data.curriculum={text!r}: its steps are {', '.join(map(str, steps))}; "
            "expected 0 first and then rising ones"
        )
    return phases


def check_shares(where, shares, sources):
    """Refuses shares that are not one number of 0 or more for each source."""
    fit = len(shares) == sources and all(map(_is_amount, shares))
    if not fit or not any(shares):
        raise UserError(
            f"{where}={tuple(shares)}: expected a number of 0 or more for each of the "
            f"{sources} parts of data.files, not all 0"
        )
