"""Attention, as functions of arrays.

`attention` is the one seam for faster kernels: whole sequences, causal within segments.
`cached_attention` is its counterpart for decoding, new tokens against a cache.
"""

import jax
import jax.numpy as jnp

from stagecraft.models import linear

# Finite, so that a row with nothing to attend to gives a mean and not NaN.
MASKED = -1e30


def attention(query, key, value, segments, *, window=0, softcap=0.0, scale=None):
    """Causal attention within segments, softmax in float32.

    A token sees itself and earlier tokens (by index) with the same segment number.
    Padding is a segment like any other (number 0): it is finite, and no real token
    sees it.

    Args:
        query: [B, T, H, C].
        key: [B, T, K, C], K dividing H; head h reads key/value head h // (H / K).
        value: [B, T, K, C].
        segments: i32[B, T].
        window: a token sees itself and the window - 1 before it; 0 for all of them.
        softcap: c in c tanh(score / c); 0 for none.
        scale: multiplies the scores; None for C^-0.5.

    Returns:
        [B, T, H, C] in the dtype of `query`.
    """
    index = jnp.arange(segments.shape[1])
    visible = (segments[:, :, None] == segments[:, None, :]) & (
        index[:, None] >= index[None, :]
    )
    if window:
        visible &= index[:, None] - index[None, :] < window
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    return _attend(query, key, value, visible, softcap, scale)


def cached_attention(query, keys, values, visible, *, softcap=0.0, scale=None):
    """Attention of new tokens to a cache of keys and values.

    Args:
        query: [B, T, H, C]; T is 1 in decoding.
        keys: [B, K, S, C], S cache slots.
        values: [B, K, S, C].
        visible: bool[B, T, S], True where a slot may be read.
        softcap, scale: as in `attention`.

    Returns:
        [B, T, H, C] in the dtype of `query`.
    """
    return _attend(query, keys, values, visible, softcap, scale)


def _attend(query, keys, values, visible, softcap, scale):
    """[B, T, H, C], 2 x [B, K, S, C], bool[B, T, S] -> [B, T, H, C]."""
    b, t, h, c = query.shape
    k = keys.shape[1]
    # Heads before tokens: both contractions are then batched matmuls, faster on a CPU
    # than any layout with heads inside. The mask is added, since an addition stores
    # nothing for the backward pass.
    scale = c**-0.5 if scale is None else scale
    query = (query * scale).reshape(b, t, k, h // k, c).transpose(0, 2, 3, 1, 4)
    bias = jnp.where(visible, 0.0, MASKED)[:, None, None]
    scores = jnp.einsum(
        "bkgtc,bksc->bkgts", query, keys, preferred_element_type=jnp.float32
    )
    scores = linear.softcap(scores, softcap)
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgts,bksc->bkgtc", weights, values)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)
