"""A step of the optimizer: schedule, clipping, decay, shards, average, settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import checkpoint, defaults, optim, sharding, tree
from stagecraft.errors import UserError
from stagecraft.models.transformer import ScalarModel, Transformer
from tests import tiny
from tests.optim.cases import Model, gradients, schedule_by_hand, settings, train


def test_the_defaults_hold_every_setting_and_no_other():
    assert {*defaults.optimizer()} == {*settings()}
    for name in optim.DIRECTIONS:
        config = defaults.optimizer()
        config.name, config.weight_decay = name, 0.0
        optim.make(config, steps=100)


@pytest.mark.parametrize("warm", [0, 1, 4])
@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_schedule(kind, warm):
    config = settings(schedule=kind, warmup_steps=warm, end_ratio=0.2)
    with jax.numpy_dtype_promotion("strict"):
        schedule = optim.make(config, steps=10).schedule
        eager = [schedule(step) for step in range(14)]
        compiled = jax.jit(jax.vmap(schedule))(jnp.arange(14))
    want = [schedule_by_hand(s, kind, 0.01, warm, 10, 0.2) for s in range(14)]
    assert all(rate.dtype == jnp.float32 and rate.shape == () for rate in eager)
    np.testing.assert_allclose(eager, want, rtol=1e-5)
    np.testing.assert_allclose(compiled, want, rtol=1e-5)


def test_schedule_starts_above_zero_peaks_and_ends():
    schedule = optim.make(settings(warmup_steps=5), steps=20).schedule
    np.testing.assert_allclose(schedule(0), 0.002, rtol=1e-6)
    np.testing.assert_allclose(schedule(4), 0.01, rtol=1e-6)
    np.testing.assert_allclose(schedule(5), 0.01, rtol=1e-6)
    np.testing.assert_allclose(schedule(20), 0.001, rtol=1e-5)


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
        mask = optim.decayed(params)
        assert tree.named(mask) == want
        assert jax.tree.structure(mask) == jax.tree.structure(params)
    two = optim.decayed({"value": {"head": 1, "bias": 1, "q_norm": 1, "rescaled": 1}})
    assert two == {
        "value": {"head": True, "bias": False, "q_norm": False, "rescaled": True}
    }


def test_decay_of_the_real_model():
    config = tiny.CONFIG

    def make(key):
        return ScalarModel(Transformer(config, key), key)

    mask = tree.named(optim.decayed(jax.eval_shape(make, jax.random.key(0))))
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


@pytest.mark.parametrize("name", optim.DIRECTIONS)
def test_a_sharded_step_is_the_step_of_one_device(name, tmp_path):
    config = tiny.config(width=128, layers=2, head_dim=32, ff_width=256)
    made = optim.make(settings(name=name), steps=10)
    steps = [0, 1]

    def make(key):
        return {"value": ScalarModel(Transformer(config, key), key)}

    results = {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        shared = sharding.make_mesh(*sizes)
        with jax.set_mesh(shared):
            params = sharding.init_sharded(make, shared)(jax.random.key(0))
            state = sharding.init_sharded(made.tx.init, shared)(params)
            if sizes == (2, 2, 2):
                check_placed(params, state)
            placed = jax.tree.map(lambda x: x.sharding, (params, state))
            step = jax.jit(
                lambda p, s, g, i: optim.apply(made, g, s, p, i)[:2],
                out_shardings=placed,
                donate_argnums=(0, 1),
            )
            for i, g in zip(steps, gradients(params, 2), strict=True):
                g = jax.device_put(g, placed[0])
                params, state = step(params, state, g, i)
            now = jax.tree.map(lambda x: x.sharding, (params, state))
            assert jax.tree.structure(now) == jax.tree.structure(placed)
            assert jax.tree.leaves(now) == jax.tree.leaves(placed)
            if sizes == (2, 2, 2):
                check_restored(tmp_path, params, state)
            results[sizes] = tree.named(jax.tree.map(np.asarray, params))
    for leaf, array in results[(1, 1, 1)].items():
        np.testing.assert_allclose(
            results[(2, 2, 2)][leaf], array, rtol=1e-4, atol=1e-5, err_msg=leaf
        )


def check_placed(params, state):
    """Nothing of a parameter's size is kept whole, and nothing moves its axes."""
    specs = {x.shape: x.sharding.spec for x in jax.tree.leaves(params) if x.ndim > 1}
    for leaf in jax.tree.leaves(state):
        if leaf.shape in specs:
            assert leaf.sharding.spec == specs[leaf.shape]
    factored = {(2, 128): (None, "fsdp"), (2, 256): (None, "tensor")}
    for name, leaf in tree.named(state).items():
        if name.endswith(("ff/gate", "ff/up", "ff/down")) and leaf.shape in factored:
            assert tuple(leaf.sharding.spec) == factored[leaf.shape], name


