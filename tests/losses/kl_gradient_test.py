"""What each estimator of the KL pulls towards, by where it is put.

Two small categoricals, so every expectation can be enumerated without noise; the same
is then drawn by samples, whose error bar is stated. The policy p is a softmax of four
logits, q is the reference. Judged against the gradient of the exact KL in the logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft.losses import kl, policy

P = np.array([0.2, 0.25, 0.25, 0.3])
Q = np.array([0.6, 0.25, 0.1, 0.05])
OLD = np.array([0.25, 0.35, 0.3, 0.1])  # an earlier policy, that sampled instead
SAMPLES = 200_000


def forward(p, q):
    """KL(p, q)."""
    return float(np.sum(p * np.log(p / q)))


def gradient_of_kl(p, q):
    """d KL(p, q) / d logits of p, by hand: p (log p/q - KL)."""
    return p * (np.log(p / q) - forward(p, q))


def gradient_of_reverse(p, q):
    """d KL(q, p) / d logits of p, by hand."""
    return p - q


def f32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def in_loss(estimator, behaviour, bias_correction=False):
    """Expected gradient of the estimator as a loss, on samples of `behaviour`."""
    logits, log_q, log_old, weights = f32(np.log(P), np.log(Q), np.log(OLD), behaviour)

    def loss(x):
        log_p = jax.nn.log_softmax(x)
        if estimator == "k1":  # what `kl_in_loss` refuses
            return jnp.sum(weights * kl.k1(log_p, log_q))
        found, _ = kl.kl_in_loss(
            log_p, log_q, log_old, estimator=estimator, bias_correction=bias_correction
        )
        return jnp.sum(weights * found)

    return np.asarray(jax.grad(loss)(logits))


def in_reward(estimator):
    """Expected policy gradient when the estimator is paid for as a reward.

    One-token completions, one for each outcome, weighed by how often each is drawn.
    """
    logits, log_q, weights = f32(np.log(P), np.log(Q), P)
    log_p = jax.nn.log_softmax(logits)
    rewards = kl.kl_reward(
        jnp.zeros(4),
        log_p[:, None],
        log_q[:, None],
        jnp.ones((4, 1), bool),
        kl_coef=1.0,
        estimator=estimator,
    )

    def loss(x):
        found, _ = policy.reinforce(jax.nn.log_softmax(x)[:, None], rewards)
        return jnp.sum(weights * found[:, 0])

    return np.asarray(jax.grad(loss)(logits))


def test_the_formulas_by_hand_are_the_derivatives():
    def exact(x, q, turned):
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        return forward(q, p) if turned else forward(p, q)

    for turned, formula in ((False, gradient_of_kl), (True, gradient_of_reverse)):
        moves = 1e-6 * np.eye(4)
        want = [
            (exact(np.log(P) + m, Q, turned) - exact(np.log(P) - m, Q, turned)) / 2e-6
            for m in moves
        ]
        np.testing.assert_allclose(formula(P, Q), want, atol=1e-8)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_mean_is_the_kl(name):
    mean = P @ np.asarray(kl.ESTIMATORS[name](*f32(np.log(P), np.log(Q))))
    np.testing.assert_allclose(mean, forward(P, Q), rtol=1e-5)


def test_mean_of_k2_is_not():
    mean = P @ np.asarray(kl.k2(*f32(np.log(P), np.log(Q))))
    np.testing.assert_allclose(mean, P @ np.log(P / Q) ** 2 / 2, rtol=1e-5)
    assert mean > 1.2 * forward(P, Q)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_means_by_samples(name):
    drawn = np.random.default_rng(0).choice(4, size=SAMPLES, p=P)
    found = kl.ESTIMATORS[name](*f32(np.log(P)[drawn], np.log(Q)[drawn]))
    found = np.asarray(found, np.float64)
    want = P @ np.log(P / Q) ** 2 / 2 if name == "k2" else forward(P, Q)
    error = found.std() / np.sqrt(SAMPLES)
    assert abs(found.mean() - want) < 4 * error < 0.01
    assert (found >= -1e-7).all() == (name != "k1")


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    np.testing.assert_allclose(in_reward("k1"), gradient_of_kl(P, Q), atol=1e-6)
    assert np.abs(gradient_of_kl(P, Q)).max() > 0.1


def test_k3_in_the_reward_pulls_by_the_difference_of_both_directions():
    want = gradient_of_kl(P, Q) - gradient_of_reverse(P, Q)
    np.testing.assert_allclose(in_reward("k3"), want, atol=1e-6)
    assert np.abs(want).max() < np.abs(gradient_of_kl(P, Q)).max() / 2


def test_k2_in_the_loss_has_the_gradient_of_the_kl():
    np.testing.assert_allclose(in_loss("k2", P), gradient_of_kl(P, Q), atol=1e-6)


def test_k3_in_the_loss_has_the_gradient_of_the_other_direction():
    got = in_loss("k3", P)
    np.testing.assert_allclose(got, gradient_of_reverse(P, Q), atol=1e-6)
    assert np.abs(got - gradient_of_kl(P, Q)).max() > 0.01


def test_k3_in_the_loss_with_bias_correction_is_right_on_any_samples():
    got = in_loss("k3", OLD, bias_correction=True)
    np.testing.assert_allclose(got, gradient_of_kl(P, Q), atol=1e-6)
    assert np.abs(in_loss("k3", OLD) - gradient_of_kl(P, Q)).max() > 0.01
    assert np.abs(in_loss("k2", OLD) - gradient_of_kl(P, Q)).max() > 0.01


def test_k1_in_the_loss_pulls_nowhere():
    np.testing.assert_allclose(in_loss("k1", P), np.zeros(4), atol=1e-6)


def by_samples(estimator, placement):
    """Gradients in the logits, one for each sample, float64[SAMPLES, 4]."""
    logits, log_q = f32(np.log(P), np.log(Q))

    def one(outcome):
        def loss(x):
            log_p = jax.nn.log_softmax(x)
            found = kl.ESTIMATORS[estimator](log_p[outcome], log_q[outcome])
            if placement == "loss":
                return found
            found = jax.lax.stop_gradient(found)
            return -policy.reinforce(log_p[outcome], found)[0]

        return jax.grad(loss)(logits)

    each = np.asarray(jax.vmap(one)(jnp.arange(4)), np.float64)
    return each[np.random.default_rng(1).choice(4, size=SAMPLES, p=P)]


@pytest.mark.parametrize(
    "estimator, placement, target",
    [
        ("k1", "reward", gradient_of_kl),
        ("k2", "loss", gradient_of_kl),
        ("k3", "loss", gradient_of_reverse),
        ("k1", "loss", lambda p, q: np.zeros(4)),
    ],
)
def test_gradients_by_samples(estimator, placement, target):
    found = by_samples(estimator, placement)
    error = found.std(axis=0) / np.sqrt(SAMPLES)
    assert (np.abs(found.mean(axis=0) - target(P, Q)) < 4.5 * error).all()
    assert (error < 0.004).all()


def test_near_the_reference_all_of_them_agree():
    near = P * (1 + 0.01 * np.array([1.0, -1.0, 1.0, -3.0]))
    near /= near.sum()
    np.testing.assert_allclose(
        gradient_of_kl(P, near), gradient_of_reverse(P, near), atol=2e-4
    )
    assert np.abs(gradient_of_kl(P, near)).max() > 2e-3
