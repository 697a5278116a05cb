"""Advantages, whitening and explained variance."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses
from stagecraft.losses import advantage


def prefixes(lengths, width):
    return np.arange(width)[None] < np.array(lengths)[:, None]


def gae_by_loop(rewards, values, mask, discount, lambda_, after=None):
    advantages = np.zeros(rewards.shape)
    for b, length in enumerate(mask.sum(1)):
        later = 0.0
        last = 0.0 if after is None else after[b]
        for t in reversed(range(length)):
            ahead = values[b, t + 1] if t + 1 < length else last
            delta = rewards[b, t] + discount * ahead - values[b, t]
            later = advantages[b, t] = delta + discount * lambda_ * later
    return advantages, np.where(mask, advantages + values, 0)


@pytest.mark.parametrize(
    "rewards, values, length, want",
    [
        # The score on the end token, and on the slot after it.
        (
            [-0.01, -0.01, 0.99, 0, 0],
            [0.1, 0.2, 0.3, 0, 0],
            3,
            [0.798225, 0.7455, 0.69],
        ),
        (
            [-0.01, -0.01, -0.01, 1, 0],
            [0.1, 0.2, 0.3, 0.5, 0],
            4,
            [0.775662, 0.72175, 0.665, 0.5],
        ),
    ],
)
def test_gae_golden(run, rewards, values, length, want):
    mask = jnp.asarray(prefixes([length], 5))
    got, returns = run(losses.gae)(jnp.array([rewards]), jnp.array([values]), mask)
    want = np.array(want + [0] * (5 - length))
    np.testing.assert_allclose(got, [want], atol=1e-6)
    np.testing.assert_allclose(returns, [want + values], atol=1e-6)


@pytest.mark.parametrize("discount, lambda_", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0)])
def test_gae_is_the_loop(run, discount, lambda_):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 5, 7)).astype(np.float32)
    mask = prefixes([7, 3, 1, 0, 6], 7)
    gae = functools.partial(losses.gae, discount=discount, lambda_=lambda_)
    got = run(gae)(*map(jnp.asarray, (rewards, values, mask)))
    want = gae_by_loop(rewards, values, mask, discount, lambda_)
    for array, expected in zip(got, want, strict=True):
        assert array.shape == (5, 7) and array.dtype == jnp.float32
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)
        assert not np.asarray(array)[~mask].any()


def test_gae_of_cut_completions_may_look_ahead(run):
    rng = np.random.default_rng(7)
    rewards, values = rng.normal(size=(2, 5, 7)).astype(np.float32)
    mask = prefixes([7, 3, 1, 0, 6], 7)
    after = np.array([2.0, 0.0, -1.0, 4.0, 0.5], np.float32)
    gae = functools.partial(losses.gae, discount=0.9, lambda_=0.7)
    got = run(lambda *a: gae(*a[:3], bootstrap=a[3]))(
        *map(jnp.asarray, (rewards, values, mask, after))
    )
    want = gae_by_loop(rewards, values, mask, 0.9, 0.7, after)
    for array, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)
        assert not np.asarray(array)[~mask].any()
    plain = gae(*map(jnp.asarray, (rewards, values, mask)))
    same = gae(*map(jnp.asarray, (rewards, values, mask)), bootstrap=jnp.zeros(5))
    np.testing.assert_array_equal(plain[0], same[0])
    np.testing.assert_array_equal(plain[1], same[1])


def test_gae_bootstrap_by_hand():
    one = jnp.ones((1, 1))  # paid 1, hoped for 1/4, and 2 more are to come at half
    advantages, returns = losses.gae(
        one, 0.25 * one, one > 0, discount=0.5, bootstrap=jnp.array([2.0])
    )
    assert advantages.tolist() == [[1.75]] and returns.tolist() == [[2.0]]


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_discounted_returns(run, discount):
    rng = np.random.default_rng(8)
    rewards = rng.normal(size=(4, 6)).astype(np.float32)
    mask = prefixes([6, 2, 0, 1], 6)
    rewards[1, 3] = np.nan
    got = run(functools.partial(advantage.discounted_returns, discount=discount))(
        jnp.asarray(rewards), jnp.asarray(mask)
    )
    want = np.zeros((4, 6))
    for b, length in enumerate(mask.sum(1)):
        for t in range(length):
            want[b, t] = sum(
                discount ** (u - t) * rewards[b, u] for u in range(t, length)
            )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_discounted_returns_gradient(check_gradient):
    rng = np.random.default_rng(9)
    mask, weights = jnp.asarray(prefixes([4, 2], 4)), rng.normal(size=(2, 4))

    def total(rewards):
        got = advantage.discounted_returns(rewards, mask, discount=0.9)
        return jnp.sum(got * weights)

    check_gradient(total, rng.normal(size=(2, 4)))


def test_gae_defaults():
    rewards, values = jnp.ones((1, 3)), jnp.zeros((1, 3))
    advantages, _ = losses.gae(rewards, values, jnp.ones((1, 3), bool))
    np.testing.assert_allclose(advantages, [[1 + 0.95 + 0.95**2, 1.95, 1]], rtol=1e-6)


def test_gae_with_lambda_one_returns_what_came():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 2, 6)).astype(np.float32)
    mask = jnp.ones((2, 6), bool)
    _, returns = losses.gae(
        jnp.asarray(rewards), jnp.asarray(values), mask, lambda_=1.0
    )
    want = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(returns, want, rtol=1e-4, atol=1e-5)


def test_gae_of_a_perfect_critic_is_zero():
    rewards = np.array([[0.0, 0.0, 2.0]], np.float32)
    values = jnp.full((1, 3), 2.0)
    advantages, returns = losses.gae(
        jnp.asarray(rewards), values, jnp.ones((1, 3), bool)
    )
    assert not advantages.any() and returns.tolist() == [[2.0, 2.0, 2.0]]


def test_gae_does_not_see_what_lies_outside_the_mask():
    rng = np.random.default_rng(2)
    rewards, values = rng.normal(size=(2, 2, 4)).astype(np.float32)
    mask = prefixes([4, 2], 4)
    clean = losses.gae(*map(jnp.asarray, (rewards, values, mask)))
    wide = ((0, 0), (0, 3))
    dirty = [np.where(mask, x, np.nan) for x in (rewards, values)]
    dirty = [np.pad(x, wide, constant_values=np.nan) for x in dirty]
    padded = losses.gae(*map(jnp.asarray, (*dirty, np.pad(mask, wide))))
    for short, long in zip(clean, padded, strict=True):
        np.testing.assert_array_equal(short, long[:, :4])
        assert not long[:, 4:].any()


def test_gae_gradient(check_gradient):
    rng = np.random.default_rng(3)
    mask = jnp.asarray(prefixes([4, 2], 4))
    weights = rng.normal(size=(2, 4))

    def total(rewards, values, after):
        advantages, returns = losses.gae(
            rewards, values, mask, discount=0.9, bootstrap=after
        )
        return jnp.sum(advantages * weights + returns * returns)

    check_gradient(total, *rng.normal(size=(2, 2, 4)), rng.normal(size=2))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_numpy(run, shift_mean, unbiased):
    rng = np.random.default_rng(4)
    x = rng.normal(3, 2, (4, 6)).astype(np.float32)
    mask = rng.random((4, 6)) < 0.6
    whiten = functools.partial(losses.whiten, shift_mean=shift_mean, unbiased=unbiased)
    got = np.asarray(run(whiten)(jnp.asarray(x), jnp.asarray(mask)))
    real = x[mask]
    want = (real - real.mean()) / np.sqrt(real.var(ddof=int(unbiased)) + 1e-8)
    np.testing.assert_allclose(
        got[mask], want if shift_mean else want + real.mean(), rtol=1e-4, atol=1e-5
    )
    assert not got[~mask].any()


def test_whiten_golden_divides_by_n():
    got = losses.whiten(jnp.array([1.0, 2.0, 3.0]), jnp.ones(3, bool))
    np.testing.assert_allclose(got, [-1.224745, 0, 1.224745], atol=1e-6)
    got = losses.whiten(jnp.array([1.0, 2.0, 3.0]), jnp.ones(3, bool), unbiased=True)
    np.testing.assert_allclose(got, [-1, 0, 1], atol=1e-6)


def test_whiten_edges():
    dirty = jnp.array([5.0, jnp.nan, jnp.inf])
    one = jnp.array([True, False, False])
    assert losses.whiten(dirty, one).tolist() == [0, 0, 0]
    assert losses.whiten(dirty, one, unbiased=True).tolist() == [0, 0, 0]
    assert losses.whiten(dirty, one, shift_mean=False).tolist() == [5, 0, 0]
    assert losses.whiten(dirty, jnp.zeros(3, bool)).tolist() == [0, 0, 0]
    assert losses.whiten(jnp.full(3, 7.0), jnp.ones(3, bool)).tolist() == [0, 0, 0]


def test_whiten_gradient(check_gradient):
    rng = np.random.default_rng(5)
    mask, weights = jnp.asarray(rng.random((2, 5)) < 0.7), rng.normal(size=(2, 5))
    check_gradient(
        lambda x: jnp.sum(losses.whiten(x, mask) * weights), rng.normal(size=(2, 5))
    )


def test_explained_variance_numpy(run):
    rng = np.random.default_rng(6)
    values, returns = rng.normal(size=(2, 4, 6)).astype(np.float32)
    mask = rng.random((4, 6)) < 0.6
    got = run(losses.explained_variance)(*map(jnp.asarray, (values, returns, mask)))
    want = 1 - np.var((returns - values)[mask]) / np.var(returns[mask])
    assert got.shape == ()
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_explained_variance_limits():
    returns = jnp.array([1.0, 2.0, 4.0, jnp.nan])
    mask = jnp.array([True, True, True, False])
    assert float(losses.explained_variance(returns + 3, returns, mask)) == 1.0
    flat = losses.explained_variance(jnp.zeros(4), returns, mask)
    np.testing.assert_allclose(flat, 0, atol=1e-6)
    assert float(losses.explained_variance(-returns, returns, mask)) < -2
    assert float(losses.explained_variance(returns, jnp.ones(4), mask)) == 0.0
    assert float(losses.explained_variance(returns, returns, jnp.zeros(4, bool))) == 0.0


def test_shapes_that_differ_are_refused():
    row, rows = jnp.ones((1, 3)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="values"):
        losses.gae(rows, row, rows > 0)
    with pytest.raises(ValueError, match="bootstrap"):
        losses.gae(rows, rows, rows > 0, bootstrap=jnp.ones(3))
    with pytest.raises(ValueError, match="mask"):
        losses.whiten(rows, row > 0)
