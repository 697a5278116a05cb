"""Estimators of the KL divergence, the reward that pays for it, and its controller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses

P, Q = np.array([0.7, 0.2, 0.08, 0.02]), np.array([0.1, 0.2, 0.3, 0.4])
KS = ("k1", "k2", "k3")
KL = float(np.sum(P * np.log(P / Q)))


def numbers(*rows):
    return [jnp.asarray(row, jnp.float32) for row in rows]


@pytest.mark.parametrize("name, want", [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531)])
def test_golden(run, name, want):
    got = run(getattr(losses, name))(*numbers([-1.0], [-1.5]))
    np.testing.assert_allclose(got, [want], atol=1e-6)


@pytest.mark.parametrize("name", KS)
def test_equal_policies_are_at_no_distance(name):
    assert not getattr(losses, name)(*numbers([-1.0, -7.0], [-1.0, -7.0])).any()


def test_expectations_are_the_kl_except_for_k2():
    logs = numbers(np.log(P), np.log(Q))
    mean = {k: P @ np.asarray(getattr(losses, k)(*logs)) for k in KS}
    np.testing.assert_allclose([mean["k1"], mean["k3"]], [KL, KL], rtol=1e-5)
    np.testing.assert_allclose(mean["k2"], P @ np.log(P / Q) ** 2 / 2, rtol=1e-5)
    assert abs(mean["k2"] - KL) > 0.2


@pytest.mark.parametrize("name", KS)
def test_monte_carlo(name):
    rng = np.random.default_rng(0)
    x = rng.choice(4, size=100_000, p=P)
    samples = getattr(losses, name)(*numbers(np.log(P)[x], np.log(Q)[x]))
    samples = np.asarray(samples, np.float64)
    want = P @ np.log(P / Q) ** 2 / 2 if name == "k2" else KL
    error = samples.std() / np.sqrt(samples.size)
    assert abs(samples.mean() - want) < 4 * error < 0.05
    assert (samples >= 0).all() == (name != "k1")


def test_gradients_as_losses():
    """On samples of p itself k1 has no expected gradient, and k2 that of the KL."""
    p, log_q = numbers(P, np.log(Q))
    logits = jnp.log(p)

    def expected(name):
        def loss(x):
            return jnp.sum(p * getattr(losses, name)(jax.nn.log_softmax(x), log_q))

        return jax.grad(loss)(logits)

    def kl(x):
        log_p = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    np.testing.assert_allclose(expected("k1"), np.zeros(4), atol=1e-6)
    np.testing.assert_allclose(expected("k2"), jax.grad(kl)(logits), atol=1e-6)
    assert np.abs(jax.grad(kl)(logits)).max() > 0.1


@pytest.mark.parametrize("name", KS)
def test_gradient_by_differences(check_gradient, name):
    rng = np.random.default_rng(1)
    check_gradient(
        lambda p, q: jnp.sum(getattr(losses, name)(p, q)), *rng.normal(size=(2, 2, 3))
    )


def test_missing_eos_takes_from_those_that_did_not_end(run):
    got = run(functools.partial(losses.missing_eos, penalty=1.5))(
        jnp.array([2.0, 2.0, -1.0]), jnp.array([True, False, False])
    )
    assert got.tolist() == [2.0, 0.5, -2.5]


def reward_by_loop(scores, logps, ref_logps, mask, kl_coef):
    rewards = np.zeros(logps.shape)
    for b in range(len(scores)):
        for t in np.flatnonzero(mask[b]):
            rewards[b, t] = -kl_coef * (logps[b, t] - ref_logps[b, t])
        if mask[b].any():
            rewards[b, np.flatnonzero(mask[b])[-1]] += scores[b]
    return rewards


def test_kl_reward_is_the_loop(run):
    rng = np.random.default_rng(2)
    scores = rng.normal(size=5).astype(np.float32)
    logps, ref_logps = -rng.random((2, 5, 6)).astype(np.float32)
    # Ended, ended at once, cut at the window, empty, ended one before the window.
    mask = np.arange(6)[None] < np.array([3, 1, 6, 0, 5])[:, None]
    got = run(functools.partial(losses.kl_reward, kl_coef=0.3))(
        *map(jnp.asarray, (scores, logps, ref_logps, mask))
    )
    want = reward_by_loop(scores, logps, ref_logps, mask, 0.3)
    assert got.shape == (5, 6) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not np.asarray(got)[~mask].any()


def test_kl_reward_pays_for_closeness_and_scores_at_the_end():
    logps, ref_logps = numbers([[-1.0, -1, -1, -9, -9]], [[-1.1, -1.1, -1.1, 0, 0]])
    mask = jnp.array([[True, True, True, False, False]])
    rewards = losses.kl_reward(jnp.ones(1), logps, ref_logps, mask, kl_coef=0.1)
    np.testing.assert_allclose(rewards, [[-0.01, -0.01, 0.99, 0, 0]], atol=1e-6)
    values = jnp.array([[0.1, 0.2, 0.3, 0.0, 0.0]])
    advantages, _ = losses.gae(rewards, values, mask)
    np.testing.assert_allclose(advantages, [[0.798225, 0.7455, 0.69, 0, 0]], atol=1e-6)


def test_kl_reward_takes_a_coefficient_that_changes():
    logps, ref_logps = numbers([[-1.0, -2.0]], [[-2.0, -2.0]])
    mask = jnp.ones((1, 2), bool)
    reward = jax.jit(
        lambda c: losses.kl_reward(jnp.zeros(1), logps, ref_logps, mask, kl_coef=c)
    )
    assert reward(jnp.float32(0.5)).tolist() == [[-0.5, 0.0]]
    assert reward(jnp.float32(0.0)).tolist() == [[0.0, 0.0]]


def test_nan_outside_the_mask_stays_there():
    mask = jnp.array([[True, False], [False, False]])
    dirty = jnp.where(mask, -1.0, jnp.nan)

    def total(logps, ref_logps):
        scores = jnp.array([1.0, 2.0])
        return jnp.sum(losses.kl_reward(scores, logps, ref_logps, mask, kl_coef=0.5))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(dirty, dirty - 1)
    assert float(value) == 0.5
    np.testing.assert_array_equal(gradients[0], [[-0.5, 0], [0, 0]])
    np.testing.assert_array_equal(gradients[1], [[0.5, 0], [0, 0]])


def test_kl_reward_gradient(check_gradient):
    rng = np.random.default_rng(3)
    mask, weights = jnp.array([[True, True, False]] * 2), rng.normal(size=(2, 3))

    def total(scores, logps, ref_logps):
        rewards = losses.kl_reward(scores, logps, ref_logps, mask, kl_coef=0.3)
        return jnp.sum(rewards * weights)

    check_gradient(total, rng.normal(size=2), *rng.normal(size=(2, 2, 3)))


@pytest.mark.parametrize(
    "kl, error",
    [(9.0, 0.2), (100.0, 0.2), (3.0, -0.2), (0.0, -0.2), (6.0, 0.0), (6.6, 0.1)],
)
def test_adaptive(run, kl, error):
    step = functools.partial(losses.adaptive, target=6.0, horizon=1e4, batch_size=256)
    got = run(step)(jnp.float32(0.1), jnp.float32(kl))
    np.testing.assert_allclose(got, 0.1 * (1 + error * 256 / 1e4), rtol=1e-6)


def test_adaptive_golden():
    got = losses.adaptive(0.1, 9.0, target=6.0, horizon=1e4, batch_size=256)
    np.testing.assert_allclose(got, 0.100512, atol=1e-7)


def test_shapes_that_differ_are_refused():
    rows = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="ref_logps"):
        losses.k3(rows, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="scores"):
        losses.kl_reward(jnp.ones((2, 1)), rows, rows, rows > 0, kl_coef=0.1)
    with pytest.raises(ValueError, match="ended"):
        losses.missing_eos(jnp.ones(2), jnp.ones(3, bool), penalty=1.0)
