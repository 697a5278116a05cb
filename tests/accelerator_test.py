"""What only an accelerator can show, run on whatever devices JAX has.

`make accelerator-check` runs these on a GPU or a TPU, where attention is its own kernel
and products are its own; `make test` runs them on CPU devices, so that the checks are
known to be right.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import sharding
from stagecraft.models import kernels, sampling
from stagecraft.models.transformer import Transformer
from tests import tiny
from tests.stages import cases, update_test

pytestmark = pytest.mark.accelerator

ON_CPU = jax.default_backend() == "cpu"
LENGTH = 640  # from 512 on a CPU takes blocks, which are another kernel than "xla" too


def gradient(config, ids, positions, segments):
    """Hidden states of rows, and the gradient of a mean of them by the parameters."""
    model = Transformer(config, jax.random.key(0))

    @jax.jit
    def both(model, direction):
        def mean(model):
            hidden = model.hidden(ids, positions, segments).astype(jnp.float32)
            kept = jnp.where((segments > 0)[..., None], hidden, 0.0)
            return (kept * direction).mean(), kept

        (_, hidden), grads = jax.value_and_grad(mean, has_aux=True)(model)
        return hidden, grads

    shape = (*ids.shape, config.width)
    direction = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return jax.tree.leaves(jax.device_get(both(model, direction)))


def documents():
    """Two rows: two documents and padding; one document."""
    column = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    segments = np.ones_like(column)
    segments[0, 200:], segments[0, 600:] = 2, 0
    positions = column.copy()
    positions[0, 200:] -= 200
    ids = np.random.default_rng(0).integers(8, 64, column.shape).astype(np.int32)
    return ids, positions, segments


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_this_devices_attention_equals_the_plain_one(dtype, window):
    # No kernel of a GPU takes float32.
    strict = not ON_CPU and (dtype == "bfloat16" or jax.default_backend() == "tpu")
    sizes = dict(max_length=LENGTH, head_dim=16, layers=2, init_std=0.1)
    if window:
        sizes |= dict(window=window, sliding=(True,))
    plain = tiny.config(**sizes, attention="xla")
    own = tiny.config(**sizes, dtype=dtype, strict_kernels=strict)
    request = kernels.Request(LENGTH, own.head_dim, dtype, 0.0)
    chosen = kernels.choose("auto", request, strict=strict)
    assert chosen.kernel != "xla"
    # bfloat16 has eight bits; sums over a row take some of the rounding away.
    tolerance = 0.03 if dtype == "bfloat16" else 1e-4
    pairs = zip(gradient(own, *documents()), gradient(plain, *documents()), strict=True)
    for value, expected in pairs:
        scale = np.linalg.norm(expected)
        assert np.linalg.norm(value - expected) <= tolerance * scale


@pytest.mark.parametrize(
    "kind", ["language_model", "reward", "preference", "unpaired_preference"]
)
def test_all_devices_together_equal_one_cpu(kind):
    alone = sharding.make_mesh(1, 1, 1, devices=jax.devices("cpu")[:1])
    expected = update_test.once(kind, alone)
    every = sharding.make_mesh(data=1, fsdp=-1)
    # A GPU's and a CPU's exp, log and sums of float32 differ in the last bits.
    tolerance = 1e-5 if ON_CPU else 1e-3
    update_test.assert_same(expected, update_test.once(kind, every), tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tokens_are_scored_as_they_were_sampled(dtype):
    model = Transformer(tiny.config(dtype=dtype), jax.random.key(0))
    raw = cases.prompts()
    sample = sampling.generate(
        model, *raw.values(), jax.random.key(1), max_new_tokens=24, stop_ids=()
    )
    seen = np.concatenate([raw["prompt_mask"], sample.mask], axis=1)
    ids = np.concatenate([raw["prompt_ids"], sample.tokens], axis=1)
    batch = dict(
        ids=ids, segments=seen.astype(np.int32), positions=seen.cumsum(1) - seen
    )
    scored = cases.token_logps(model, batch)[:, -24:]
    gap = np.abs(scored - np.asarray(sample.logps))
    assert gap.max() < (0.3 if dtype == "bfloat16" else 1e-3)
    assert gap.mean() < (0.03 if dtype == "bfloat16" else 1e-4)
