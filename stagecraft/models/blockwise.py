"""Attention block by block, in plain XLA: no [T, T] array ever exists.

The softmax is accumulated over blocks of keys (Milakov, Gimelshein 2018), and its
gradient recomputes the scores from one saved number a query (Dao et al. 2022). Blocks
that no query sees, after it or out of its window, are skipped.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft.models import linear

# Finite, so that a row that may attend to nothing gives a mean and not NaN.
MASKED = -1e30
# Measured on two cores, from 512 to 4096 tokens.
BLOCK = 128


def attention(
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    *,
    window: int,
    softcap: float,
    scale: float,
    block: int = BLOCK,
) -> Array:
    """Computes causal attention within segments.

    Args:
        query: [B, T, H, C].
        key, value: [B, T, K, C], K dividing H.
        segments: i32[B, T].
        window, softcap, scale: as in `attention.attention`.
        block: queries, and keys, of a block.

    Returns:
        [B, T, H, C] in the dtype of `query`.
    """
    b, t, h, c = query.shape
    k = key.shape[2]
    block = min(block, t)
    room = -t % block
    if room:
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))) for x in (query, key, value)
        )
        segments = jnp.pad(segments, ((0, 0), (0, room)), constant_values=-1)
    query = query.reshape(b, t + room, k, h // k, c).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    out = _attend(query, key, value, segments, (window, softcap, scale, block))
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t + room, h, c)[:, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, segments, settings):
    """[B, K, G, T, C], 2 x [B, K, T, C], i32[B, T] -> [B, K, G, T, C]."""
    return _forward(query, key, value, segments, settings)[0]


def _forward(query, key, value, segments, settings):
    """Returns the output and what the gradient needs; G = H / K queries share a key."""
    window, _, _, block = settings
    size = query.shape[:3]

    def one(row):
        q = _cut(query, row, block, 3)

        def visit(column, state):
            top, total, mixed = state
            scores, _ = _scores(q, key, segments, row, column, settings)
            new = jnp.maximum(top, scores.max(axis=-1))
            decay = jnp.exp(top - new)
            weights = jnp.exp(scores - new[..., None])
            v = _cut(value, column, block, 2)
            more = _product("bkgts,bksc->bkgtc", weights.astype(v.dtype), v)
            mixed = mixed * decay[..., None] + more
            return new, total * decay + weights.sum(axis=-1), mixed

        start = (
            jnp.full((*size, block), MASKED, jnp.float32),
            jnp.zeros((*size, block), jnp.float32),
            jnp.zeros((*size, block, query.shape[-1]), jnp.float32),
        )
        # A query's own block comes last: sums over masked keys alone decay to 0 there,
        # since every token sees itself.
        first = _first(row, window, block)
        top, total, mixed = jax.lax.fori_loop(first, row + 1, visit, start)
        return (mixed / total[..., None]).astype(query.dtype), top + jnp.log(total)

    out, log_z = jax.lax.map(one, jnp.arange(query.shape[3] // block))
    out, log_z = _join(out, 3), _join(log_z, 3)
    return out, (query, key, value, segments, out, log_z)


def _backward(settings, saved, d_out):
    query, key, value, segments, out, log_z = saved
    window, softcap, scale, block = settings
    inner = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)

    def one(carry, row):
        q, d_o = (_cut(x, row, block, 3) for x in (query, d_out))
        z, product = (_cut(x, row, block, 3) for x in (log_z, inner))

        def visit(column, state):
            d_q, d_key, d_value = state
            k, v = (_cut(x, column, block, 2) for x in (key, value))
            scores, slope = _scores(q, key, segments, row, column, settings)
            weights = jnp.exp(scores - z[..., None])
            d_weights = _product("bkgtc,bksc->bkgts", d_o, v)
            d_scores = weights * (d_weights - product[..., None]) * slope * scale
            d_scores = d_scores.astype(q.dtype)
            d_q = d_q + _product("bkgts,bksc->bkgtc", d_scores, k)
            d_k = _product("bkgts,bkgtc->bksc", d_scores, q)
            d_v = _product("bkgts,bkgtc->bksc", weights.astype(q.dtype), d_o)
            d_key = _add(d_key, d_k, column, block)
            d_value = _add(d_value, d_v, column, block)
            return d_q, d_key, d_value

        first = _first(row, window, block)
        state = (jnp.zeros(q.shape, jnp.float32), *carry)
        d_q, *carry = jax.lax.fori_loop(first, row + 1, visit, state)
        return tuple(carry), d_q.astype(query.dtype)

    start = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    rows = jnp.arange(query.shape[3] // block)
    (d_key, d_value), d_query = jax.lax.scan(one, start, rows)
    d_query = _join(d_query, 3)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)


def _scores(q, key, segments, row, column, settings):
    """Returns f32[B, K, G, t, s] scores of one block, and the soft-cap's slope."""
    window, softcap, scale, block = settings
    k = _cut(key, column, block, 2)
    scores = _product("bkgtc,bksc->bkgts", q * jnp.asarray(scale, q.dtype), k)
    scores = linear.softcap(scores, softcap)
    slope = 1 - jnp.square(scores / softcap) if softcap else 1.0
    index = jnp.arange(block)
    apart = (row - column) * block + index[:, None] - index[None, :]
    visible = (apart >= 0) & (apart < window) if window else apart >= 0
    own, other = (_cut(segments, i, block, 1) for i in (row, column))
    visible = visible & (own[:, :, None] == other[:, None, :])
    return jnp.where(visible[:, None, None], scores, MASKED), slope


def _first(row, window, block):
    """Returns the first block of keys of which a block of queries sees anything."""
    if not window:
        return jnp.zeros_like(row)
    return jnp.maximum(row * block - (window - 1), 0) // block


def _product(subscripts, *operands):
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _cut(x, index, block, axis):
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _add(x, more, index, block):
    old = _cut(x, index, block, 2)
    return jax.lax.dynamic_update_slice_in_dim(x, old + more, index * block, 2)


def _join(blocks, axis):
    """Joins [blocks, ...] along the axis that was cut."""
    blocks = jnp.moveaxis(blocks, 0, axis)
    shape = list(blocks.shape)
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    return blocks.reshape(shape)
