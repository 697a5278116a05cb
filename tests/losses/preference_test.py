"""Direct preference optimization against numpy, golden numbers and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked

# Chosen rises by 1 over the reference, rejected falls by 0.5.
POLICY, REFERENCE = np.array([[-10.0, -12.0]]), np.array([[-11.0, -11.5]])


def by_numpy(policy, reference, beta, label_smoothing):
    ratio = policy - reference
    margin = beta * (ratio[:, 0] - ratio[:, 1])
    right, wrong = np.log1p(np.exp(-margin)), np.log1p(np.exp(margin))
    return (1 - label_smoothing) * right + label_smoothing * wrong


@pytest.mark.parametrize("label_smoothing, want", [(0.0, 0.620957), (0.1, 0.635957)])
def test_golden(run, label_smoothing, want):
    loss_fn = functools.partial(losses.dpo, beta=0.1, label_smoothing=label_smoothing)
    loss, _ = run(loss_fn)(*(jnp.asarray(x, jnp.float32) for x in (POLICY, REFERENCE)))
    np.testing.assert_allclose(loss, [want], atol=1e-6)


def test_defaults_are_plain_dpo_at_a_tenth():
    loss, _ = losses.dpo(jnp.asarray(POLICY), jnp.asarray(REFERENCE))
    np.testing.assert_allclose(loss, [0.620957], atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_numpy(run, label_smoothing):
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-20, 5, (2, 6, 2)).astype(np.float32)
    loss_fn = functools.partial(losses.dpo, beta=0.3, label_smoothing=label_smoothing)
    loss, metrics = run(loss_fn)(jnp.asarray(policy), jnp.asarray(reference))
    want = by_numpy(policy, reference, 0.3, label_smoothing)
    np.testing.assert_allclose(loss, want, rtol=1e-4, atol=1e-6)
    rewards = 0.3 * (policy - reference)
    expected = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "rewards/accuracies": rewards[:, 0] > rewards[:, 1],
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    assert {*metrics} == {*expected}
    for name, value in expected.items():
        assert metrics[name].shape == (6,) and metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6)


def test_gradient(check_gradient):
    rng = np.random.default_rng(1)
    policy, reference = rng.normal(-5, 2, (2, 4, 2))

    def total(policy, reference):
        loss, _ = losses.dpo(policy, reference, beta=0.5, label_smoothing=0.1)
        return jnp.sum(loss)

    check_gradient(total, policy, reference)


def test_equal_policies():
    logps = jnp.array([[-5.0, -9.0], [-100.0, -1.0]])
    loss, metrics = losses.dpo(logps, logps, beta=0.1)
    np.testing.assert_allclose(loss, np.log(2) * np.ones(2), rtol=1e-6)
    assert not metrics["rewards/margins"].any()
    assert not metrics["rewards/accuracies"].any()  # a tie is no success
    gradient = jax.grad(lambda x: jnp.sum(losses.dpo(x, logps, beta=0.1)[0]))(logps)
    np.testing.assert_allclose(gradient, [[-0.05, 0.05]] * 2, rtol=1e-6)


def test_swapping_the_pair_swaps_the_verdict():
    policy, reference = jnp.asarray(POLICY), jnp.asarray(REFERENCE)
    loss, metrics = losses.dpo(policy, reference)
    swapped, other = losses.dpo(policy[:, ::-1], reference[:, ::-1])
    assert loss[0] < np.log(2) < swapped[0]
    assert metrics["rewards/accuracies"][0] == 1 and other["rewards/accuracies"][0] == 0
    np.testing.assert_allclose(
        metrics["rewards/margins"], -other["rewards/margins"], rtol=1e-6
    )


def test_far_apart_does_not_overflow():
    loss, _ = losses.dpo(jnp.array([[0.0, -1e4], [-1e4, 0.0]]), jnp.zeros((2, 2)))
    np.testing.assert_allclose(loss, [0.0, 1000.0], atol=1e-4)


def test_nan_outside_the_completion_stays_there():
    logps = jnp.array([[[-1.0, jnp.nan], [-2.0, -3.0]]])  # [1, 2, T]
    mask = jnp.array([[[True, False], [True, True]]])

    def total(x):
        sums = losses.sequence_logps(x, mask)
        return jnp.sum(losses.dpo(sums, jnp.zeros_like(sums))[0])

    value, gradient = jax.value_and_grad(total)(logps)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert gradient[0, 0, 1] == 0 and gradient[0, 0, 0] < 0 < gradient[0, 1, 0]


def test_empty_batch_mask_is_zero():
    loss, _ = losses.dpo(jnp.zeros((2, 2)), jnp.zeros((2, 2)))
    assert float(masked.mean(loss, jnp.zeros(2, bool))) == 0.0


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="ref_logps"):
        losses.dpo(jnp.ones((2, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        losses.dpo(jnp.ones((2, 3)), jnp.ones((2, 3)))
