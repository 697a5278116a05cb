"""Policy-gradient losses over tokens: the clipped surrogate (PPO), and the critic's.

None here takes a mask, so positions outside the completion are up to the caller: clear
the inputs there (`masked.clear`) if they may hold NaN or wild numbers, and reduce the
loss under the mask. Losses made for training without a critic are in `group`.
"""

import jax.numpy as jnp
from jax import Array

from stagecraft import masked
from stagecraft.errors import UserError
from stagecraft.losses.types import Result

# A ratio beyond e^20 is a wild number either way. Unlimited, its overflow times a zero
# advantage would be NaN, in the gradient even where the clip decides.
MAX_LOG_RATIO = 20.0


def probability_ratio(log_ratio: Array) -> Array:
    """Returns the probability ratio of tokens or sequences: exp, safe from overflow.

    Args:
        log_ratio: f32, any shape, nats: new minus old log-probability.

    Returns:
        f32 like `log_ratio`, between e^-20 and e^20.
    """
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def surrogate(
    ratio: Array, advantages: Array, *, clip: float, clip_high: float | None
) -> tuple[Array, dict[str, Array]]:
    """Returns the larger of the free and the clipped loss, and where the clip acts.

    Args:
        ratio: f32, any shape.
        advantages: f32, same shape, constants.
        clip: how far the ratio may fall below 1 and still be rewarded.
        clip_high: how far it may rise above 1; None: as `clip`.

    Returns:
        loss f32 like `ratio`; metrics, each f32 like `ratio`, 1 where the clip decides:
        "clip_ratio/low_mean" (a bad token already unlikelier), "clip_ratio/high_mean"
        (a good one already likelier), "clip_ratio/region_mean" (either).
    """
    low, high = 1 - clip, 1 + (clip if clip_high is None else clip_high)
    clipped = jnp.clip(ratio, low, high)
    loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
    below = (ratio < low) & (advantages < 0)
    above = (ratio > high) & (advantages > 0)
    return loss, {
        "clip_ratio/low_mean": below.astype(jnp.float32),
        "clip_ratio/high_mean": above.astype(jnp.float32),
        "clip_ratio/region_mean": (below | above).astype(jnp.float32),
    }


def drift(log_ratio: Array) -> dict[str, Array]:
    """Measures how far the policy has moved since the rollout.

    Args:
        log_ratio: f32, any shape, nats: new minus old log-probability.

    Returns:
        each f32 like `log_ratio`: "policy/approxkl_avg" (half the squared log-ratio),
        "policy/approxkl_k3" (the unbiased estimator that is never negative),
        "val/ratio", "policy/ratio_max" (the same ratio, to be reduced by a maximum).
    """
    ratio = probability_ratio(log_ratio)
    return {
        "policy/approxkl_avg": 0.5 * jnp.square(log_ratio),
        "policy/approxkl_k3": ratio - 1 - log_ratio,
        "val/ratio": ratio,
        "policy/ratio_max": ratio,
    }


