"""How true quality rises and falls as a proxy of it is pursued: Gao's two curves.

With d = sqrt(KL(policy || start)) and R what was gained of the gold score (Gao et al.
2022, arxiv.org/abs/2210.10760):

    best of n   R(d) = d (alpha - beta d)
    RL          R(d) = d (alpha - beta log d)

Both are linear in alpha and beta: ordinary least squares, without start values. Points
along one run depend on each other and share its seed, so that one run gives one alpha
and one beta, and the t interval is over runs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from stagecraft.anatomy import statistics
from stagecraft.errors import UserError

RL, BEST_OF_N = "rl", "best_of_n"
FORMS = {RL: lambda d: d * np.log(d), BEST_OF_N: np.square}
# The RL form's slope at 0 has no bound, and no run begins with one.
LEAST = 0.3
PAST = 2  # points beyond the peak without which beta is a guess


class Fit(NamedTuple):
    """One run's curve.

    Attributes:
        form: `RL` or `BEST_OF_N`.
        start: gold at d = 0, as it was given or fitted.
        alpha, beta: of the curve; nearly one figure where the peak is out of sight.
        rms: root mean square of the residuals, in gold.
        left_out: the same of each point where the fit is without it: by this, two forms
            are compared.
        peak, best: d of the curve's maximum and R there; None where it only rises.
        past: points beyond the peak; fewer than `PAST` do not show that it turns.
        points: how many it is from.
    """

    form: str
    start: float
    alpha: float
    beta: float
    rms: float
    left_out: float
    peak: float | None
    best: float | None
    past: int
    points: int

    def at(self, distance: np.ndarray) -> np.ndarray:
        """Returns the gold score at d above 0: f64[...]."""
        d = np.asarray(distance, np.float64)
        return self.start + self.alpha * d - self.beta * FORMS[self.form](d)


def fit(
    distance: Sequence[float],
    gold: Sequence[float],
    form: str = RL,
    start: float | None = None,
) -> Fit:
    """Fits one run's curve by least squares.

    Args:
        distance: sqrt(KL), a point each; those below `LEAST` are left out.
        gold: the gold score at each.
        form: `RL` or `BEST_OF_N`.
        start: gold at d = 0, from far more answers than a point has: its error is in
            all of them. None fits it with the curve.

    Raises:
        UserError: fewer points than unknowns and one.
    """
    d, y = np.asarray(distance, np.float64), np.asarray(gold, np.float64)
    far = d >= LEAST
    d, y = d[far], y[far]
    columns = [d, -FORMS[form](d)]
    if start is None:
        columns.append(np.ones_like(d))
    table, offset = np.stack(columns, axis=1), start or 0.0
    if len({*d}) <= len(columns):
        raise UserError(
            f"{len({*d})} points at sqrt(KL) of {LEAST} or more: a curve of "
            f"{len(columns)} unknowns needs {len(columns) + 1}"
        )
    solved = np.linalg.lstsq(table, y - offset)[0]
    residuals = y - offset - table @ solved
    # Leaving out row i adds r_i h_i / (1 - h_i) to its residual, h the leverage.
    leverage = np.sum(np.linalg.pinv(table).T * table, axis=1)
    alpha, beta = float(solved[0]), float(solved[1])
    peak, best = _peak(form, alpha, beta)
    return Fit(
        form=form,
        start=float(solved[2]) if start is None else float(start),
        alpha=alpha,
        beta=beta,
        rms=_rms(residuals),
        left_out=_rms(residuals / (1 - leverage)),
        peak=peak,
        best=best,
        past=int(np.sum(d > peak)) if peak is not None else 0,
        points=len(d),
    )


def _rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


def _peak(form, alpha, beta):
    """Where the curve turns down, and what was gained by then."""
    if beta <= 0 or alpha <= 0:
        return None, None
    if form == BEST_OF_N:
        return alpha / (2 * beta), alpha**2 / (4 * beta)
    peak = float(np.exp(min(alpha / beta - 1, 50.0)))
    return peak, beta * peak


def over_seeds(fits: Sequence[Fit]) -> dict[str, tuple[float, float | None]]:
    """Returns means over runs with half their 95% t intervals: {figure: (mean, half)}.

    Args:
        fits: one a seed, of one form.

    Returns:
        alpha and beta, and, where every run turned, peak and best. Those two say more:
        the errors of alpha and beta nearly cancel in them.
    """
    names = ["alpha", "beta"]
    if all(one.past >= PAST for one in fits):
        names += ["peak", "best"]
    return {
        name: statistics.interval([getattr(one, name) for one in fits])
        for name in names
    }


# -- where the points come from --------------------------------------------------------


class Path(NamedTuple):
    """What a policy went through while it trained, a row logged each.

    Attributes:
        steps: updates done.
        distance: sqrt(KL(policy || start)), the KL in nats a sequence and smoothed.
        proxy, gold: mean of the reward trained on, and of the gold score, of the
            answers sampled at that step.
    """

    steps: np.ndarray
    distance: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray


def path(rows: Sequence[Mapping], proxy: str, gold: str) -> Path:
    """Reads the path of a policy from what its stage logged.

    Args:
        rows: of metrics.jsonl; those without all figures are passed over.
        proxy, gold: sources of its rewards, as "reward_model" and "gold": a verifier of
            weight 0 is watched and not trained on.
    """
    keys = ("step", "objective/kl", f"rewards/{proxy}/mean", f"rewards/{gold}/mean")
    table = [[row[key] for key in keys] for row in rows if all(k in row for k in keys)]
    if not table:
        raise UserError(f"no step logged {' and '.join(keys[1:])}")
    steps, kl, own, true = np.array(table, np.float64).T
    distance = np.sqrt(np.maximum(smoothed(kl), 0.0))
    return Path(steps.astype(int), distance, own, true)


def smoothed(values: Sequence[float], width: int = 5) -> np.ndarray:
    """Returns running means over `width` neighbours, fewer at both ends: f64[N].

    The KL of a step's few answers is itself an estimate, and least squares on a noisy d
    would find too flat a curve.
    """
    values, half = np.asarray(values, np.float64), width // 2
    windows = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return np.array([window.mean() for window in windows])


def best_of(proxy: np.ndarray, scores: np.ndarray, n: int) -> float:
    """Returns the mean score of the answer that a proxy likes best of n.

    It is the mean over all choices of n among the N answers to each prompt (the
    estimator of Nakano et al. 2021, arxiv.org/abs/2112.09332): the answer of rank i
    from below is the best of C(i - 1, n - 1) in C(N, n). Answers that the proxy likes
    alike share their ranks.

    Args:
        proxy, scores: f[P, N], of N answers to each of P prompts.
        n: 1 to N.
    """
    total = proxy.shape[1]
    ranks = np.arange(1, total + 1)
    shares = special.comb(ranks - 1, n - 1) / special.comb(total, n)
    means = []
    for likes, own in zip(proxy, scores, strict=True):
        order = np.argsort(likes, kind="stable")
        _, group = np.unique(likes[order], return_inverse=True)
        shared = np.bincount(group, shares) / np.bincount(group)
        means.append(np.sum(shared[group] * own[order]))
    return float(np.mean(means))


def best_of_kl(n: int) -> float:
    """Returns log n - (n - 1) / n: the KL of best of n, in nats.

    It is exact where no two answers are the same, and a bound above where some are
    (Beirami et al. 2024, arxiv.org/abs/2401.01879).

    >>> best_of_kl(1)
    0.0
    """
    return float(np.log(n) - (n - 1) / n)
