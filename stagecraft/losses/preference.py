"""Preference objectives over pairs, measured against a frozen reference policy.

No reward model, no sampling. Column 0 of a pair is the chosen completion, column 1 the
rejected one. Names and numbers are those of TRL's DPO trainer, except that its
"sigmoid" is called `dpo` here, and may be smoothed.

Most losses here compare *scores*: log-ratios to the reference, or what replaces them
under another f-divergence (`pairs.divergence_scores`). They are written on scores and
called with log-probabilities, see `pairs.on_logps`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft import masked
from stagecraft.losses.pairs import (
    check_positive,
    check_range,
    difference,
    implied_rewards,
    logistic,
    on_logps,
    per_token,
    squared,
)
from stagecraft.losses.types import PlacedResult, Result


@on_logps
def dpo(
    scores: Array,
    preference: Array | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Array:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7).

    arxiv.org/abs/2305.18290. Label smoothing is the conservative variant for labels
    flipped with a known probability (Mitchell 2023, "A note on DPO with noisy
    preferences"); soft labels are the same with a probability of each pair's own, such
    as an AI judge's.

    Args:
        policy_logps: f32[B, 2], nats: sum of log p(token) over the completion; column 0
            is the chosen completion, column 1 the rejected one.
        ref_logps: f32[B, 2], the same under the frozen reference policy.
        preference: f32[B], the probability that column 0 is the better one; None for 1.
        scores: f32[B, 2], what is compared, from `pairs.divergence_scores`; None for
            the log-ratios. Logged rewards are always those of the log-ratios.
        beta: weight of the implied KL penalty; larger stays nearer the reference.
        label_smoothing: assumed share of flipped labels, in [0, 0.5); with `preference`
            on top of it.

    Returns:
        loss f32[B], not reduced; metrics, each f32[B]: "rewards/chosen",
        "rewards/rejected" (beta times the log-ratio to the reference),
        "rewards/margins", "rewards/accuracies" (a tie counts as wrong), "logps/chosen",
        "logps/rejected".

    Raises:
        ValueError: when the arrays are not all [B, 2], or `preference` not [B].
        UserError: for a hyper-parameter out of its range.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> loss, _ = dpo(same, same)  # policy and reference agree, a coin toss: log 2
    >>> round(float(loss[0]), 4)
    0.6931
    """
    check_range(0, 0.5, label_smoothing=label_smoothing)
    margin = beta * difference(scores)
    flipped = label_smoothing
    if preference is not None:
        masked.check_shapes(preference=preference, pairs=margin)
        right = preference * (1 - label_smoothing) + (1 - preference) * label_smoothing
        flipped = 1 - right
    return logistic(margin, flipped)


@on_logps
def hinge(scores: Array, *, beta: float = 0.1) -> Array:
    """Hinge on the margin over the reference (SLiC-HF, Zhao et al. 2023).

    arxiv.org/abs/2305.10425, with the log-ratio in place of the likelihood. A pair
    whose margin has reached 1 has no gradient. Arguments and metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> hinge(same, same)[0].tolist()
    [1.0]
    """
    return jax.nn.relu(1 - beta * difference(scores))


@on_logps
def ipo(scores: Array, lengths: Array, *, beta: float = 0.1) -> Array:
    """Identity preference optimization, averaged per token (Azar et al. 2023, eq. 17).

    arxiv.org/abs/2310.12036. Regresses the difference of scores onto 1/(2 beta), so
    that certain labels cannot drive it to infinity. Each score is divided by its
    completion's length, as TRL does on the authors' word that theirs were; `ipo_sum` is
    the formula as printed.

    Args:
        policy_logps, ref_logps: f32[B, 2], nats, sums; as in `dpo`.
        lengths: f32[B, 2], tokens of each completion.
        scores: as in `dpo`.
        beta: the paper's tau; the target is 1/(2 beta) nats a token.

    Returns:
        loss f32[B], not reduced; metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> ipo(same, same, jnp.ones((1, 2)), beta=0.5)[0].tolist()
    [1.0]
    """
    average = per_token(scores, lengths)
    return squared(difference(average) - 1 / (2 * beta))


@on_logps
def ipo_sum(scores: Array, *, beta: float = 0.1) -> Array:
    """Identity preference optimization on sums (Azar et al. 2023, eq. 17).

    arxiv.org/abs/2310.12036, as printed and as in OpenRLHF: the target is 1/(2 beta)
    nats for whole completions. Arguments and metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> ipo_sum(same, same, beta=0.5)[0].tolist()
    [1.0]
    """
    return squared(difference(scores) - 1 / (2 * beta))


@on_logps
def sigmoid_norm(scores: Array, lengths: Array, *, beta: float = 0.1) -> Array:
    """DPO on scores per token (length-normalised, Lambert et al. 2024, Tulu 3).

    arxiv.org/abs/2411.15124, section on preference tuning. Averages are small, so beta
    is usually above 1. Arguments as in `ipo`, metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> loss, _ = sigmoid_norm(same, same, jnp.array([[2.0, 7.0]]), beta=5.0)
    >>> round(float(loss[0]), 4)  # a coin toss: log 2
    0.6931
    """
    return logistic(beta * difference(per_token(scores, lengths)))


