"""Claims about training stages, and the verdict that several seeds give on each.

A claim states before it is run: one primary figure, the smallest effect of interest,
and a control that could refute it. The unit is one seed of the whole chain of stages,
and arms are paired within it, so a primary figure is one number a seed. Of these the
95% t interval decides (Student 1908; no bootstrap: over three seeds it covers 71%):

    holds                  the interval lies beyond the effect (or, of a claim that two
                           things are alike, within plus and minus it), and that of the
                           control does not
    refuted                it lies on the other side, or the control does as well
    undecided              it holds the effect; `seeds_needed` says how many would do
    cannot be asked here   a check of the manipulation failed, or nothing varied

A claim that is wrong by no more than its effect is said to hold in at most 2.5% of
repetitions.
"""

import ast
import math
import operator
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from stagecraft import bounds, schema
from stagecraft.anatomy.statistics import CONFIDENCE
from stagecraft.errors import UserError

VERDICTS = "claims.json"  # of a work directory of claims
HOLDS, REFUTED, UNDECIDED = "holds", "refuted", "undecided"
NOT_HERE, NONE = "cannot be asked here", "no verdict"
LEAST_SEEDS = 3
_QUANTILE = (1 + CONFIDENCE) / 2
_MOST_SEEDS = 1000  # beyond which a number of seeds is no advice
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Claim(NamedTuple):
    """What a claim states before it is run.

    Attributes:
        name: of its file.
        number: its place in the table.
        claim: in the words of its source.
        source: who said it, and where.
        primary: an expression over figures, as in "ppo.gold_mean - sft.gold_mean";
            arithmetic and log(x) are known.
        effect: the smallest effect of interest, in the primary's unit.
        control: in words, what would show that something else explains it.
        alike: whether the claim is that the primary lies within plus and minus the
            effect (an equivalence), not beyond it.
        control_primary: the same expression of the control, which must not hold; ""
            where the primary is itself a difference from the control.
        checks: bounds that every seed must meet for the question to be one.
        exact: whether nothing is left to chance, so that seeds need not differ.
        seconds: about how long it takes on two cores, a seed, base chain left out.
    """

    name: str
    number: int
    claim: str
    source: str
    primary: str
    effect: float
    control: str
    alike: bool = False
    control_primary: str = ""
    checks: tuple[str, ...] = ()
    exact: bool = False
    seconds: float = 0.0


class Outcome(NamedTuple):
    """A verdict and what it is from.

    Attributes:
        verdict: one of the constants above.
        reason: why there is none, or what the control did; "" where that is plain.
        mean, low, high: of the primary over seeds; None where there is no interval.
        p: one-sided, that the effect is not reached; None where there is no interval.
        seeds: how many the interval is from.
        seeds_needed: for an interval that leaves the effect, at the same mean and
            spread; None where it does, or where over a thousand would not do.
    """

    verdict: str
    reason: str = ""
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    seeds: int = 0
    seeds_needed: int | None = None


def read(text: str, name: str) -> Claim:
    """Reads the header of a claim: the TOML after a line "[claim]" of a docstring.

    Args:
        text: the docstring.
        name: of the file, for messages.

    Raises:
        UserError: no header, an unknown or missing key, a value of another type, or an
            expression that is none.
    """
    start = re.search(r"^\[claim\]$", text, re.MULTILINE)
    if not start:
        raise UserError(
            f"{name}: no claim: expected a line [claim] in the docstring, and TOML "
            "below it"
        )
    try:
        values = tomllib.loads(text[start.start() :])["claim"]
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{name}: [claim]: not TOML ({error})") from error
    fields = [field for field in Claim._fields if field != "name"]
    for key in values:
        if key not in fields:
            hint = schema.hint(key, fields)
            raise UserError(f"{name}: [claim]: unknown key {key}; {hint}".rstrip("; "))
    for key in fields:
        if key not in values and key not in Claim._field_defaults:
            raise UserError(f"{name}: [claim]: {key} is missing")
    values = {"checks": (), **values}
    values["checks"] = tuple(values["checks"])
    for key in ("effect", "number"):
        if isinstance(values[key], bool) or not isinstance(values[key], int | float):
            raise UserError(
                f"{name}: [claim]: {key}={values[key]!r}: expected a number"
            )
    if values["effect"] < 0:
        raise UserError(
            f"{name}: [claim]: effect={values['effect']}: expected no negative number; "
            "turn the primary's sign round"
        )
    claim = Claim(name=name, **values)
    for key in ("primary", "control_primary"):
        if getattr(claim, key):
            _parse(getattr(claim, key), f"{name}: [claim]: {key}")
    for check in claim.checks:
        bounds.parse(check)
    return claim


def value(expression: str, figures: Mapping) -> float:
    """Returns the value of an expression over figures.

    Args:
        expression: names as "ppo.gold_mean", numbers, + - * / and log(x).
        figures: nested dicts of numbers, as a run's summary.

    Raises:
        UserError: a figure that is not there, or no finite value.

    >>> value("2 * a.x - log(b.y) / 2", {"a": {"x": 3.0}, "b": {"y": 1.0}})
    6.0
    """
    try:
        result = _value(_parse(expression, "primary"), figures)
    except (ZeroDivisionError, ValueError) as error:
        raise UserError(f"{expression}: has no value ({error})") from error
    if not math.isfinite(result):
        raise UserError(f"{expression}: is {result}, not a finite number")
    return result


