"""Several attempts at each problem: pass@k, what guessing would reach, Cover@tau.

pass@k is the chance that one of k sampled answers is right. It says what a model can do
at all, but with few possible answers and many attempts it says how lucky one gets:
beside it stands guess@k, the same for answers that do not look at the problem.
Cover@tau, the share of problems that at least a share tau of the answers solve, asks
for more than luck.

Source: Chen et al. 2021 (arxiv.org/abs/2107.03374), equation 1; Yue et al. 2025
(arxiv.org/abs/2504.13837); for guessing and Cover@tau arxiv.org/abs/2510.08325.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special

COVERED = (0.1, 0.5, 0.9)  # tau, of the figures cover@10, cover@50, cover@90


def pass_at(k: int, attempts: int, right: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the unbiased estimate of pass@k of each problem, f[B].

    1 - C(n - c, k) / C(n, k), of n attempts of which c are right.

    Args:
        k: from 1 to n.
        attempts: n, at every problem.
        right: c of each problem, int[B].

    Raises:
        ValueError: k is more than n: there is no unbiased estimate.

    >>> pass_at(3, 10, [1]).round(6).tolist()
    [0.3]
    """
    if not 1 <= k <= attempts:
        raise ValueError(f"pass@{k} of {attempts} attempts: expected 1 to {attempts}")
    wrong, log = attempts - np.asarray(right), special.gammaln
    # Each of these factorials may be beyond a float; their ratio is not.
    some = np.maximum(wrong, k)
    ratio = log(some + 1) - log(attempts + 1)
    ratio += log(attempts - k + 1) - log(some - k + 1)
    return np.where(wrong < k, 1.0, 1.0 - np.exp(ratio))


def guess_at(k: int, chances: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the chance that one of k independent guesses is right, f[B].

    Args:
        k: how many guesses.
        chances: that one guess at each problem is right, f[B].
    """
    return 1.0 - (1.0 - np.asarray(chances, float)) ** k


def cover_at(
    tau: float, attempts: int, right: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Returns of each problem whether a share tau of its attempts is right, f[B]."""
    return (np.asarray(right) >= tau * attempts - 1e-9).astype(float)


def powers(attempts: int) -> list[int]:
    """Returns 1, 2, 4, ... up to a number of attempts.

    >>> powers(5)
    [1, 2, 4]
    """
    return [2**i for i in range(attempts.bit_length())]


def figures(right: np.ndarray, chances: np.ndarray) -> dict[str, tuple]:
    """Returns {figure: (value, standard error or None)}.

    pass@k for k = 1, 2, 4, ..., guess@k and cover@(100 tau). The error is that over
    draws of the attempts at these problems, by the jackknife; guess@k has none, and so
    has pass@k for k = n.

    Args:
        right: bool[B, n], of each attempt at each problem.
        chances: f[B], that an answer to another problem is right.
    """
    attempts, counts = right.shape[1], right.sum(axis=1)
    rows = {}
    for k in powers(attempts):
        rows[f"pass@{k}"] = _with_error(
            lambda n, c, k=k: pass_at(k, n, c), right, enough=attempts > k
        )
    for k in powers(attempts):
        rows[f"guess@{k}"] = (float(guess_at(k, chances).mean()), None)
    for tau in COVERED:
        value = float(cover_at(tau, attempts, counts).mean())
        rows[f"cover@{round(100 * tau)}"] = (value, None)
    return rows


def _with_error(estimate, right, enough):
    """Returns a mean over problems, and its error by leaving one draw out at a time.

    Args:
        estimate: (attempts, right int[B]) -> f[B].
        right: bool[B, n].
        enough: whether n - 1 attempts allow the estimate.
    """
    attempts, counts = right.shape[1], right.sum(axis=1)
    mean = float(estimate(attempts, counts).mean())
    if not enough:
        return mean, None
    without = [
        estimate(attempts - 1, counts - right[:, i]).mean() for i in range(attempts)
    ]
    return mean, float(np.sqrt((attempts - 1) * np.var(without)))
