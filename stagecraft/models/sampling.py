"""Sampling from the decoder: prefill, then one token at a time from a cache.

The blocks are those of training; only how tokens attend to each other differs, and that
is passed to them as a function.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft import sharding
from stagecraft.errors import UserError
from stagecraft.models import attention, draws
from stagecraft.models.transformer import Transformer

# A batch is halved, as its rows end, where that pays for compiling one more loop of
# tokens: for long answers, twice at most, and to no fewer rows a device than these,
# which share one reading of the weights.
HALVED_FROM = 64  # tokens of the longest answer
HALVINGS = 2
FEWEST_ROWS = 4


class Sample(NamedTuple):
    """Completions of a batch of prompts.

    Attributes:
        tokens: i32[B, N], 0 after the end of a row.
        mask: bool[B, N], True through the stop token.
        logps: f32[B, N] log-probability of each token in nats, under the whole
            distribution at the temperature (before top-k and top-p); 0 after the end.
        ended: bool[B], True where a stop token came within N tokens.
    """

    tokens: Array
    mask: Array
    logps: Array
    ended: Array


class SamplingParams(NamedTuple):
    """How completions are sampled.

    Attributes:
        max_new_tokens: N.
        stop_ids: the tokens that end a row, which keeps them; () ends none early.
        temperature: divides the logits; 0 takes the most likely token, and log-probs
            are then at temperature 1.
        top_k: sample from the k most likely tokens only; 0 is off.
        top_p: then from the fewest of these that reach this probability (Holtzman et
            al. 2020); 1 is off.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def validate(self) -> "SamplingParams":
        """Returns itself, or raises a UserError that names the value out of range."""
        for name, ok, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (off)"),
        ):
            if not ok:
                value = getattr(self, name)
                raise UserError(f"{name}: expected {expected}, got {value}")
        return self


@functools.partial(jax.jit, static_argnames=(*SamplingParams._fields, "samples"))
def generate(
    model: Transformer,
    prompt_ids: Array,
    prompt_mask: Array,
    key: Array,
    *,
    samples: int = 1,
    **settings,
) -> Sample:
    """Samples completions; compiled once for each prompt shape and setting.

    A row's randomness comes from (key, step, row), so the result does not depend on the
    mesh. Rows that have ended leave a batch of long answers by halves; work stops when
    every row has ended.

    Args:
        prompt_ids: i32[B, P] left-padded prompts.
        prompt_mask: bool[B, P], True on real tokens.
        key: a random key.
        samples: G, completions of each prompt, which share its prefill.
        **settings: fields of `SamplingParams`.

    Returns:
        A `Sample` of B * G rows, the samples of one prompt next to each other.

    Raises:
        UserError: a setting is out of its range.
    """
    params = SamplingParams(**settings).validate()
    if samples < 1:
        raise UserError(f"samples: expected 1 or more, got {samples}")
    state, cache = _begin(model, prompt_ids, prompt_mask, key, samples, params)
    return _decode_by_halves(model, state, cache, key, params, HALVINGS)


def stream(
    model: Transformer,
    prompt_ids: Array,
    prompt_mask: Array,
    key: Array,
    *,
    every: int = 8,
    **settings,
) -> Iterator[Sample]:
    """Yields what `generate` returns as it grows.

    The tokens are the same, whatever `every` is: the number of them between two yields.
    """
    params = SamplingParams(**settings).validate()
    state, cache = _begin_jit(model, prompt_ids, prompt_mask, key, 1, params)
    until = 1
    yield state.sample
    while until < params.max_new_tokens and not state.sample.ended.all():
        until = min(until + every, params.max_new_tokens)
        state, cache = _decode_loop_jit(model, state, cache, key, until, params)
        yield state.sample