def check_restored(folder, params, state):
    """Through a checkpoint and back, every array in its place."""
    saved = checkpoint.Checkpoints(folder / "checkpoints")
    state = {"state": state, "step": jnp.int32(1)}
    saved.save(1, params, state, {})
    saved.wait()
    _, again, _ = saved.restore(1, params, state)
    saved.close()
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert tree.digest(again) == tree.digest(state)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert one.sharding == two.sharding


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_ema_is_numpy(decay):
    average = params = Model(jax.random.key(0))
    want = {n: np.asarray(x, np.float64) for n, x in tree.named(params).items()}
    step = jax.jit(optim.ema)
    with jax.numpy_dtype_promotion("strict"):
        for i in range(1, 4):
            params = Model(jax.random.key(i))
            average = step(average, params, decay)
            new = tree.named(params)
            want = {n: decay * x + (1 - decay) * new[n] for n, x in want.items()}
    assert isinstance(average, Model)
    for name, x in tree.named(average).items():
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, want[name], rtol=1e-5, atol=1e-6)


def test_learning_rate_factors():
    params = {"policy": {"w": jnp.zeros(2)}, "value": {"w": jnp.zeros(2)}}
    grads = jax.tree.map(jnp.ones_like, params)
    config = settings(name="sgd", schedule="constant", warmup_steps=0, clip_norm=0.0)
    made = optim.make(config, steps=1)
    got, _, metrics = optim.apply(
        made, grads, made.tx.init(params), params, 0, {"policy": 1.0, "value": 3.0}
    )
    np.testing.assert_allclose(got["policy"]["w"], [-0.01, -0.01], rtol=1e-6)
    np.testing.assert_allclose(got["value"]["w"], [-0.03, -0.03], rtol=1e-6)
    np.testing.assert_allclose(metrics["update_norm"], np.sqrt(0.002), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 0.01, rtol=1e-6)
    with pytest.raises(ValueError, match="lr_scale"):
        optim.apply(made, grads, made.tx.init(params), params, 0, {"policy": 1.0})


def test_the_step_counter_is_the_callers():
    params = {"w": jnp.zeros(1)}
    made = optim.make(settings(name="sgd", clip_norm=0.0), steps=10)
    state = made.tx.init(params)
    for step in (jnp.int32(7), 7, np.int64(7)):
        _, _, metrics = optim.apply(made, {"w": jnp.ones(1)}, state, params, step)
        want = schedule_by_hand(7, "cosine", 0.01, 3, 10, 0.1)
        np.testing.assert_allclose(metrics["learning_rate"], want, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(name="adamax"),
            "optimizer.name must be one of adamw, adam, lion, .*, sgd, got 'adamax'",
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
        (dict(decay_share=0.0), "decay_share must be above 0, at most 1, got 0.0"),
        (dict(decay_share=1.1), "optimizer.decay_share must be above 0"),
        (dict(schedule="wsd", decay_share=0.04), "no whole step of the 10 steps"),
        (dict(schedule="wsd", decay_share=0.8), "no room for warmup_steps=3 in the 10"),
        (dict(momentum=1.0), "optimizer.momentum must be from 0 to below 1"),
        (dict(update_rms=-0.1), "optimizer.update_rms must be at least 0"),
        (
            dict(name="adam", weight_decay=0.1),
            "weight_decay must be 0 with adam, which has none, got 0.1; adamw",
        ),
        (
            dict(weight_deca=0.1),
            "weight_deca: unknown key; did you mean 'weight_decay'",
        ),
        (dict(zzz=1), "zzz: unknown key; known here: .*warmup_steps"),
    ],
    ids=str,
)
def test_impossible_settings_are_told_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        optim.make(settings(**changes), steps=10)
    assert "\n" not in str(error.value)


def test_a_missing_setting_is_told():
    config = settings()
    del config.b1
    with pytest.raises(UserError, match="optimizer.b1 is missing"):
        optim.make(config, steps=10)