def _parse(expression, where):
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise UserError(f"{where}: {expression!r}: not an expression") from error
    for node in ast.walk(tree):
        known = (ast.BinOp, ast.UnaryOp, ast.USub, ast.Constant, ast.Attribute)
        known += (ast.Name, ast.Call, ast.Load, *_OPERATORS)
        function = isinstance(node, ast.Call) and ast.unparse(node.func) != "log"
        if not isinstance(node, known) or function:
            raise UserError(
                f"{where}: {expression!r}: {ast.unparse(node)}: expected figures as "
                "ppo.gold_mean, numbers, + - * / and log(x)"
            )
    return tree


def _value(node, figures):
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.BinOp):
        sides = _value(node.left, figures), _value(node.right, figures)
        return _OPERATORS[type(node.op)](*sides)
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, figures)
    if isinstance(node, ast.Call):
        return math.log(_value(node.args[0], figures))
    key = ast.unparse(node)
    figure = bounds.lookup(figures, key)
    if isinstance(figure, bool) or not isinstance(figure, int | float):
        raise UserError(f"no figure {key} in the runs of this claim")
    return float(figure)


def decide(
    claim: Claim,
    values: Sequence[float],
    controls: Sequence[float] = (),
    failed: Sequence[str] = (),
) -> Outcome:
    """Returns the verdict on a claim.

    Args:
        claim: what was stated.
        values: the primary figure, one a seed.
        controls: that of the control; () where the claim has no control_primary.
        failed: checks that a seed did not meet, in words.
    """
    if len(values) < (1 if claim.exact else LEAST_SEEDS):
        return Outcome(
            NONE,
            f"{len(values)} seeds: an interval that decides needs {LEAST_SEEDS}",
            seeds=len(values),
        )
    alike, effect = claim.alike, claim.effect
    outcome = _of_values(values, effect, alike, claim.exact)
    if failed:
        return outcome._replace(verdict=NOT_HERE, reason="; ".join(failed))
    if outcome.verdict != HOLDS or not controls:
        return outcome
    control = _of_values(controls, effect, alike, claim.exact)
    if control.verdict == HOLDS:
        reason = f"the control shows the same ({control.mean:.3g})"
        return outcome._replace(verdict=REFUTED, reason=reason)
    if control.verdict != REFUTED:
        reason = f"the control may show the same ({control.mean:.3g}, {UNDECIDED})"
        needed = control.seeds_needed
        return outcome._replace(verdict=UNDECIDED, reason=reason, seeds_needed=needed)
    return outcome


def _of_values(values, effect, alike, exact):
    values, count = np.asarray(values, np.float64), len(values)
    mean, spread = float(values.mean()), 0.0
    if count > 1:
        spread = float(values.std(ddof=1))
    if spread <= 1e-12 * max(abs(mean), 1.0):
        if not exact:
            reason = "the primary is the same on every seed: nothing was left to chance"
            return Outcome(NOT_HERE, reason, mean, seeds=count)
        holds = abs(mean) < effect if alike else mean > effect
        return Outcome(HOLDS if holds else REFUTED, "", mean, mean, mean, None, count)
    error = spread / math.sqrt(count)
    half = float(special.stdtrit(count - 1, _QUANTILE)) * error
    low, high = mean - half, mean + half
    if alike:
        # Two one-sided tests (Schuirmann 1987): the larger p.
        margin = effect - abs(mean)
        inside, outside = (
            low > -effect and high < effect,
            low > effect or high < -effect,
        )
    else:
        margin, inside, outside = mean - effect, low > effect, high < effect
    verdict = HOLDS if inside else REFUTED if outside else UNDECIDED
    p = float(special.stdtr(count - 1, -margin / error))
    needed = None if verdict != UNDECIDED else _needed(spread, abs(margin), count)
    return Outcome(verdict, "", mean, low, high, p, count, needed)


def _needed(spread, margin, count):
    """Returns the least number of seeds whose half width is below the margin."""
    counts = np.arange(count + 1, _MOST_SEEDS + 1)
    halves = special.stdtrit(counts - 1, _QUANTILE) * spread / np.sqrt(counts)
    enough = counts[halves < margin]
    return int(enough[0]) if len(enough) else None


def holm(p_values: Sequence[float | None]) -> list[bool]:
    """Returns which claims hold when all are asked at once (Holm 1979).

    Args:
        p_values: one a claim; None where there is none, which counts among those asked.

    >>> holm([0.001, 0.04, None, 0.008])
    [True, False, False, True]
    """
    level, count = (1 - CONFIDENCE) / 2, len(p_values)
    order = sorted(
        range(count), key=lambda i: math.inf if (p := p_values[i]) is None else p
    )
    holds, open_ = [False] * count, True
    for place, i in enumerate(order):
        p = p_values[i]
        open_ = open_ and p is not None and p <= level / (count - place)
        holds[i] = open_
    return holds
