"""The decoder against plain numpy, its masks, and its life as a pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stagecraft import tree
from stagecraft.errors import UserError
from stagecraft.models import transformer
from stagecraft.models.transformer import ScalarModel, Transformer
from tests import tiny

CONFIG = tiny.config(
    **dict(vocab_size=50, width=24, layers=2, head_dim=6, ff_width=40),
    **dict(max_length=128, rope_theta=100.0),
)


def initial(seed=0, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return jax.jit(lambda key: Transformer(config, key))(jax.random.key(seed))


def make(seed=0, **changes):
    """A model of random weights, norm scales among them: a missing one would show."""
    config = dataclasses.replace(CONFIG, **changes)
    model = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        if name.endswith("scale"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)

    return tree.map_names(draw, model)


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in lengths]


def batch(ids):
    """ids, positions, segments of one unpadded document."""
    ids = np.asarray(ids)[None]
    return ids, np.arange(ids.shape[1])[None], np.ones_like(ids)


logits = jax.jit(lambda model, *args: model.logits(*args))


def numpy_logits(model, ids):
    """One document, [T] -> [T, V], in float64 and one head at a time."""
    c = model.config
    p = {k: np.asarray(v, np.float64) for k, v in tree.named(model).items()}
    t = len(ids)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    def rotate(x):
        half = c.head_dim // 2
        out = np.empty_like(x)
        for position in range(t):
            for i in range(half):
                angle = position * c.rope_theta ** (-2 * i / c.head_dim)
                a, b = x[position, i], x[position, i + half]
                out[position, i] = a * np.cos(angle) - b * np.sin(angle)
                out[position, i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = p["embed"][ids]
    for i in range(c.layers):
        w = {k[7:]: v[i] for k, v in p.items() if k.startswith("layers/")}
        y = norm(x, w["attention_norm/scale"])
        attended = np.zeros_like(x)
        for h in range(c.heads):
            k = h // (c.heads // c.kv_heads)
            query = y @ w["attention/query"][:, h]
            key = y @ w["attention/key"][:, k]
            value = y @ w["attention/value"][:, k]
            if c.qk_norm:
                query = norm(query, w["attention/query_norm/scale"])
                key = norm(key, w["attention/key_norm/scale"])
            scores = rotate(query) @ rotate(key).T / np.sqrt(c.head_dim)
            for row in range(t):
                seen = np.exp(scores[row, : row + 1] - scores[row, : row + 1].max())
                mixed = (seen / seen.sum()) @ value[: row + 1]
                attended[row] += mixed @ w["attention/out"][h]
        x = x + attended
        y = norm(x, w["ff_norm/scale"])
        gate = y @ w["ff/gate"]
        gated = gate / (1 + np.exp(-gate)) * (y @ w["ff/up"])
        x = x + gated @ w["ff/down"]
    table = p["embed"] if c.tied else p["unembed"]
    return norm(x, p["norm/scale"]) @ table.T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "qk_norm": False},
        {"kv_heads": 1},
        {"kv_heads": 4, "remat": "full"},
    ],
    ids=str,
)
def test_logits_equal_plain_numpy(changes):
    model = make(**changes)
    (ids,) = documents([9])
    got = logits(model, *batch(ids))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], numpy_logits(model, ids), atol=2e-5, rtol=1e-5)


def test_padding_changes_nothing():
    model = make()
    (ids,) = documents([7])
    expected = logits(model, *batch(ids))[0]
    for left, right in [(5, 0), (0, 5), (2, 3)]:
        # Padding holds a token and positions like any other: only segments tell.
        pad = ((0, 0), (left, right))
        padded = [
            np.pad(a, pad, constant_values=v)
            for a, v in zip(batch(ids), (3, 1, 0), strict=True)
        ]
        got = logits(model, *padded)[0]
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[left : left + 7], expected, atol=1e-5)


def packed(parts, room=3):
    """One row: documents one after the other, then padding."""
    ids = np.concatenate([*parts, np.zeros(room, np.int32)])[None]
    positions = np.concatenate([*(np.arange(len(d)) for d in parts), np.zeros(room)])
    segments = np.concatenate(
        [*(np.full(len(d), i + 1) for i, d in enumerate(parts)), np.zeros(room)]
    )
    return ids, positions[None].astype(np.int32), segments[None].astype(np.int32)


def test_packed_documents_equal_separate_ones():
    model = make()
    parts = documents([4, 7, 3])
    got = logits(model, *packed(parts))[0]
    start = 0
    for ids in parts:
        expected = logits(model, *batch(ids))[0]
        np.testing.assert_allclose(got[start : start + len(ids)], expected, atol=1e-5)
        start += len(ids)


def test_gradient_is_finite_and_ignores_padding():
    model = make()
    args = packed(documents([4, 3]), room=5)
    real = args[2] > 0

    def loss(model, args):
        hidden = model.hidden(*args)
        return jnp.where(real[..., None], hidden, 0).sum()

    gradient = jax.jit(jax.grad(loss))
    got = gradient(model, args)
    other = np.where(real, args[0], 7), *args[1:]
    for a, b in zip(*map(jax.tree.leaves, (got, gradient(model, other))), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_later_tokens_are_not_seen():
    model = make()
    (ids,) = documents([8])
    changed = ids.copy()
    changed[5] = (changed[5] + 1) % CONFIG.vocab_size
    a, b = (logits(model, *batch(x))[0] for x in (ids, changed))
    np.testing.assert_array_equal(a[:5], b[:5])
    assert (np.abs(a[5:] - b[5:]).max(axis=-1) > 1e-3).all()


def test_names_and_shapes():
    model = make(tied=False)
    shapes = {name: leaf.shape for name, leaf in tree.named(model).items()}
    assert shapes == {
        "embed": (50, 24),
        "unembed": (50, 24),
        "norm/scale": (24,),
        "layers/attention_norm/scale": (2, 24),
        "layers/attention/query": (2, 24, 4, 6),
        "layers/attention/key": (2, 24, 2, 6),
        "layers/attention/value": (2, 24, 2, 6),
        "layers/attention/out": (2, 4, 6, 24),
        "layers/attention/query_norm/scale": (2, 6),
        "layers/attention/key_norm/scale": (2, 6),
        "layers/ff_norm/scale": (2, 24),
        "layers/ff/gate": (2, 24, 40),
        "layers/ff/up": (2, 24, 40),
        "layers/ff/down": (2, 40, 24),
    }
    assert "unembed" not in tree.named(make())
    assert make().output_embedding().shape == (50, 24)


def test_initial_scale():
    model = initial(width=64, ff_width=256, layers=8, tied=False, init_std=0.02)
    deviations = {k: float(np.std(v)) for k, v in tree.named(model).items()}
    for name in ("embed", "unembed", "layers/attention/query", "layers/ff/gate"):
        assert deviations[name] == pytest.approx(0.02, rel=0.05)
    for name in ("layers/attention/out", "layers/ff/down"):
        assert deviations[name] == pytest.approx(0.02 / 4, rel=0.05)
    for name, leaf in tree.named(model).items():
        assert not name.endswith("scale") or (np.asarray(leaf) == 1).all()
    # Layers, and matrices within a layer, do not share their numbers.
    query, key = model.layers.attention.query[...], model.layers.attention.key[...]
    assert not np.allclose(query[0], query[1])
    assert not np.allclose(query[:, :, :2], key)


def leaves_are_arrays(model):
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))


def test_a_module_is_a_pytree_of_arrays():
    model, other = make(0), initial(1)
    assert leaves_are_arrays(model)
    assert len(jax.tree.leaves(model)) == 13
    difference = jax.tree.map(jnp.subtract, model, other)
    assert isinstance(difference, Transformer)
    assert difference.config == CONFIG
    restored = jax.tree.map(jnp.add, other, difference)
    np.testing.assert_allclose(restored.embed[...], model.embed[...], atol=1e-6)
    abstract = jax.eval_shape(lambda k: Transformer(CONFIG, k), jax.random.key(0))
    assert jax.tree.structure(abstract) == jax.tree.structure(model)
    assert abstract.layers.ff.up.shape == (2, 24, 40)


def test_training_step_on_a_dict_of_modules():
    body = make()
    modules = {"policy": body, "value": ScalarModel(make(1), jax.random.key(2))}
    args = batch(documents([6])[0])

    def loss(modules):
        hidden = modules["policy"].hidden(*args)
        return (hidden**2).mean() + (modules["value"](*args) ** 2).mean()

    tx = optax.adamw(1e-3)
    traces = []

    def step(modules, state):
        traces.append(1)
        value, gradient = jax.value_and_grad(loss)(modules)
        updates, state = tx.update(gradient, state, modules)
        return optax.apply_updates(modules, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    state = jax.jit(tx.init)(modules)
    losses = []
    for _ in range(3):
        before = modules
        modules, state, value = step(modules, state)
        losses.append(float(value))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert isinstance(modules["policy"], Transformer)
    assert leaves_are_arrays(modules)
    assert losses[2] < losses[1] < losses[0]
    assert len(traces) == 1


def gradient(model):
    args = packed(documents([4, 5]))
    return jax.jit(jax.grad(lambda m: (m.hidden(*args) ** 2).mean()))(model)


@pytest.fixture(scope="module")
def expected_gradient():
    return gradient(make())


@pytest.mark.parametrize("remat", ["full", "dots", "names", "offload"])
def test_remat_changes_no_number(remat, expected_gradient, monkeypatch):
    monkeypatch.setattr(transformer, "UNROLL", 0)  # and neither does the layer loop
    got = gradient(make(remat=remat))
    for a, b in zip(*map(jax.tree.leaves, (got, expected_gradient)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def matmuls(remat):
    """How many the gradient holds: the more recomputed, the less stored."""
    model = make(remat=remat)
    args = batch(documents([6])[0])
    return str(jax.make_jaxpr(jax.grad(lambda m: m.hidden(*args).sum()))(model)).count(
        "dot_general"
    )


def test_remat_policies_differ_in_what_they_recompute():
    assert matmuls("full") > matmuls("names") == matmuls("offload") > matmuls("none")
    assert matmuls("full") > matmuls("dots") > matmuls("none")


def test_compute_dtype():
    model = make(dtype="bfloat16")
    args = batch(documents([9])[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda m: m.hidden(*args), model).dtype == jnp.bfloat16
    got = logits(model, *args)
    assert got.dtype == jnp.float32
    expected = numpy_logits(model, args[0][0])
    assert np.abs(got[0] - expected).max() < 0.05 * np.abs(expected).max()
    gradient = jax.eval_shape(jax.grad(lambda m: m.logits(*args).sum()), model)
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_scalar_model():
    body = make(width=24)
    model = ScalarModel(body, jax.random.key(5))
    args = batch(documents([6])[0])
    head, bias = np.asarray(model.head[...]), model.bias[...]
    assert head.shape == (24,) and bias.shape == () and bias == 0
    heads = jax.vmap(lambda k: ScalarModel(body, k).head[...])(
        jax.random.split(jax.random.key(0), 500)
    )
    assert float(heads.std()) == pytest.approx((24 + 1) ** -0.5, rel=0.02)
    call = jax.jit(lambda model, *args: model(*args))
    got = call(model, *args)
    assert got.shape == (1, 6) and got.dtype == jnp.float32
    hidden = jax.jit(lambda body, *args: body.hidden(*args))(body, *args)
    np.testing.assert_allclose(got, hidden @ head, atol=1e-5)
    moved = tree.map_names(lambda n, x: x + 3 if n == "bias" else x, model)
    np.testing.assert_allclose(call(moved, *args), got + 3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 6, "kv_heads": 4}, ["model.kv_heads", "6", "4"]),
        ({"head_dim": 7}, ["model.head_dim", "even", "7"]),
        ({"layers": 0}, ["model.layers", "positive", "0"]),
        ({"width": 24.0}, ["model.width", "integer", "24.0"]),
        ({"init_std": -1.0}, ["model.init_std", "-1.0"]),
        ({"norm_eps": 0.0}, ["model.norm_eps"]),
        ({"dtype": "int8"}, ["model.dtype", "float32", "bfloat16", "'int8'"]),
        ({"remat": "some"}, ["model.remat", "full", "'some'"]),
    ],
    ids=str,
)
def test_config_refuses(changes, words):
    with pytest.raises(UserError) as error:
        dataclasses.replace(CONFIG, **changes).validate()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
