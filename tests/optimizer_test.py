"""The optimizer against numpy and optax.adamw; its schedule; its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from stagecraft import checkpoint, defaults, mesh, optimizer, tree
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
        decay_share=0.3,
        momentum=0.95,
        update_rms=0.2,
    )
    if changes.get("name") == "adam":
        defaults["weight_decay"] = 0.0
    return ConfigDict(defaults | changes)


def test_the_defaults_hold_every_setting_and_no_other():
    assert {*defaults.optimizer()} == {*settings()}
    for name in optimizer.DIRECTIONS:
        config = defaults.optimizer()
        config.name, config.weight_decay = name, 0.0
        optimizer.make(config, steps=100)


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
    if kind == "wsd":  # the last 3 of 10 steps
        return (
            lr + max(step - (steps - 3), 0) / 3 * (end * lr - lr)
            if step < 10
            else (end * lr)
        )
    if kind == "linear":
        return lr + share * (end * lr - lr)
    return lr * (end + (1 - end) * (1 + np.cos(np.pi * share)) / 2)


@pytest.mark.parametrize("warm", [0, 1, 4])
@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
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


def test_lion_is_numpy():
    x = np.array([[1.0, -2.0, 0.5]])
    grads = [np.array([[0.3, 0.4, -1.0]]), np.array([[-0.5, 0.01, 2.0]])]
    got, *_ = train(
        settings(
            name="lion", lr=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0
        ),
        {"w": jnp.asarray(x, jnp.float32)},
        [{"w": jnp.asarray(g, jnp.float32)} for g in grads],
        2,
    )
    want, m = x, np.zeros_like(x)
    for g in grads:
        want = want - 0.1 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * want)
        m = 0.95 * m + 0.05 * g
    np.testing.assert_allclose(got["w"], want, rtol=1e-5)


def test_adam_is_adamw_without_decay():
    params = Model(jax.random.key(0))
    one, two = (
        train(config, params, gradients(params, 3), 10)[0]
        for config in (settings(name="adam"), settings(weight_decay=0.0))
    )
    assert tree.digest(one) == tree.digest(two)


FLAT = dict(schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.0)


class Wide(nnx.Module):
    """Two layers with a matrix large enough to factor, and other shapes."""

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.layers = jax.vmap(WideBlock)(jax.random.split(keys[0], 2))
        self.embed = nnx.Param(
            jax.random.normal(keys[1], (130, 128)), axes=("vocab", "embed")
        )
        self.head = nnx.Param(jax.random.normal(keys[2], (128,)), axes=("embed",))


class WideBlock(nnx.Module):
    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.up = nnx.Param(
            jax.random.normal(keys[0], (128, 140)), axes=("embed", "ff")
        )
        self.query = nnx.Param(
            jax.random.normal(keys[1], (128, 4, 6)), axes=("embed", "heads", None)
        )
        self.out = nnx.Param(
            jax.random.normal(keys[2], (4, 6, 128)), axes=("heads", None, "embed")
        )
        self.scale = nnx.Param(jnp.ones(128), axes=("embed",))


def single_layers(module):
    """{name: float64 array}, every layer of a stack under a name of its own."""
    found = {}
    for name, array in tree.named(module).items():
        array = np.asarray(array, np.float64)
        if name.startswith("layers/"):
            found |= {f"{name}.{i}": layer for i, layer in enumerate(array)}
        else:
            found[name] = array
    return found


def rms(x):
    return np.sqrt((x**2).mean())


def adafactor_by_numpy(x, grads, lr):
    """One parameter; Shazeer and Stern's algorithms 4 and 6 without momentum."""
    row = column = v = 0.0
    for t, g in enumerate(grads, 1):
        keep = 1 - t**-0.8
        square = g**2 + 1e-30
        if x.ndim == 2 and min(x.shape) >= 128:
            row = keep * row + (1 - keep) * square.mean(1)
            column = keep * column + (1 - keep) * square.mean(0)
            u = g / np.sqrt(np.outer(row, column) / row.mean())
        else:
            v = keep * v + (1 - keep) * square
            u = g / np.sqrt(v)
        u = u / max(1, rms(u))
        x = x - lr * max(1e-3, rms(x)) * u
    return x


def newton_schulz(x):
    """Five quintic iterations of Jordan's coefficients, in float64."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / np.linalg.norm(wide)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide - 4.7750 * gram @ wide + 2.0315 * gram @ gram @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def muon_by_numpy(x, grads, lr, momentum, scale):
    """One matrix: Nesterov momentum with each part's bias corrected, orthogonalised."""
    m = np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m = momentum * m + (1 - momentum) * g
        ahead = momentum * m / (1 - momentum ** (t + 1))
        u = newton_schulz(ahead + (1 - momentum) * g / (1 - momentum**t))
        x = x - lr * scale * u
    return x


def adam_by_numpy(x, grads, c):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = c.b1 * m + (1 - c.b1) * g, c.b2 * v + (1 - c.b2) * g**2
        m_hat, v_hat = m / (1 - c.b1**t), v / (1 - c.b2**t)
        x = x - c.lr * m_hat / (np.sqrt(v_hat) + c.eps)
    return x


