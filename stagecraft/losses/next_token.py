"""Next-token prediction, and the one place where targets are shifted."""

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft import masked
from stagecraft.losses.types import Result


def _drop_first(x):
    """Moves every column one step left; the last one becomes zero (False)."""
    return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)


def shift(ids: Array, mask: Array, segments: Array) -> tuple[Array, Array]:
    """Aligns each token with the position whose output predicts it.

    The mask moves with the targets, never with the outputs. The first token of a
    document has no target position: the token before it belongs to another document.

    Args:
        ids: i32[..., T] token ids.
        mask: bool[..., T], True where the token itself is a target.
        segments: i32[..., T], one number per packed document from 1; 0 is padding.

    Returns:
        targets i32[..., T]: `ids` one step ahead (the last column is 0), and
        target_mask bool[..., T]: True where position t predicts a token to learn in
        its own document; the last column is False.

    >>> ids, mask = jnp.array([[5, 6, 7, 8]]), jnp.array([[True, True, True, True]])
    >>> targets, target_mask = shift(ids, mask, jnp.array([[1, 1, 2, 2]]))
    >>> targets.tolist(), target_mask.tolist()
    ([[6, 7, 8, 0]], [[True, False, True, False]])
    """
    masked.check_shapes(ids=ids, mask=mask, segments=segments)
    ahead = _drop_first(segments)  # 0 after the last column, so never a match below
    return _drop_first(ids), _drop_first(mask) & (segments == ahead) & (ahead > 0)


def next_token(logps: Array) -> Result:
    """Negative log-likelihood of each target token.

    Args:
        logps: f32[B, T], nats: log p(target) at each position.

    Returns:
        loss f32[B, T] (not reduced; meaningful under the target mask), metrics {}.
    """
    return -logps, {}


def dft(logps: Array) -> Result:
    """Dynamic fine-tuning: a token's loss times its own probability (Wu et al. 2025).

    arxiv.org/abs/2508.05629. Maximum likelihood weighs a token's gradient by 1/p; the
    factor p, through which no gradient flows, takes that back, so that tokens that the
    model finds absurd have little gradient.

    Args:
        logps: f32[B, T], nats: log p(target) at each position.

    Returns:
        loss f32[B, T] (not reduced; meaningful under the target mask), metrics {}.

    >>> loss, _ = dft(jnp.log(jnp.array([[0.5, 1e-9]])))  # log 2 / 2, and next to none
    >>> [round(float(x), 4) for x in loss[0]]
    [0.3466, 0.0]
    """
    return -jax.lax.stop_gradient(jnp.exp(jnp.minimum(logps, 0.0))) * logps, {}


def z_loss(log_z: Array) -> Result:
    """Squared log-normaliser of the softmax (PaLM, Chowdhery et al. 2022).

    arxiv.org/abs/2204.02311. To be added to another loss, there by 1e-4: it keeps
    logits, which the likelihood only fixes up to a constant, from drifting.

    Args:
        log_z: f32[B, T], nats: logsumexp of the logits at each position.

    Returns:
        loss f32[B, T] (not reduced; meaningful under the target mask); metrics
        {"log_z": f32[B, T]}.

    >>> z_loss(jnp.array([[0.0, -2.0]]))[0].tolist()  # 0: the logits are log-probs
    [[0.0, 4.0]]
    """
    return jnp.square(log_z), {"log_z": log_z}


def sequence_logps(logps: Array, target_mask: Array) -> Array:
    """Sums log-probabilities over the tokens of each completion (no mean).

    Args:
        logps: f32[..., T], nats: log p(target) at each position.
        target_mask: bool[..., T], the positions that belong to the completion.

    Returns:
        f32[...], nats; 0 for a row without completion tokens.
    """
    return masked.sum(logps, target_mask, axis=-1)


LOSSES = (next_token, dft, z_loss)
__all__ = [*(loss.__name__ for loss in LOSSES), "sequence_logps", "shift"]
