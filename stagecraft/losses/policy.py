"""Proximal policy optimization: the clipped losses of the policy and of the critic.

Neither takes a mask, so positions outside the completion are up to the caller: clear
the inputs there (`masked.clear`) if they may hold NaN or wild numbers, and reduce the
loss under the mask.
"""

import jax.numpy as jnp

from stagecraft import masked


def ppo_policy(logps, old_logps, advantages, *, clip=0.2):
    """Clipped surrogate of the policy gradient (Schulman et al. 2017, eq. 7).

    arxiv.org/abs/1707.06347. Where clipping is the worse of the two bounds the gradient
    is zero: the policy has moved far enough on that token.

    Args:
        logps: f32[B, T], nats: log-probs of the sampled tokens now, at the temperature
            they were sampled with.
        old_logps: f32[B, T], the same before the first update on this batch.
        advantages: f32[B, T], constants.
        clip: how far the probability ratio may leave 1 and still be rewarded.

    Returns:
        loss f32[B, T], not reduced; metrics, each f32[B, T]: "policy/clipfrac_avg" (1
        where the clip decides), "policy/approxkl_avg" (half the squared log-ratio),
        "policy/approxkl_k3" (the unbiased estimator that is never negative),
        "val/ratio", "policy/ratio_max" (the same ratio, to be reduced by a maximum).

    Raises:
        ValueError: when the shapes differ.

    >>> zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    >>> loss, _ = ppo_policy(zero, zero, one)  # nothing moved yet: ratio 1
    >>> float(loss[0, 0])
    -1.0
    """
    masked.check_shapes(logps=logps, old_logps=old_logps, advantages=advantages)
    log_ratio = logps - old_logps  # [B, T]
    ratio = jnp.exp(log_ratio)
    free = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    loss = jnp.maximum(free, clipped)
    return loss, {
        "policy/clipfrac_avg": (clipped > free).astype(jnp.float32),
        "policy/approxkl_avg": 0.5 * jnp.square(log_ratio),
        "policy/approxkl_k3": ratio - 1 - log_ratio,
        "val/ratio": ratio,
        "policy/ratio_max": ratio,
    }


def ppo_value(values, old_values, returns, *, clip=0.2):
    """Half the squared error of the critic, its step clipped like the policy's.

    The larger of the clipped and the free error counts (Engstrom et al. 2020,
    arxiv.org/abs/2005.12729, on code-level optimizations).

    Args:
        values: f32[B, T], the critic now.
        old_values: f32[B, T], the critic before the first update on this batch.
        returns: f32[B, T], constants.
        clip: how far a value may move from the old one; None switches clipping off.

    Returns:
        loss f32[B, T] including the factor 1/2, not reduced; metrics
        {"val/clipfrac_avg": f32[B, T]}, 1 where the clip decides.

    Raises:
        ValueError: when the shapes differ.
    """
    masked.check_shapes(values=values, old_values=old_values, returns=returns)
    free = jnp.square(values - returns)  # [B, T]
    if clip is None:
        return 0.5 * free, {"val/clipfrac_avg": jnp.zeros_like(free)}
    near = jnp.clip(values, old_values - clip, old_values + clip)
    clipped = jnp.square(near - returns)
    loss = 0.5 * jnp.maximum(free, clipped)
    return loss, {"val/clipfrac_avg": (clipped > free).astype(jnp.float32)}