def test_adafactor_is_numpy_layer_by_layer():
    params = Wide(jax.random.key(0))
    grads = [*gradients(params, 4)]
    got, state, _ = train(settings(name="adafactor", **FLAT), params, grads, 4)
    each = [single_layers(g) for g in grads]
    for name, x in single_layers(params).items():
        want = adafactor_by_numpy(x, [g[name] for g in each], 0.01)
        np.testing.assert_allclose(
            single_layers(got)[name], want, rtol=1e-4, atol=1e-5, err_msg=name
        )
    # It is kept factored: far less than one number a parameter.
    assert tree.count(state) < 0.25 * tree.count(params)


def test_adafactor_is_optax_adafactor():
    params = {"w": jax.random.normal(jax.random.key(0), (128, 140)), "b": jnp.ones(3)}
    grads = [*gradients(params, 4)]
    got, *_ = train(settings(name="adafactor", **FLAT), params, grads, 4)
    tx = optax.adafactor(0.01)
    state, want = tx.init(params), params
    for g in grads:
        updates, state = tx.update(g, state, want)
        want = optax.apply_updates(want, updates)
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update_rms", [0.2, 0.0])
def test_muon_is_numpy_for_matrices_and_adam_for_the_rest(update_rms):
    params = Wide(jax.random.key(0))
    grads = [*gradients(params, 4)]
    config = settings(name="muon", update_rms=update_rms, momentum=0.9, **FLAT)
    got, *_ = train(config, params, grads, 4)
    each = [single_layers(g) for g in grads]
    # Rows and columns of what each layer multiplies with: inputs by outputs.
    matrices = {"up": (128, 140), "query": (128, 24), "out": (24, 128)}
    for name, x in single_layers(params).items():
        shape = matrices.get(name.split("/")[-1].split(".")[0])
        own = [g[name] for g in each]
        if shape is None:
            want = adam_by_numpy(x, own, config)
        else:
            scale = np.sqrt(max(1, shape[1] / shape[0]))
            if update_rms:
                scale = update_rms * np.sqrt(max(shape))
            flat = [g.reshape(shape) for g in own]
            want = muon_by_numpy(x.reshape(shape), flat, 0.01, 0.9, scale)
            want = want.reshape(x.shape)
        np.testing.assert_allclose(
            single_layers(got)[name], want, rtol=1e-3, atol=2e-5, err_msg=name
        )


def test_muon_moves_a_matrix_about_as_far_as_adam():
    params = Wide(jax.random.key(0))
    grads = [*gradients(params, 1)]
    got, *_ = train(settings(name="muon", **FLAT), params, grads, 1)
    moved = {k: v - single_layers(params)[k] for k, v in single_layers(got).items()}
    for name, change in moved.items():
        muon = name.split("/")[-1].split(".")[0] in ("up", "query", "out")
        low, high = (0.1, 0.3) if muon else (0.9, 1.01)
        assert low < rms(change) / 0.01 < high, name


def test_muon_takes_the_layers_matrices_of_the_real_model():
    config = ModelConfig(vocab_size=64, tied=False)

    def make(key):
        return ScalarModel(Transformer(config, key), key)

    model = jax.eval_shape(make, jax.random.key(0))
    variables = optimizer._variables(model)
    found = {n: optimizer.matrix_axes(n, axes) for n, (_, axes) in variables.items()}
    attention = "body/layers/attention"
    assert {n: tuple(d) for n, d in found.items() if d} == {
        f"{attention}/query": ((0,), (1, 2)),
        f"{attention}/key": ((0,), (1, 2)),
        f"{attention}/value": ((0,), (1, 2)),
        f"{attention}/out": ((0, 1), (2,)),
        "body/layers/ff/gate": ((0,), (1,)),
        "body/layers/ff/up": ((0,), (1,)),
        "body/layers/ff/down": ((0,), (1,)),
    }
    assert optimizer.matrix_axes("up", ("experts", "embed", "ff")) == ((1,), (2,))


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
def test_a_sharded_step_is_the_step_of_one_device(name, tmp_path):
    config = ModelConfig(
        vocab_size=64, width=128, layers=2, heads=4, kv_heads=2, ff_width=256
    )
    made = optimizer.make(settings(name=name), steps=10)
    steps = [0, 1]

    def make(key):
        model = Transformer(config, key)
        return {"policy": model, "value": ScalarModel(Transformer(config, key), key)}

    results = {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        shared = mesh.make(*sizes)
        with jax.set_mesh(shared):
            params = mesh.born(make, shared)(jax.random.key(0))
            state = mesh.born_optimizer(made.tx, params, shared)
            if sizes == (2, 2, 2):
                check_placed(params, state)
            placed = jax.tree.map(lambda x: x.sharding, (params, state))
            step = jax.jit(
                lambda p, s, g, i: optimizer.apply(made, g, s, p, i)[:2],
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
    step = jax.jit(optimizer.ema)
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
