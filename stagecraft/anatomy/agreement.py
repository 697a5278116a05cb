"""Whether raters agree: with one another, with themselves, and with a coin.

Labels are any hashable values; None is a label that is missing. Sources: Cohen (1960),
"A coefficient of agreement for nominal scales"; Krippendorff (2011), "Computing
Krippendorff's alpha-reliability".
"""

import collections
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from stagecraft.anatomy import statistics


class Rate(NamedTuple):
    """A share with its interval.

    Attributes:
        count, n: so many of so many.
        share: count / n; None where n is 0.
        low, high: the 95% interval.
    """

    count: int
    n: int
    share: float | None
    low: float
    high: float


def rate(count: int, n: int) -> Rate:
    """Returns a share with its Wilson interval; from 0 to 1 where n is 0."""
    if not n:
        return Rate(0, 0, None, 0.0, 1.0)
    return Rate(count, n, count / n, *statistics.wilson(count, n))


def cohen(ones: Sequence[Hashable], others: Sequence[Hashable]) -> float | None:
    """Returns Cohen's kappa of two raters: agreement beyond that of their frequencies.

    kappa = (p_o - p_e) / (1 - p_e), over the items that both labelled.

    Returns:
        None where it is not defined: no item in common, or all of them labelled alike.
    """
    pairs = [
        (a, b)
        for a, b in zip(ones, others, strict=True)
        if a is not None and b is not None
    ]
    if not pairs:
        return None
    n = len(pairs)
    agreed = sum(a == b for a, b in pairs) / n
    first, second = (collections.Counter(side) for side in zip(*pairs, strict=True))
    expected = sum(first[label] * second[label] for label in first) / n**2
    return None if expected == 1 else (agreed - expected) / (1 - expected)


def krippendorff(
    labels: Sequence[Sequence[Hashable]], values: Sequence[Hashable] = ()
) -> float | None:
    """Returns Krippendorff's alpha, for any number of raters and missing labels.

    alpha = 1 - D_o / D_e: the disagreement within items over that of labels drawn from
    all items. Each label of an item of m labels is paired with the m - 1 others, and
    counts 1 / (m - 1).

    Args:
        labels: for each item its labels, one a rater, None where one is missing.
        values: () for labels without an order; else all of them in their order, and
            the distance of two is that of ordinal labels.

    Returns:
        None where it is not defined: no item has two labels, or all labels are alike.
    """
    units = [[label for label in item if label is not None] for item in labels]
    units = [unit for unit in units if len(unit) > 1]
    order = list(values) or sorted({label for unit in units for label in unit}, key=str)
    place = {label: number for number, label in enumerate(order)}
    seen = np.zeros((len(order), len(order)))  # coincidences
    for unit in units:
        counts = np.zeros(len(order))
        for label in unit:
            counts[place[label]] += 1
        together = np.outer(counts, counts) - np.diag(counts)
        seen += together / (len(unit) - 1)
    totals = seen.sum(axis=1)
    n = totals.sum()
    distance = _ordinal(totals) if len(values) else 1 - np.eye(len(order))
    expected = (np.outer(totals, totals) * distance).sum()
    if not expected:
        return None
    return float(1 - (n - 1) * (seen * distance).sum() / expected)


def _ordinal(totals):
    """Returns squared distances: labels between two, each end counted half."""
    through = np.cumsum(totals) - totals / 2
    return np.square(through[:, None] - through[None, :])


def over_items(
    labels: Sequence[Sequence[Hashable]],
    items: Sequence[Hashable] = (),
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Returns the 95% interval of nominal alpha, by drawing items with replacement.

    Args:
        labels: as of `krippendorff`.
        items: what each row of labels belongs to, and is drawn with; () for a row each.
        draws, seed: of the drawing.

    Returns:
        None where alpha is not defined for nearly all draws.
    """
    groups = collections.defaultdict(list)
    for item, row in zip(items or range(len(labels)), labels, strict=True):
        groups[item].append(row)
    whole = list(groups.values())
    rng, values = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = rng.integers(len(whole), size=len(whole))
        alpha = krippendorff([row for i in chosen for row in whole[i]])
        values += [] if alpha is None else [alpha]
    if len(values) < draws / 2:
        return None
    tail = 100 * (1 - statistics.CONFIDENCE) / 2
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)
