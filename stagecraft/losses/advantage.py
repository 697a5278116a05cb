"""Advantages and returns of sampled completions, and their whitening."""

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft import masked


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    discount: float = 1.0,
    lambda_: float = 0.95,
    bootstrap: Array | None = None,
) -> tuple[Array, Array]:
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16).

    arxiv.org/abs/1506.02438. The last masked token ends the episode, also where a
    completion was cut at the length limit: the value after it is 0, or `bootstrap`
    where given. Returns are built from these advantages, so whiten only afterwards.

    Args:
        rewards: f32[B, T], received after each token.
        values: f32[B, T]: the critic's value of the state before each token.
        mask: bool[B, T], True on the completion: one unbroken run from column 0; with
            the score placed after the end token, `kl.value_mask` of it.
        discount: weight of the next token's worth.
        lambda_: 0 trusts the critic one step ahead, 1 only the rewards received.
        bootstrap: f32[B]: the critic's value of the state after the last masked token,
            for completions that were cut there; 0 for those that ended. None: all 0.

    Returns:
        advantages and returns, each f32[B, T], 0 outside the mask.

    Raises:
        ValueError: when the shapes do not fit.

    >>> one = jnp.ones((1, 1))
    >>> advantages, returns = gae(one, 0.25 * one, one > 0)  # reward less value
    >>> float(advantages[0, 0]), float(returns[0, 0])
    (0.75, 1.0)
    """
    masked.check_shapes(rewards=rewards, values=values, mask=mask)
    # Once cleared, the tail holds only zeros, and so do the deltas there.
    rewards, values = masked.clear(rewards, mask), masked.clear(values, mask)
    ahead = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    if bootstrap is not None:
        masked.check_shapes(bootstrap=bootstrap, rows=mask[:, 0])
        last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
        ahead = jnp.where(last, bootstrap[:, None], ahead)
    deltas = rewards + discount * ahead - values  # [B, T]

    def back(later, delta):
        advantage = delta + discount * lambda_ * later
        return advantage, advantage

    start = jnp.zeros_like(deltas[:, 0])
    _, advantages = jax.lax.scan(back, start, deltas.T, reverse=True)  # [T, B]
    return advantages.T, advantages.T + values


def discounted_returns(rewards: Array, mask: Array, *, discount: float = 1.0) -> Array:
    """Sums rewards from each token to the end: the return of REINFORCE.

    Whitened over the whole batch, these are the advantages of REINFORCE++ (Hu et al.
    2025, arxiv.org/abs/2501.03262).

    Args:
        rewards: f32[B, T], received after each token.
        mask: bool[B, T], True on the completion: one unbroken run from column 0.
        discount: weight of the next token's reward.

    Returns:
        f32[B, T], 0 outside the mask.

    Raises:
        ValueError: when the shapes differ.

    >>> rewards = jnp.array([[1.0, 2.0, 4.0]])
    >>> discounted_returns(rewards, rewards > 0, discount=0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """
    no_values = jnp.zeros_like(rewards)
    return gae(rewards, no_values, mask, discount=discount, lambda_=1.0)[0]


def whiten(
    x: Array, mask: Array, *, shift_mean: bool = True, unbiased: bool = False
) -> Array:
    """Scales the masked values to variance 1 and, by default, mean 0.

    Meant for a whole batch at once, over all devices: whitening each minibatch is
    another algorithm. Rewards are whitened with `shift_mean=False`: a shift would
    reward every token, and so length.

    Args:
        x: f32, any shape.
        mask: bool, same shape.
        shift_mean: False leaves the mean as it is.
        unbiased: divide the variance by n - 1, as TRL does, rather than by n.

    Returns:
        f32 like `x`, 0 outside the mask.

    >>> whiten(jnp.array([1.0, 3.0, 50.0]), jnp.array([True, True, False])).tolist()
    [-1.0, 1.0, 0.0]
    """
    mean = masked.mean(x, mask)
    var = masked.var(x, mask, unbiased=unbiased)
    scaled = (masked.clear(x, mask) - mean) * jax.lax.rsqrt(var + 1e-8)
    return masked.clear(scaled if shift_mean else scaled + mean, mask)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """Returns the share of the returns' variance that the critic explains.

    Args:
        values: f32[B, T], the critic's values.
        returns: f32[B, T], its targets.
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


__all__ = ["discounted_returns", "explained_variance", "gae", "whiten"]
