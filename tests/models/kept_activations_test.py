"""What the backward pass keeps of the forward pass, in numbers a token and layer."""

import dataclasses

import jax
import jax.numpy as jnp

from stagecraft.models.transformer import UNROLL, Transformer
from tests import tiny

LENGTH = 64
CONFIG = tiny.config(width=64, head_dim=16, ff_width=256)


def temporary(layers, rows):
    """f32 numbers that the gradient of a scanned model needs beside its arguments."""
    assert layers > UNROLL
    config = dataclasses.replace(CONFIG, layers=layers)
    model = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
    gradient = jax.jit(jax.grad(lambda model, *x: model.hidden(*x).sum()))
    memory = gradient.lower(model, ids, ids, ids).compile().memory_analysis()
    return memory.temp_size_in_bytes / 4


def test_norms_and_activations_are_not_kept():
    sizes = {(n, r): temporary(n, r) for n in (10, 20) for r in (16, 32)}
    rows = sizes[10, 16] - sizes[10, 32] + sizes[20, 32] - sizes[20, 16]
    kept = rows / (10 * 16 * LENGTH)
    heads, keys = 4 * 16, 2 * 16
    # The residual stream twice, queries and keys before their norms, what attention
    # reads, its exponentials, what it returns twice, and both products of the
    # feed-forward.
    needed = 2 * 64 + (heads + keys) + (heads + 2 * keys) + 4 * LENGTH + 2 * heads
    needed += 2 * 256
    assert needed < kept < 1.05 * needed
    # No copies of weights: what a layer adds does not depend on them.
    layer = (sizes[20, 16] - sizes[10, 16]) / 10 - kept * 16 * LENGTH
    assert layer < 0.01 * 64 * 64