@jax.jit
def continuation_logps(
    model: Transformer,
    prompt_ids: Array,
    prompt_mask: Array,
    tokens: Array,
    mask: Array,
) -> Array:
    """Computes how likely each of some continuations is after each prompt.

    A prompt is read once, whatever the number of continuations.

    Args:
        prompt_ids: i32[B, P] left-padded prompts.
        prompt_mask: bool[B, P], True on real tokens.
        tokens: i32[K, M], the continuations, padded on the right.
        mask: bool[K, M], True on real tokens; the first one is real.

    Returns:
        f32[B, K], the sum of each continuation's log-probabilities in nats.
    """
    (count, length), prompt_mask = tokens.shape, prompt_mask.astype(bool)
    samples = count if length > 1 else 1
    hidden, cache = _prefill(model, prompt_ids, prompt_mask, samples, length - 1)
    first = jax.nn.log_softmax(last_logits(model, hidden[::samples]), axis=-1)
    total = first[:, tokens[:, 0]]
    if length == 1:
        return total
    rows = prompt_mask.shape[0]
    lengths = jnp.repeat(prompt_mask.sum(axis=1, dtype=jnp.int32), count)
    slots = jnp.arange(prompt_mask.shape[1] + length - 1)
    prompt_slots = jnp.pad(_repeat(prompt_mask, count, 0), ((0, 0), (0, length - 1)))

    def advance(cache, step):
        slot = prompt_mask.shape[1] + step
        visible = prompt_slots | ((slots >= prompt_mask.shape[1]) & (slots <= slot))
        token = jnp.tile(tokens[:, step], rows)
        positions = (lengths + step)[:, None]
        hidden, cache = decode(model, token, positions, visible, slot, cache)
        logps = jax.nn.log_softmax(last_logits(model, hidden), axis=-1)
        following = jnp.tile(tokens[:, step + 1], rows)
        logps = jnp.take_along_axis(logps, following[:, None], axis=-1)
        return cache, logps.reshape(rows, count)

    _, later = jax.lax.scan(advance, cache, jnp.arange(length - 1))
    return total + jnp.where(mask[:, 1:].T[:, None, :], later, 0.0).sum(axis=0)


class DecodeState(NamedTuple):
    """Completions being decoded.

    Attributes:
        step: i32, tokens sampled so far.
        row: i32[B], which row of the whole batch each one is.
        token: i32[B], the last one of each row.
        prompt_mask: bool[B, P].
        sample: the `Sample` so far, with room for N tokens.
    """

    step: Array
    row: Array
    token: Array
    prompt_mask: Array
    sample: Sample


def _begin(
    model, prompt_ids, prompt_mask, key, samples, params
) -> tuple[DecodeState, Any]:
    """Reads the prompts and samples each row's first token: the state and its cache."""
    room = params.max_new_tokens
    prompt_mask = prompt_mask.astype(bool)
    hidden, cache = _prefill(model, prompt_ids, prompt_mask, samples, room)
    prompt_mask = _repeat(prompt_mask, samples, axis=0)
    row = jnp.arange(prompt_mask.shape[0])
    none = jnp.zeros(row.shape, bool)
    token, logps, ended = _next_token(model, key, 0, row, hidden, none, params)
    empty = (prompt_mask.shape[0], room)
    sample = Sample(
        tokens=_write(jnp.zeros(empty, jnp.int32), 0, token),
        mask=_write(jnp.zeros(empty, bool), 0, ~none),
        logps=_write(jnp.zeros(empty, jnp.float32), 0, logps),
        ended=ended,
    )
    return DecodeState(jnp.int32(1), row, token, prompt_mask, sample), cache


