"""Token log-probabilities: plain numpy, blocks, memory, and every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import mesh
from stagecraft.errors import UserError
from stagecraft.models import heads

B, T, D, V = 8, 5, 16, 24
SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]


def arrays(b=B, t=T, d=D, v=V, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(b, t, d)).astype(np.float32)
    embedding = rng.normal(size=(v, d)).astype(np.float32)
    targets = rng.integers(0, v, (b, t)).astype(np.int32)
    return hidden, embedding, targets


def numpy_stats(hidden, embedding, targets, temperature=1.0):
    raw = hidden.astype(np.float64) @ embedding.astype(np.float64).T
    logits = raw / temperature
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return heads.TokenStats(
        logps=np.take_along_axis(logps, targets[..., None], -1)[..., 0],
        entropy=-(np.exp(logps) * logps).sum(-1),
        correct=(raw.argmax(-1) == targets).astype(np.float32),
        logit_mean=raw.mean(-1),
    )


def plain_gradient(hidden, embedding, targets, temperature, weights):
    """Gradient of sum(weights * logps), by hand: (onehot - p) through the product."""
    raw = hidden.astype(np.float64) @ embedding.astype(np.float64).T / temperature
    p = np.exp(raw) / np.exp(raw).sum(-1, keepdims=True)
    d = (np.eye(V)[targets] - p) * weights[..., None] / temperature
    return d @ embedding, np.einsum("btv,btd->vd", d, hidden)


def weighted(weights, **settings):
    def loss(hidden, embedding, targets):
        stats = heads.token_logps(hidden, embedding, targets, **settings)
        return (stats.logps * weights).sum(), stats

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


WEIGHTS = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)


@pytest.mark.parametrize("block_size", [None, 1, 7, 8, 40, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_plain_numpy(block_size, temperature):
    args = arrays()
    step = weighted(WEIGHTS, block_size=block_size, temperature=temperature)
    (_, stats), gradients = step(*args)
    for got, expected in zip(stats, numpy_stats(*args, temperature), strict=True):
        assert got.shape == (B, T) and got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=1e-5)
    for got, expected in zip(
        gradients, plain_gradient(*args, temperature, WEIGHTS), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [None, 2])
def test_every_mesh_equals_plain_numpy(shape, block_size):
    args = arrays()
    made = mesh.make(*shape)
    with jax.set_mesh(made):
        placed = (
            mesh.put(args[0], made),
            jax.device_put(
                args[1], jax.NamedSharding(made, mesh.spec(("vocab", "embed")))
            ),
            mesh.put(args[2], made),
        )
        step = weighted(WEIGHTS, block_size=block_size, temperature=0.7)
        (_, stats), gradients = step(*placed)
    for got, expected in zip(stats, numpy_stats(*args, 0.7), strict=True):
        assert got.sharding.is_equivalent_to(mesh.batch_sharding(made, 2), 2)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    for got, expected in zip(
        gradients, plain_gradient(*args, 0.7, WEIGHTS), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_huge_logits_stay_finite():
    hidden, embedding, targets = arrays()
    step = weighted(WEIGHTS, block_size=7)
    (_, stats), gradients = step(hidden * 1e3, embedding, targets)
    for array in (*stats, *gradients):
        assert np.isfinite(array).all()
    assert (np.asarray(stats.logps) <= 0).all()


def test_only_log_probabilities_carry_gradients():
    hidden, embedding, targets = arrays()

    def others(hidden, embedding):
        stats = heads.token_logps(hidden, embedding, targets, block_size=7)
        return (stats.entropy + stats.correct + stats.logit_mean).sum()

    for gradient in jax.grad(others, (0, 1))(hidden, embedding):
        assert not gradient.any()


def test_without_stats():
    args = arrays()
    for block_size in (None, 7):
        stats = heads.token_logps(*args, block_size=block_size, stats=False)
        np.testing.assert_allclose(stats.logps, numpy_stats(*args).logps, atol=1e-5)
        assert stats[1:] == (None, None, None)


def test_logits_are_float32_from_bfloat16():
    hidden, embedding, targets = arrays()
    low = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(low.astype(jnp.float32))
    table = np.asarray(jnp.asarray(embedding, jnp.bfloat16).astype(jnp.float32))
    stats = heads.token_logps(low, embedding, targets)
    assert stats.logps.dtype == jnp.float32
    # Rounded inputs are the only loss: a bfloat16 logit would be off by 0.03.
    np.testing.assert_allclose(
        stats.logps, numpy_stats(rounded, table, targets).logps, atol=1e-4
    )


def test_rows_that_do_not_divide_are_refused():
    hidden, embedding, targets = arrays(b=6)
    with (
        jax.set_mesh(mesh.make()),
        pytest.raises(UserError, match="6 rows do not divide .* 8 shards"),
    ):
        heads.token_logps(hidden, embedding, targets)


def equations(jaxpr, inside=()):
    """(equation, names of the equations around it) of a jaxpr and all within it."""
    for equation in jaxpr.eqns:
        yield equation, inside
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from equations(part, (*inside, equation.primitive.name))


def sizes(jaxpr):
    return [
        variable.aval.size
        for equation, _ in equations(jaxpr)
        for variable in equation.outvars
        if hasattr(variable.aval, "size")
    ]


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_all_logits_never_exist_at_once(shape):
    b, t, v, block_size = 4, 256, 512, 64
    args = arrays(b, t, D, v)

    def loss(hidden, embedding, targets):
        stats = heads.token_logps(hidden, embedding, targets, block_size=block_size)
        return stats.logps.mean()

    def trace(function):
        return jax.make_jaxpr(function)(*args).jaxpr

    def traced():
        return trace(loss), trace(jax.grad(loss, (0, 1)))

    if shape is None:
        jaxprs = traced()
    else:
        with jax.set_mesh(mesh.make(*shape)):
            jaxprs = traced()
    for jaxpr in jaxprs:
        assert len(sizes(jaxpr)) > 20
        assert max(sizes(jaxpr)) <= block_size * v < b * t * v


def test_default_block_bounds_the_logits(monkeypatch):
    def trace(limit):
        monkeypatch.setattr(heads, "BLOCK_ELEMENTS", limit)
        # A new function each time: traces of the same one are cached.
        fresh = functools.partial(heads.token_logps)
        return jax.make_jaxpr(fresh)(*arrays(d=4)).jaxpr

    assert max(sizes(trace(10 * V))) <= 10 * V
    jaxpr = trace(B * T * V)
    assert not [e for e, _ in equations(jaxpr) if e.primitive.name == "scan"]


def test_no_traffic_in_the_loop_but_per_token_sums():
    """The embedding is gathered, and its gradient summed, outside the block loop."""
    block_size = 2
    args = arrays()
    with jax.set_mesh(mesh.make(2, 2, 2)):
        step = weighted(WEIGHTS, block_size=block_size)
        jaxpr = jax.make_jaxpr(step)(*args).jaxpr
    moved = {True: [], False: []}
    for equation, inside in equations(jaxpr):
        name = equation.primitive.name
        if name.startswith(("psum", "pmax", "all_gather", "reduce_scatter")):
            moved["scan" in inside].append((name, equation.outvars[0].aval.size))
    assert moved[True] and all(size <= block_size for _, size in moved[True])
    names = [name for name, size in moved[False] if size > block_size]
    assert sum(name.startswith("all_gather") for name in names) == 1
    assert sum(name.startswith("reduce_scatter") for name in names) == 1
