"""Sampling from the decoder: prefill, then one token at a time from a cache.

The blocks are those of training; only the way tokens see each other differs, and it is
passed to them as a function.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stagecraft import sharding
from stagecraft.errors import UserError
from stagecraft.models import attention as attention_lib


class Sample(NamedTuple):
    """Completions of a batch of prompts.

    Attributes:
        tokens: i32[B, N], 0 after the end of a row.
        mask: bool[B, N], True through the stop token.
        logps: f32[B, N] log-probability of each token in nats, under the whole
            distribution at the temperature (before top-k and top-p); 0 after the end.
        ended: bool[B], True where a stop token came within N tokens.
    """

    tokens: Any
    mask: Any
    logps: Any
    ended: Any


@functools.partial(
    jax.jit,
    static_argnames=(
        *("max_new_tokens", "stop_ids", "temperature", "top_k", "top_p", "samples"),
    ),
)
def generate(
    model,
    prompt_ids,
    prompt_mask,
    key,
    *,
    max_new_tokens,
    stop_ids,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    samples=1,
) -> Sample:
    """Samples completions; compiled once for each prompt shape and setting.

    A row's randomness comes from (key, step, row), so the result does not depend on the
    mesh. Work stops when every row has ended.

    Args:
        model: a `Transformer`.
        prompt_ids: i32[B, P] left-padded prompts.
        prompt_mask: bool[B, P], True on real tokens.
        key: a random key.
        max_new_tokens: N.
        stop_ids: tuple of the tokens that end a row, kept in it; () ends none early.
        temperature: divides the logits; 0 takes the most likely token, and log-probs
            are then at temperature 1.
        top_k: draw from the k most likely tokens only; 0 is off.
        top_p: then from the fewest of these that reach this probability (Holtzman et
            al. 2020); 1 is off.
        samples: G, completions of each prompt, which share its prefill.

    Returns:
        A `Sample` of B * G rows, the samples of one prompt next to each other.

    Raises:
        UserError: a setting is out of its range.
    """
    _check(max_new_tokens, temperature, top_k, top_p, samples)
    drawing = _Drawing(stop_ids, temperature, top_k, top_p)
    talk, cache = _begin(
        *(model, prompt_ids, prompt_mask, key, max_new_tokens, samples, drawing)
    )
    return _go_on(model, talk, cache, key, max_new_tokens, drawing)[0].sample


def stream(
    model,
    prompt_ids,
    prompt_mask,
    key,
    *,
    max_new_tokens,
    stop_ids,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    every=8,
):
    """What `generate` returns, as far as it has come: a generator of `Sample`s.

    The tokens are the same, whatever `every` is: the number of them between two yields.
    """
    _check(max_new_tokens, temperature, top_k, top_p, 1)
    drawing = _Drawing(stop_ids, temperature, top_k, top_p)
    talk, cache = _begin_alone(
        *(model, prompt_ids, prompt_mask, key, max_new_tokens, 1, drawing)
    )
    until = 1
    yield talk.sample
    while until < max_new_tokens and not talk.sample.ended.all():
        until = min(until + every, max_new_tokens)
        talk, cache = _go_on_alone(model, talk, cache, key, until, drawing)
        yield talk.sample


class _Drawing(NamedTuple):
    """How tokens are chosen, and which of them end a row."""

    stop_ids: tuple
    temperature: float
    top_k: int
    top_p: float


class _Talk(NamedTuple):
    """Completions under way: N of them are `step`, and the last is `token` i32[B]."""

    step: Any
    token: Any
    prompt_mask: Any  # bool[B, P]
    sample: Sample


def _begin(
    model, prompt_ids, prompt_mask, key, max_new_tokens, samples, drawing
) -> tuple[_Talk, Any]:
    """Prompts and the first token of each row: the talk and its cache."""
    prompt_mask = prompt_mask.astype(bool)
    hidden, cache = _prefill(model, prompt_ids, prompt_mask, samples, max_new_tokens)
    prompt_mask = _repeat(prompt_mask, samples, axis=0)
    none = jnp.zeros((prompt_mask.shape[0],), bool)
    token, logps, ended = _choose(model, key, 0, hidden, none, drawing)
    empty = (prompt_mask.shape[0], max_new_tokens)
    sample = Sample(
        tokens=_write(jnp.zeros(empty, jnp.int32), 0, token),
        mask=_write(jnp.zeros(empty, bool), 0, ~none),
        logps=_write(jnp.zeros(empty, jnp.float32), 0, logps),
        ended=ended,
    )
    return _Talk(jnp.int32(1), token, prompt_mask, sample), cache


def _go_on(model, talk, cache, key, until, drawing) -> tuple[_Talk, Any]:
    """The talk until there are so many tokens, or every row has ended."""
    prompt_length, room = talk.prompt_mask.shape[1], talk.sample.tokens.shape[1]
    lengths = talk.prompt_mask.sum(axis=1, dtype=jnp.int32)
    slots = jnp.arange(prompt_length + room)
    prompt_slots = jnp.pad(talk.prompt_mask, ((0, 0), (0, room)))

    def going(state):
        talk, _ = state
        return (talk.step < until) & ~talk.sample.ended.all()

    def advance(state):
        talk, cache = state
        step, sample = talk.step, talk.sample
        slot = prompt_length + step - 1
        visible = prompt_slots | ((slots >= prompt_length) & (slots <= slot))
        positions = (lengths + step - 1)[:, None]
        hidden, cache = _decode(model, talk.token, positions, visible, slot, cache)
        live = ~sample.ended
        token, logps, ended = _choose(model, key, step, hidden, sample.ended, drawing)
        sample = Sample(
            tokens=_write(sample.tokens, step, token),
            mask=_write(sample.mask, step, live),
            logps=_write(sample.logps, step, logps),
            ended=ended,
        )
        talk = talk._replace(step=step + 1, token=token, sample=sample)
        return talk, cache

    return jax.lax.while_loop(going, advance, (talk, cache))


_begin_alone = jax.jit(_begin, static_argnames=("max_new_tokens", "samples", "drawing"))
_go_on_alone = jax.jit(_go_on, static_argnames="drawing", donate_argnames="cache")


def _choose(model, key, step, hidden, ended, drawing):
    """The next token of each row, its log-prob, and which rows have ended now."""
    logits = _last_logits(model, hidden)
    drawn, logps = _draw(
        jax.random.fold_in(key, step),
        *(logits, drawing.temperature, drawing.top_k, drawing.top_p),
    )
    drawn = jnp.where(ended, 0, drawn)
    logps = jnp.where(ended, 0.0, logps)
    now = drawn[:, None] == jnp.array(drawing.stop_ids, jnp.int32)
    return drawn, logps, ended | now.any(axis=1)


def _write(out, step, column):
    return jax.lax.dynamic_update_slice_in_dim(out, column[:, None], step, axis=1)


def _repeat(x, samples, axis):
    return x if samples == 1 else jnp.repeat(x, samples, axis=axis)


def _check(max_new_tokens, temperature, top_k, top_p, samples):
    for name, value, ok, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1 (off)"),
        ("samples", samples, samples >= 1, "1 or more"),
    ):
        if not ok:
            raise UserError(f"{name}: expected {expected}, got {value}")


def _prefill(model, ids, mask, samples, room):
    """Runs each prompt once; returns the last hidden state [B G, 1, D] and the cache.

    The cache is keys and values of each layer, [B G, K, P + room, C].
    """
    c = model.config
    segments = mask.astype(jnp.int32)
    positions = jnp.cumsum(segments, axis=1) - segments
    angles = model.angles(positions, segments)

    def step(x, layer, kind):
        def attend(query, key, value):
            attended = model.attend(query, key, value, segments, kind)
            return attended, (key.swapaxes(1, 2), value.swapaxes(1, 2))

        x, cache, _ = layer(x, angles[kind], attend)
        return x, cache

    x = model.lookup(ids, positions)
    x, stacked = model.through(step, x, unroll=model.unroll)

    def cached(layer):
        part = jax.tree.map(lambda x: _repeat(x[layer], samples, axis=0), stacked)
        return jax.tree.map(lambda x: jnp.pad(x, padding), part)

    padding = ((0, 0), (0, 0), (0, room), (0, 0))
    cache = tuple(map(cached, range(c.layers)))
    return model.norm(_repeat(x[:, -1:], samples, axis=0)), _place(cache)


def _decode(model, token, positions, visible, slot, cache):
    """Runs one token a row, i32[B]; returns [B, 1, D] and the cache with it added.

    Layers are unrolled, each with arrays of its own for the cache: these are updated in
    place and read where they lie. One array for all layers would be copied, a layer's
    part at a time, for every token.
    """
    c = model.config
    angles = model.angles(positions, None)
    slots = jnp.arange(visible.shape[1])
    x, caches = model.lookup(token[:, None], positions), []
    for (kind, layer), old in zip(model.each_layer(), cache, strict=True):
        # Slots lie as far apart as the positions they hold, also behind padding.
        near = visible & (slot - slots < kind.window) if kind.window else visible

        def attend(query, key, value, old=old, near=near):
            new = jax.tree.map(
                lambda kept, one: jax.lax.dynamic_update_slice(
                    kept, one.swapaxes(1, 2), (0, 0, slot, 0)
                ),
                old,
                (key, value),
            )
            attended = attention_lib.cached_attention(
                *(query, *new, near[:, None, :]),
                softcap=c.attention_softcap,
                scale=c.scale,
            )
            return attended, new

        x, new, _ = layer(x, angles[kind], attend)
        caches.append(new)
    return model.norm(x), _place(tuple(caches))


def _place(cache):
    return jax.tree.map(
        lambda x: sharding.constrain(x, "batch", "kv_heads", None, None), cache
    )


def _last_logits(model, hidden):
    """[B, 1, D] -> f32[B, V], each row's vocabulary whole on one device."""
    logits = model.project_out(hidden[:, 0])
    return sharding.constrain(logits, "batch", None)


def _draw(key, logits, temperature, top_k, top_p):
    """One token a row: f32[B, V] -> (i32[B], f32[B] log-probs)."""
    greedy = temperature == 0
    logits = logits if greedy else logits / temperature
    if greedy:
        token = logits.argmax(axis=-1).astype(jnp.int32)
    elif top_k or top_p < 1:
        kept = min(top_k, logits.shape[1]) if top_k else logits.shape[1]
        values, indices = jax.lax.top_k(logits, kept)
        weights = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(weights, axis=-1) - weights
        # The first token is always kept; a token is dropped once those before it
        # already reach top_p.
        values = jnp.where(before < top_p, values, -jnp.inf)
        choice = _categorical(key, values)
        token = jnp.take_along_axis(indices, choice[:, None], axis=-1)[:, 0]
    else:
        token = _categorical(key, logits)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def _categorical(key, logits):
    """Draws from each row by one uniform number, from a key of the row's own."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    # In (0, 1]: a token of probability zero is never the first to reach it.
    uniform = 1.0 - jax.vmap(jax.random.uniform)(keys)[:, None]
    reached = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    return (reached < uniform * reached[:, -1:]).sum(axis=-1, dtype=jnp.int32)
