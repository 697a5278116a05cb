"""Token log-probabilities: plain numpy, blocks, memory, and every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import sharding
from stagecraft.errors import UserError
from stagecraft.models import heads

B, T, D, V = 8, 5, 16, 24
# With context: rows that it splits, and rows of another length, which stay whole.
SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 1, 5), (1, 2, 1, 2, 2)]


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
        log_z=np.log(np.exp(logits).sum(-1)),
        log_p2=np.log(np.exp(2 * logps).sum(-1)),
    )


def assert_stats(stats, expected, **tolerance):
    """The fields that were made are those of numpy."""
    made = [k for k in stats._fields if getattr(stats, k) is not None]
    assert made[:5] == [*heads.TokenStats._fields[:5]]
    for name in made:
        got, want = getattr(stats, name), getattr(expected, name)
        assert got.shape == want.shape and got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, err_msg=name, **tolerance)


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
    assert stats.log_p2 is None
    assert_stats(stats, numpy_stats(*args, temperature), rtol=1e-6, atol=1e-5)
    for got, expected in zip(
        gradients, plain_gradient(*args, temperature, WEIGHTS), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [None, 2])
def test_every_mesh_equals_plain_numpy(shape, block_size):
    args = arrays()
    made = sharding.make_mesh(*shape)
    with jax.set_mesh(made):
        placed = (
            sharding.shard_batch(args[0], made),
            jax.device_put(
                args[1], jax.NamedSharding(made, sharding.spec(("vocab", "embed")))
            ),
            sharding.shard_batch(args[2], made),
        )
        step = weighted(WEIGHTS, block_size=block_size, temperature=0.7, squares=True)
        (_, stats), gradients = step(*placed)
    assert stats.log_p2 is not None
    assert_stats(stats, numpy_stats(*args, 0.7), rtol=1e-6, atol=1e-5)
    tokens = "length" if T % made.shape["context"] == 0 else None
    split = jax.NamedSharding(made, sharding.spec(("batch", tokens)))
    for got in stats:
        assert got.sharding.is_equivalent_to(split, 2)
    for got, expected in zip(
        gradients, plain_gradient(*args, 0.7, WEIGHTS), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_huge_logits_stay_finite():
    hidden, embedding, targets = arrays()
    step = weighted(WEIGHTS, block_size=7)
    (_, stats), gradients = step(hidden * 1e3, embedding, targets)
    for array in (*jax.tree.leaves(stats), *gradients):
        assert np.isfinite(array).all()
    assert (np.asarray(stats.logps) <= 0).all()


def test_only_log_probabilities_carry_gradients():
    hidden, embedding, targets = arrays()

    def others(hidden, embedding):
        stats = heads.token_logps(
            hidden, embedding, targets, block_size=7, squares=True
        )
        return (stats.entropy + stats.correct + stats.logit_mean + stats.log_p2).sum()

    for gradient in jax.grad(others, (0, 1))(hidden, embedding):
        assert not gradient.any()


def field_gradient(name, args, temperature=1.0, **settings):
    """Gradient of the weighted sum of one field, by hidden states and embedding."""

    @jax.jit
    def total(hidden, embedding):
        stats = heads.token_logps(
            *(hidden, embedding, args[2]), temperature=temperature, **settings
        )
        return (getattr(stats, name) * WEIGHTS).sum()

    return jax.grad(total, (0, 1))(*args[:2])


def by_differences(name, args, temperature=1.0, step=1e-5):
    """The same in float64, one number at a time."""

    def total(hidden, embedding):
        stats = numpy_stats(hidden, embedding, args[2], temperature)
        return (getattr(stats, name) * WEIGHTS).sum()

    found = []
    for place in range(2):
        own = args[place].astype(np.float64)
        gradient = np.zeros_like(own)
        for at in np.ndindex(own.shape):
            moved = []
            for sign in (1, -1):
                changed = own.copy()
                changed[at] += sign * step
                inputs = [changed if p == place else args[p] for p in range(2)]
                moved.append(total(*inputs))
            gradient[at] = (moved[0] - moved[1]) / (2 * step)
        found.append(gradient)
    return found


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("name", "settings"),
    [("log_z", {}), ("entropy", {"entropy_gradient": True}), ("logps", {})],
)
def test_gradients_by_differences(name, settings, shape):
    """Of the normaliser for the z-loss, of the entropy for its bonus."""
    args = arrays()
    want = by_differences(name, args, 0.7)
    if shape is None:
        got = field_gradient(name, args, 0.7, block_size=7, **settings)
    else:
        made = sharding.make_mesh(*shape)
        with jax.set_mesh(made):
            table = jax.NamedSharding(made, sharding.spec(("vocab", "embed")))
            placed = (
                sharding.shard_batch(args[0], made),
                jax.device_put(args[1], table),
                sharding.shard_batch(args[2], made),
            )
            got = field_gradient(name, placed, 0.7, block_size=2, **settings)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_an_entropy_gradient_leaves_the_numbers_alone():
    args = arrays()
    plain, told = (
        heads.token_logps(*args, temperature=0.7, entropy_gradient=g)
        for g in (False, True)
    )
    for one, other in zip(plain[:5], told[:5], strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_stats():
    args = arrays()
    for block_size in (None, 7):
        stats = heads.token_logps(*args, block_size=block_size, stats=False)
        np.testing.assert_allclose(stats.logps, numpy_stats(*args).logps, atol=1e-5)
        assert stats[1:] == (None,) * 5


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
        jax.set_mesh(sharding.make_mesh()),
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
        with jax.set_mesh(sharding.make_mesh(*shape)):
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


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("stats", [True, False])
def test_few_logits_are_held_and_many_made_again(blocks, stats, monkeypatch):
    """Held, the backward pass has no product for them; the numbers are the same."""
    args = arrays()
    monkeypatch.setattr(heads, "BLOCK_ELEMENTS", B * T * V // blocks)
    results, products = [], []
    for held in (True, False):
        monkeypatch.setattr(heads, "HELD_ELEMENTS", B * T * V - (not held))
        step = weighted(WEIGHTS, temperature=0.7, stats=stats)
        results.append(step(*args))
        made = [
            equation.outvars[0].aval.shape
            for equation, _ in equations(jax.make_jaxpr(step)(*args).jaxpr)
            if equation.primitive.name == "dot_general"
        ]
        products.append(made.count((B * T // blocks, V)))
    assert products == [1, 2]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    expected = plain_gradient(*args, 0.7, WEIGHTS)
    for got, want in zip(results[0][1], expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_no_traffic_in_the_loop_but_per_token_sums():
    """The embedding is gathered, and its gradient summed, outside the block loop."""
    block_size = 2
    args = arrays()
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
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
