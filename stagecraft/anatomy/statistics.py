"""Means over a few seeds, their intervals, and the difference of two of them.

A value is one seed's figure. It may come with the error of measuring it: the standard
error of a mean over sampled answers, and the degrees of freedom of that estimate.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy import special

CONFIDENCE = 0.95
Error = tuple[float, float]  # standard error, degrees of freedom


def interval(
    values: Sequence[float], errors: Sequence[Error] = ()
) -> tuple[float, float | None]:
    """Returns the mean over seeds and half the width of its interval.

    With n values x_i of standard errors s_i, half the width is

        max(t(n - 1) S / sqrt(n),  t(v) E),   E^2 = sum s_i^2 / n^2,

    S^2 the variance over seeds and v the degrees of freedom of E (see `error_of_mean`).
    S holds the chance of training and of measuring, so the first term alone covers as
    often as it says; but S of a few seeds may come out near zero, and then the interval
    would be tighter than what a value is known to. The larger of the two never is. It
    covers at least 95%; 99% where three seeds do not differ at all.

    Args:
        values: numbers, one a seed.
        errors: (s_i, its degrees of freedom), one a seed; () where nothing is known of
            them or there are none, as for greedy answers.

    Returns:
        (mean, half): the interval is mean - half to mean + half. With one value it is
        of the measuring alone; half is None without its error.

    >>> interval([1.0])
    (1.0, None)
    >>> interval([2.0, 2.0, 2.0])
    (2.0, 0.0)
    """
    mean = float(np.mean(values))
    halves = [_half(*error_of_mean(errors))] if errors else []
    if len(values) > 1:
        halves.append(_half(over_draws(values)[1], len(values) - 1))
    return mean, max(halves, default=None)


def difference(
    ones: Sequence[float],
    others: Sequence[float],
    errors: Sequence[Error] = (),
    other_errors: Sequence[Error] = (),
) -> tuple[float, float | None]:
    """Returns the difference of two means and half its interval.

    Half the width is the larger of Welch's over seeds and of t(v) E, the errors of both
    means as in `interval`: E^2 is the sum of their squares.

    Args:
        ones, others: numbers, one a seed each.
        errors, other_errors: of these, as in `interval`.

    Returns:
        (difference, half): where either side is one value, or neither side shows any
        spread, the interval is of the measuring alone; half is None without errors.

    >>> difference([3.0], [1.0, 2.0])
    (1.5, None)
    """
    change = float(np.mean(ones) - np.mean(others))
    halves = []
    if errors and other_errors:
        both = error_of_mean(errors), error_of_mean(other_errors)
        halves.append(_half(*_sum(both)))
    if min(len(ones), len(others)) > 1 and (np.ptp(ones) or np.ptp(others)):
        # Its import takes longer than that of JAX, and few commands come here.
        from scipy import stats

        with warnings.catch_warnings():
            # That one side hardly spreads is fine: the other's spread decides.
            warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
            test = stats.ttest_ind(ones, others, equal_var=False)
        low, high = test.confidence_interval(CONFIDENCE)
        halves.append(float(high - low) / 2)
    return change, max(halves, default=None)


def error_of_mean(errors: Sequence[Error]) -> Error:
    """Returns the standard error of a mean of independent values, and its freedom.

    >>> error_of_mean([(3.0, 3), (4.0, 3)])[0]
    2.5
    """
    total, freedom = _sum(errors)
    return total / len(errors), freedom


def _sum(errors):
    """Returns the error of a sum and Satterthwaite's degrees of freedom for it.

    v = (sum s_i^2)^2 / sum (s_i^4 / v_i).
    """
    squares, freedom = np.square([s for s, _ in errors]), [v for _, v in errors]
    total = squares.sum()
    if not total:
        return 0.0, float(np.sum(freedom))
    return float(np.sqrt(total)), float(total**2 / np.sum(squares**2 / freedom))


def _half(error, freedom):
    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2) * error)


def wilson(hits: float, count: float) -> tuple[float, float]:
    """Returns Wilson's 95% interval of a share, which holds near 0 and 1 too.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), Wilson (1927).

    Args:
        hits, count: so many of so many, above 0.

    >>> [round(x, 4) for x in wilson(8, 10)], [round(x, 4) for x in wilson(0, 20)]
    ([0.4902, 0.9433], [0.0, 0.1611])
    """
    z = float(special.ndtri((1 + CONFIDENCE) / 2))
    share = hits / count
    middle = share + z**2 / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = ((middle + sign * half) / (1 + z**2 / count) for sign in (-1, 1))
    return max(float(low), 0.0), min(float(high), 1.0)


# -- one model, several draws of its answers -------------------------------------------


def over_draws(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean over draws and its standard error; None for one draw."""
    mean, size = float(np.mean(values)), len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(size)) if size > 1 else None
    return mean, error


def over_both(table: np.ndarray) -> tuple[float, float | None]:
    """Returns the mean of a figure of two models over all pairs of their draws.

    It is the two-sample U-statistic: every draw of the one is held against every draw
    of the other. Its variance is estimated by that of the means over rows / I plus that
    of the means over columns / J, which is a little too large, never too small, in
    expectation.

    Args:
        table: f[I, J], draw i of the one against draw j of the other.

    Returns:
        (mean, standard error); None where either has one draw.
    """
    parts = [over_draws(table.mean(axis=axis))[1] for axis in (0, 1)]
    error = None if None in parts else float(np.hypot(*parts))
    return float(table.mean()), error


def over_pairs(table: np.ndarray) -> tuple[float, float | None]:
    """Returns the mean of a figure of two answers of one model over pairs of draws.

    It is the U-statistic over pairs i < j; its standard error is the jackknife's, which
    leaves out one draw at a time.

    Args:
        table: f[I, I], of which only what is above the diagonal is read; NaN where a
            pair has no figure.

    Returns:
        (mean, standard error); None with fewer than three draws, or where a draw has no
        pair left.
    """
    upper = np.triu(np.ones(table.shape, bool), 1) & np.isfinite(table)
    size, mean = len(table), float(table[upper].mean())
    pairs_left = [np.delete(np.delete(upper, i, 0), i, 1) for i in range(size)]
    if size < 3 or not all(part.any() for part in pairs_left):
        return mean, None
    without = [
        np.delete(np.delete(table, i, 0), i, 1)[part].mean()
        for i, part in enumerate(pairs_left)
    ]
    return mean, float(np.sqrt((size - 1) * np.var(without)))


def two_groups(values: Sequence[float], least: float) -> float:
    """Returns how much better two groups of values fit than one, in BIC.

    One normal distribution against two of a common SD, each value in one of them
    (Fraley and Raftery 1998, by classification likelihood): BIC(one) - BIC(two). Above
    6 it is strong evidence of two; of eight values from one normal, 2% come that far.

    Args:
        values: at least three, one a seed.
        least: the SD that a group has at least, such as the error of measuring.

    >>> two_groups([0.1, 0.12, 0.9, 0.88, 0.11, 0.91], 0.02) > 10
    True
    """
    x, count = np.sort(np.asarray(values, np.float64)), len(values)

    def fit(parts):
        squares = sum(np.sum((part - part.mean()) ** 2) for part in parts)
        shares = np.array([len(part) for part in parts]) / count
        likelihood = -0.5 * np.log(max(squares / count, least**2)) * count
        return likelihood + count * np.sum(shares * np.log(shares))

    one = 2 * np.log(count) - 2 * fit([x])
    two = 4 * np.log(count) - 2 * max(
        fit([x[:cut], x[cut:]]) for cut in range(1, count)
    )
    return float(one - two)
