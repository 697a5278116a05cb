"""Attention and rotary positions, as functions of arrays.

`attention` is the one seam for faster kernels: whole sequences, causal within segments.
`cached_attention` is its counterpart for decoding, new tokens against a cache.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to attend to gives a mean and not NaN.
MASKED = -1e30


def rope(positions, channels: int, theta: float):
    """Cosines and sines of rotary position embedding (Su et al. 2021, eq. 15).

    Args:
        positions: i32[B, T].
        channels: C, channels per head.
        theta: base of the wavelengths.

    Returns:
        Two f32[B, T, 1, C/2], for `rotate`.
    """
    exponents = jnp.arange(0, channels, 2, dtype=jnp.float32) / channels
    angles = positions[..., None, None].astype(jnp.float32) * theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, angles):
    """Rotates channel pairs (i, i + C/2), Llama's pairing; x is [B, T, H, C]."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attention(query, key, value, segments):
    """Causal attention within segments, softmax in float32.

    A token sees itself and earlier tokens (by index) with the same segment number.
    Padding is a segment like any other (number 0): it is finite, and no real token
    sees it.

    Args:
        query: [B, T, H, C].
        key: [B, T, K, C], K dividing H; head h reads key/value head h // (H / K).
        value: [B, T, K, C].
        segments: i32[B, T].

    Returns:
        [B, T, H, C] in the dtype of `query`.
    """
    index = jnp.arange(segments.shape[1])
    visible = (segments[:, :, None] == segments[:, None, :]) & (
        index[:, None] >= index[None, :]
    )
    return _attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), visible)


def cached_attention(query, keys, values, visible):
    """Attention of new tokens to a cache of keys and values.

    Args:
        query: [B, T, H, C]; T is 1 in decoding.
        keys: [B, K, S, C], S cache slots.
        values: [B, K, S, C].
        visible: bool[B, T, S], True where a slot may be read.

    Returns:
        [B, T, H, C] in the dtype of `query`.
    """
    return _attend(query, keys, values, visible)


def _attend(query, keys, values, visible):
    """[B, T, H, C], 2 x [B, K, S, C], bool[B, T, S] -> [B, T, H, C]."""
    b, t, h, c = query.shape
    k = keys.shape[1]
    # Heads before tokens: both contractions are then batched matmuls, faster on a CPU
    # than any layout with heads inside. The mask is added, since an addition stores
    # nothing for the backward pass.
    query = (query * c**-0.5).reshape(b, t, k, h // k, c).transpose(0, 2, 3, 1, 4)
    bias = jnp.where(visible, 0.0, MASKED)[:, None, None]
    scores = jnp.einsum(
        "bkgtc,bksc->bkgts", query, keys, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgts,bksc->bkgtc", weights, values)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)
