"""Means over a few seeds, their intervals, and the difference of two of them."""

import warnings

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def interval(values: list[float]) -> tuple[float, float | None]:
    """Returns the mean over seeds and half the width of its interval (Student's t).

    Args:
        values: numbers, one a seed.

    Returns:
        (mean, half): the interval is mean - half to mean + half; half is None for one
        value, which says nothing about its spread.

    >>> interval([1.0])
    (1.0, None)
    >>> interval([2.0, 2.0, 2.0])
    (2.0, 0.0)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    _, quantile = stats.t.interval(CONFIDENCE, len(values) - 1)
    return mean, float(quantile * stats.sem(values))


def difference(ones: list[float], others: list[float]) -> tuple[float, float | None]:
    """Returns the difference of two means and half its interval (Welch).

    Args:
        ones, others: numbers, one a seed each.

    Returns:
        (difference, half): half is None where either side is one value, or where
        neither side shows any spread.

    >>> difference([3.0], [1.0, 2.0])
    (1.5, None)
    """
    change = float(np.mean(ones) - np.mean(others))
    if min(len(ones), len(others)) < 2 or not (np.ptp(ones) or np.ptp(others)):
        return change, None
    with warnings.catch_warnings():
        # That one side hardly spreads is fine: the other's spread decides.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        test = stats.ttest_ind(ones, others, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return change, float(high - low) / 2
