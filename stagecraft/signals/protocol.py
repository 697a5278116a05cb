"""What every rater of pairs is: prompts and pairs of answers go in, verdicts come out.

A rater is one file of this folder with two functions, `make(config, sources, rng)` and
`check(where, config, world)`, and one line in `signals.raters`. `READS` names the keys
of the stage that it reads and other raters do not.
"""

import collections
import inspect
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from stagecraft import storage
from stagecraft.errors import UserError

Answer = tuple[str, bool]  # a text, and whether it ended by itself
Pair = tuple[Answer, Answer]

IDENTICAL = "identical"
UNSCORED = "unscored"


class Verdict(NamedTuple):
    """What a rater says of a pair.

    Attributes:
        probability: that the first answer is better, from 0 to 1; a tie is .5. None
            where the rater has no verdict: a failure is never a number.
        reason: why there is none: "identical", "unparsed", "timed_out", "too_long",
            "unscored", or another of docs/signals.md; "" where there is one.
        both_bad: neither answer is acceptable.
        strength: by how much the better one is better, on the rater's own scale; None
            where the rater has no scale.
        evidence: JSON values that it was computed from, such as a judge's
            log-probabilities in both orders; None where the rater shows none.
    """

    probability: float | None = None
    reason: str = ""
    both_bad: bool = False
    strength: float | None = None
    evidence: dict | None = None


class Rater(Protocol):
    """Rates pairs of answers, a batch at a time.

    Attributes:
        identity: hash of all that decides its verdicts. A journal of one rater is not
            continued with another.
    """

    identity: str

    def rate(self, prompts: list, pairs: list[Pair]) -> list[Verdict]:
        """Returns a verdict for each pair; prompts are texts or message lists."""
        ...


class Sources(NamedTuple):
    """What a run has that a rater may be made from.

    Attributes:
        world: name of the experiment's world, "" without one.
        reward: a `signals.reward.RewardModel`, or None.
        judge: a `signals.judge.LocalModel`, or None.
        folder: where a rater may keep what it was answered, or None.
    """

    world: str = ""
    reward: Any = None
    judge: Any = None
    folder: Any = None


class Failures:
    """Counts what a rater could not rate, and ends a run that has too much of it.

    Pairs of equal texts, and those that a rater leaves out, are no failures.

    Args:
        rater: its name, for the message.
        most: share of all it was given; 1 for no limit.
    """

    LEAST = 64  # so many count in full before a share of them means anything

    def __init__(self, rater: str, most: float):
        self.rater, self.most = rater, most
        self.reasons, self.seen = collections.Counter(), 0

    def see(self, reasons: Iterable[str]) -> None:
        """Counts reasons, "" for none; a UserError once there are too many."""
        for reason in reasons:
            self.seen += 1
            if reason not in ("", IDENTICAL, UNSCORED):
                self.reasons[reason] += 1
        failed = self.reasons.total()
        if failed > self.most * max(self.seen, self.LEAST):
            listed = ", ".join(f"{n} {r}" for r, n in self.reasons.most_common())
            raise UserError(
                f"rater={self.rater!r}: {failed} of {self.seen} without a verdict "
                f"({listed}), more than judge.max_failed={self.most:g} of them; see "
                "docs/signals.md on what each means"
            )


def same_text(pair: Pair) -> bool:
    """Returns whether both answers are the same text, whether or not they ended."""
    return pair[0][0] == pair[1][0]


def checked(verdicts, count, rater) -> list[Verdict]:
    """Returns what a rater returned, as JSON values; refuses what are not verdicts.

    Args:
        verdicts: what the rater returned.
        count: of the pairs it was given.
        rater: its name in the config, for the message.
    """
    if len(verdicts) != count:
        raise UserError(
            f"rater={rater!r}: returned {len(verdicts)} verdicts for {count} pairs; "
            "expected one for each"
        )
    for verdict in verdicts:
        if not isinstance(verdict, Verdict) or not _possible(verdict):
            raise UserError(
                f"rater={rater!r}: returned {verdict!r}; expected a Verdict with a "
                "probability from 0 to 1, or with none and a reason"
            )
    return [
        Verdict(
            _float(v.probability),
            v.reason,
            bool(v.both_bad),
            _float(v.strength),
            v.evidence,
        )
        for v in verdicts
    ]


def _float(value):
    return None if value is None else float(value)


def _possible(verdict):
    if verdict.probability is None:
        return bool(verdict.reason)
    finite = verdict.strength is None or math.isfinite(verdict.strength)
    return 0 <= verdict.probability <= 1 and not verdict.reason and finite


def identity(**parts) -> str:
    """Returns the hash of JSON values that decide a rater's verdicts."""
    return storage.digest(parts)


def source(function: Any) -> str:
    """Returns the source of the module that defines a function.

    Of the function alone where the module has no file, as in a notebook; "" for
    compiled code.
    """
    places: tuple[Any, ...] = (inspect.getmodule(function), function, type(function))
    for code in places:
        try:
            # From 3.13 on that is the text of python -c, whatever was compiled.
            if inspect.getfile(code) != "<string>":
                return inspect.getsource(code)
        except (OSError, TypeError):
            continue
    return ""


def refuse_soft_labels(where, config):
    """Refuses soft labels, for raters that choose and give no probability."""
    if config.soft_labels:
        raise UserError(
            f"{where}.soft_labels=True: needs rater='reward' or 'judge', which give a "
            "probability"
        )
