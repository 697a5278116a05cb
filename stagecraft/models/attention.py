"""Attention, as functions of arrays.

`attention` is the only call of faster kernels: whole sequences, causal within segments.
`cached_attention` is its counterpart for decoding, new tokens against a cache.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft import sharding
from stagecraft.models import blockwise, kernels, linear

MASKED = blockwise.MASKED

# Chunks of rows in which XLA works, and the fewest rows worth one.
CHUNKS, LEAST = 4, 64
# Rows that splash attention takes at a time.
LANES = 128


def attention(
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    *,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    kernel: str = "xla",
    strict: bool = False,
) -> Array:
    """Computes causal attention within segments, softmax in float32.

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
        kernel: "auto", or one of `kernels`' table.
        strict: whether falling back from the kernel is a UserError.

    Returns:
        [B, T, H, C] in the dtype of `query`.
    """
    t, channels = query.shape[1], query.shape[3]
    scale = channels**-0.5 if scale is None else scale
    mesh = sharding.current_mesh()
    parts = mesh.shape["context"] if mesh and sharding.length_axis(t) else 1
    request = kernels.Request(t, channels, query.dtype.name, softcap, parts)
    choice = kernels.choose(kernel, request, strict=strict)
    window = window if window < t else 0
    span = f" in a window of {window}" if window else ""
    kernels.log_once(f"attention{span}", choice)
    run = functools.partial(
        KERNELS[choice.kernel], window=window, softcap=softcap, scale=scale
    )
    if choice.kernel == "xla" and parts == 1:
        return run(query, key, value, segments)
    return _on_each_device(run, query, key, value, segments, parts)


def cached_attention(
    query: Array,
    keys: Array,
    values: Array,
    visible: Array,
    *,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Array:
    """Computes attention of new tokens to a cache of keys and values.

    Args:
        query: [B, T, H, C]; T is 1 in decoding.
        keys: [B, K, S, C], S cache slots.
        values: [B, K, S, C].
        visible: bool[B, T, S], True where a slot may be read.
        softcap, scale: as in `attention`.

    Returns:
        [B, T, H, C] in the dtype of `query`.
    """
    scale = query.shape[3] ** -0.5 if scale is None else scale
    kernels.log_once("attention to a cache", kernels.Choice("xla", "the only one"))
    return _attend(query, keys, values, visible, softcap, scale)


def _attend(query, keys, values, visible, softcap, scale):
    """Attends: [B, T, H, C], 2 x [B, K, S, C], bool[B, T, S] -> [B, T, H, C]."""
    b, t, h, c = query.shape
    k = keys.shape[1]
    # Heads before tokens: both contractions are then batched matmuls, faster on a CPU
    # than any layout with heads inside.
    query = (query * scale).reshape(b, t, k, h // k, c).transpose(0, 2, 3, 1, 4)
    out = _mix(query, keys, values, visible, softcap)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mix(query, keys, values, visible, softcap):
    """[B, K, G, T, C], 2 x [B, K, S, C], bool[B, T, S] -> [B, K, G, T, C].

    Arrays of [T, S] are what attention costs, so they are few: exponentials are never
    divided by their sum (what they mix is), and they are all that is kept.
    """
    return _mix_forward(query, keys, values, visible, softcap)[0]


def _mix_forward(query, keys, values, visible, softcap):
    capped = linear.softcap(_product("bkgtc,bksc->bkgts", query, keys), softcap)
    scores = capped + jnp.where(visible, 0.0, MASKED)[:, None, None]
    exps = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = exps.sum(axis=-1, keepdims=True)
    mixed = _product("bkgts,bksc->bkgtc", exps.astype(values.dtype), values)
    out = (mixed / total).astype(query.dtype)
    saved = (query, keys, values, exps, total, out, capped if softcap else None)
    return out, saved


def _mix_backward(softcap, saved, d_out):
    query, keys, values, exps, total, out, capped = saved
    d_out = d_out.astype(jnp.float32) / total
    # Of the softmax: each score's gradient less their mean under the weights, which is
    # the product of the output with its gradient.
    mean = (d_out * out).sum(axis=-1, keepdims=True)
    d_out = d_out.astype(query.dtype)
    d_scores = exps * (_product("bkgtc,bksc->bkgts", d_out, values) - mean)
    if softcap:
        d_scores = d_scores * (1 - jnp.square(capped / softcap))
    d_scores = d_scores.astype(query.dtype)
    d_query = _product("bkgts,bksc->bkgtc", d_scores, keys)
    d_keys = _of_keys(query, d_scores)
    d_values = _of_keys(d_out, exps.astype(query.dtype))
    return (
        d_query.astype(query.dtype),
        d_keys.astype(keys.dtype),
        d_values.astype(values.dtype),
        None,
    )


_mix.defvjp(_mix_forward, _mix_backward)


def _of_keys(rows, weights):
    """[B, K, G, T, C], [B, K, G, T, S] -> f32[B, K, S, C].

    As [C, S] until the end: otherwise XLA transposes the weights, the larger factor.
    """
    product = _product("bkgtc,bkgts->bkcs", rows, weights)
    return jax.lax.optimization_barrier(product).swapaxes(2, 3)


def _product(subscripts, *operands):
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _xla(query, key, value, segments, *, window, softcap, scale, start=None):
    """Attends in chunks of rows, each only to the keys up to its end: half the work.

    Where queries are a part of the row, `start` is the place of the first: no chunks
    then, since that place is known only as it runs.
    """
    if start is not None:
        return _part(query, key, value, segments, start, window, softcap, scale)
    t = segments.shape[1]
    chunks = max(1, min(CHUNKS, t // LEAST))
    edges = [t * i // chunks for i in range(chunks + 1)]
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    index, out = jnp.arange(t), []
    for start, end in itertools.pairwise(edges):
        rows, first = slice(start, end), max(0, start - window + 1) if window else 0
        seen = slice(first, end)
        visible = segments[:, rows, None] == segments[:, None, seen]
        visible &= index[rows, None] >= index[None, seen]
        if window:
            visible &= index[rows, None] - index[None, seen] < window
        keys, values = key[:, :, seen], value[:, :, seen]
        out.append(_attend(query[:, rows], keys, values, visible, softcap, scale))
    return jnp.concatenate(out, axis=1) if chunks > 1 else out[0]


def _part(query, key, value, segments, start, window, softcap, scale):
    """Attends from a part of the row to all of it."""
    own = jax.lax.dynamic_slice_in_dim(segments, start, query.shape[1], axis=1)
    apart = start + jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])
    visible = own[:, :, None] == segments[:, None, :]
    visible &= (apart >= 0) & (apart < window) if window else apart >= 0
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    return _attend(query, key, value, visible, softcap, scale)


def _cudnn(query, key, value, segments, *, window, softcap, scale):
    """Runs cuDNN's flash attention, which takes segments only as a mask."""
    del softcap  # not supported: see kernels.missing
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=same,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


