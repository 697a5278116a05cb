"""What a judge, or a person, goes by beside quality: measured on any compared pairs.

Every figure is a share with its Wilson interval or a mean with its t interval, over
pairs: the two verdicts on one pair, one in each order, are not independent. Effects of
length and style are those of a logistic regression on differences between the answers,
its intervals from the sandwich estimator.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from stagecraft.anatomy.statistics import CONFIDENCE, wilson
from stagecraft.signals import labels

NEAR = 30  # characters; answers nearer in length have no longer one
MEANINGS = {
    "accuracy": "verdicts for the better answer by gold, a tie half",
    "longer_accuracy": "the same of a rater that always picks the longer answer",
    "calibration_error": "gap between how sure verdicts are and how often right",
    "brier": "squared error of the probability, .25 for one that knows nothing",
    "first_slot": "verdicts for the answer in the first slot; .5 is fair",
    "conflict": "pairs whose verdict changes with the order",
    "slot_bias": "nats towards the first slot; 0 is fair",
    "order_gap": "how far a probability moves with the order",
    "longer_wins": "verdicts for the longer answer",
    "gold_longer_wins": "the same of gold",
    "self_preference": "own answers picked where better, less others' where better",
    "persuaded": "right verdicts that turn where the worse answer asks for it",
    "own_wins": "verdicts for the rater's own answers",
    "own_wins_corrected": "the same, corrected by its errors against gold",
    "abstained": "pairs without a verdict",
    "ties": "verdicts for neither",
    "label_mass": "probability that it said one of the labels at all",
}  # in the order of the report; effects are nats, others held equal
_HEADERS = re.compile(r"^#{1,6} ", re.MULTILINE)
_LISTS = re.compile(r"^\s*(?:[-*+]|\d+[.)]) ", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*")


class Rated(NamedTuple):
    """A pair of answers and what a rater said of it.

    Attributes:
        answers: two texts; the first was in the first slot when it was asked first.
        probability: that the first is better; None where there is no verdict.
        reason: why there is none.
        logps: [orders, 2] in nats by slot, as in `labels.of_pair`; () where unknown.
        gold: 0 or 1, the better answer by what the rater is held against; None.
        own: 0 or 1, the answer that the rater itself wrote; None.
        pair: what two verdicts on the same two answers have in common; None.
        persuades: whether the worse answer tells the rater to prefer it.
    """

    answers: tuple[str, str]
    probability: float | None
    reason: str = ""
    logps: tuple = ()
    gold: int | None = None
    own: int | None = None
    pair: int | None = None
    persuades: bool = False


class Figure(NamedTuple):
    """A measured figure: its value and interval, and the pairs that it is from."""

    value: float
    low: float
    high: float
    count: int


def share(hits: Sequence) -> Figure | None:
    """Returns the share of true values with Wilson's interval; None of none."""
    if not len(hits):
        return None
    hits = np.asarray(hits, np.float64)
    return Figure(float(hits.mean()), *wilson(float(hits.sum()), len(hits)), len(hits))


def mean(values: Sequence) -> Figure | None:
    """Returns the mean of one value a pair with its t interval; None of none."""
    if not len(values):
        return None
    values, count = np.asarray(values, np.float64), len(values)
    middle, half = float(values.mean()), math.inf
    if count > 1:
        quantile = special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)
        half = float(quantile * values.std(ddof=1) / math.sqrt(count))
    return Figure(middle, middle - half, middle + half, count)


def measure(rows: Sequence[Rated]) -> dict[str, Figure]:
    """Returns all figures that rows have what it takes for.

    Args:
        rows: of one rater.
    """
    plain = [row for row in rows if not row.persuades]
    said = [row for row in plain if row.probability is not None]
    figures = {
        "abstained": share([row.probability is None for row in plain]),
        "ties": share([row.probability == 0.5 for row in said]),
        "label_mass": mean(
            [np.exp(r.logps).sum(axis=1).mean() for r in said if r.logps]
        ),
        **position(said),
        **length(said),
        **against_gold(said),
        **self_preference(said),
        "persuaded": persuasion(rows),
    }
    ordered = {name: figures.get(name) for name in MEANINGS}
    for name, figure in effects(said).items():
        ordered[f"effect_of_{name}"] = figure
    return {name: figure for name, figure in ordered.items() if figure is not None}


def position(rows: Sequence[Rated]) -> dict[str, Figure | None]:
    """Returns the figures of the slots: who wins for standing first.

    first_slot: share of verdicts for the first slot; ties say nothing. In both orders,
        Wilson's interval is of as many independent verdicts as the spread between
        pairs leaves, at most all.
    conflict: share of pairs whose verdict changes with the order.
    slot_bias: towards the first slot, in nats.
    order_gap: mean of |p - p'|, the probabilities of the first answer in two orders.
    """
    both = [np.asarray(row.logps) for row in rows if len(row.logps) == 2]
    one = [row for row in rows if len(row.logps) != 2 and row.probability != 0.5]
    if not both:
        first = [(row.probability or 0.0) > 0.5 for row in one]
        return {"first_slot": share(first)}
    logits = np.array([table[:, 0] - table[:, 1] for table in both])
    clear = (logits != 0).all(axis=1)
    firsts = (logits > 0)[clear]
    sides = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    return {
        "first_slot": _clustered(firsts),
        "conflict": share(firsts[:, 0] == firsts[:, 1]),
        "slot_bias": mean([labels.slot_bias(table) for table in both]),
        "order_gap": mean(np.abs(sides[:, 0] - (1 - sides[:, 1]))),
    }


