"""Names, sizes, norms and digests of trees."""

import hashlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stagecraft import tree


class Attention(nnx.Module):
    def __init__(self, key):
        self.query = nnx.Param(jax.random.normal(key, (2, 3)), axes=("embed", "heads"))
        self.value = nnx.Param(jnp.ones((2, 3)))  # a parameter may be called value
        self.bias = None
        self.width = 2


class Model(nnx.Module):
    def __init__(self, key):
        self.embed = nnx.Param(jnp.arange(8.0).reshape(4, 2))
        self.layers = jax.vmap(Attention)(jax.random.split(key, 3))
        self.extra = nnx.List([Attention(key)])


NAMES = ["embed", "extra/0/query", "extra/0/value", "layers/query", "layers/value"]


def test_names_of_modules():
    model = Model(jax.random.key(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = tree.named(model)
        both = tree.named({"policy": model, "steps": [1, 2]})
    assert sorted(got) == NAMES
    assert not any(isinstance(x, nnx.Variable) for x in got.values())
    assert got["layers/query"].shape == (3, 2, 3)
    np.testing.assert_array_equal(got["embed"], np.arange(8.0).reshape(4, 2))
    assert sorted(both) == [f"policy/{n}" for n in NAMES] + ["steps/0", "steps/1"]


def test_names_follow_the_order_of_leaves():
    model = {"b": Model(jax.random.key(0)), "a": (jnp.zeros(1), jnp.ones(1))}
    leaves = jax.tree.leaves(model)
    named = tree.named(model)
    assert len(named) == len(leaves)
    assert all(a is b for a, b in zip(named.values(), leaves, strict=True))


def test_names_of_abstract_modules_and_optimizer_states():
    model = Model(jax.random.key(0))
    abstract = tree.named(jax.eval_shape(Model, jax.random.key(0)))
    assert {n: x.shape for n, x in abstract.items()} == {
        n: x.shape for n, x in tree.named(model).items()
    }
    state = tree.named(optax.scale_by_adam().init(model))
    assert sorted(state) == sorted(
        ["count"] + [f"{m}/{n}" for m in ("mu", "nu") for n in NAMES]
    )


def test_a_lone_array_and_an_empty_tree():
    assert list(tree.named(jnp.ones(2))) == [""]
    assert tree.named({}) == {} and tree.named(None) == {}


def test_names_that_clash_are_refused():
    with pytest.raises(ValueError, match="'a/b'"):
        tree.named({"a": {"b": 1}, "a/b": 2})


def test_map_names_keeps_the_structure():
    model = {"policy": Model(jax.random.key(0))}
    got = tree.map_names(lambda name, x: f"{name}{x.shape}", model)
    assert jax.tree.structure(got) == jax.tree.structure(model)
    assert got["policy"].layers.query.get_value() == "policy/layers/query(3, 2, 3)"


def test_count():
    model = Model(jax.random.key(0))
    assert tree.count(model) == 8 + 3 * 12 + 12
    assert tree.count(jax.eval_shape(Model, jax.random.key(0))) == 56
    assert tree.count({}) == 0 and tree.count([1.0, np.ones(3)]) == 4


def test_global_norm():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 4)), rng.normal(size=5)
    leaves = {"a": jnp.asarray(a, jnp.float32), "b": [jnp.asarray(b, jnp.float32)]}
    want = np.linalg.norm([*a.ravel(), *b])
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_allclose(jax.jit(tree.global_norm)(leaves), want, rtol=1e-6)
        with_counter = leaves | {"step": jnp.int32(1000)}
        np.testing.assert_allclose(tree.global_norm(with_counter), want, rtol=1e-6)
    assert float(tree.global_norm({})) == 0


def test_global_norm_of_half_precision_is_float32():
    got = tree.global_norm([jnp.full((1000,), 1.0, jnp.bfloat16)])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.sqrt(1000), rtol=1e-6)


def test_digest_is_sha256_of_the_contents():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    want = hashlib.sha256(b"a/b\0float32\0(2, 3)\0" + x.tobytes()).hexdigest()
    assert tree.digest({"a": {"b": jnp.asarray(x)}}) == want


def test_digest_sees_every_change():
    x = np.arange(6, dtype=np.float32)
    moved = x.copy()
    moved[3] = np.nextafter(moved[3], 9)
    trees = [
        {"a": x},
        {"b": x},
        {"a": moved},
        {"a": x.reshape(2, 3)},
        {"a": x.astype(np.float64)},
        {"a": x.view(np.int32)},
        {"a": x[:3], "b": x[3:]},
        {"a": x, "b": x},
        {"a": jnp.asarray(x, jnp.bfloat16)},
        {"a": jax.random.key(0)},
        {"a": jax.random.key(1)},
    ]
    assert len({tree.digest(t) for t in trees}) == len(trees)


def test_digest_ignores_order_and_placement():
    x, y = np.arange(8.0, dtype=np.float32), np.ones(3, np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert tree.digest({"x": x, "y": y}) == tree.digest({"y": y, "x": spread})
    assert tree.digest(x[::2]) == tree.digest(x[::2].copy())  # strides are no content
    rows = list(np.eye(11))  # as a dict, "10" comes before "2"
    assert tree.digest(rows) == tree.digest({str(i): x for i, x in enumerate(rows)})
    one, two = Model(jax.random.key(0)), Model(jax.random.key(0))
    assert tree.digest(one) == tree.digest(two)
    assert tree.digest(one) != tree.digest(Model(jax.random.key(1)))
