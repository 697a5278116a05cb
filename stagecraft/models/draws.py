"""One token from each row of logits: the most likely, or a random one.

A row's randomness is one uniform number from a key of its own, so that what is sampled
for it does not depend on the rows beside it.
"""

import jax
import jax.numpy as jnp
from jax import Array


def draw(
    key: Array, row: Array, logits: Array, temperature: float, top_k: int, top_p: float
) -> tuple[Array, Array]:
    """Samples one token a row.

    Args:
        key: a random key; row: i32[B], what each row's own key is made of besides.
        logits: f32[B, V].
        temperature, top_k, top_p: as of `sampling.SamplingParams`.

    Returns:
        i32[B] tokens; f32[B] their log-probabilities in nats, as of `sampling.Sample`.
    """
    greedy = temperature == 0
    logits = logits if greedy else logits / temperature
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
    if greedy:
        token = logits.argmax(axis=-1).astype(jnp.int32)
    elif top_k or top_p < 1:
        count = min(top_k, logits.shape[1]) if top_k else logits.shape[1]
        token = nucleus(keys, logits, count, top_p)
    else:
        token = categorical(keys, logits)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def nucleus(keys: Array, logits: Array, count: int, top_p) -> Array:
    """Samples from the fewest of the `count` likeliest tokens that reach `top_p`.

    Args:
        keys: [B] random keys.
        logits: f32[B, V].
        count: tokens to choose from at most.
        top_p: a number, or f32[B, 1].

    Returns:
        i32[B].
    """
    values, indices = jax.lax.top_k(logits, count)
    weights = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights
    # The first token is always kept; a token is dropped once those before it already
    # reach top_p.
    values = jnp.where(before < top_p, values, -jnp.inf)
    choice = categorical(keys, values)
    return jnp.take_along_axis(indices, choice[:, None], axis=-1)[:, 0]


def categorical(keys: Array, logits: Array) -> Array:
    """Samples from each row with one uniform number from the row's own key.

    Args: [B] random keys; f32[B, V]. Returns i32[B].
    """
    # In (0, 1]: a token of probability zero is never the first to reach it.
    uniform = 1.0 - jax.vmap(jax.random.uniform)(keys)[:, None]
    reached = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    return (reached < uniform * reached[:, -1:]).sum(axis=-1, dtype=jnp.int32)
