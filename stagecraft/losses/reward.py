"""Reward modelling from comparisons."""

import jax
import jax.numpy as jnp


def bradley_terry(rewards, *, margin=None, centering=0.0):
    """Bradley-Terry loss on reward differences (Ouyang et al. 2022, eq. 1).

    arxiv.org/abs/2203.02155. The margin is that of Llama 2 (arxiv.org/abs/2307.09288,
    eq. 2); the centering term keeps the rewards, which the loss only fixes up to a
    constant, around zero (Eisenstein et al. 2023, arxiv.org/abs/2312.09244): it squares
    the pair's sum.

    Args:
        rewards: f32[B, 2]; column 0 scores the chosen response, column 1 the rejected.
        margin: f32[B] or a number that the difference should exceed; None for 0.
        centering: weight of (chosen + rejected)^2; 0.01 is usual when it is on.

    Returns:
        loss f32[B], not reduced; metrics {"accuracy", "margin"}, each f32[B]. A tie
        counts as wrong, and both metrics ignore `margin`.

    Raises:
        ValueError: when `rewards` is not [B, 2] or `margin` is an array of another
            shape than [B].

    >>> loss, metrics = bradley_terry(jnp.array([[3.0, 3.0]]))  # a coin toss: log 2
    >>> round(float(loss[0]), 4), float(metrics["accuracy"][0])
    (0.6931, 0.0)
    """
    if rewards.ndim != 2 or rewards.shape[1] != 2:
        raise ValueError(f"rewards must be [B, 2], got {rewards.shape}")
    if (
        jnp.ndim(margin if margin is not None else 0)
        and margin.shape != rewards.shape[:1]
    ):
        raise ValueError(f"margin {margin.shape} must be [B] beside {rewards.shape}")
    difference = rewards[:, 0] - rewards[:, 1]  # [B]
    loss = -jax.nn.log_sigmoid(difference - (0.0 if margin is None else margin))
    loss += centering * jnp.square(rewards[:, 0] + rewards[:, 1])
    accuracy = (difference > 0).astype(jnp.float32)
    return loss, {"accuracy": accuracy, "margin": difference}
