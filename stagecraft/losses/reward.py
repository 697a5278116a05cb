"""Reward modelling from comparisons."""

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft import masked
from stagecraft.losses.pairs import check_range
from stagecraft.losses.types import Result


def bradley_terry(
    rewards: Array,
    *,
    margin: Array | float | None = None,
    preference: Array | None = None,
    centering: float = 0.0,
) -> Result:
    """Bradley-Terry loss on reward differences (Ouyang et al. 2022, eq. 1).

    arxiv.org/abs/2203.02155. The margin is that of Llama 2 (arxiv.org/abs/2307.09288,
    eq. 2); soft labels, an AI judge's probability in place of a verdict, are those of
    Bai et al. 2022 (arxiv.org/abs/2212.08073); the centering term keeps the rewards,
    which the loss only fixes up to a constant, around zero (Eisenstein et al. 2023,
    arxiv.org/abs/2312.09244): it squares the pair's sum.

    Args:
        rewards: f32[B, 2]; column 0 scores the chosen response, column 1 the rejected.
        margin: f32[B] or a number that the difference should exceed; None for 0. With
            soft labels, whichever response wins should win by it.
        preference: f32[B], the probability that column 0 is the better one; None for 1.
        centering: weight of (chosen + rejected)^2; 0.01 is usual when it is on.

    Returns:
        loss f32[B], not reduced; metrics {"accuracy", "margin"}, each f32[B]. A tie
        counts as wrong, and both metrics ignore `margin` and `preference`.

    Raises:
        ValueError: when `rewards` is not [B, 2], or `margin` or `preference` an array
            of another shape than [B].
        UserError: when `centering` is negative.

    >>> loss, metrics = bradley_terry(jnp.array([[3.0, 3.0]]))  # a coin toss: log 2
    >>> round(float(loss[0]), 4), float(metrics["accuracy"][0])
    (0.6931, 0.0)
    """
    if rewards.ndim != 2 or rewards.shape[1] != 2:
        raise ValueError(f"rewards must be [B, 2], got {rewards.shape}")
    for name, array in (("margin", margin), ("preference", preference)):
        shape = jnp.shape(0 if array is None else array)
        if shape and shape != rewards.shape[:1]:
            raise ValueError(f"{name} {shape} must be [B] beside {rewards.shape}")
    check_range(0, jnp.inf, centering=centering)
    difference = rewards[:, 0] - rewards[:, 1]  # [B]
    margin = 0.0 if margin is None else margin
    loss = -jax.nn.log_sigmoid(difference - margin)
    if preference is not None:
        other = -jax.nn.log_sigmoid(-difference - margin)
        loss = preference * loss + (1 - preference) * other
    loss += centering * jnp.square(rewards[:, 0] + rewards[:, 1])
    accuracy = (difference > 0).astype(jnp.float32)
    return loss, {"accuracy": accuracy, "margin": difference}


def bradley_terry_ranked(
    rewards: Array, present: Array, *, centering: float = 0.0
) -> Result:
    """Bradley-Terry over all pairs of one prompt's ranked responses.

    Ouyang et al. 2022, arxiv.org/abs/2203.02155, eq. 1 in full: the k responses of a
    prompt stay in one batch element, whose k(k - 1)/2 pairs weigh 1 together. Taken as
    separate rows they would count a prompt once for each pair, and overfit.

    Args:
        rewards: f32[B, K], scores of the responses, the best first.
        present: bool[B, K], True where there is a response; gaps may be anywhere.
        centering: weight of the squared sum of each pair's rewards.

    Returns:
        loss f32[B], not reduced, 0 for a prompt with fewer than two responses; metrics
        {"accuracy", "margin"}: means over each prompt's pairs f32[B], with the mask of
        the prompts that have any. A tie counts as wrong.

    Raises:
        ValueError: when the shapes differ or are not [B, K].
        UserError: when `centering` is negative.

    >>> loss, _ = bradley_terry_ranked(jnp.zeros((1, 4)), jnp.ones((1, 4), bool))
    >>> round(float(loss[0]), 4)  # six coin tosses, each with a sixth of the weight
    0.6931
    """
    masked.check_shapes(rewards=rewards, present=present)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [B, K], got {rewards.shape}")
    check_range(0, jnp.inf, centering=centering)
    rewards = masked.clear(rewards, present)
    better, worse = rewards[:, :, None], rewards[:, None, :]
    shape = (*rewards.shape, rewards.shape[1])  # [B, better, worse]
    better, worse = jnp.broadcast_to(better, shape), jnp.broadcast_to(worse, shape)
    pairs = present[:, :, None] & present[:, None, :]
    order = jnp.triu(jnp.ones(shape[1:], bool), k=1)
    pairs = pairs & jnp.broadcast_to(order, shape)
    difference = better - worse
    loss = -jax.nn.log_sigmoid(difference)
    loss += centering * jnp.square(better + worse)
    prompts = pairs.any((1, 2))

    def mean(x):
        return masked.mean(x, pairs, axis=(1, 2))

    return mean(loss), {
        "accuracy": (mean(difference > 0), prompts),
        "margin": (mean(difference), prompts),
    }


LOSSES = (bradley_terry, bradley_terry_ranked)
__all__ = [loss.__name__ for loss in LOSSES]
