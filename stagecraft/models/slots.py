"""Decoding of texts that begin and end at different times, in the rows of one cache.

A text's row holds the keys and values of each token at the slot of its position.
Prompts are read apart (`read`) and put into free rows (`insert`); all rows then decode
together, some steps at a time (`advance`). How a row's tokens are drawn is its own, and
no row sees another's, so that a text does not depend on its neighbours.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft.models import sampling
from stagecraft.models.draws import categorical, nucleus
from stagecraft.models.transformer import Transformer

# The most alternatives to a token that are reported.
TOP = 20
# Hidden states whose logits are held at once when a prompt is scored.
CHUNK = 64


class Draws(NamedTuple):
    """How the tokens of each row are drawn.

    Attributes:
        key: u32[B, 2], the words of a Threefry key.
        step: i32[B], tokens drawn before.
        temperature: f32[B]; 0 takes the most likely token.
        top_p: f32[B]; 1 is off.
    """

    key: Array
    step: Array
    temperature: Array
    top_p: Array


class Drawn(NamedTuple):
    """Tokens with their log-probabilities in nats, at temperature 1.

    Attributes:
        token: i32[...].
        logp: f32[...].
        top: i32[..., TOP], the likeliest tokens, or as many as there are.
        top_logps: f32[..., TOP].
    """

    token: Array
    logp: Array
    top: Array
    top_logps: Array


class Rows(NamedTuple):
    """The rows of a cache.

    Attributes:
        token: i32[B], the last token of each, not yet in the cache.
        length: i32[B], tokens in the cache.
        left: i32[B], tokens that may still be drawn; 0 in rows that are free.
        stops: i32[B, M], tokens that end each; -1 where there are fewer.
        draws: `Draws`.
    """

    token: Array
    length: Array
    left: Array
    stops: Array
    draws: Draws


@functools.partial(jax.jit, static_argnames="echo")
def read(
    model: Transformer, ids: Array, mask: Array, draws: Draws, *, echo: bool
) -> tuple[Drawn, Drawn | None, Any]:
    """Reads prompts and draws what follows each.

    Args:
        ids: i32[B, P], prompts padded on the right.
        mask: bool[B, P], True on real tokens.
        draws: of the first token of each.
        echo: whether the prompts' own tokens are scored.

    Returns:
        the `Drawn` of the token that follows each; that of the prompts' tokens from the
        second on, [B, P] with the last column for nothing, or None; the cache: keys and
        values of each layer, [B, K, P, C].
    """
    hidden, cache = sampling.read_prompts(model, ids, mask)
    hidden = model.norm(hidden)
    last = (mask.sum(axis=1) - 1)[:, None, None]
    logits = sampling.last_logits(model, jnp.take_along_axis(hidden, last, axis=1))
    first = _draw(logits, draws, jnp.bool(True))
    return first, _scored(model, hidden, ids) if echo else None, cache


def _scored(model, hidden, ids):
    """Returns the `Drawn` [B, P] of the token behind each place."""
    targets = jnp.roll(ids, -1, axis=1)

    def score(place):
        state, target = place
        logits = model.project_out(state)
        return _of_token(logits, target, jnp.bool(True))

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    out = jax.lax.map(score, flat, batch_size=CHUNK)
    return jax.tree.map(lambda x: x.reshape(*ids.shape, *x.shape[1:]), out)


@functools.partial(jax.jit, donate_argnames="cache")
def insert(cache: Any, prompts: Any, rows: Array) -> Any:
    """Puts prompts that were read into rows of a cache.

    Args:
        cache: [B, K, S, C] of each layer.
        prompts: [R, K, P, C] of each layer, P at most S.
        rows: i32[R], where each goes; B for those that go nowhere.
    """
    return jax.tree.map(
        lambda old, new: old.at[rows, :, : new.shape[2]].set(new, mode="drop"),
        cache,
        prompts,
    )


def empty_cache(model: Transformer, rows: int, room: int) -> Any:
    """Returns a cache of so many rows with so many slots each."""
    ids = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, 1), jnp.bool)
    read = functools.partial(sampling.read_prompts, room=room - 1)
    _, shapes = jax.eval_shape(read, model, ids, mask)

    @jax.jit
    def make():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return sampling.shard_cache(zeros)

    return make()


@functools.partial(jax.jit, static_argnames="room")
def widened(cache: Any, *, room: int) -> Any:
    """Returns a cache with more slots in each row."""
    more = room - jax.tree.leaves(cache)[0].shape[2]
    padding = ((0, 0), (0, 0), (0, more), (0, 0))
    return jax.tree.map(lambda x: jnp.pad(x, padding), cache)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def advance(
    model: Transformer, rows: Rows, cache: Any, tops: Array, *, steps: int
) -> tuple[Drawn, Array, Any]:
    """Draws the next tokens of all rows.

    Args:
        rows: `Rows`; each has slots for the tokens it may draw in so many steps.
        cache: [B, K, S, C] of each layer.
        tops: bool[], whether alternatives are reported.
        steps: N.

    Returns:
        `Drawn` [N, B]; bool[N, B], True where a row's token is real; the cache.
    """
    slots = jnp.arange(jax.tree.leaves(cache)[0].shape[2])

    def step(carry, _):
        rows, cache = carry
        live = rows.left > 0
        visible = slots <= rows.length[:, None]
        positions = rows.length[:, None]
        hidden, cache = sampling.decode(
            model, rows.token, positions, visible, rows.length, cache
        )
        drawn = _draw(sampling.last_logits(model, hidden), rows.draws, tops)
        ended = (drawn.token[:, None] == rows.stops).any(axis=1)
        draws = rows.draws._replace(step=rows.draws.step + 1)
        rows = rows._replace(
            token=drawn.token,
            length=rows.length + live,
            left=jnp.where(ended, 0, rows.left - live),
            draws=draws,
        )
        return (rows, cache), (drawn, live)

    (_, cache), (drawn, live) = jax.lax.scan(step, (rows, cache), length=steps)
    return drawn, live, cache


def _draw(logits, draws, tops):
    """Draws one token a row from f32[B, V]; returns its `Drawn`."""
    greedy = logits.argmax(axis=-1).astype(jnp.int32)
    sampled = draws.temperature > 0

    def draw():
        heat = jnp.where(sampled, draws.temperature, 1.0)[:, None]
        keys = jax.random.wrap_key_data(draws.key, impl="threefry2x32")
        keys = jax.vmap(jax.random.fold_in)(keys, draws.step)
        token, cut = categorical(keys, logits / heat), draws.top_p < 1

        def narrowed():
            top_p, count = draws.top_p[:, None], logits.shape[1]
            return nucleus(keys, logits / heat, count, top_p)

        # A row's token is the same whether its neighbours cut the tail off or not.
        near = jax.lax.cond(cut.any(), narrowed, lambda: token)
        return jnp.where(sampled, jnp.where(cut, near, token), greedy)

    token = jax.lax.cond(sampled.any(), draw, lambda: greedy)
    return _of_token(logits, token, tops)


def _of_token(logits, token, tops):
    """Returns the `Drawn` of tokens i32[...] under logits f32[..., V]."""
    logps = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logps, token[..., None], axis=-1)[..., 0]
    count = min(TOP, logits.shape[-1])

    def likeliest():
        values, top = jax.lax.top_k(logps, count)
        return top.astype(jnp.int32), values

    def none():
        shape = (*token.shape, count)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    return Drawn(token, chosen, *jax.lax.cond(tops, likeliest, none))