def _decode_by_halves(model, state, cache, key, params, halvings) -> Sample:
    """Decodes to the end; once half of the rows have ended, the others go on alone.

    Each device halves its own rows, so none crosses to another, and as late as the one
    with most rows that go on.
    """
    until, shards = params.max_new_tokens, _row_shards()
    half = _half(len(state.row), shards, params) if halvings else 0
    if not half:
        return _decode_loop(model, state, cache, key, until, params)[0].sample
    state, cache = _decode_loop(model, state, cache, key, until, params, half, shards)

    def apart(x):
        heads = "kv_heads" if x.ndim == 4 else None  # those of the cache
        x = x.reshape(shards, -1, *x.shape[1:])
        return sharding.constrain(x, "batch", None, *[heads, None, None][: x.ndim - 2])

    def take(x):
        rows = jax.vmap(lambda x, at: x[at])(apart(x), going_on)
        return rows.reshape(shards * half, *x.shape[1:])

    def put(x, part):
        set_rows = jax.vmap(lambda x, at, part: x.at[at].set(part))
        return set_rows(apart(x), going_on, apart(part)).reshape(x.shape)

    # In their order; where fewer than half go on, ended ones behind them.
    going_on = jnp.argsort(apart(state.sample.ended), axis=1, stable=True)[:, :half]
    step, *of_rows = state
    fewer = DecodeState(step, *jax.tree.map(take, of_rows))
    fewer_cache = shard_cache(jax.tree.map(take, cache))
    rest = _decode_by_halves(model, fewer, fewer_cache, key, params, halvings - 1)
    return jax.tree.map(put, state.sample, rest)


def _row_shards():
    mesh = sharding.current_mesh()
    return sharding.row_shards(mesh) if mesh else 1


def _half(rows, shards, params):
    """Returns half of the rows of one of the shards; 0 to leave none of them out."""
    half = rows // shards // 2
    long = params.stop_ids and params.max_new_tokens >= HALVED_FROM
    return half if long and half >= FEWEST_ROWS and rows % (2 * shards) == 0 else 0


def _decode_loop(
    model, state, cache, key, until, params, fewest=0, shards=1
) -> tuple[DecodeState, Any]:
    """Decodes until rows have `until` tokens or no more than `fewest` go on.

    `fewest` is of each of the `shards` parts of the rows.
    """
    prompt_length, room = state.prompt_mask.shape[1], state.sample.tokens.shape[1]
    lengths = state.prompt_mask.sum(axis=1, dtype=jnp.int32)
    slots = jnp.arange(prompt_length + room)
    prompt_slots = jnp.pad(state.prompt_mask, ((0, 0), (0, room)))

    def unfinished(carry):
        state, _ = carry
        going_on = (~state.sample.ended).reshape(shards, -1).sum(axis=1)
        return (state.step < until) & (going_on > fewest).any()

    def advance(carry):
        state, cache = carry
        step, sample = state.step, state.sample
        slot = prompt_length + step - 1
        visible = prompt_slots | ((slots >= prompt_length) & (slots <= slot))
        positions = (lengths + step - 1)[:, None]
        hidden, cache = decode(model, state.token, positions, visible, slot, cache)
        live = ~sample.ended
        token, logps, ended = _next_token(
            model, key, step, state.row, hidden, sample.ended, params
        )
        sample = Sample(
            tokens=_write(sample.tokens, step, token),
            mask=_write(sample.mask, step, live),
            logps=_write(sample.logps, step, logps),
            ended=ended,
        )
        state = state._replace(step=step + 1, token=token, sample=sample)
        return state, cache

    return jax.lax.while_loop(unfinished, advance, (state, cache))


_begin_jit = jax.jit(_begin, static_argnames=("samples", "params"))
_decode_loop_jit = jax.jit(
    _decode_loop, static_argnames="params", donate_argnames="cache"
)


def _next_token(model, key, step, row, hidden, ended, params):
    """Samples each row's next token: the tokens, their log-probs, which rows ended."""
    logits = last_logits(model, hidden)
    choice = params.temperature, params.top_k, params.top_p
    token, logps = draws.draw(jax.random.fold_in(key, step), row, logits, *choice)
    token = jnp.where(ended, 0, token)
    logps = jnp.where(ended, 0.0, logps)
    stops = token[:, None] == jnp.array(params.stop_ids, jnp.int32)
    return token, logps, ended | stops.any(axis=1)


def _write(out, step, column):
    return jax.lax.dynamic_update_slice_in_dim(out, column[:, None], step, axis=1)


def _repeat(x, samples, axis):
    return x if samples == 1 else jnp.repeat(x, samples, axis=axis)


