"""Preference objectives over single completions that were liked or not.

Metrics of liked ("chosen") and other ("rejected") completions are pairs (values, mask):
each is a mean over its own rows alone.
"""

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft import masked
from stagecraft.losses.pairs import check_positive, check_range
from stagecraft.losses.types import Metrics, Result


def kto(
    policy_logps: Array,
    ref_logps: Array,
    labels: Array,
    kl: Array,
    rows: Array | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, eq. 7 and 8).

    arxiv.org/abs/2402.01306. A completion is worth its reward against what the policy
    gains on average, with diminishing returns both ways.

    Args:
        policy_logps: f32[B], nats: sum of log p(token) over the completion.
        ref_logps: f32[B], the same under the frozen reference policy.
        labels: bool[B], True where the completion is desirable.
        kl: f32[], nats, at least 0: the reference point z, the policy's mean log-ratio
            on completions of other prompts. No gradient flows through it.
        rows: bool[B], False on rows of padding; None for none.
        beta: weight of the implied KL penalty.
        desirable_weight: the paper's lambda_D.
        undesirable_weight: lambda_U. The authors advise lambda_D n_D / (lambda_U n_U)
            between 1 and 1.33 for n_D desirable and n_U other completions.

    Returns:
        loss f32[B], not reduced; metrics: "kl" f32[B], and pairs (f32[B], bool[B]):
        "rewards/chosen", "rewards/rejected" (beta times the log-ratio to the
        reference), "logps/chosen", "logps/rejected".

    Raises:
        ValueError: when the shapes do not fit.
        UserError: for a hyper-parameter out of its range.

    >>> zero, labels = jnp.zeros(2), jnp.array([True, False])
    >>> kto(zero, zero, labels, jnp.float32(0.0))[0].tolist()  # nothing gained or lost
    [0.5, 0.5]
    """
    log_ratio, metrics = _start(policy_logps, ref_logps, labels, rows, beta)
    check_range(
        0,
        jnp.inf,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    kl = jax.lax.stop_gradient(kl)
    gain = beta * (log_ratio - kl)
    one = jnp.ones_like(gain)
    weight = jnp.where(labels, desirable_weight * one, undesirable_weight * one)
    loss = weight * jax.nn.sigmoid(jnp.where(labels, -gain, gain))
    return loss, metrics | {"kl": jnp.broadcast_to(kl, gain.shape)}


def bco(
    policy_logps: Array,
    ref_logps: Array,
    labels: Array,
    delta: Array,
    rows: Array | None = None,
    *,
    beta: float = 0.1,
) -> Result:
    """Binary classifier optimization (Jung et al. 2024).

    arxiv.org/abs/2404.04656. Classifies rewards as desirable or not, their running mean
    being the border.

    Args:
        policy_logps, ref_logps, labels, rows: as in `kto`.
        delta: f32[], running mean of the rewards of all completions. No gradient flows
            through it.
        beta: weight of the implied KL penalty.

    Returns:
        loss f32[B], not reduced; metrics as in `kto`, with "delta" in place of "kl".

    >>> zero, labels = jnp.zeros(2), jnp.array([True, False])
    >>> [round(float(x), 4) for x in bco(zero, zero, labels, jnp.float32(0.0))[0]]
    [0.6931, 0.6931]
    """
    log_ratio, metrics = _start(policy_logps, ref_logps, labels, rows, beta)
    delta = jax.lax.stop_gradient(delta)
    logit = beta * log_ratio - delta
    loss = -jax.nn.log_sigmoid(jnp.where(labels, logit, -logit))
    return loss, metrics | {"delta": jnp.broadcast_to(delta, loss.shape)}


def apo_zero_unpaired(
    policy_logps: Array,
    ref_logps: Array,
    labels: Array,
    rows: Array | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """Anchored preference optimization, zero, unpaired (D'Oosterlinck et al. 2024).

    arxiv.org/abs/2408.06266, eq. 7 with each completion on its own: KTO whose reference
    point is the reference policy itself. Arguments and metrics as in `kto`, without
    "kl".

    >>> zero, labels = jnp.zeros(2), jnp.array([True, False])
    >>> apo_zero_unpaired(zero, zero, labels)[0].tolist()
    [0.5, 0.5]
    """
    loss, metrics = kto(
        policy_logps,
        ref_logps,
        labels,
        jnp.zeros((), policy_logps.dtype),
        rows,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    return loss, {name: value for name, value in metrics.items() if name != "kl"}


def _start(
    policy_logps: Array,
    ref_logps: Array,
    labels: Array,
    rows: Array | None,
    beta: float,
) -> tuple[Array, Metrics]:
    """Checks the arrays of every loss here; returns log-ratios f32[B] and metrics."""
    rows = jnp.ones(policy_logps.shape, bool) if rows is None else rows
    masked.check_shapes(
        policy_logps=policy_logps, ref_logps=ref_logps, labels=labels, rows=rows
    )
    if policy_logps.ndim != 1 or labels.dtype != jnp.bool_:
        raise ValueError(
            f"policy_logps must be [B] and labels bool[B], got {policy_logps.shape} "
            f"and {labels.dtype}"
        )
    check_positive(beta=beta)
    log_ratio = policy_logps - ref_logps
    chosen, rejected = labels & rows, ~labels & rows
    return log_ratio, {
        "rewards/chosen": (beta * log_ratio, chosen),
        "rewards/rejected": (beta * log_ratio, rejected),
        "logps/chosen": (policy_logps, chosen),
        "logps/rejected": (policy_logps, rejected),
    }


LOSSES = (kto, bco, apo_zero_unpaired)
__all__ = [loss.__name__ for loss in LOSSES]