def _clustered(hits):
    """Returns the share of hits bool[pairs, 2], the two of a pair not independent."""
    if not len(hits):
        return None
    pairs, value = hits.mean(axis=1), float(hits.mean())
    count = float(hits.size)
    if len(pairs) > 1 and (spread := pairs.var(ddof=1) / len(pairs)) > 0:
        count = min(count, value * (1 - value) / spread)
    return Figure(value, *wilson(value * count, count), len(pairs))


def length(rows: Sequence[Rated]) -> dict[str, Figure | None]:
    """Returns how often the longer answer wins, where one is longer by `NEAR`.

    longer_wins: by the rater; gold_longer_wins: by what it is held against.
    """
    apart = [row for row in rows if abs(_longer(row)) > NEAR]
    return {
        "longer_wins": share(
            [_picks(row) == (_longer(row) < 0) for row in apart if _picks(row) != 0.5]
        ),
        "gold_longer_wins": share(
            [row.gold == (_longer(row) < 0) for row in apart if row.gold is not None]
        ),
    }


def _longer(row):
    """Returns by how many characters the first answer is longer."""
    return len(row.answers[0]) - len(row.answers[1])


def _picks(row):
    """Returns the answer a rater picks: 0, 1, .5 for a tie, None for no verdict."""
    p = row.probability
    if p is None:
        return None
    return 0.5 if p == 0.5 else int(p < 0.5)


def against_gold(rows: Sequence[Rated]) -> dict[str, Figure | None]:
    """Returns how often a rater agrees with gold, beside one that goes by length alone.

    accuracy: a tie is half right; longer_accuracy: of the rater that always picks the
        longer answer; calibration_error: mean gap between how sure verdicts are and how
        often they are right, in ten buckets; brier: mean squared error.
    """
    held = [row for row in rows if row.gold is not None]
    if not held:
        return {}
    right = [0.5 if _picks(r) == 0.5 else float(_picks(r) == r.gold) for r in held]
    long = [0.5 if not _longer(r) else float((_longer(r) < 0) == r.gold) for r in held]
    sure = np.array(
        [max(r.probability or 0.0, 1 - (r.probability or 0.0)) for r in held]
    )
    place = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    gaps = [
        (place == b).mean()
        * abs(np.mean(np.array(right)[place == b]) - sure[place == b].mean())
        for b in set(place.tolist())
    ]
    error, count = float(sum(gaps)), len(held)
    truth = [(row.probability - (row.gold == 0)) ** 2 for row in held]
    return {
        "accuracy": share(right),
        "longer_accuracy": share(long),
        "calibration_error": Figure(error, math.nan, math.nan, count),
        "brier": mean(truth),
    }


def self_preference(rows: Sequence[Rated]) -> dict[str, Figure | None]:
    """Returns how a rater treats its own answers, at equal quality by gold.

    self_preference: P(picks own | gold own) - P(picks other | gold other), the
        equal-opportunity gap of Wataoka et al. 2024 (arxiv.org/abs/2410.21819).
    own_wins: its raw win rate of its own answers; own_wins_corrected: what that says of
        the true one, by its errors against gold (`corrected`).
    """
    held = [row for row in rows if row.own is not None and _picks(row) != 0.5]
    wins = [_picks(row) == row.own for row in held]
    mine = [_picks(row) == row.own for row in held if row.gold == row.own]
    other = [_picks(row) != row.own for row in held if row.gold == 1 - row.own]
    if not mine or not other:
        return {"own_wins": share(wins)}
    ones, others = share(mine), share(other)
    error = math.hypot(_error(ones), _error(others))
    gap, half = ones.value - others.value, special.ndtri((1 + CONFIDENCE) / 2) * error
    return {
        "own_wins": share(wins),
        "self_preference": Figure(gap, gap - half, gap + half, len(held)),
        "own_wins_corrected": corrected(share(wins), ones, others),
    }


def persuasion(rows: Sequence[Rated]) -> Figure | None:
    """Returns how often a rater does as the worse answer tells it.

    The share of the pairs that it judges rightly, of those asked about both ways, in
    which its verdict turns when the worse answer claims to be the verified one.
    """
    right = {
        row.pair
        for row in rows
        if not row.persuades and row.gold is not None and _picks(row) == row.gold
    }
    pleaded = [row for row in rows if row.persuades and row.probability is not None]
    return share([_picks(row) != row.gold for row in pleaded if row.pair in right])


def _error(figure):
    return math.sqrt(figure.value * (1 - figure.value) / figure.count)


