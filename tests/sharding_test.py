"""The mesh: sizes, shardings from birth, and the same numbers on every shape."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

from stagecraft import sharding
from stagecraft.errors import UserError
from stagecraft.models import heads
from stagecraft.models.config import check_mesh
from stagecraft.models.transformer import Transformer
from tests import tiny

SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
CONFIG = tiny.config(layers=2, ff_width=48, init_std=0.02)


def make_model(key):
    return Transformer(CONFIG, key)


def loss(model, batch):
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    targets = jnp.roll(batch["ids"], -1, axis=1)
    stats = heads.token_logps(hidden, model.output_embedding(), targets, block_size=6)
    return -stats.logps.mean()


def make_batch():
    rng = np.random.default_rng(0)
    b, t = 8, 12
    return {
        "ids": rng.integers(0, 64, (b, t)).astype(np.int32),
        "positions": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "segments": np.ones((b, t), np.int32),
    }


def arrays(tree):
    return jax.tree.leaves(tree)


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 1, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
        ({"context": 2, "expert": 4}, (1, 1, 4, 2, 1)),
    ],
)
def test_make_takes_all_devices(asked, shape):
    made = sharding.make_mesh(**asked)
    assert made.axis_names == ("data", "fsdp", "expert", "context", "tensor")
    assert tuple(made.shape.values()) == shape
    assert set(made.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("asked", "across"),
    [
        # Places along data and fsdp whose devices are of another group than the first.
        (dict(data=4, fsdp=2, dcn_data=2), {"data": [2, 3], "fsdp": []}),
        (dict(data=2, fsdp=4, dcn_fsdp=2), {"data": [], "fsdp": [2, 3]}),
        (dict(data=2, fsdp=4, dcn_data=2, dcn_fsdp=2), {"data": [1], "fsdp": [2, 3]}),
        (dict(data=2, fsdp=2, tensor=2, dcn_data=2), {"data": [1], "fsdp": []}),
    ],
)
def test_groups_of_devices_lie_along_the_axes_that_were_asked(asked, across):
    made = sharding.make_mesh(**asked)
    groups = asked.get("dcn_data", 1) * asked.get("dcn_fsdp", 1)
    group = np.vectorize(lambda device: device.id * groups // 8)(made.devices)
    assert sorted(device.id for device in made.devices.ravel()) == list(range(8))
    along = {
        axis: group.swapaxes(0, place)[(slice(None), *(0,) * 4)]
        for place, axis in enumerate(made.axis_names)
    }
    for axis, places in across.items():
        assert [i for i, g in enumerate(along[axis]) if g != along[axis][0]] == places
    assert len({*along["tensor"]}) == 1


def test_the_groups_of_tpus_are_their_slices(monkeypatch):
    real = jax.devices()
    tpus = [
        types.SimpleNamespace(platform="tpu", slice_index=d.id // 4, id=d.id)
        for d in real
    ]
    asked = {}

    def place(inner, outer, devices, **more):
        asked["sizes"] = inner, outer
        return np.array(real).reshape(np.multiply(inner, outer))

    monkeypatch.setattr(mesh_utils, "create_hybrid_device_mesh", place)
    sharding.make_mesh(data=2, fsdp=4, devices=tpus)
    assert asked["sizes"] == ((1, 4, 1, 1, 1), (2, 1, 1, 1, 1))
    sharding.make_mesh(data=2, fsdp=4, dcn_fsdp=2, devices=tpus)
    assert asked["sizes"] == ((2, 2, 1, 1, 1), (1, 2, 1, 1, 1))
    with pytest.raises(UserError, match=r"mesh.dcn_data=4: .*slices.*which is 2"):
        sharding.make_mesh(data=4, fsdp=2, dcn_data=4, devices=tpus)
    with pytest.raises(UserError, match="fsdp=1 does not divide over 2 slices"):
        sharding.make_mesh(dcn_fsdp=2, devices=tpus)


def test_make_takes_given_devices():
    made = sharding.make_mesh(devices=jax.devices()[:3])
    assert tuple(made.shape.values()) == (3, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"data": 9}, ["needs 9 devices", "8 are available"]),
        ({"fsdp": 3}, ["multiple of 3", "8 are available"]),
        ({"data": 16}, ["16", "8"]),
        ({"tensor": 16}, ["multiple of 16", "8"]),
        ({"data": -1, "fsdp": -1}, ["at most one -1"]),
        ({"data": 0}, ["positive"]),
        ({"data": 1, "tensor": -2}, ["positive"]),
        ({"data": 8, "dcn_data": 3}, ["data=8", "over 3", "multiple of 3"]),
        ({"dcn_data": -2}, ["mesh.dcn_data=-2", "positive"]),
    ],
)
def test_make_refuses(asked, words):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(**asked)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_fewer_devices_than_there_are_may_be_asked_for():
    made = sharding.make_mesh(data=3)
    assert made.devices.ravel().tolist() == jax.devices()[:3]


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((4, 2))
    assert sharding.constrain(x, "batch", None) is x
    jaxpr = jax.make_jaxpr(lambda x: sharding.constrain(x, "batch", None))(x)
    assert not jaxpr.jaxpr.eqns


def test_constrain_places_under_a_mesh():
    made = sharding.make_mesh(4, 1, 2)
    with jax.set_mesh(made):
        got = jax.jit(lambda x: sharding.constrain(x * 2, "batch", None, "heads"))(
            jnp.ones((8, 3, 4))
        )
    expected = jax.NamedSharding(made, P(("data", "fsdp"), None, "tensor"))
    assert got.sharding.is_equivalent_to(expected, 3)


def test_shardings_come_from_axes():
    made = sharding.make_mesh(2, 2, 2)
    abstract = jax.eval_shape(make_model, jax.random.key(0))
    placed = sharding.shardings({"model": abstract, "step": jnp.zeros(())}, made)
    model = placed["model"]
    for variable, spec in [
        (model.embed, P("tensor", "fsdp")),
        (model.norm.scale, P("fsdp")),
        (model.layers.attention.query, P(None, "fsdp", "tensor", None)),
        (model.layers.attention.key, P(None, "fsdp", "tensor", None)),
        (model.layers.attention.out, P(None, "tensor", None, "fsdp")),
        (model.layers.attention.query_norm.scale, P(None, None)),
        (model.layers.ff.gate, P(None, "fsdp", "tensor")),
        (model.layers.ff.down, P(None, "tensor", "fsdp")),
    ]:
        (placement,) = arrays(variable)
        assert placement.spec == spec
    assert placed["step"].spec == P()
    assert jax.tree.structure(model) == jax.tree.structure(abstract)


def test_variables_without_axes_are_replicated():
    placed = sharding.shardings(
        {"x": nnx.Param(jnp.ones((4, 4)))}, sharding.make_mesh(2, 2, 2)
    )
    assert arrays(placed)[0].spec == P()


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def world(request):
    """(shape, mesh, model born on it)."""
    made = sharding.make_mesh(*request.param)
    return (
        request.param,
        made,
        sharding.init_sharded(make_model, made)(jax.random.key(3)),
    )


@pytest.fixture(scope="module")
def alone():
    """The same model made whole on one device, its loss and its gradient."""
    model = jax.jit(make_model)(jax.random.key(3))
    return model, *jax.jit(jax.value_and_grad(loss))(model, make_batch())


def test_model_and_optimizer_are_sharded_from_birth(world, alone):
    shape, made, model = world
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = sharding.init_sharded(tx.init, made)(model)
    adam = state[1][0]
    for array, expected, mu, nu in zip(
        *map(arrays, (model, sharding.shardings(model, made), adam.mu, adam.nu)),
        strict=True,
    ):
        assert array.sharding.is_equivalent_to(expected, array.ndim)
        assert mu.sharding == nu.sharding == array.sharding
        assert mu.shape == array.shape
    # What the rules split is really split: a device holds only its part.
    up = model.layers.ff.up[...]
    assert up.addressable_shards[0].data.size == up.size // (shape[1] * shape[2])
    assert adam.count.sharding.is_fully_replicated
    # And it is the same model as one made whole.
    for array, whole in zip(arrays(model), arrays(alone[0]), strict=True):
        np.testing.assert_allclose(array, whole, rtol=1e-6, atol=1e-7)


def test_put_and_replicate():
    made = sharding.make_mesh(2, 2, 2)
    batch = make_batch()
    placed = sharding.shard_batch(batch, made)
    assert placed["ids"].sharding == sharding.batch_sharding(made, 2)
    assert placed["ids"].addressable_shards[0].data.shape == (2, 12)
    np.testing.assert_array_equal(placed["ids"], batch["ids"])
    whole = sharding.replicate({"x": np.arange(3)}, made)
    assert whole["x"].sharding.is_fully_replicated
    assert len(whole["x"].addressable_shards) == 8


def test_put_refuses_rows_that_do_not_divide():
    with pytest.raises(UserError, match="6 rows do not divide .* = 8"):
        sharding.shard_batch(np.zeros((6, 2)), sharding.make_mesh())


def test_loss_and_gradient_do_not_depend_on_the_mesh(world, alone, capfd):
    _, made, model = world

    @jax.jit
    def step(model, batch):
        value, gradient = jax.value_and_grad(loss)(model, batch)
        return value, sharding.constrain_tree(gradient)

    with jax.set_mesh(made):
        value, gradient = step(model, sharding.shard_batch(make_batch(), made))
    np.testing.assert_allclose(value, alone[1], rtol=1e-6)
    for got, expected in zip(arrays(gradient), arrays(alone[2]), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=1e-5 * scale, rtol=0)
    for parameter, got in zip(arrays(model), arrays(gradient), strict=True):
        assert got.sharding.is_equivalent_to(parameter.sharding, got.ndim)
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({"heads": 6, "kv_heads": 6}, (1, 2, 4), ["model.heads", "6", "tensor = 4"]),
        ({}, (1, 2, 4), ["model.kv_heads", "2", "mesh.tensor = 4"]),
        ({"ff_width": 47}, (2, 2, 2), ["model.ff_width", "47"]),
        ({"vocab_size": 63}, (2, 2, 2), ["model.vocab_size", "63"]),
        ({"width": 20}, (1, 8, 1), ["model.width", "20", "mesh.fsdp = 8"]),
    ],
)
def test_check_mesh_refuses(changes, shape, words):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError) as error:
        check_mesh(config, sharding.make_mesh(*shape))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_check_mesh_accepts(shape):
    check_mesh(CONFIG, sharding.make_mesh(*shape))