def _prefill(model, ids, mask, samples, room):
    """Runs each prompt once; returns the last hidden state [B G, 1, D] and the cache.

    The cache is keys and values of each layer, [B G, K, P + room, C].
    """
    x, cache = read_prompts(model, ids, mask, samples, room)
    return model.norm(_repeat(x[:, -1:], samples, axis=0)), cache


def read_prompts(
    model: Transformer, ids: Array, mask: Array, samples: int = 1, room: int = 0
) -> tuple[Array, Any]:
    """Runs prompts, each once, wherever their padding is.

    Args:
        ids: i32[B, P].
        mask: bool[B, P], True on real tokens.
        samples: G, rows of the cache for each prompt.
        room: slots of the cache behind the prompt's.

    Returns:
        [B, P, D] hidden states before the final norm; the cache: keys and values of
        each layer, [B G, K, P + room, C].
    """
    c = model.config
    segments = mask.astype(jnp.int32)
    positions = jnp.cumsum(segments, axis=1) - segments
    angles = model.angles(positions, segments)

    def step(x, layer, spec):
        def attend(query, key, value):
            attended = model.attend(query, key, value, segments, spec)
            return attended, (key.swapaxes(1, 2), value.swapaxes(1, 2))

        x, cache, _ = layer(x, angles[spec], attend)
        return x, cache

    x = model.lookup(ids, positions)
    x, stacked = model.through(step, x, unroll=model.unroll)

    def cached(layer):
        part = jax.tree.map(lambda x: _repeat(x[layer], samples, axis=0), stacked)
        return jax.tree.map(lambda x: jnp.pad(x, padding), part)

    padding = ((0, 0), (0, 0), (0, room), (0, 0))
    cache = tuple(map(cached, range(c.layers)))
    return x, shard_cache(cache)


def decode(
    model: Transformer, token: Array, positions: Array, visible: Array, slot, cache
) -> tuple[Array, Any]:
    """Runs one token a row.

    Args:
        token: i32[B].
        positions: i32[B, 1].
        visible: bool[B, S], True where a slot of the cache may be read.
        slot: i32[] or i32[B], where the token's keys and values go.
        cache: keys and values of each layer, [B, K, S, C].

    Returns:
        [B, 1, D] hidden states after the final norm; the cache with the token added.

    Layers are unrolled, each with arrays of its own for the cache: these are updated in
    place and read where they lie. One array for all layers would be copied, a layer's
    part at a time, for every token.
    """
    c = model.config
    angles = model.angles(positions, None)
    slots = jnp.arange(visible.shape[1])
    x, caches, slot = model.lookup(token[:, None], positions), [], jnp.asarray(slot)
    for (spec, layer), old in zip(model.each_layer(), cache, strict=True):
        # Slots lie as far apart as the positions they hold, also behind padding.
        near = visible
        if spec.window:
            near = visible & (slot[..., None] - slots < spec.window)

        def attend(query, key, value, old=old, near=near):
            new = jax.tree.map(
                lambda slots, one: _put(slots, one.swapaxes(1, 2), slot),
                old,
                (key, value),
            )
            attended = attention.cached_attention(
                query,
                *new,
                near[:, None, :],
                softcap=c.attention_softcap,
                scale=c.scale,
            )
            return attended, new

        x, new, _ = layer(x, angles[spec], attend)
        caches.append(new)
    return model.norm(x), shard_cache(tuple(caches))


def _put(slots, one, slot):
    """Writes [B, K, 1, C] into [B, K, S, C] at one slot, or at one of each row."""
    if slot.ndim == 0:
        return jax.lax.dynamic_update_slice(slots, one, (0, 0, slot, 0))
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, at))
    zero = jnp.zeros_like(slot)
    return put(slots, one, (zero, slot, zero))


def shard_cache(cache):
    """Fixes the sharding of a cache: rows over the batch axes, heads over `tensor`."""
    return jax.tree.map(
        lambda x: sharding.constrain(x, "batch", "kv_heads", None, None), cache
    )


def last_logits(model, hidden):
    """Computes [B, 1, D] -> f32[B, V], each row's vocabulary on one device."""
    logits = model.project_out(hidden[:, 0])
    return sharding.constrain(logits, "batch", None)
