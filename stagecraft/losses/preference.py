"""Preference objectives: pairs of completions, no reward model, no sampling."""

import jax
import jax.numpy as jnp

from stagecraft import masked


def dpo(policy_logps, ref_logps, *, beta=0.1, label_smoothing=0.0):
    """Direct preference optimization (Rafailov et al. 2023, eq. 7).

    arxiv.org/abs/2305.18290. Label smoothing is the conservative variant for labels
    flipped with a known probability (Mitchell 2023, "A note on DPO with noisy
    preferences").

    Args:
        policy_logps: f32[B, 2], nats: sum of log p(token) over the completion; column 0
            is the chosen completion, column 1 the rejected one.
        ref_logps: f32[B, 2], the same under the frozen reference policy.
        beta: weight of the implied KL penalty; larger stays nearer the reference.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss f32[B], not reduced; metrics, each f32[B]: "rewards/chosen",
        "rewards/rejected" (beta times the log-ratio to the reference),
        "rewards/margins", "rewards/accuracies" (a tie counts as wrong), "logps/chosen",
        "logps/rejected".

    Raises:
        ValueError: when the two arrays are not both [B, 2].

    >>> same = jnp.array([[-5.0, -9.0]])
    >>> loss, _ = dpo(same, same)  # policy and reference agree, a coin toss: log 2
    >>> round(float(loss[0]), 4)
    0.6931
    """
    masked.check_shapes(policy_logps=policy_logps, ref_logps=ref_logps)
    if policy_logps.ndim != 2 or policy_logps.shape[1] != 2:
        raise ValueError(f"policy_logps must be [B, 2], got {policy_logps.shape}")
    rewards = beta * (policy_logps - ref_logps)  # [B, 2]
    margins = rewards[:, 0] - rewards[:, 1]  # [B]
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(margins)
    loss -= label_smoothing * jax.nn.log_sigmoid(-margins)
    return loss, {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).astype(jnp.float32),
        "logps/chosen": policy_logps[:, 0],
        "logps/rejected": policy_logps[:, 1],
    }