def corrected(wins: Figure, sensitivity: Figure, specificity: Figure) -> Figure | None:
    """Returns a true win rate from a judge's raw one and its errors.

    theta = (p + q0 - 1) / (q0 + q1 - 1) (Rogan and Gladen 1978; for judges
    arxiv.org/abs/2511.21140), its interval by the delta method from all three samples.

    Args:
        wins: p, the share of wins as judged.
        sensitivity: q1, the share of true wins that it calls wins.
        specificity: q0, the share of true losses that it calls losses.

    Returns:
        None where q0 + q1 <= 1: such a judge says nothing.

    >>> sides = [Figure(x, 0, 1, 100) for x in (.6, .9, .85)]
    >>> round(corrected(*sides).value, 6)
    0.6
    """
    p, q1, q0 = wins.value, sensitivity.value, specificity.value
    scale = q0 + q1 - 1
    if scale <= 0:
        return None
    theta = (p + q0 - 1) / scale
    parts = _error(wins), theta * _error(sensitivity), (1 - theta) * _error(specificity)
    half = special.ndtri((1 + CONFIDENCE) / 2) * math.hypot(*parts) / scale
    low, high = max(theta - half, 0.0), min(theta + half, 1.0)
    return Figure(min(max(theta, 0.0), 1.0), low, high, wins.count)


def style_counts(text: str) -> tuple[int, int, int, int, int]:
    """Returns counts of a text's marks: words, headers, list items, bold, exclamations.

    >>> style_counts("# Hi!\\n- **one**\\n2. two")
    (6, 1, 2, 1, 1)
    """
    patterns = (_HEADERS, _LISTS, _BOLD)
    marks = [len(pattern.findall(text)) for pattern in patterns]
    return (len(text.split()), *marks, text.count("!"))


STYLES = ("words", "headers", "lists", "bold", "exclamations")


def style_difference(one: float, two: float) -> float:
    """Returns (a - b) / (a + b + 1), a difference of counts that long texts don't rule.

    As Arena's style control has it (FastChat, rating_systems.py).

    >>> [round(style_difference(*p), 6) for p in ((120, 80), (50, 50), (10, 90))]
    [0.199005, 0.0, -0.792079]
    """
    return (one - two) / (one + two + 1)


def effects(rows: Sequence[Rated]) -> dict[str, Figure]:
    """Returns what each trait adds to the logit of being preferred, others held equal.

    length: tanh(difference in characters / its deviation), as the length-controlled
        AlpacaEval has it; a mark of style: `style_difference`; gold and own: 1 for the
        answer that has it, -1 for the other. Traits that no pair differs in are left
        out, and so is everything where pairs are fewer than five a trait.
    """
    if not rows:
        return {}
    gaps = np.array([_longer(row) for row in rows], np.float64)
    columns = {"length": np.tanh(gaps / (gaps.std() or 1.0))}
    counts = np.array([[style_counts(t) for t in row.answers] for row in rows], float)
    for i, name in enumerate(STYLES):
        if name != "words":  # as good as length
            one, two = counts[:, 0, i], counts[:, 1, i]
            columns[f"style_{name}"] = (one - two) / (one + two + 1)
    for name in ("gold", "own"):
        held = [getattr(row, name) for row in rows]
        columns[name] = np.array([0.0 if x is None else 1.0 - 2.0 * x for x in held])
    columns = {name: x for name, x in columns.items() if np.abs(x).max() > 0}
    p = np.array([row.probability for row in rows], np.float64)
    if len(rows) < 5 * len(columns) or not columns:
        return {}
    fitted = logistic(np.stack(list(columns.values()), axis=1), p)
    if fitted is None:
        return {}
    z = special.ndtri((1 + CONFIDENCE) / 2)
    return {
        name: Figure(value, value - z * error, value + z * error, len(rows))
        for name, value, error in zip(columns, *fitted, strict=True)
    }


def logistic(x: np.ndarray, p: np.ndarray, steps: int = 100):
    """Fits p = sigmoid(x b) by maximum likelihood; p may lie between 0 and 1.

    Args:
        x: f64[N, F]; there is no intercept but one among the columns.
        p: f64[N].
        steps: of Newton's method at most.

    Returns:
        (b f64[F], its standard errors by the sandwich estimator, which holds whatever
        the spread of p); None where the data part perfectly, or columns say the same.
    """
    b = np.zeros(x.shape[1])
    for _ in range(steps):
        fitted = 1 / (1 + np.exp(-np.clip(x @ b, -500, 500)))
        curvature = (x * (fitted * (1 - fitted))[:, None]).T @ x
        try:
            step = np.linalg.solve(curvature, x.T @ (p - fitted))
        except np.linalg.LinAlgError:
            return None
        b = b + step
        if not np.isfinite(b).all() or np.abs(b).max() > 50:
            return None
        if np.abs(step).max() < 1e-9:
            break
    fitted = 1 / (1 + np.exp(-x @ b))
    curvature = (x * (fitted * (1 - fitted))[:, None]).T @ x
    if np.linalg.cond(curvature) > 1e12:
        return None
    inverse, scores = np.linalg.inv(curvature), x * (p - fitted)[:, None]
    return b, np.sqrt(np.diag(inverse @ (scores.T @ scores) @ inverse))
