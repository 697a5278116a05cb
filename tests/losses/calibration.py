"""How good and how honest a reward model's verdicts are, from held-out comparisons.

Plain numpy over a whole evaluation set. A reward difference d means that the chosen
response is the better one with probability sigmoid(d); the model's verdict is whichever
has the higher reward, and its confidence lies between 1/2 and 1.
"""

from typing import NamedTuple

import numpy as np


class Buckets(NamedTuple):
    """Verdicts grouped by confidence.

    Attributes:
        edges: f64[N + 1], the limits of the buckets, from 1/2 to 1.
        counts: i64[N], how many verdicts fell into each.
        confidence: f64[N], their mean confidence; NaN for an empty bucket.
        accuracy: f64[N], the share of them that agrees with the labels; NaN for an
            empty bucket.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def by_confidence(difference, *, buckets=5):
    """Accuracy of the verdicts by how sure they are.

    Args:
        difference: float[N], reward of the chosen response less the rejected one's.
        buckets: how many buckets of equal width between 1/2 and 1.

    Returns:
        `Buckets`. A tie counts as wrong.

    >>> found = by_confidence([9.0, 9.0, -9.0, 0.1], buckets=2)
    >>> found.counts.tolist(), found.accuracy.round(2).tolist()
    ([1, 3], [1.0, 0.67])
    """
    difference = np.asarray(difference, np.float64).ravel()
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(difference), 500.0)))
    edges = np.linspace(0.5, 1.0, buckets + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, None)
    place = np.minimum(place, buckets - 1)  # 1.0 itself belongs to the last
    counts = np.bincount(place, minlength=buckets)

    def mean(x):
        sums = np.bincount(place, weights=x, minlength=buckets)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    return Buckets(edges, counts, mean(confidence), mean(difference > 0))


def expected_calibration_error(difference, *, buckets=10):
    """Mean gap between how sure the verdicts are and how often they are right.

    Guo et al. 2017, arxiv.org/abs/1706.04599, eq. 3, over buckets of equal width.

    Args:
        difference: float[N], reward of the chosen response less the rejected one's.
        buckets: how many buckets of equal width between 1/2 and 1.

    Returns:
        float in [0, 1]; 0 when there are no comparisons.

    >>> expected_calibration_error([99.0, -99.0])  # certain, and right half the time
    0.5
    """
    found = by_confidence(difference, buckets=buckets)
    gaps = np.abs(found.accuracy - found.confidence)
    total = found.counts.sum()
    return float(np.nansum(found.counts * gaps) / total) if total else 0.0


def length_baseline(lengths):
    """Accuracy of preferring by length alone: what a reward model must beat.

    Args:
        lengths: int[N, 2], tokens of the chosen and the rejected response.

    Returns:
        float: the better of "the longer one wins" and "the shorter one wins", either
        tossing a coin on a tie; 0.5 without comparisons.

    >>> length_baseline([[9, 3], [8, 2], [1, 5], [4, 4]])
    0.625
    """
    lengths = np.asarray(lengths).reshape(-1, 2)
    longer = (lengths[:, 0] > lengths[:, 1]) + 0.5 * (lengths[:, 0] == lengths[:, 1])
    return majority_baseline(longer)


def majority_baseline(first_won):
    """Accuracy of always giving the commoner verdict.

    Args:
        first_won: bool[N] (or shares of a win), over comparisons in the order in which
            they were shown, whether the first response won.

    Returns:
        float in [0.5, 1]; 0.5 without comparisons.

    >>> majority_baseline([True, False, False, False])
    0.75
    """
    first_won = np.asarray(first_won, np.float64)
    share = float(first_won.mean()) if first_won.size else 0.5
    return max(share, 1 - share)