@on_logps
def robust(scores: Array, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """Provably robust DPO (Chowdhury et al. 2024): noise subtracted, not mixed in.

    arxiv.org/abs/2403.00409. When labels are flipped with probability
    `label_smoothing`, this has the expected gradient of DPO on clean labels; it may be
    negative. Arguments and metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> round(float(robust(same, same, label_smoothing=0.25)[0][0]), 4)
    0.6931
    """
    check_range(0, 0.5, label_smoothing=label_smoothing)
    margin = beta * difference(scores)
    right, flipped = 1 - label_smoothing, label_smoothing
    clean = right * logistic(margin) - flipped * logistic(-margin)
    return clean / (1 - 2 * label_smoothing)


@on_logps
def exo_pair(
    scores: Array, *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> Array:
    """Efficient exact optimization on pairs (Ji et al. 2024, eq. 16).

    arxiv.org/abs/2402.00856. The reverse KL from the policy's preference to the
    smoothed label, where DPO takes the forward one. Arguments and metrics as in `dpo`,
    but `label_smoothing` lies in (0, 0.5): with 0 the KL is infinite.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> loss, _ = exo_pair(same, same, label_smoothing=0.4)
    >>> round(float(loss[0]), 4)  # KL of (1/2, 1/2) from (0.6, 0.4)
    0.0204
    """
    check_range(0, 0.5, label_smoothing=label_smoothing)
    check_positive(label_smoothing=label_smoothing)
    margin = beta * difference(scores)
    right = -logistic(margin) - jnp.log1p(-jnp.asarray(label_smoothing, margin.dtype))
    wrong = -logistic(-margin) - jnp.log(jnp.asarray(label_smoothing, margin.dtype))
    return jax.nn.sigmoid(margin) * right + jax.nn.sigmoid(-margin) * wrong


@on_logps
def discopop(scores: Array, *, beta: float = 0.1, tau: float = 0.05) -> Array:
    """Discovered preference optimization (Lu et al. 2024, eq. 5).

    arxiv.org/abs/2406.08414: a language model found it. Blends the logistic loss, for
    pairs still ranked wrongly, into an exponential one. Arguments and metrics as in
    `dpo`.

    Args:
        tau: width of the blend, in margins.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> round(float(discopop(same, same)[0][0]), 4)  # half log 2 and half 1
    0.8466
    """
    check_positive(tau=tau)
    margin = beta * difference(scores)
    # In one exponent: far below 0 the blend vanishes faster than e^-margin grows.
    exponential = jnp.exp(jax.nn.log_sigmoid(margin / tau) - margin)
    return jax.nn.sigmoid(-margin / tau) * logistic(margin) + exponential


@on_logps
def nca_pair(scores: Array, *, beta: float = 0.1) -> Array:
    """Noise contrastive alignment on pairs (Chen et al. 2024).

    arxiv.org/abs/2402.05369. Classifies each completion as better or worse than the
    reference, so that the chosen one's likelihood does not fall. Arguments and metrics
    as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> round(float(nca_pair(same, same)[0][0]), 4)  # 2 log 2
    1.3863
    """
    chosen, rejected = beta * scores[:, 0], beta * scores[:, 1]
    return logistic(chosen) + 0.5 * (logistic(-chosen) + logistic(-rejected))


@on_logps
def bco_pair(scores: Array, *, beta: float = 0.1) -> Array:
    """Binary classifier optimization on pairs (Jung et al. 2024).

    arxiv.org/abs/2404.04656, without the reward shift, which `unpaired.bco` has: both
    completions are classified on their own. Arguments and metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> round(float(bco_pair(same, same)[0][0]), 4)  # 2 log 2
    1.3863
    """
    return logistic(beta * scores[:, 0]) + logistic(-beta * scores[:, 1])


@on_logps
def sppo_hard(scores: Array, *, beta: float = 0.1) -> Array:
    """Self-play preference optimization with hard labels (Wu et al. 2024, eq. 4.7).

    arxiv.org/abs/2405.00675, the winning probability taken as 1 and 0: regresses the
    scores onto 1/(2 beta) and -1/(2 beta). Arguments and metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> sppo_hard(same, same, beta=0.5)[0].tolist()
    [2.0]
    """
    target = 1 / (2 * beta)
    return squared(scores[:, 0] - target) + squared(scores[:, 1] + target)


@on_logps
def apo_zero(scores: Array, *, beta: float = 0.1) -> Array:
    """Anchored preference optimization, zero (D'Oosterlinck et al. 2024, eq. 7).

    arxiv.org/abs/2408.06266. Raises the chosen and lowers the rejected likelihood: for
    chosen completions better than the model's own. Arguments and metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> apo_zero(same, same)[0].tolist()
    [1.0]
    """
    chosen, rejected = beta * scores[:, 0], beta * scores[:, 1]
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


@on_logps
def apo_down(scores: Array, *, beta: float = 0.1) -> Array:
    """Anchored preference optimization, down (D'Oosterlinck et al. 2024, eq. 8).

    arxiv.org/abs/2408.06266. Lowers both likelihoods, the rejected one's more: for
    chosen completions worse than the model's own. Arguments and metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> apo_down(same, same)[0].tolist()
    [1.0]
    """
    chosen, margin = beta * scores[:, 0], beta * difference(scores)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(-margin)


def aot(
    policy_logps: Array,
    ref_logps: Array,
    rows: Array | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Result:
    """Alignment by optimal transport on pairs (Melnyk et al. 2024).

    arxiv.org/abs/2406.05882. Compares the policy's margins with the reference's as
    distributions: both are sorted, and margins of one rank are compared. A row's loss
    therefore depends on the whole batch, and so on how a batch is split. It has no
    scores: no completion is compared with itself under the reference.

    Args:
        policy_logps, ref_logps: f32[B, 2], nats, sums; as in `dpo`.
        rows: bool[B], True where a row holds a pair: padding is not sorted in. None for
            all.
        beta, label_smoothing: as in `dpo`.

    Returns:
        loss f32[B], each at the row of the policy's margin; metrics as in `dpo`.

    >>> policy = jnp.array([[2.0, 0.0], [1.0, 0.0]])
    >>> one, _ = aot(policy, jnp.array([[9.0, 0.0], [0.0, 0.0]]))
    >>> other, _ = aot(policy, jnp.array([[0.0, 0.0], [9.0, 0.0]]))
    >>> one.tolist() == other.tolist()  # the order of the reference's rows is lost
    True
    """
    metrics = implied_rewards(policy_logps, ref_logps, beta)
    check_range(0, 0.5, label_smoothing=label_smoothing)
    policy, reference = difference(policy_logps), difference(ref_logps)
    margin = beta * _less_same_rank(policy, reference, rows)
    return logistic(margin, label_smoothing), metrics


@on_logps
def aot_unpaired(
    scores: Array,
    rows: Array | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Array:
    """Alignment by optimal transport, unpaired (Melnyk et al. 2024).

    arxiv.org/abs/2406.05882. Compares the scores of all chosen completions with those
    of all rejected ones, rank by rank: which ones formed a pair is not used. Arguments
    as in `aot`, with `scores` as in `dpo`.

    Returns:
        loss f32[B], each at the row of the chosen completion; metrics as in `dpo`.

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> round(float(aot_unpaired(same, same)[0][0]), 4)
    0.6931
    """
    check_range(0, 0.5, label_smoothing=label_smoothing)
    margin = beta * _less_same_rank(scores[:, 0], scores[:, 1], rows)
    return logistic(margin, label_smoothing)


def _less_same_rank(a: Array, b: Array, rows: Array | None) -> Array:
    """Returns each of `a` less the one of `b` of its rank, f32[B]; 0 outside `rows`."""
    rows = jnp.ones(a.shape, bool) if rows is None else rows
    masked.check_shapes(pairs=a, rows=rows)
    last = jnp.full_like(a, jnp.inf)
    rank = jnp.argsort(jnp.argsort(jnp.where(rows, a, last)))
    partner = jnp.sort(jnp.where(rows, b, last))[rank]
    return masked.clear(a, rows) - masked.clear(partner, rows)


def sft(
    policy_logps: Array, ref_logps: Array, chosen_logps: Array, *, beta: float = 0.1
) -> PlacedResult:
    """Maximum likelihood of the chosen completion's tokens, to be added to another.

    With `dpo` and weights (1, w) it is the regularised objective of RPO (Liu et al.
    2024, arxiv.org/abs/2405.16436).

    Args:
        policy_logps, ref_logps: f32[B, 2], nats, sums; only for the metrics.
        chosen_logps: f32[B, T], nats: log-probs of the chosen completion's tokens.
        beta: scale of the logged rewards.

    Returns:
        {"chosen": loss f32[B, T]}, not reduced, over the chosen completion's tokens;
        metrics as in `dpo`.

    >>> sums = jnp.array([[-3.0, -9.0]])
    >>> sft(sums, sums, jnp.array([[-1.0, -2.0]]))[0]["chosen"].tolist()
    [[1.0, 2.0]]
    """
    return {"chosen": -chosen_logps}, implied_rewards(policy_logps, ref_logps, beta)


LOSSES = (
    dpo,
    hinge,
    ipo,
    ipo_sum,
    exo_pair,
    nca_pair,
    robust,
    bco_pair,
    sppo_hard,
    aot,
    aot_unpaired,
    apo_zero,
    apo_down,
    discopop,
    sigmoid_norm,
    sft,
)
ALIASES = {"sigmoid": dpo}  # TRL's name
# A row's loss depends on the whole batch, which must not be split.
ACROSS_ROWS = (aot, aot_unpaired)
__all__ = [loss.__name__ for loss in LOSSES]
# Doctest does not look behind a decorator by itself.
__test__ = {loss.__name__: loss for loss in LOSSES}
