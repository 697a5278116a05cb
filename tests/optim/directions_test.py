"""Each direction of the optimizer against numpy, and against Optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stagecraft import optim, tree
from stagecraft.models.transformer import ScalarModel, Transformer
from tests import tiny
from tests.optim.cases import Model, gradients, schedule_by_hand, settings, train


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
    config = tiny.config(tied=False)

    def make(key):
        return ScalarModel(Transformer(config, key), key)

    model = jax.eval_shape(make, jax.random.key(0))
    variables = optim._variables(model)
    found = {n: optim.matrix_axes(n, axes) for n, (_, axes) in variables.items()}
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
    assert optim.matrix_axes("up", ("experts", "embed", "ff")) == ((1,), (2,))
