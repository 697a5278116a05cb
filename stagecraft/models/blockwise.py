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
    start: Array | int = 0,
) -> Array:
    """Computes causal attention within segments.

    Args:
        query: [B, T, H, C].
        key, value: [B, S, K, C], K dividing H; S is T but where queries are a part.
        segments: i32[B, S].
        window, softcap, scale: as in `attention.attention`.
        block: queries, and keys, of a block.
        start: the place of the first query among the keys.

    Returns:
        [B, T, H, C] in the dtype of `query`.
    """
    b, t, h, c = query.shape
    k = key.shape[2]
    block = min(block, t)
    own = jax.lax.dynamic_slice_in_dim(segments, start, t, axis=1)
    query, own = _filled(query, block), _filled(own, block, -1)
    key, value = _filled(key, block), _filled(value, block)
    segments = _filled(segments, block, -1)
    query = query.reshape(b, -1, k, h // k, c).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    marks = own, segments, jnp.int32(start)
    out = _attend(query, key, value, marks, (window, softcap, scale, block))
    return out.transpose(0, 3, 1, 2, 4).reshape(b, -1, h, c)[:, :t]


def _filled(x, block, value=0):
    """Pads the tokens of [B, T, ...] to whole blocks."""
    room = ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, room, constant_values=value) if room[1][1] else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, marks, settings):
    """[B, K, G, T, C], 2 x [B, K, S, C] -> [B, K, G, T, C].

    `marks` are the segments of queries and of keys, i32[B, T] and i32[B, S], and the
    place of the first query, i32.
    """
    return _forward(query, key, value, marks, settings)[0]


def _forward(query, key, value, marks, settings):
    """Returns the output and what the gradient needs; G = H / K queries share a key."""
    block, size = settings[-1], query.shape[:3]

    def one(row):
        q = _cut(query, row, block, 3)

        def visit(column, state):
            top, total, mixed = state
            scores, _ = _scores(q, key, marks, row, column, settings)
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
        first, last = _seen(row, marks, settings)
        top, total, mixed = jax.lax.fori_loop(first, last + 1, visit, start)
        return (mixed / total[..., None]).astype(query.dtype), top + jnp.log(total)

    out, log_z = jax.lax.map(one, jnp.arange(query.shape[3] // block))
    out, log_z = _join(out, 3), _join(log_z, 3)
    return out, (query, key, value, marks, out, log_z)


def _backward(settings, saved, d_out):
    query, key, value, marks, out, log_z = saved
    _, _, scale, block = settings
    inner = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)

    def one(carry, row):
        q, d_o = (_cut(x, row, block, 3) for x in (query, d_out))
        z, product = (_cut(x, row, block, 3) for x in (log_z, inner))

        def visit(column, state):
            d_q, d_key, d_value = state
            k, v = (_cut(x, column, block, 2) for x in (key, value))
            scores, slope = _scores(q, key, marks, row, column, settings)
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

        first, last = _seen(row, marks, settings)
        state = (jnp.zeros(q.shape, jnp.float32), *carry)
        d_q, *carry = jax.lax.fori_loop(first, last + 1, visit, state)
        return tuple(carry), d_q.astype(query.dtype)

    start = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    rows = jnp.arange(query.shape[3] // block)
    (d_key, d_value), d_query = jax.lax.scan(one, start, rows)
    d_query = _join(d_query, 3)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), (None,) * 3


_attend.defvjp(_forward, _backward)


def _scores(q, key, marks, row, column, settings):
    """Returns f32[B, K, G, t, s] scores of one block, and the soft-cap's slope."""
    window, softcap, scale, block = settings
    own, others, start = marks
    k = _cut(key, column, block, 2)
    scores = _product("bkgtc,bksc->bkgts", q * jnp.asarray(scale, q.dtype), k)
    scores = linear.softcap(scores, softcap)
    slope = 1 - jnp.square(scores / softcap) if softcap else 1.0
    index = jnp.arange(block)
    apart = start + (row - column) * block + index[:, None] - index[None, :]
    visible = (apart >= 0) & (apart < window) if window else apart >= 0
    own, others = _cut(own, row, block, 1), _cut(others, column, block, 1)
    visible = visible & (own[:, :, None] == others[:, None, :])
    return jnp.where(visible[:, None, None], scores, MASKED), slope


def _seen(row, marks, settings):
    """Returns the first and last block of keys of which a block of queries sees any."""
    window, block = settings[0], settings[-1]
    begin = marks[2] + row * block
    last = jnp.minimum((begin + block - 1) // block, marks[1].shape[1] // block - 1)
    if not window:
        return jnp.zeros_like(last), last
    return jnp.maximum(begin - (window - 1), 0) // block, last


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
