"""The optimizer against numpy and optax.adamw; its schedule; its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from stagecraft import optimizer, tree
from stagecraft.errors import UserError
from stagecraft.models.config import ModelConfig
from stagecraft.models.transformer import ScalarModel, Transformer


def settings(**changes):
    defaults = dict(
        name="adamw",
        lr=0.01,
        schedule="cosine",
        warmup_steps=3,
        end_ratio=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1,
        clip_norm=0.5,
    )
    return ConfigDict(defaults | changes)


class Norm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(3))


class Block(nnx.Module):
    def __init__(self, key):
        self.query = nnx.Param(jax.random.normal(key, (3, 3)), axes=("embed", "heads"))
        self.norm = Norm()


class Model(nnx.Module):
    def __init__(self, key):
        self.embed = nnx.Param(jax.random.normal(key, (4, 3)))
        self.layers = jax.vmap(Block)(jax.random.split(key, 2))
        self.norm = Norm()
        self.bias = nnx.Param(jnp.ones(()))


def gradients(params, steps):
    """Different for every step and leaf; some beyond the clip, some within."""
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, params))
    for step in range(steps):
        size = 0.02 if step % 2 else 2.0
        new = [(size * rng.normal(size=x.shape)).astype(x.dtype) for x in leaves]
        yield jax.tree.unflatten(structure, new)


def train(config, params, grads, steps, **arguments):
    made = optimizer.make(config, steps=steps)
    state, step = made.tx.init(params), jax.jit(optimizer.apply, static_argnums=0)
    for i, g in enumerate(grads):
        params, state, metrics = step(made, g, state, params, i, **arguments)
    return params, state, metrics


# ------------------------------------------------------------------------ learning rate


def schedule_by_hand(step, kind, lr, warm, steps, end):
    if step < warm:
        return lr * (step + 1) / warm
    share = min((step - warm) / (steps - warm), 1)
    if kind == "constant":
        return lr
    if kind == "linear":
        return lr + share * (end * lr - lr)
    return lr * (end + (1 - end) * (1 + np.cos(np.pi * share)) / 2)


@pytest.mark.parametrize("warm", [0, 1, 4])
@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_schedule(kind, warm):
    config = settings(schedule=kind, warmup_steps=warm, end_ratio=0.2)
    with jax.numpy_dtype_promotion("strict"):
        schedule = optimizer.make(config, steps=10).schedule
        eager = [schedule(step) for step in range(14)]
        compiled = jax.jit(jax.vmap(schedule))(jnp.arange(14))
    want = [schedule_by_hand(s, kind, 0.01, warm, 10, 0.2) for s in range(14)]
    assert all(rate.dtype == jnp.float32 and rate.shape == () for rate in eager)
    np.testing.assert_allclose(eager, want, rtol=1e-5)
    np.testing.assert_allclose(compiled, want, rtol=1e-5)


def test_schedule_starts_above_zero_peaks_and_ends():
    schedule = optimizer.make(settings(warmup_steps=5), steps=20).schedule
    np.testing.assert_allclose(schedule(0), 0.002, rtol=1e-6)
    np.testing.assert_allclose(schedule(4), 0.01, rtol=1e-6)
    np.testing.assert_allclose(schedule(5), 0.01, rtol=1e-6)
    np.testing.assert_allclose(schedule(20), 0.001, rtol=1e-5)


# --------------------------------------------------------------------------- directions


def adamw_by_numpy(config, params, grads, steps):
    """Every leaf flat in one dict of float64."""
    params = {n: np.asarray(x, np.float64) for n, x in tree.named(params).items()}
    m = {n: np.zeros_like(x) for n, x in params.items()}
    v = {n: np.zeros_like(x) for n, x in params.items()}
    for t, g in enumerate(grads):
        g = {n: np.asarray(x, np.float64) for n, x in tree.named(g).items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        lr = schedule_by_hand(
            t, config.schedule, config.lr, config.warmup_steps, steps, config.end_ratio
        )
        for n in params:
            x = g[n] * min(1, config.clip_norm / norm)
            m[n] = config.b1 * m[n] + (1 - config.b1) * x
            v[n] = config.b2 * v[n] + (1 - config.b2) * x**2
            m_hat = m[n] / (1 - config.b1 ** (t + 1))
            v_hat = v[n] / (1 - config.b2 ** (t + 1))
            update = m_hat / (np.sqrt(v_hat) + config.eps)
            if not n.endswith(("scale", "bias")):
                update = update + config.weight_decay * params[n]
            params[n] = params[n] - lr * update
    return params


def test_adamw_is_numpy():
    params, config = Model(jax.random.key(0)), settings()
    got, _, metrics = train(config, params, gradients(params, 6), 10)
    want = adamw_by_numpy(config, params, gradients(params, 6), 10)
    assert isinstance(got, Model)
    for name, array in tree.named(got).items():
        np.testing.assert_allclose(array, want[name], rtol=1e-5, atol=1e-6)
    last = tree.named([*gradients(params, 6)][-1]).values()
    np.testing.assert_allclose(
        metrics["grad_norm"], np.sqrt(sum((x**2).sum() for x in last)), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["param_norm"], np.sqrt(sum((x**2).sum() for x in want.values())), 1e-5
    )


def test_twenty_steps_of_optax_adamw():
    params, config = Model(jax.random.key(1)), settings(schedule="linear")
    got, *_ = train(config, params, gradients(params, 20), 20)
    # The mask is written out here: another judge than our rule by name.
    mask = jax.tree.map(lambda _: True, params)
    mask.norm.scale.set_value(False)
    mask.layers.norm.scale.set_value(False)
    mask.bias.set_value(False)
    tx = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            lambda t: jnp.where(t < 3, 0.01 * (t + 1) / 3, 0.01 - 0.009 * (t - 3) / 17),
            b1=0.9,
            b2=0.95,
            eps=1e-5,
            weight_decay=0.1,
            mask=mask,
        ),
    )
    want, state, update = params, tx.init(params), jax.jit(tx.update)
    for g in gradients(params, 20):
        updates, state = update(g, state, want)
        want = jax.tree.map(np.add, want, updates)
    for name, array in tree.named(want).items():
        np.testing.assert_allclose(tree.named(got)[name], array, rtol=1e-5, atol=1e-6)


def test_sgd_and_rmsprop_are_numpy():
    x = np.array([[1.0, -2.0]])
    grads = [np.array([[0.3, 0.4]]), np.array([[-0.1, 0.2]])]
    flat = dict(schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.0)
    for name in ("sgd", "rmsprop"):
        got, *_ = train(
            settings(name=name, lr=0.1, **flat),
            {"w": jnp.asarray(x, jnp.float32)},
            [{"w": jnp.asarray(g, jnp.float32)} for g in grads],
            2,
        )
        want, v = x, 0
        for g in grads:
            v = 0.95 * v + 0.05 * g**2
            want = want - 0.1 * (g if name == "sgd" else g / (np.sqrt(v) + 1e-5))
        np.testing.assert_allclose(got["w"], want, rtol=1e-5)


def test_clipping_is_by_the_norm_of_everything():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    flat = dict(name="sgd", lr=1.0, schedule="constant", warmup_steps=0)
    for clip, factor in [(0.5, 0.1), (5.1, 1.0), (0.0, 1.0)]:
        got, _, metrics = train(settings(clip_norm=clip, **flat), params, [grads], 1)
        np.testing.assert_allclose(got["a"], [-3 * factor, 0], rtol=1e-6)
        np.testing.assert_allclose(got["b"], [-4 * factor], rtol=1e-6)
        assert {*metrics} == {"grad_norm", "update_norm", "param_norm", "learning_rate"}
        np.testing.assert_allclose(metrics["grad_norm"], 5, rtol=1e-6)
        np.testing.assert_allclose(metrics["update_norm"], 5 * factor, rtol=1e-6)
        assert float(metrics["learning_rate"]) == 1


def test_decay_is_by_name_not_by_shape():
    want = {
        "embed": True,
        "layers/query": True,
        "layers/norm/scale": False,  # [L, D], a matrix by shape alone
        "norm/scale": False,
        "bias": False,
    }
    for params in (Model(jax.random.key(0)), jax.eval_shape(Model, jax.random.key(0))):
        mask = optimizer.decayed(params)
        assert tree.named(mask) == want
        assert jax.tree.structure(mask) == jax.tree.structure(params)
    two = optimizer.decayed(
        {"value": {"head": 1, "bias": 1, "q_norm": 1, "rescaled": 1}}
    )
    assert two == {
        "value": {"head": True, "bias": False, "q_norm": False, "rescaled": True}
    }


def test_decay_of_the_real_model():
    config = ModelConfig(vocab_size=64)

    def make(key):
        return ScalarModel(Transformer(config, key), key)

    mask = tree.named(optimizer.decayed(jax.eval_shape(make, jax.random.key(0))))
    exempt = {name.split("/")[-1] for name, decay in mask.items() if not decay}
    assert exempt == {"scale", "bias"}
    for name in ("body/embed", "body/layers/attention/query", "head"):
        assert mask[name]


def test_decay_is_decoupled_from_the_gradient():
    params = Model(jax.random.key(0))
    zeros = [jax.tree.map(jnp.zeros_like, params)]
    config = settings(schedule="constant", warmup_steps=0, lr=0.5, weight_decay=0.2)
    got, *_ = train(config, params, zeros, 1)
    for name, array in tree.named(got).items():
        shrunk = 1.0 if name.endswith(("scale", "bias")) else 0.9
        np.testing.assert_allclose(array, shrunk * tree.named(params)[name], rtol=1e-6)


# ---------------------------------------------------------------------- how it is used


@pytest.mark.parametrize("name", optimizer.DIRECTIONS)
def test_every_state_can_be_placed_like_its_parameters(name):
    params = {"policy": Model(jax.random.key(0)), "value": Model(jax.random.key(1))}
    tx = optimizer.make(settings(name=name), steps=10).tx
    state = jax.eval_shape(tx.init, params)
    labels = tree.map_names(lambda name, _: name, params)
    placed = optax.tree.map_params(
        tx, lambda _, label: label, state, labels, transform_non_params=lambda _: "-"
    )
    moments = {"adamw": 2, "rmsprop": 1, "sgd": 0}[name]
    got = [x for x in jax.tree.leaves(placed) if x != "-"]
    assert sorted(got) == sorted(jax.tree.leaves(labels) * moments)


def test_learning_rate_factors():
    params = {"policy": {"w": jnp.zeros(2)}, "value": {"w": jnp.zeros(2)}}
    grads = jax.tree.map(jnp.ones_like, params)
    config = settings(name="sgd", schedule="constant", warmup_steps=0, clip_norm=0.0)
    made = optimizer.make(config, steps=1)
    got, _, metrics = optimizer.apply(
        made, grads, made.tx.init(params), params, 0, {"policy": 1.0, "value": 3.0}
    )
    np.testing.assert_allclose(got["policy"]["w"], [-0.01, -0.01], rtol=1e-6)
    np.testing.assert_allclose(got["value"]["w"], [-0.03, -0.03], rtol=1e-6)
    np.testing.assert_allclose(metrics["update_norm"], np.sqrt(0.002), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 0.01, rtol=1e-6)
    with pytest.raises(ValueError, match="lr_scale"):
        optimizer.apply(made, grads, made.tx.init(params), params, 0, {"policy": 1.0})


def test_the_step_counter_is_the_callers():
    params = {"w": jnp.zeros(1)}
    made = optimizer.make(settings(name="sgd", clip_norm=0.0), steps=10)
    state = made.tx.init(params)
    for step in (jnp.int32(7), 7, np.int64(7)):
        _, _, metrics = optimizer.apply(made, {"w": jnp.ones(1)}, state, params, step)
        want = schedule_by_hand(7, "cosine", 0.01, 3, 10, 0.1)
        np.testing.assert_allclose(metrics["learning_rate"], want, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(name="adam"),
            "optimizer.name must be one of adamw, rmsprop, sgd, got 'adam'",
        ),
        (dict(schedule="step"), "optimizer.schedule must be one of constant, cosine"),
        (dict(lr=-1.0), "optimizer.lr must be at least 0, got -1.0"),
        (dict(lr=float("nan")), "optimizer.lr"),
        (dict(lr="3e-4"), "optimizer.lr must be at least 0, got '3e-4'"),
        (dict(b2=1.0), "optimizer.b2 must be from 0 to below 1"),
        (dict(eps=0.0), "optimizer.eps must be above 0"),
        (dict(end_ratio=1.5), "optimizer.end_ratio must be from 0 to 1"),
        (dict(weight_decay=None), "optimizer.weight_decay"),
        (dict(clip_norm=True), "optimizer.clip_norm"),
        (dict(warmup_steps=0.5), "optimizer.warmup_steps must be a whole number"),
        (dict(warmup_steps=10), "warmup_steps must be below the 10 steps"),
        (
            dict(weight_deca=0.1),
            "weight_deca is no setting.*did you mean weight_decay?",
        ),
        (dict(zzz=1), "zzz is no setting of the optimizer; known: .*warmup_steps"),
    ],
    ids=str,
)
def test_impossible_settings_are_told_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        optimizer.make(settings(**changes), steps=10)
    assert "\n" not in str(error.value)


def test_a_missing_setting_is_told():
    config = settings()
    del config.b1
    with pytest.raises(UserError, match="optimizer.b1 is missing"):
        optimizer.make(config, steps=10)
