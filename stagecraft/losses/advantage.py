"""Advantages and returns of sampled completions, and the scale they are put on."""

import jax
import jax.numpy as jnp

from stagecraft import masked


def gae(rewards, values, mask, *, discount=1.0, lambda_=0.95):
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16).

    arxiv.org/abs/1506.02438. The last masked token ends the episode, also where a
    completion was cut at the length limit: the value after it is 0. Returns are built
    from these advantages, so whiten only afterwards.

    Args:
        rewards: f32[B, T], paid after each token.
        values: f32[B, T]: the critic's value of the state before each token.
        mask: bool[B, T], True on the completion: one unbroken run from column 0.
        discount: weight of the next token's worth.
        lambda_: 0 trusts the critic one step ahead, 1 only the rewards that came.

    Returns:
        advantages and returns, each f32[B, T], 0 outside the mask.

    Raises:
        ValueError: when the shapes differ.

    >>> one = jnp.ones((1, 1))
    >>> advantages, returns = gae(one, 0.25 * one, one > 0)  # paid less hoped
    >>> float(advantages[0, 0]), float(returns[0, 0])
    (0.75, 1.0)
    """
    masked.check_shapes(rewards=rewards, values=values, mask=mask)
    # Once cleared, the tail holds only zeros, and so do the deltas there.
    rewards, values = masked.clear(rewards, mask), masked.clear(values, mask)
    ahead = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    deltas = rewards + discount * ahead - values  # [B, T]

    def back(later, delta):
        advantage = delta + discount * lambda_ * later
        return advantage, advantage

    start = jnp.zeros_like(deltas[:, 0])
    _, advantages = jax.lax.scan(back, start, deltas.T, reverse=True)  # [T, B]
    return advantages.T, advantages.T + values


def whiten(x, mask, *, shift_mean=True):
    """Scales the masked values to variance 1 and, by default, mean 0.

    Meant for a whole batch at once, over all devices: whitening each minibatch is
    another algorithm. The variance is the population's (divided by n).

    Args:
        x: f32, any shape.
        mask: bool, same shape.
        shift_mean: False keeps the mean where it was.

    Returns:
        f32 like `x`, 0 outside the mask.

    >>> whiten(jnp.array([1.0, 3.0, 50.0]), jnp.array([True, True, False])).tolist()
    [-1.0, 1.0, 0.0]
    """
    mean = masked.mean(x, mask)
    scaled = (masked.clear(x, mask) - mean) * jax.lax.rsqrt(masked.var(x, mask) + 1e-8)
    return masked.clear(scaled if shift_mean else scaled + mean, mask)


def explained_variance(values, returns, mask):
    """Share of the returns' variance that the critic accounts for.

    Args:
        values: f32[B, T], the critic's values.
        returns: f32[B, T], what it should have said.
        mask: bool[B, T].

    Returns:
        f32 scalar: 1 for a perfect critic, 0 for a constant one, below 0 for one worse
        than a constant; 0 when the returns do not vary.
    """
    total = masked.var(returns, mask)
    varies = total > 0
    safe = jnp.where(varies, total, jnp.ones_like(total))
    share = 1 - masked.var(returns - values, mask) / safe
    return jnp.where(varies, share, jnp.zeros_like(share))