def ppo_policy(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> Result:
    """Clipped surrogate of the policy gradient (Schulman et al. 2017, eq. 7).

    arxiv.org/abs/1707.06347. Where clipping is the worse of the two bounds the gradient
    is zero: the policy has moved far enough on that token. With advantages of a group
    this is the loss of GRPO (Shao et al. 2024, arxiv.org/abs/2402.03300, eq. 3).

    Args:
        logps: f32[B, T], nats: log-probs of the sampled tokens now, at the temperature
            they were sampled with.
        old_logps: f32[B, T], the same before the first update on this batch.
        advantages: f32[B, T], constants.
        clip: how far the probability ratio may leave 1 and still be rewarded.
        clip_high: how far it may rise, if that differs: DAPO's clip-higher (Yu et al.
            2025, arxiv.org/abs/2503.14476, eq. 8) has 0.28 beside a `clip` of 0.2.
        dual_clip: above 1: a bad token costs at most this many times its advantage,
            however much likelier it became (Ye et al. 2019, arxiv.org/abs/1912.09729,
            dual clip). None: no limit.
        delta: the same limit by its name in two-sided GRPO (Prime Intellect 2025,
            arxiv.org/abs/2505.07291), set on the ratio itself; above 1 + clip_high,
            and there equal to `dual_clip`.

    Returns:
        loss f32[B, T], not reduced; metrics, each f32[B, T]: "policy/clipfrac_avg" (1
        where the clip decides), "policy/approxkl_avg" (half the squared log-ratio),
        "policy/approxkl_k3" (the unbiased estimator that is never negative),
        "val/ratio", "policy/ratio_max" (the same ratio, to be reduced by a maximum),
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean" (the
        share clipped, by side).

    Raises:
        ValueError: when the shapes differ.
        UserError: when `dual_clip` or `delta` would cut into the unclipped region.

    >>> zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    >>> loss, _ = ppo_policy(zero, zero, one)  # nothing moved yet: ratio 1
    >>> float(loss[0, 0])
    -1.0
    """
    masked.check_shapes(logps=logps, old_logps=old_logps, advantages=advantages)
    highest = 1 + (clip if clip_high is None else clip_high)
    if dual_clip is not None and dual_clip <= 1:
        raise UserError(
            f"dual_clip={dual_clip!r}: expected more than 1 (3 is usual), or None; at "
            "1 or below, bad tokens of an unmoved policy would have no gradient"
        )
    if delta is not None and delta <= highest:
        raise UserError(
            f"delta={delta!r}: expected more than 1 + clip_high = {highest:g}, or "
            "None; otherwise it cuts into the region that the clip leaves free"
        )
    log_ratio = logps - old_logps  # [B, T]
    moved = drift(log_ratio)
    ratio = moved["val/ratio"]
    if delta is not None:
        ratio = jnp.minimum(ratio, delta)
    loss, clipped = surrogate(ratio, advantages, clip=clip, clip_high=clip_high)
    if dual_clip is not None:
        limit = jnp.where(advantages < 0, -dual_clip * advantages, jnp.inf)
        loss = jnp.minimum(loss, limit)
    share = {"policy/clipfrac_avg": clipped["clip_ratio/region_mean"]}
    return loss, share | moved | clipped


def reinforce(logps: Array, advantages: Array) -> Result:
    """The plain policy gradient (Williams 1992, REINFORCE): no ratio and no clip.

    Right only while the policy is the one that sampled, that is for one update on each
    rollout. The value means nothing, only its gradient does: with centred advantages it
    is near 0 from the first step on.

    Args:
        logps: f32[B, T], nats, of the sampled tokens.
        advantages: f32[B, T], constants.

    Returns:
        loss f32[B, T], not reduced; metrics: none.

    Raises:
        ValueError: when the shapes differ.

    >>> loss, _ = reinforce(jnp.full((1, 1), -2.0), jnp.full((1, 1), 3.0))
    >>> float(loss[0, 0])
    6.0
    """
    masked.check_shapes(logps=logps, advantages=advantages)
    return -advantages * logps, {}


def entropy_bonus(entropy: Array) -> Result:
    """Minus the entropy of each prediction: minimized, it keeps the policy varied.

    Mnih et al. 2016 (arxiv.org/abs/1602.01783), section 4. Weigh it against
    the policy's loss by its coefficient, 0.01 say.

    Args:
        entropy: f32[B, T], nats, of the distribution each token was drawn from.

    Returns:
        loss f32[B, T], not reduced; metrics: none (the stage logs the entropy).
    """
    return -entropy, {}


def ppo_value(
    values: Array, old_values: Array, returns: Array, *, clip: float | None = 0.2
) -> Result:
    """Half the squared error of the critic, its step clipped like the policy's.

    The larger of the clipped and the free error counts (Engstrom et al. 2020,
    arxiv.org/abs/2005.12729, on code-level optimizations).

    Args:
        values: f32[B, T], the critic now.
        old_values: f32[B, T], the critic before the first update on this batch.
        returns: f32[B, T], constants.
        clip: how far a value may move from the old one; None or 0: not clipped.

    Returns:
        loss f32[B, T] including the factor 1/2, not reduced; metrics
        {"val/clipfrac_avg": f32[B, T]}, 1 where the clip decides.

    Raises:
        ValueError: when the shapes differ.
    """
    masked.check_shapes(values=values, old_values=old_values, returns=returns)
    free = jnp.square(values - returns)  # [B, T]
    if not clip:
        return 0.5 * free, {"val/clipfrac_avg": jnp.zeros_like(free)}
    near = jnp.clip(values, old_values - clip, old_values + clip)
    clipped = jnp.square(near - returns)
    loss = 0.5 * jnp.maximum(free, clipped)
    return loss, {"val/clipfrac_avg": (clipped > free).astype(jnp.float32)}


LOSSES = (ppo_policy, reinforce, entropy_bonus)
ALIASES = {"grpo": ppo_policy}  # with advantages of a group
__all__ = [*(loss.__name__ for loss in LOSSES), "ppo_value"]
