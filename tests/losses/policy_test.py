"""The clipped losses of the policy and the critic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked
from stagecraft.errors import UserError
from stagecraft.losses import policy


def logs(*ratios):
    """Log-probabilities whose ratio to zeros is as given, [1, T]."""
    return jnp.log(jnp.array([ratios], jnp.float32))


def value_by_numpy(values, old, returns, clip):
    near = old + np.clip(values - old, -clip, clip)
    return 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2)


RATIOS, ADVANTAGES = (1.5, 0.5, 1.5, 0.5), (1.0, 1.0, -1.0, -1.0)


def test_policy_golden(run):
    advantages = jnp.array([ADVANTAGES])
    zeros = jnp.zeros((1, 4))
    loss, metrics = run(losses.ppo_policy)(logs(*RATIOS), zeros, advantages)
    np.testing.assert_allclose(loss, [[-1.2, -0.5, 1.5, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(metrics["policy/clipfrac_avg"], [[1, 0, 0, 1]])


def test_policy_gradient_is_zero_where_the_clip_decides():
    def total(x):
        loss, _ = losses.ppo_policy(x, jnp.zeros((1, 4)), jnp.array([ADVANTAGES]))
        return jnp.sum(loss)

    gradient = jax.grad(total)(logs(*RATIOS))
    np.testing.assert_allclose(gradient, [[0, -0.5, 1.5, 0]], rtol=1e-6)


@pytest.mark.parametrize("clip", [0.1, 0.4])
def test_policy_numpy(run, clip):
    rng = np.random.default_rng(0)
    logps, old, advantages = rng.normal(0, 0.5, (3, 5, 8)).astype(np.float32)
    loss, metrics = run(functools.partial(losses.ppo_policy, clip=clip))(
        *map(jnp.asarray, (logps, old, advantages))
    )
    ratio = np.exp(logps - old)
    free = ratio * advantages
    clipped = np.clip(ratio, 1 - clip, 1 + clip) * advantages
    low = (ratio < 1 - clip) & (advantages < 0)
    high = (ratio > 1 + clip) & (advantages > 0)
    expected = {
        "policy/clipfrac_avg": clipped < free,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
        "policy/approxkl_avg": (logps - old) ** 2 / 2,
        "policy/approxkl_k3": ratio - 1 - np.log(ratio),
        "val/ratio": ratio,
        "policy/ratio_max": ratio,
    }
    np.testing.assert_allclose(loss, -np.minimum(free, clipped), rtol=1e-5)
    assert {*metrics} == {*expected}
    for name, value in expected.items():
        assert metrics[name].shape == (5, 8) and metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6)
    assert 0 < np.mean(expected["policy/clipfrac_avg"]) < 1


def policy_by_loop(logps, old, advantages, low, high, dual_clip, delta):
    loss = np.zeros(logps.shape)
    for at in np.ndindex(logps.shape):
        ratio, advantage = np.exp(logps[at] - old[at]), advantages[at]
        free = min(ratio, delta or np.inf) * advantage
        gain = min(free, min(max(ratio, 1 - low), 1 + high) * advantage)
        if dual_clip and advantage < 0:
            gain = max(gain, dual_clip * advantage)
        loss[at] = -gain
    return loss


OPTIONS = [
    {},
    {"clip": 0.1},
    {"clip": 0.2, "clip_high": 0.28},
    {"clip": 0.3, "clip_high": 0.05},
    {"dual_clip": 1.1},
    {"dual_clip": 1.5, "clip_high": 0.3},
    {"delta": 1.4},
    {"delta": 1.6, "clip": 0.1, "clip_high": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_policy_is_the_loop(run, options):
    rng = np.random.default_rng(6)
    logps, old, advantages = rng.normal(0, 0.5, (3, 6, 8)).astype(np.float32)
    advantages[0] = 0.0
    loss, metrics = run(functools.partial(losses.ppo_policy, **options))(
        *map(jnp.asarray, (logps, old, advantages))
    )
    low = options.get("clip", 0.2)
    high = options.get("clip_high", low)
    limits = options.get("dual_clip"), options.get("delta")
    want = policy_by_loop(logps, old, advantages, low, high, *limits)
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-7)
    ratio = np.exp(logps - old)
    above = (ratio > 1 + high) & (advantages > 0)
    np.testing.assert_array_equal(metrics["clip_ratio/high_mean"], above)
    np.testing.assert_allclose(metrics["val/ratio"], ratio, rtol=1e-5)
    assert above.any() and loss.dtype == jnp.float32


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_policy_gradient_by_differences(check_gradient, options):
    rng = np.random.default_rng(1)
    logps, old, advantages = rng.normal(0, 0.5, (3, 3, 4))

    def total(logps, old, advantages):
        return jnp.sum(losses.ppo_policy(logps, old, advantages, **options)[0])

    check_gradient(total, logps, old, advantages)


def test_clip_higher_by_hand():
    # Ratio 1.25 is inside 1 + 0.28 and outside 1 + 0.2; below, 0.75 is outside either.
    ratios, advantages = logs(1.25, 1.5, 0.75), jnp.array([[1.0, 1.0, -1.0]])
    zeros = jnp.zeros((1, 3))
    loss, metrics = losses.ppo_policy(ratios, zeros, advantages, clip_high=0.28)
    np.testing.assert_allclose(loss, [[-1.25, -1.28, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(metrics["clip_ratio/low_mean"], [[0, 0, 1]])
    np.testing.assert_array_equal(metrics["clip_ratio/high_mean"], [[0, 1, 0]])
    np.testing.assert_array_equal(metrics["clip_ratio/region_mean"], [[0, 1, 1]])


@pytest.mark.parametrize("name", ["dual_clip", "delta"])
def test_a_bad_token_costs_no_more_than_the_limit(name):
    ratios, advantages = logs(2.0, 9.0, 9.0), jnp.array([[-1.0, -1.0, 1.0]])
    zeros = jnp.zeros((1, 3))

    def total(x):
        loss, _ = losses.ppo_policy(x, zeros, advantages, **{name: 3.0})
        return jnp.sum(loss), loss

    gradient, loss = jax.grad(total, has_aux=True)(ratios)
    np.testing.assert_allclose(loss, [[2.0, 3.0, -1.2]], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[2.0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"dual_clip": 1.0}, "dual_clip=1.0: expected more than 1"),
        ({"delta": 1.2}, "delta=1.2: expected more than 1 [+] clip_high = 1.2"),
        ({"delta": 1.25, "clip_high": 0.3}, "delta=1.25.*1.3"),
    ],
)
def test_a_limit_inside_the_clip_is_refused(options, told):
    one = jnp.ones((1, 1))
    with pytest.raises(UserError, match=told):
        losses.ppo_policy(one, one, one, **options)


@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_wild_ratios_stay_finite(run, advantage):
    def total(x):
        advantages = jnp.full((1, 2), advantage)
        loss, metrics = losses.ppo_policy(x, jnp.zeros((1, 2)), advantages)
        return jnp.sum(loss), (loss, metrics)

    gradient, got = run(jax.grad(total, has_aux=True))(jnp.array([[200.0, -200.0]]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradient, got)))
    if advantage > 0:
        assert not gradient.any()


def test_reinforce(run, check_gradient):
    rng = np.random.default_rng(7)
    logps, advantages = rng.normal(size=(2, 3, 4)).astype(np.float32)
    loss, metrics = run(policy.reinforce)(jnp.asarray(logps), jnp.asarray(advantages))
    np.testing.assert_allclose(loss, -advantages * logps, rtol=1e-6)
    assert metrics == {}
    check_gradient(lambda x, a: jnp.sum(policy.reinforce(x, a)[0]), logps, advantages)


def test_reinforce_is_what_the_surrogate_starts_from():
    rng = np.random.default_rng(8)
    logps, advantages = (
        jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 2, 3))
    )

    def gradient(loss, *more):
        return jax.grad(lambda x: jnp.sum(loss(x, *more, advantages)[0]))(logps)

    got = gradient(losses.ppo_policy, logps)
    np.testing.assert_allclose(got, gradient(policy.reinforce), rtol=1e-6)


def test_entropy_bonus(run):
    entropy = jnp.array([[0.5, 2.0]])
    loss, metrics = run(policy.entropy_bonus)(entropy)
    assert loss.tolist() == [[-0.5, -2.0]] and metrics == {}
    gradient = jax.grad(lambda x: jnp.sum(policy.entropy_bonus(x)[0]))(entropy)
    assert gradient.tolist() == [[-1.0, -1.0]]


def test_unmoved_policy_takes_the_plain_policy_gradient():
    rng = np.random.default_rng(2)
    logps, advantages = rng.normal(size=(2, 3, 4)).astype(np.float32)
    mask = rng.random((3, 4)) < 0.6

    def total(x):
        loss, metrics = losses.ppo_policy(
            x, jnp.asarray(logps), jnp.asarray(advantages)
        )
        return masked.mean(loss, mask), metrics

    gradient, metrics = jax.grad(total, has_aux=True)(jnp.asarray(logps))
    want = np.where(mask, -advantages, 0) / mask.sum()
    np.testing.assert_allclose(gradient, want, rtol=1e-6)
    np.testing.assert_array_equal(metrics["val/ratio"], np.ones((3, 4)))
    for name in ("clipfrac_avg", "approxkl_avg", "approxkl_k3"):
        assert not metrics[f"policy/{name}"].any()


def test_another_temperature_on_one_side_is_seen():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(4, 9)), jnp.float32)
    new, old = jax.nn.log_softmax(logits / 0.7), jax.nn.log_softmax(logits)
    _, metrics = losses.ppo_policy(new, old, jnp.ones_like(new))
    assert float(jnp.max(jnp.abs(metrics["val/ratio"] - 1))) > 0.1


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_value_numpy(run, clip):
    rng = np.random.default_rng(4)
    values, old, returns = rng.normal(0, 0.3, (3, 5, 8)).astype(np.float32)
    loss, metrics = run(functools.partial(losses.ppo_value, clip=clip))(
        *map(jnp.asarray, (values, old, returns))
    )
    want = value_by_numpy(values, old, returns, clip)
    np.testing.assert_allclose(loss, want, rtol=1e-4, atol=1e-7)
    decided = want > 0.5 * (values - returns) ** 2 + 1e-6
    np.testing.assert_array_equal(metrics["val/clipfrac_avg"], decided)
    assert 0 < decided.mean() < 1 and {*metrics} == {"val/clipfrac_avg"}


def test_value_by_hand():
    # Old 0, return 1. At 0.5 the clipped value 0.2 is worse: (0.2 - 1)^2 / 2. At -0.5
    # the free one is: (-0.5 - 1)^2 / 2. Inside the clip both agree: (0.1 - 1)^2 / 2.
    values = jnp.array([[0.5, -0.5, 0.1]])
    zeros, ones = jnp.zeros((1, 3)), jnp.ones((1, 3))
    loss, metrics = losses.ppo_value(values, zeros, ones, clip=0.2)
    np.testing.assert_allclose(loss, [[0.32, 1.125, 0.405]], rtol=1e-6)
    assert metrics["val/clipfrac_avg"].tolist() == [[1.0, 0.0, 0.0]]
    gradient = jax.grad(
        lambda x: jnp.sum(losses.ppo_value(x, zeros, ones, clip=0.2)[0])
    )(values)
    np.testing.assert_allclose(gradient, [[0, -1.5, -0.9]], rtol=1e-6)


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_value_without_clip(run, off):
    values, returns = jnp.array([[3.0, 0.5]]), jnp.array([[1.0, 1.0]])
    loss, metrics = run(functools.partial(losses.ppo_value, clip=off))(
        values, jnp.zeros((1, 2)), returns
    )
    np.testing.assert_allclose(loss, [[2.0, 0.125]])  # clipped: 2 and 1/2
    assert not metrics["val/clipfrac_avg"].any()


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_gradient_by_differences(check_gradient, clip):
    rng = np.random.default_rng(5)

    def total(values, old, returns):
        return jnp.sum(losses.ppo_value(values, old, returns, clip=clip)[0])

    check_gradient(total, *rng.normal(0, 0.4, (3, 3, 4)))


def test_nan_outside_the_mask_stays_there():
    mask = jnp.array([[True, False], [True, True]])
    dirty = jnp.array([[0.1, jnp.nan], [0.2, 0.3]])

    def total(logps, old, values):
        logps, old, values = (masked.clear(x, mask) for x in (logps, old, values))
        advantages = jnp.where(mask, 1.0, 0.0)
        policy, metrics = losses.ppo_policy(logps, old, advantages)
        value, _ = losses.ppo_value(values, values, advantages)
        metrics = {k: masked.mean(v, mask) for k, v in metrics.items()}
        return masked.mean(policy, mask) + masked.mean(value, mask), metrics

    (value, metrics), gradients = jax.value_and_grad(
        total, argnums=(0, 1, 2), has_aux=True
    )(dirty, dirty + 0.1, dirty)
    assert np.isfinite(value) and np.isfinite([*metrics.values()]).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all() and gradient[0, 1] == 0


def test_empty_mask_is_zero():
    one = jnp.ones((1, 1))
    nothing = jnp.zeros((1, 1), bool)
    for loss, _ in (losses.ppo_policy(one, one, one), losses.ppo_value(one, one, one)):
        assert float(masked.mean(loss, nothing)) == 0.0


def test_shapes_that_differ_are_refused():
    row, rows = jnp.ones((1, 3)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="advantages"):
        losses.ppo_policy(rows, rows, row)
    with pytest.raises(ValueError, match="returns"):
        losses.ppo_value(rows, rows, row)
    with pytest.raises(ValueError, match="advantages"):
        policy.reinforce(rows, row)
