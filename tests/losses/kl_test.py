"""Estimators of the KL divergence, the reward that pays for it, and its controller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses
from stagecraft.errors import UserError
from stagecraft.losses import kl

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


def test_missing_eos_may_replace_the_score(run):
    replaced = functools.partial(losses.missing_eos, penalty=1.5, replace=-1.0)
    got = run(replaced)(jnp.array([2.0, 2.0, -3.0]), jnp.array([True, False, False]))
    assert got.tolist() == [2.0, -1.0, -1.0]
    scores, ended = jnp.array([2.0, -3.0]), jnp.array([False, False])
    assert losses.missing_eos(scores, ended).tolist() == [2.0, -3.0]
    assert losses.missing_eos(scores, ended, replace=0.0).tolist() == [0.0, 0.0]


def test_missing_eos_gradient(check_gradient):
    ended, weights = jnp.array([True, False]), np.array([2.0, 3.0])
    for options in ({"penalty": 1.0}, {"replace": -1.0}):
        check_gradient(
            lambda x, o=options: jnp.sum(losses.missing_eos(x, ended, **o) * weights),
            np.array([0.5, 0.7]),
        )


def reward_by_loop(scores, logps, ref_logps, mask, kl_coef, placement, estimator):
    rewards = np.zeros(logps.shape)
    for b in range(len(scores)):
        for t in np.flatnonzero(mask[b]):
            ratio = logps[b, t] - ref_logps[b, t]
            paid = ratio if estimator == "k1" else np.exp(-ratio) - 1 + ratio
            rewards[b, t] = -kl_coef * paid
        if mask[b].any():
            slot = np.flatnonzero(mask[b])[-1]
            slot += placement == "B" and slot + 1 < mask.shape[1]
            rewards[b, slot] += scores[b]
    return rewards


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("placement", ["A", "B"])
def test_kl_reward_is_the_loop(run, placement, estimator):
    rng = np.random.default_rng(2)
    scores = rng.normal(size=5).astype(np.float32)
    logps, ref_logps = -rng.random((2, 5, 6)).astype(np.float32)
    # Ended, ended at once, cut at the window, empty, ended one before the window.
    mask = np.arange(6)[None] < np.array([3, 1, 6, 0, 5])[:, None]
    options = {"kl_coef": 0.3, "placement": placement, "estimator": estimator}
    got = run(functools.partial(losses.kl_reward, **options))(
        *map(jnp.asarray, (scores, logps, ref_logps, mask))
    )
    want = reward_by_loop(scores, logps, ref_logps, mask, **options)
    assert got.shape == (5, 6) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    paid = np.asarray(kl.value_mask(jnp.asarray(mask), placement))
    assert not np.asarray(got)[~paid].any()
    assert paid.sum(1).tolist() == (
        [3, 1, 6, 0, 5] if placement == "A" else [4, 2, 6, 0, 6]
    )
    np.testing.assert_array_equal(paid, np.arange(6) < paid.sum(1)[:, None])


def test_kl_reward_defaults_to_k1_at_the_end_token():
    rows = numbers([[-1.0, -2.0, 0.0]], [[-1.5, -1.0, 0.0]])
    mask = jnp.array([[True, True, False]])
    got = losses.kl_reward(jnp.ones(1), *rows, mask, kl_coef=0.1)
    np.testing.assert_allclose(got, [[-0.05, 1.1, 0]], rtol=1e-6)
    assert kl.value_mask(mask).tolist() == mask.tolist()


def test_score_after_the_end_token_golden(run):
    """The score is paid where the critic has read the whole completion."""
    logps, ref_logps = numbers([[-1.0, -1, -1, -9, -9]], [[-1.1, -1.1, -1.1, 0, 0]])
    mask = jnp.array([[True, True, True, False, False]])
    values = jnp.array([[0.1, 0.2, 0.3, 0.5, 0.7]])

    def judge(logps, ref_logps, values):
        rewards = losses.kl_reward(
            jnp.ones(1), logps, ref_logps, mask, kl_coef=0.1, placement="B"
        )
        return rewards, losses.gae(rewards, values, kl.value_mask(mask, "B"))

    rewards, (advantages, returns) = run(judge)(logps, ref_logps, values)
    np.testing.assert_allclose(rewards, [[-0.01, -0.01, -0.01, 1, 0]], atol=1e-6)
    want = np.array([0.775662, 0.72175, 0.665, 0.5, 0])
    np.testing.assert_allclose(advantages, [want], atol=1e-6)
    hoped = np.array([0.1, 0.2, 0.3, 0.5, 0])
    np.testing.assert_allclose(returns, [want + hoped], atol=1e-6)


def test_a_completion_that_fills_the_window_has_no_slot_after_it():
    zeros, full = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    got = [
        losses.kl_reward(jnp.ones(1), zeros, zeros, full, kl_coef=0.1, placement=p)
        for p in "AB"
    ]
    assert got[0].tolist() == got[1].tolist() == [[0.0, 1.0]]
    assert kl.value_mask(full, "B").tolist() == [[True, True]]


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


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("placement", ["A", "B"])
def test_wild_numbers_outside_the_mask_stay_there(placement, estimator):
    mask = jnp.array([[True, False, False], [False, False, False]])
    wild = jnp.where(mask, -1.0, jnp.array([jnp.nan, -jnp.inf, 1e6]))

    def total(logps, ref_logps):
        rewards = losses.kl_reward(
            jnp.ones(2),
            logps,
            ref_logps,
            mask,
            kl_coef=0.5,
            placement=placement,
            estimator=estimator,
        )
        return jnp.sum(rewards)

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(wild, wild)
    assert float(value) == 1.0
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[~mask].any()


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


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("placement", ["A", "B"])
def test_kl_reward_gradient(check_gradient, placement, estimator):
    rng = np.random.default_rng(3)
    mask, weights = jnp.array([[True, True, False]] * 2), rng.normal(size=(2, 3))

    def total(scores, logps, ref_logps):
        rewards = losses.kl_reward(
            scores,
            logps,
            ref_logps,
            mask,
            kl_coef=0.3,
            placement=placement,
            estimator=estimator,
        )
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


@pytest.mark.parametrize("name, want", [("k2", 0.125), ("k3", 0.106531)])
def test_kl_in_loss_golden(run, name, want):
    function = functools.partial(kl.kl_in_loss, estimator=name)
    loss, metrics = run(function)(*numbers([[-1.0, -2.0]], [[-1.5, -2.0]]))
    np.testing.assert_allclose(loss, [[want, 0]], atol=1e-6)
    assert {*metrics} == {"kl"}
    np.testing.assert_array_equal(metrics["kl"], loss)


def test_kl_in_loss_numpy(run):
    rng = np.random.default_rng(4)
    logps, ref, old = rng.normal(size=(3, 2, 5)).astype(np.float32)
    arrays = [jnp.asarray(x) for x in (logps, ref, old)]
    plain = np.exp(ref - logps) - 1 + logps - ref
    loss, _ = run(kl.kl_in_loss)(*arrays)  # old log-probs alone change nothing
    np.testing.assert_allclose(loss, plain, rtol=1e-4, atol=1e-6)
    corrected = functools.partial(kl.kl_in_loss, bias_correction=True)
    loss, metrics = run(corrected)(*arrays)
    np.testing.assert_allclose(loss, np.exp(logps - old) * plain, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(metrics["kl"], loss)


@pytest.mark.parametrize(
    "options", [{"estimator": "k2"}, {"estimator": "k3"}, {"bias_correction": True}]
)
def test_kl_in_loss_gradient_by_differences(check_gradient, options):
    rng = np.random.default_rng(5)
    check_gradient(
        lambda *x: jnp.sum(kl.kl_in_loss(*x, **options)[0]), *rng.normal(size=(3, 2, 3))
    )


def test_k1_in_the_loss_is_refused_with_the_reason():
    rows = jnp.ones((1, 2))
    with pytest.raises(UserError, match="expected gradient .* is zero.*'k1' in the re"):
        kl.kl_in_loss(rows, rows, estimator="k1")


def test_options_that_do_not_go_together_are_refused():
    rows, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    with pytest.raises(UserError, match="expected estimator='k3'"):
        kl.kl_in_loss(rows, rows, rows, estimator="k2", bias_correction=True)
    with pytest.raises(ValueError, match="needs old_logps"):
        kl.kl_in_loss(rows, rows, bias_correction=True)
    with pytest.raises(UserError, match="estimator='k4'.*'k2', 'k3'"):
        kl.kl_in_loss(rows, rows, estimator="k4")
    with pytest.raises(UserError, match="estimator='k2'.*'k1', 'k3'"):
        losses.kl_reward(jnp.ones(1), rows, rows, mask, kl_coef=0.1, estimator="k2")
    with pytest.raises(UserError, match="placement='C'.*'A', 'B'"):
        losses.kl_reward(jnp.ones(1), rows, rows, mask, kl_coef=0.1, placement="C")


def test_shapes_that_differ_are_refused():
    rows = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="ref_logps"):
        losses.k3(rows, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="old_logps"):
        kl.kl_in_loss(rows, rows, jnp.ones((1, 3)), bias_correction=True)
    with pytest.raises(ValueError, match="scores"):
        losses.kl_reward(jnp.ones((2, 1)), rows, rows, rows > 0, kl_coef=0.1)
    with pytest.raises(ValueError, match="ended"):
        losses.missing_eos(jnp.ones(2), jnp.ones(3, bool), penalty=1.0)