def _splash(query, key, value, segments, *, window, softcap, scale, interpret=False):
    """Runs JAX's Pallas kernel for TPUs, one row of the batch after the other."""
    # Imported here: Pallas for TPUs takes a second that no other machine needs.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    t, heads = query.shape[1:3]
    room = -t % LANES
    if room:  # a segment of its own, so that each of its rows sees something
        pad = ((0, 0), (0, room), (0, 0), (0, 0))
        query, key, value = (jnp.pad(x, pad) for x in (query, key, value))
        segments = jnp.pad(segments, ((0, 0), (0, room)), constant_values=-1)
    shape = (t + room, t + room)
    if window:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = splash.CausalMask(shape)
    run = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    query = query * jnp.asarray(scale, query.dtype)
    out = jax.vmap(lambda q, k, v, s: run(q, k, v, splash.SegmentIds(s, s)))(
        *(x.swapaxes(1, 2) for x in (query, key, value)), segments
    )
    return out.swapaxes(1, 2)[:, :t].astype(query.dtype)


KERNELS = dict(xla=_xla, blockwise=blockwise.attention, cudnn=_cudnn, splash=_splash)


def _on_each_device(run, query, key, value, segments, parts):
    """Runs a kernel under a mesh on each device's own rows and heads.

    Over `context` each device has the queries of a part of the row and collects the
    keys and values of all parts, whose gradients go back as sums.

    Args:
        parts: of a row, that lie on different devices.
    """
    if sharding.current_mesh() is None:
        return run(query, key, value, segments)
    tokens = "length" if parts > 1 else None

    def on_device(query, key, value, segments):
        if parts == 1:
            return run(query, key, value, segments)
        key, value = (
            jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (key, value)
        )
        start = jax.lax.axis_index("context") * query.shape[1]
        return run(query, key, value, segments, start=start)

    query_spec, key_spec = (
        sharding.spec(("batch", tokens, name, None)) for name in ("heads", "kv_heads")
    )
    return jax.shard_map(
        on_device,
        in_specs=(query_spec, key_spec, key_spec, sharding.spec(("batch", None))),
        out_specs=query_spec,
        # Nothing but keys and values crosses devices, and not every kernel can say so.
        check_vma=False,
    )(query, key, value, segments)
