"""Policy optimization without a critic: advantages from G samples of each prompt.

A group's own mean (or the mean of the other samples) stands in for the critic. The
token losses here differ from `policy.ppo_policy` in how the probability ratio is built
and limited; how tokens become one number is the subject of `aggregate`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft import masked, schema
from stagecraft.errors import UserError
from stagecraft.losses.policy import drift, probability_ratio, surrogate
from stagecraft.losses.types import Result


def _check_group(rewards: Array, scored: Array | None) -> Array:
    """Returns the mask of scored samples; refuses groups of fewer than two."""
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [N, G], got {rewards.shape}")
    if rewards.shape[1] < 2:
        raise UserError(
            f"{rewards.shape[1]} sample per prompt: a baseline from the group needs at "
            "least 2; sample more, or use a critic (PPO)"
        )
    scored = jnp.ones(rewards.shape, bool) if scored is None else scored
    masked.check_shapes(rewards=rewards, scored=scored)
    return scored


def _below_best(rewards: Array, scored: Array) -> Array:
    """Subtracts the group's best reward, so that equal rewards become exactly 0.

    A mean of equal numbers may differ from them by a rounding error, which a division
    by the deviation, a rounding error too, would blow up.
    """
    best = jax.lax.stop_gradient(masked.max(rewards, scored, axis=1))
    return masked.clear(masked.clear(rewards, scored) - best[:, None], scored)


def _spread(rewards: Array, scored: Array, axis: int | None) -> Array:
    """Returns the unbiased standard deviation (n - 1); 0 for fewer than two samples."""
    return jnp.sqrt(masked.var(rewards, scored, axis, unbiased=True))


def group_advantages(
    rewards: Array,
    scored: Array | None = None,
    *,
    scale: str = "group",
    eps: float = 1e-4,
) -> Array:
    """Compares each sample with the mean of its group (GRPO, Shao et al. 2024).

    arxiv.org/abs/2402.03300, section 4.1.2. Unscaled, these are the advantages of Dr.
    GRPO (Liu et al. 2025, arxiv.org/abs/2503.20783) and, whitened over the whole batch
    afterwards, those of REINFORCE++ with baseline (arxiv.org/abs/2501.03262).

    Args:
        rewards: f32[N, G]: G samples of each of N prompts.
        scored: bool[N, G], False where no score could be had (the reward may then be
            NaN): left out of every mean and deviation, advantage 0. None: all scored.
        scale: divide by the deviation of the "group", of the whole "batch", or by
            nothing ("none"). Deviations are unbiased (n - 1).
        eps: added to the deviation.

    Returns:
        f32[N, G]; 0 throughout a group with fewer than two scored samples.

    Raises:
        ValueError: when the shapes do not fit.
        UserError: for fewer than two samples per prompt, or an unknown `scale`.

    >>> group_advantages(jnp.array([[1.0, 0.0]]), scale="none").tolist()
    [[0.5, -0.5]]
    """
    schema.choice("scale", scale, ("group", "batch", "none"))
    scored = _check_group(rewards, scored)
    below = _below_best(rewards, scored)
    mean = masked.mean(below, scored, axis=1)[:, None]
    centered = masked.clear(below - mean, scored)
    if scale == "none":
        return centered
    if scale == "group":
        return centered / (_spread(below, scored, 1)[:, None] + eps)
    return centered / (_spread(rewards, scored, None) + eps)


def leave_one_out(
    rewards: Array,
    scored: Array | None = None,
    *,
    normalize: bool = False,
    eps: float = 1e-4,
) -> Array:
    """Each reward less the mean of the others in its group (RLOO).

    Ahmadian et al. 2024 (arxiv.org/abs/2402.14740), section 3.2. A KL penalty belongs
    into the rewards: kl_coef times the `k1` summed over the completion.

    Args:
        rewards: f32[N, G]: G samples of each of N prompts.
        scored: bool[N, G], False where no score could be had (the reward may then be
            NaN): left out of the means, advantage 0. None: all scored.
        normalize: put the advantages of the whole batch to mean 0 and deviation 1.
        eps: added to that deviation.

    Returns:
        f32[N, G]; 0 throughout a group with fewer than two scored samples.

    Raises:
        ValueError: when the shapes do not fit.
        UserError: for fewer than two samples per prompt.

    >>> leave_one_out(jnp.array([[1.0, 0.0]])).tolist()
    [[1.0, -1.0]]
    """
    scored = _check_group(rewards, scored)
    below = _below_best(rewards, scored)
    others = masked.count(scored, axis=1)[:, None] - 1  # [N, 1]
    has_others = scored & jnp.broadcast_to(others > 0, scored.shape)
    total = jnp.sum(below, axis=1, keepdims=True)
    baseline = (total - below) / jnp.maximum(others, 1.0).astype(below.dtype)
    advantages = masked.clear(below - baseline, has_others)
    if not normalize:
        return advantages
    mean = masked.mean(advantages, has_others)
    spread = _spread(advantages, has_others, None)
    return masked.clear((advantages - mean) / (spread + eps), has_others)


def dynamic_sampling(rewards: Array, scored: Array | None = None) -> Array:
    """Selects prompts with a gradient: those whose samples differ in reward.

    DAPO (Yu et al. 2025, arxiv.org/abs/2503.14476), eq. 11: the others have advantage 0
    throughout and are sampled anew.

    Args:
        rewards: f32[N, G]: G samples of each of N prompts.
        scored: bool[N, G], False where no score could be had; None: all scored.

    Returns:
        bool[N], True for the groups to keep; False also where fewer than two samples
        were scored.

    Raises:
        ValueError: when the shapes do not fit.
        UserError: for fewer than two samples per prompt.

    >>> dynamic_sampling(jnp.array([[1.0, 1.0], [1.0, 0.0]])).tolist()
    [False, True]
    """
    scored = _check_group(rewards, scored)
    lowest = -masked.max(-rewards, scored, axis=1)
    return masked.max(rewards, scored, axis=1) > lowest


def frac_reward_zero_std(rewards: Array, scored: Array | None = None) -> Array:
    """Returns 1 for each group whose rewards are all equal, as a metric: f32[N].

    The complement of `dynamic_sampling`; arguments as there.
    """
    return 1 - dynamic_sampling(rewards, scored).astype(jnp.float32)


def soft_overlong(lengths: Array, *, limit: int, cache: int) -> Array:
    """Penalizes completions gradually as they come near the length limit.

    DAPO (Yu et al. 2025, arxiv.org/abs/2503.14476), eq. 13: nothing up to limit - cache
    tokens, then linearly down to -1 at the limit, and -1 beyond.

    Args:
        lengths: f32 or i32[B], tokens of each completion.
        limit: tokens: the longest completion that is sampled.
        cache: tokens: how far below the limit the penalty begins.

    Returns:
        f32[B], from -1 to 0, to be added to the scores.

    Raises:
        UserError: when `cache` is not between 1 and `limit`.

    >>> soft_overlong(jnp.array([10, 15, 20]), limit=20, cache=10).tolist()
    [0.0, -0.5, -1.0]
    """
    if not 0 < cache <= limit:
        raise UserError(
            f"cache={cache!r}: expected from 1 to limit={limit!r} tokens: the stretch "
            "below the limit over which the penalty grows"
        )
    left = (limit - cache) - lengths.astype(jnp.float32)
    return jnp.clip(left / cache, -1.0, 0.0)


def _by_sequence(
    ratio: Array,
    log_ratio: Array,
    advantages: Array,
    mask: Array,
    clip: float,
    clip_high: float | None,
) -> Result:
    """Returns the surrogate of one ratio f32[B] per sequence, on each of its tokens."""
    ratio = jnp.broadcast_to(ratio[:, None], advantages.shape)
    loss, clipped = surrogate(ratio, advantages, clip=clip, clip_high=clip_high)
    metrics = drift(log_ratio)  # of tokens, but for the ratios
    metrics |= {"val/ratio": ratio[:, 0], "policy/ratio_max": ratio[:, 0]}
    metrics |= {k: masked.mean(v, mask, axis=1) for k, v in clipped.items()}
    return masked.clear(loss, mask), metrics


def gspo(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    mask: Array,
    *,
    clip: float = 3e-4,
    clip_high: float | None = 4e-4,
) -> Result:
    """Group sequence policy optimization (Zheng et al. 2025, eq. 5 and 7).

    arxiv.org/abs/2507.18071. One ratio per completion, the geometric mean over its
    tokens, so that a whole completion is clipped or not: hence the far narrower clip.

    Args:
        logps: f32[B, T], nats: log-probs of the sampled tokens now, at the temperature
            they were sampled with.
        old_logps: f32[B, T], the same before the first update on this batch.
        advantages: f32[B, T], constants; usually one number per row.
        mask: bool[B, T], True on the completion.
        clip: how far the ratio may fall below 1 and still be rewarded.
        clip_high: how far it may rise above 1.

    Returns:
        loss f32[B, T], not reduced, 0 outside the mask: each token holds the loss of
        its sequence, so the mean over sequences is `aggregate("grpo", ...)`. Metrics:
        "policy/approxkl_avg" and "policy/approxkl_k3" f32[B, T] of the tokens; of the
        sequences, f32[B]: "val/ratio", "policy/ratio_max", "clip_ratio/low_mean",
        "clip_ratio/high_mean", "clip_ratio/region_mean".

    Raises:
        ValueError: when the shapes differ.

    >>> moved = jnp.log(jnp.array([[2.0, 0.5]]))  # up and down: the mean stays
    >>> zero, one = jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> loss, _ = gspo(moved, zero, one, one > 0)
    >>> loss.tolist()
    [[-1.0, -1.0]]
    """
    masked.check_shapes(
        logps=logps, old_logps=old_logps, advantages=advantages, mask=mask
    )
    log_ratio = masked.clear(logps, mask) - masked.clear(old_logps, mask)
    ratio = probability_ratio(masked.mean(log_ratio, mask, axis=1))  # [B]
    return _by_sequence(ratio, log_ratio, advantages, mask, clip, clip_high)


def rloo_policy(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    mask: Array,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Result:
    """Clipped surrogate with the ratio of whole completions (RLOO as trained today).

    Ahmadian et al. 2024 (arxiv.org/abs/2402.14740) take the completion as the one
    action; its ratio is the product over the tokens. Arguments, returns and refusals as
    `gspo`, whose ratio is the geometric mean instead.

    >>> moved = jnp.log(jnp.array([[2.0, 0.5]]))  # up and down: the product stays
    >>> zero, one = jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> loss, _ = rloo_policy(moved, zero, one, one > 0)
    >>> loss.tolist()
    [[-1.0, -1.0]]
    """
    masked.check_shapes(
        logps=logps, old_logps=old_logps, advantages=advantages, mask=mask
    )
    log_ratio = masked.clear(logps, mask) - masked.clear(old_logps, mask)
    ratio = probability_ratio(masked.sum(log_ratio, mask, axis=1))  # [B]
    return _by_sequence(ratio, log_ratio, advantages, mask, clip, clip_high)


def cispo(
    logps: Array, old_logps: Array, advantages: Array, *, clip_high: float = 5.0
) -> Result:
    """REINFORCE weighted by the ratio, the weight cut off (MiniMax 2025, eq. 4 and 5).

    arxiv.org/abs/2506.13585. A token that moved far keeps a gradient, of bounded
    weight; the surrogate would silence it. The bound 5 is that of Khatri et al. 2025
    (arxiv.org/abs/2510.13786).

    Args:
        logps, old_logps: f32[B, T], nats, as in `gspo`.
        advantages: f32[B, T], constants.
        clip_high: largest weight: a ratio, not a distance from 1.

    Returns:
        loss f32[B, T], not reduced; metrics, each f32[B, T]: "cispo_clip_ratio" (1
        where a good token's weight is cut), "policy/approxkl_avg",
        "policy/approxkl_k3", "val/ratio", "policy/ratio_max".

    Raises:
        ValueError: when the shapes differ.
        UserError: when `clip_high` is at most 1: then every weight would be cut, also
            those of a policy that has not moved.

    >>> old, new = jnp.zeros((1, 1)), jnp.full((1, 1), 9.0)  # e^9 times likelier
    >>> loss, _ = cispo(new, old, jnp.ones((1, 1)))  # -5 log p
    >>> float(loss[0, 0])
    -45.0
    """
    if clip_high <= 1:
        raise UserError(
            f"clip_high={clip_high!r}: CISPO cuts the ratio at clip_high itself, not "
            "at 1 + clip_high, so 1 or less cuts every weight, also of a policy that "
            "has not moved; expected more than 1 (5 is usual)"
        )
    masked.check_shapes(logps=logps, old_logps=old_logps, advantages=advantages)
    moved = drift(logps - old_logps)
    ratio = moved["val/ratio"]
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, clip_high))
    cut = (ratio > clip_high) & (advantages > 0)
    return -weight * advantages * logps, moved | {
        "cispo_clip_ratio": cut.astype(jnp.float32)
    }


def sapo(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Result:
    """Soft adaptive policy optimization: a smooth gate for the clip (Gao et al. 2025).

    arxiv.org/abs/2511.20347. The ratio goes through a sigmoid of slope 1
    where it is 1; the sharper gate for bad tokens steadies training.

    Args:
        logps, old_logps: f32[B, T], nats, as in `gspo`.
        advantages: f32[B, T], constants.
        tau_positive: sharpness of the gate where the advantage is above 0.
        tau_negative: sharpness elsewhere.

    Returns:
        loss f32[B, T], not reduced; metrics, each f32[B, T]: "policy/approxkl_avg",
        "policy/approxkl_k3", "val/ratio", "policy/ratio_max".

    Raises:
        ValueError: when the shapes differ.
        UserError: when a sharpness is not above 0.

    >>> zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    >>> loss, _ = sapo(zero, zero, one)  # unmoved: 4 sigmoid(0) = 2, a constant aside
    >>> float(loss[0, 0])
    -2.0
    """
    for name, value in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
        if value <= 0:
            raise UserError(f"{name}={value!r}: expected more than 0 (1 is usual)")
    masked.check_shapes(logps=logps, old_logps=old_logps, advantages=advantages)
    moved = drift(logps - old_logps)
    tau = jnp.where(advantages > 0, tau_positive, tau_negative).astype(logps.dtype)
    gate = jax.nn.sigmoid(tau * (moved["val/ratio"] - 1)) * 4 / tau
    return -gate * advantages, moved


LOSSES = (gspo, cispo, sapo, rloo_policy)
# One loss a sequence, spread over its tokens: right as a mean over sequences only.
BY_SEQUENCE = (gspo, rloo_policy)
__all__ = [
    *(loss.__name__ for loss in LOSSES),
    "dynamic_sampling",
    "frac_reward_zero_std",
    "group_advantages",
    "leave_one_out",
    "soft_overlong",
]
