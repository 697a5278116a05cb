"""The attention seam: every kernel does what the reference does, or says it cannot."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import sharding
from stagecraft.errors import UserError
from stagecraft.models import attention, blockwise, kernels
from stagecraft.models.kernels import Request

T, H, K, C = 75, 4, 2, 16


def arrays(rows=2, channels=C, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(0, 1, (rows, T, heads, channels)), dtype)
        for heads in (H, K, K)
    )
    # Padding on both sides, two documents; and one that fills its row.
    segments = np.repeat([0, 1, 2, 0], [4, 30, 36, 5])[None].repeat(rows, axis=0)
    segments[1] = 1
    return query, key, value, jnp.asarray(segments, jnp.int32)


def numpy_attention(query, key, value, segments, *, window, softcap, scale):
    query, key, value = (np.float64(x) for x in (query, key, value))
    segments = np.asarray(segments)
    out = np.zeros_like(query)
    for b, h, i in np.ndindex(*np.shape(query)[:1], H, T):
        seen = [
            j
            for j in range(i + 1)
            if segments[b, j] == segments[b, i] and (not window or i - j < window)
        ]
        scores = key[b, seen, h // (H // K)] @ query[b, i, h] * scale
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        mixed = weights @ value[b, seen, h // (H // K)]
        out[b, i, h] = mixed / weights.sum()
    return out


SETTINGS = [
    {"window": 0, "softcap": 0.0, "scale": 0.25},
    {"window": 0, "softcap": 1.5, "scale": 0.4},
    {"window": 9, "softcap": 0.0, "scale": 0.25},
    {"window": 40, "softcap": 1.5, "scale": 0.25},
]


@pytest.mark.parametrize("least", [attention.LEAST, 30, 10], ids="chunks of {}".format)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_reference_equals_plain_numpy(settings, least, monkeypatch):
    monkeypatch.setattr(attention, "LEAST", least)
    args = arrays()
    got = jax.jit(functools.partial(attention.attention, **settings))(*args)
    np.testing.assert_allclose(got, numpy_attention(*args, **settings), atol=2e-5)


def gradients(run, settings, args):
    *inputs, segments = args
    weights = jnp.cos(jnp.arange(inputs[0].size)).reshape(inputs[0].shape)

    def loss(*inputs):
        return (run(*inputs, segments, **settings) * weights).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs)


REFERENCE = functools.partial(attention.attention, kernel="xla")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("block", [16, 128])
def test_blockwise_equals_the_reference(settings, block):
    """In value and gradient; blocks that divide the row, and one larger than it."""
    args = arrays()
    run = functools.partial(blockwise.attention, block=block)
    got, expected = (gradients(f, settings, args) for f in (run, REFERENCE))
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-5)


def plain(query, key, value, segments, *, window, softcap, scale):
    """Softmax over all of [T, T], for JAX to differentiate."""
    t, groups = query.shape[1], query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = scale * jnp.einsum("bthc,bshc->bhts", query, key)
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    apart = jnp.arange(t)[:, None] - jnp.arange(t)[None]
    seen = (apart >= 0) & (apart < (window or t))
    seen = seen & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshc->bthc", weights, value)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_equal_those_of_plain_attention_in_float64(settings, monkeypatch):
    monkeypatch.setattr(attention, "LEAST", 30)  # two chunks
    args = arrays()
    got = gradients(REFERENCE, settings, args)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.float64(x)) for x in args[:3]]
        expected = gradients(plain, settings, (*wide, args[3]))
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert b.dtype == np.float64
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_the_gradient_moves_fewer_bytes_than_that_of_plain_attention(monkeypatch):
    """As the compiler counts them; in one chunk, so that both do the same products."""
    monkeypatch.setattr(attention, "CHUNKS", 1)
    rng, settings = np.random.default_rng(0), SETTINGS[0]
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, 128, heads, C)), jnp.float32)
        for heads in (H, K, K)
    )
    segments = jnp.ones((2, 128), jnp.int32)

    def bytes_moved(run):
        def loss(*inputs):
            return (run(*inputs, segments, **settings) ** 2).sum()

        step = jax.jit(jax.grad(loss, (0, 1, 2)))
        compiled = step.lower(query, key, value).compile()
        return compiled.cost_analysis()["bytes accessed"]

    assert bytes_moved(REFERENCE) < 0.9 * bytes_moved(plain)


@pytest.mark.parametrize("settings", SETTINGS[2:], ids=str)
def test_splash_equals_the_reference_when_interpreted(settings):
    """Not run on hardware: what the TPU kernel would do, step by step on a CPU."""
    args = arrays(rows=2)
    run = functools.partial(attention._splash, interpret=True)
    got, expected = (gradients(f, settings, args) for f in (run, REFERENCE))
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-5)


def test_splash_is_lowered_for_a_tpu():
    query, key, value, segments = arrays(channels=64, dtype=jnp.bfloat16)

    def loss(*inputs):
        run = functools.partial(attention._splash, window=9, softcap=2.0, scale=0.1)
        return run(*inputs, segments).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, value)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, and two of the gradient


@pytest.mark.parametrize("window", [0, 9])
def test_cudnn_is_asked_for_the_reference(window, monkeypatch):
    """Not run on hardware: the same call, answered by XLA."""
    args, settings = arrays(), {"window": window, "softcap": 0.0, "scale": 0.3}
    called = jax.nn.dot_product_attention

    def answered(*inputs, implementation, **options):
        assert implementation == "cudnn"
        return called(*inputs, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answered)
    got, expected = (
        gradients(f, settings, args) for f in (attention._cudnn, REFERENCE)
    )
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-5)


def test_cudnn_is_lowered_for_a_gpu(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(
        fused_attention_stablehlo, "check_cudnn_version", lambda: 91_100
    )
    query, key, value, segments = arrays(dtype=jnp.bfloat16)
    query, key, value, segments = (x[:, :74] for x in (query, key, value, segments))

    def loss(*inputs):
        run = functools.partial(attention._cudnn, window=9, softcap=0.0, scale=0.3)
        return run(*inputs, segments).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, value)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "fmhaScaleBiasSoftmaxBackward" in text
    assert r"sliding_window_length\22: 9" in text
    assert r"fmha_scale\22: 0.3" in text and r"mask_type\22: \22CAUSAL" in text


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize(
    "sizes", [dict(fsdp=2, tensor=2), dict(tensor=2, context=2), dict(context=4)]
)
@pytest.mark.parametrize("kernel", ["xla", "blockwise"])
def test_each_device_works_on_its_own_rows_heads_and_tokens(kernel, sizes, window):
    settings = {"window": window, "softcap": 1.5, "scale": 0.25}
    args = arrays(rows=4)
    args = [x[:, :72] for x in args]  # of the tests' 75: parts that are no whole block
    run = functools.partial(attention.attention, kernel=kernel)
    expected = gradients(REFERENCE, settings, args)
    with jax.set_mesh(sharding.make_mesh(**sizes)):
        got = gradients(run, settings, args)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("block", [8, 10])
@pytest.mark.parametrize("window", [0, 13])
def test_a_part_of_the_queries_in_blocks(window, block):
    """Parts that begin within a block of keys, forward and backward."""
    settings = {"window": window, "softcap": 0.0, "scale": 0.25}
    query, key, value, segments = args = arrays()
    expected = gradients(REFERENCE, settings, args)

    def parts(query, key, value, segments, **settings):
        edges = (0, 21, 40, T)
        cut = [
            blockwise.attention(
                query[:, a:b], key, value, segments, start=a, block=block, **settings
            )
            for a, b in itertools.pairwise(edges)
        ]
        return jnp.concatenate(cut, axis=1)

    got = gradients(parts, settings, args)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-5)


def test_blocks_hold_no_square_of_the_length():
    """Bytes of a gradient's temporaries: at twice the length twice, not four times."""

    def size(length, kernel):
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(query, key, value, segments):
            run = functools.partial(attention.attention, kernel=kernel)
            return run(query, key, value, segments).sum()

        compiled = (
            jax.jit(jax.grad(loss)).lower(shape, shape, shape, segments).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert size(2048, "blockwise") < 2.5 * size(1024, "blockwise")
    assert size(1024, "xla") > 4 * size(1024, "blockwise")


PLAIN = Request(length=1024, channels=64, dtype="bfloat16", softcap=0.0)


@pytest.mark.parametrize(
    ("asked", "platform", "changes", "expected", "fallen"),
    [
        ("auto", "cpu", {}, "blockwise", False),
        ("auto", "cpu", {"length": 511}, "xla", False),
        ("auto", "gpu", {}, "cudnn", False),
        ("auto", "tpu", {"softcap": 30.0, "dtype": "float32"}, "splash", False),
        ("auto", "gpu", {"softcap": 30.0}, "blockwise", True),
        ("auto", "gpu", {"dtype": "float32"}, "blockwise", True),
        ("auto", "gpu", {"channels": 256}, "blockwise", True),
        ("auto", "gpu", {"length": 65}, "xla", True),
        ("cudnn", "cpu", {}, "blockwise", True),
        ("splash", "gpu", {}, "blockwise", True),
        ("xla", "gpu", {}, "xla", False),
        ("blockwise", "tpu", {"length": 8}, "blockwise", False),
    ],
)
def test_the_choice_of_a_kernel(asked, platform, changes, expected, fallen):
    request = PLAIN._replace(**changes)
    choice = kernels.choose(asked, request, platform=platform)
    assert (choice.kernel, choice.fallback) == (expected, fallen)
    if fallen:
        with pytest.raises(UserError) as error:
            kernels.choose(asked, request, strict=True, platform=platform)
        assert "model.strict_kernels" in str(error.value)
        assert "\n" not in str(error.value)
    else:
        strict = kernels.choose(asked, request, strict=True, platform=platform)
        assert strict == choice


def test_a_choice_is_said_once(caplog):
    kernels.log_once.cache_clear()
    run = functools.partial(attention.attention, kernel="cudnn")
    with caplog.at_level(logging.INFO, "stagecraft"):
        for _ in range(2):
            jax.eval_shape(run, *arrays())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "attention: xla (instead of cudnn: cudnn runs on a GPU, and this is a CPU)"
    )
    with pytest.raises(UserError, match="cudnn"):
        jax.eval_shape(functools.partial(run, strict=True), *arrays())
