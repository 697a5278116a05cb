"""The Bradley-Terry losses against numpy, golden numbers and their limits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked
from stagecraft.errors import UserError
from stagecraft.losses import reward


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


def test_soft_labels(run, check_gradient):
    rng = np.random.default_rng(2)
    rewards, p = rng.normal(size=(5, 2)), np.array([0.0, 1.0, 0.5, 0.8, 0.3])
    soft = by_numpy(rewards) * p + by_numpy(rewards[:, ::-1]) * (1 - p)
    arrays = [jnp.asarray(x, jnp.float32) for x in (rewards, p)]
    loss, metrics = run(lambda x, p: losses.bradley_terry(x, preference=p))(*arrays)
    np.testing.assert_allclose(loss, soft, rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], rewards[:, 0] > rewards[:, 1])
    # With a margin, whichever wins is to win by it.
    loss, _ = losses.bradley_terry(arrays[0], preference=arrays[1], margin=0.7)
    first, second = by_numpy(rewards, 0.7), by_numpy(rewards[:, ::-1], 0.7)
    np.testing.assert_allclose(loss, first * p + second * (1 - p), rtol=1e-5)
    check_gradient(
        lambda x, p, m: losses.bradley_terry(x, preference=p, margin=m)[0].sum(),
        rewards,
        p,
        np.full(5, 0.2),
    )


def test_soft_labels_rest_where_the_judge_is_met():
    # The gradient vanishes where sigmoid(difference) is the judge's probability.
    rewards, p = jnp.array([[np.log(3.0), 0.0]]), jnp.array([0.75])
    slope = jax.grad(lambda x: losses.bradley_terry(x, preference=p)[0].sum())
    np.testing.assert_allclose(slope(rewards), np.zeros((1, 2)), atol=1e-6)


def ranked_by_numpy(rewards, present, centering):
    out = []
    for row, there in zip(rewards, present, strict=True):
        pairs = np.array(list(itertools.combinations(row[there], 2))).reshape(-1, 2)
        out.append(by_numpy(pairs, 0.0, centering).mean() if len(pairs) else 0.0)
    return np.array(out)


@pytest.mark.parametrize("centering", [0.0, 0.1])
def test_ranked(run, check_gradient, centering):
    rng = np.random.default_rng(3)
    rewards, present = rng.normal(size=(7, 4)), rng.random((7, 4)) < 0.7
    present[0], present[1], present[2] = True, False, [False, True, False, False]
    loss_fn = functools.partial(reward.bradley_terry_ranked, centering=centering)
    wild = jnp.asarray(np.where(present, rewards, np.nan), jnp.float32)
    loss, metrics = run(loss_fn)(wild, jnp.asarray(present))
    np.testing.assert_allclose(
        loss, ranked_by_numpy(rewards, present, centering), rtol=1e-5
    )
    check_gradient(lambda x: loss_fn(x, present)[0].sum(), rewards)
    gradient = jax.grad(lambda x: loss_fn(x, jnp.asarray(present))[0].sum())(wild)
    assert np.isfinite(gradient).all() and not gradient[~present].any()
    accuracy, prompts = metrics["accuracy"]
    np.testing.assert_array_equal(prompts, present.sum(1) > 1)
    np.testing.assert_array_equal(prompts, metrics["margin"][1])
    for i in np.flatnonzero(prompts):
        pairs = np.array(list(itertools.combinations(rewards[i][present[i]], 2)))
        np.testing.assert_allclose(accuracy[i], (pairs[:, 0] > pairs[:, 1]).mean())
        np.testing.assert_allclose(
            metrics["margin"][0][i], (pairs[:, 0] - pairs[:, 1]).mean(), rtol=1e-5
        )


def test_ranked_pair_is_bradley_terry():
    rewards = jnp.asarray(np.random.default_rng(4).normal(size=(5, 2)), jnp.float32)
    ranked, _ = reward.bradley_terry_ranked(
        rewards, jnp.ones((5, 2), bool), centering=0.01
    )
    plain, _ = losses.bradley_terry(rewards, centering=0.01)
    np.testing.assert_allclose(ranked, plain, rtol=1e-6)


def test_prompts_weigh_alike_however_many_responses():
    # Nine responses have 36 pairs, and still the say of one prompt.
    present = jnp.arange(9)[None] < jnp.array([[9], [2]])
    loss, _ = reward.bradley_terry_ranked(jnp.zeros((2, 9)), present)
    np.testing.assert_allclose(loss, np.log(2) * np.ones(2), rtol=1e-6)


def test_more_wrong_input_is_refused():
    with pytest.raises(ValueError, match="preference"):
        losses.bradley_terry(jnp.ones((3, 2)), preference=jnp.ones((2,)))
    with pytest.raises(UserError, match="centering"):
        losses.bradley_terry(jnp.ones((3, 2)), centering=-0.1)
    with pytest.raises(ValueError, match="present"):
        reward.bradley_terry_ranked(jnp.ones((3, 2)), jnp.ones((3, 3), bool))
    with pytest.raises(ValueError, match=r"\[B, K\]"):
        reward.bradley_terry_ranked(jnp.ones(3), jnp.ones(3, bool))
