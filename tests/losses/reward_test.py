"""The Bradley-Terry loss against numpy, golden numbers and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked


def by_numpy(rewards, margin=0.0, centering=0.0):
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    loss = np.log1p(np.exp(-(chosen - rejected - margin)))
    return loss + centering * (chosen + rejected) ** 2


@pytest.mark.parametrize(
    "arguments, want",
    [(dict(margin=0.5), 0.554355), (dict(centering=0.01), 0.385501)],
)
def test_golden(run, arguments, want):
    loss, _ = run(functools.partial(losses.bradley_terry, **arguments))(
        jnp.array([[1.0, 0.2]])
    )
    np.testing.assert_allclose(loss, [want], atol=1e-6)


@pytest.mark.parametrize("margin", ["none", "number", "array"])
def test_numpy(run, margin):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(7, 2)).astype(np.float32)
    margin = {"none": None, "number": 0.3, "array": rng.random(7, np.float32)}[margin]
    loss_fn = functools.partial(losses.bradley_terry, margin=margin, centering=0.05)
    loss, metrics = run(loss_fn)(jnp.asarray(rewards))
    assert loss.shape == (7,) and loss.dtype == jnp.float32
    want = by_numpy(rewards, 0.0 if margin is None else margin, 0.05)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["margin"], rewards[:, 0] - rewards[:, 1])
    np.testing.assert_array_equal(metrics["accuracy"], rewards[:, 0] > rewards[:, 1])
    assert {*metrics} == {"accuracy", "margin"}


def test_gradient(check_gradient):
    rewards = np.random.default_rng(1).normal(size=(4, 2))

    def total(x, margin):
        return jnp.sum(losses.bradley_terry(x, margin=margin, centering=0.1)[0])

    check_gradient(total, rewards, np.array([0.1, 0.5, 1.0, 2.0]))


def test_limits():
    equal, _ = losses.bradley_terry(jnp.array([[3.0, 3.0], [-9.0, -9.0]]))
    np.testing.assert_allclose(equal, np.log(2) * np.ones(2), rtol=1e-6)
    # Far apart it is the difference itself, or nothing: no overflow either way.
    far, _ = losses.bradley_terry(jnp.array([[-500.0, 500.0], [500.0, -500.0]]))
    np.testing.assert_allclose(far, [1000.0, 0.0], atol=1e-6)


def test_chosen_first_tie_is_wrong_margin_not_counted():
    rewards = jnp.array([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    loss, metrics = losses.bradley_terry(rewards, margin=5.0)
    assert metrics["accuracy"].tolist() == [1.0, 0.0, 0.0]
    assert metrics["margin"].tolist() == [1.0, -1.0, 0.0]
    assert loss[0] < loss[2] < loss[1]


def test_centering_squares_the_sum():
    # Opposite rewards are centered already; a sum of squares would still push.
    off, _ = losses.bradley_terry(jnp.array([[4.0, -4.0]]))
    on, _ = losses.bradley_terry(jnp.array([[4.0, -4.0]]), centering=1.0)
    np.testing.assert_array_equal(on, off)


def test_nan_in_a_row_outside_the_mask():
    rewards = jnp.array([[1.0, 0.0], [jnp.nan, jnp.nan]])
    rows = jnp.array([True, False])

    def total(x):
        x = masked.clear(x, jnp.broadcast_to(rows[:, None], x.shape))
        return masked.mean(losses.bradley_terry(x)[0], rows)

    value, gradient = jax.value_and_grad(total)(rewards)
    np.testing.assert_allclose(value, np.log1p(np.exp(-1)), rtol=1e-6)
    assert np.isfinite(gradient).all() and not gradient[1].any()


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        losses.bradley_terry(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="margin"):
        losses.bradley_terry(jnp.ones((3, 2)), margin=jnp.ones((3, 1)))
