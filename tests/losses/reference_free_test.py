"""ORPO, CPO, SimPO and AlphaPO: numpy, golden numbers, gradients and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft.errors import UserError
from stagecraft.losses import reference_free

CPO = ("cpo", "cpo_hinge", "cpo_ipo")
AVERAGED = ("orpo", "cpo_ipo", "simpo", "alphapo")


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def log_odds(p):
    return np.log(np.exp(p) / (1 - np.exp(p)))


def by_numpy(name, logps, lengths, *, beta, gamma=0.0, alpha=0.0, label_smoothing=0.0):
    """Loss of the rows, and the rewards that are logged."""
    averages = logps / lengths
    used = averages if name in AVERAGED else logps
    rewards = beta * used
    if name == "alphapo":
        rewards = beta * (1 - np.exp(averages) ** -alpha) / alpha
    margin = rewards[:, 0] - rewards[:, 1]
    if name == "orpo":
        return beta * softplus(-log_odds(used) @ [1, -1]), rewards
    if name == "cpo_hinge":
        return np.maximum(0, 1 - margin), rewards
    if name == "cpo_ipo":
        return (used @ [1, -1] - 0.5 / beta) ** 2, rewards
    margin = margin - gamma
    return softplus(-margin) + label_smoothing * margin, rewards


# Hyper-parameters of the rows' loss; CPO's alpha weighs its likelihood instead.
CASES = {
    "orpo": dict(beta=0.3),
    "cpo": dict(beta=0.3, label_smoothing=0.2),
    "cpo_hinge": dict(beta=0.05),
    "cpo_ipo": dict(beta=0.3),
    "simpo": dict(beta=2.5, gamma=1.2, label_smoothing=0.1),
    "alphapo": dict(beta=1.5, gamma=0.4, alpha=0.25, label_smoothing=0.1),
    "alphapo, below": dict(beta=1.5, gamma=0.4, alpha=-0.5),
}


def call(name, logps, lengths, tokens, **hyper):
    """The loss called with whatever it takes: {"rows": ..., maybe more}, metrics."""
    function = getattr(reference_free, name.split(",")[0])
    arrays = dict(policy_logps=logps)
    if function.__name__ in AVERAGED:
        arrays["lengths"] = lengths
    if function.__name__ in CPO:
        arrays["chosen_logps"] = tokens
    if function.__name__ == "orpo":
        arrays["document_logps"] = tokens
    loss, metrics = function(**arrays, **hyper)
    return loss if isinstance(loss, dict) else {"rows": loss}, metrics


def cases(seed, rows=6, scale=1.0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (rows, 2)).astype(float)
    logps = -lengths * rng.uniform(0.1, 3 * scale, (rows, 2))
    tokens = -rng.random((rows, 5))
    tokens[rng.random((rows, 5)) < 0.3] = 0
    return logps, lengths, tokens


def f32(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


@pytest.mark.parametrize("name", CASES)
def test_numpy(run, name):
    hyper = CASES[name]
    arrays = cases(0)
    loss, metrics = run(functools.partial(call, name, **hyper))(*f32(*arrays))
    logps, lengths, tokens = arrays
    base = name.split(",")[0]
    want, rewards = by_numpy(base, logps, lengths, **hyper)
    np.testing.assert_allclose(loss["rows"], want, rtol=2e-4, atol=1e-5)
    assert loss["rows"].dtype == jnp.float32
    used = logps / lengths if base in AVERAGED else logps
    expected = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "rewards/accuracies": rewards[:, 0] > rewards[:, 1],
        "logps/chosen": used[:, 0],
        "logps/rejected": used[:, 1],
    }
    if base == "orpo":
        odds = log_odds(used) @ [1, -1]
        expected |= {"log_odds_chosen": odds, "log_odds_ratio": -softplus(-odds)}
    if base in ("orpo", *CPO):
        values, mask = metrics.pop("nll_loss")
        np.testing.assert_allclose(values, -tokens, rtol=1e-6)
        np.testing.assert_array_equal(mask, tokens < 0)
    assert {*metrics} == {*expected}
    for key, value in expected.items():
        assert metrics[key].shape == value.shape
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-4)


def test_golden():
    p, one, none = jnp.array([[-2.0, -1.5]]), jnp.ones((1, 2)), jnp.zeros((1, 3))
    loss, metrics = reference_free.orpo(p, one, none, beta=0.1)
    np.testing.assert_allclose(metrics["log_odds_chosen"], [-0.607069], atol=1e-6)
    np.testing.assert_allclose(loss["rows"], [0.104206], atol=1e-6)
    loss, _ = reference_free.simpo(p, one, beta=2.0, gamma=1.0)
    np.testing.assert_allclose(loss, [2.126928], atol=1e-6)
    # By hand: (1 - p^-1)/1 is 1 - e^2 and 1 - e^1.5, 2.907367 apart.
    loss, _ = reference_free.alphapo(p, one, beta=1.0, gamma=0.0, alpha=1.0)
    np.testing.assert_allclose(loss, [2.960547], atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradient(check_gradient, name):
    logps, lengths, tokens = cases(1, rows=3)

    def total(logps, tokens):
        loss, _ = call(name, logps, lengths, tokens, **CASES[name])
        return sum(jnp.sum(x) for x in loss.values())

    check_gradient(total, logps, tokens)


def test_likelihood_terms():
    logps, lengths, tokens = cases(2)
    loss, _ = call("orpo", *f32(logps, lengths, tokens))
    assert {*loss} == {"rows", "document"}
    np.testing.assert_allclose(loss["document"], -tokens, rtol=1e-6)
    for name in CPO:
        loss, _ = call(name, *f32(logps, lengths, tokens), alpha=0.4)
        assert {*loss} == {"rows", "chosen"}
        np.testing.assert_allclose(loss["chosen"], -0.4 * tokens, rtol=1e-5)
        loss, _ = call(name, *f32(logps, lengths, tokens), alpha=0)
        assert not loss["chosen"].any()


def test_averages_forget_length_and_sums_do_not():
    logps, lengths, tokens = cases(3)
    longer = f32(logps * 3, lengths * 3, tokens)
    for name in ("orpo", "cpo", "cpo_hinge", "cpo_ipo", "simpo", "alphapo"):
        loss, _ = call(name, *f32(logps, lengths, tokens))
        other, _ = call(name, *longer)
        same = np.allclose(loss["rows"], other["rows"], rtol=1e-4)
        assert same == (name in AVERAGED)


@pytest.mark.parametrize("name", CASES)
def test_swapping_the_pair_swaps_the_verdict(name):
    better = f32([[-2.0, -6.0]], [[2.0, 2.0]], [[-1.0, -1.0]])
    loss, metrics = call(name, *better, **CASES[name])
    swapped, other = call(name, better[0][:, ::-1], *better[1:], **CASES[name])
    assert loss["rows"][0] < swapped["rows"][0]
    assert metrics["rewards/accuracies"][0] == 1 and other["rewards/accuracies"][0] == 0
    np.testing.assert_allclose(metrics["rewards/margins"], -other["rewards/margins"])


def test_equal_completions():
    same = f32([[-4.0, -4.0]], [[2.0, 2.0]], [[0.0]])
    for name, want in (("orpo", 0.1 * np.log(2)), ("cpo", np.log(2)), ("cpo_hinge", 1)):
        loss, metrics = call(name, *same)
        np.testing.assert_allclose(loss["rows"], [want], rtol=1e-6)
        assert not metrics["rewards/accuracies"].any()  # a tie is no success
    for name in ("simpo", "alphapo"):  # log(1 + e^gamma)
        loss, _ = call(name, *same, gamma=1.0)
        np.testing.assert_allclose(loss["rows"], [np.log1p(np.e)], rtol=1e-6)


def test_alphapo_becomes_simpo():
    arrays = f32(*cases(4))
    want, _ = call("simpo", *arrays)
    exact, _ = call("alphapo", *arrays, alpha=0)
    np.testing.assert_array_equal(exact["rows"], want["rows"])
    near, _ = call("alphapo", *arrays, alpha=1e-5)
    np.testing.assert_allclose(near["rows"], want["rows"], rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_certain_and_empty_completions_stay_finite(name):
    # Probability 1, no tokens at all (a row of padding), and next to no probability.
    logps = [[0.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [-1e-9, -1e-6], [-9e2, -1e-3]]
    lengths = [[3.0, 3.0], [3.0, 3.0], [0.0, 0.0], [3.0, 3.0], [9.0, 1.0]]
    arrays = f32(logps, lengths, np.zeros((5, 2)))

    def total(x):
        loss, _ = call(name, x, *arrays[1:], **CASES[name])
        return sum(jnp.sum(x) for x in loss.values())

    value, gradient = jax.value_and_grad(total)(arrays[0])
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_log1mexp_near_both_ends():
    x = np.array([-50.0, -20.0, -1.0, -np.log(2), -0.5, -1e-3, -1e-6, -1e-9])
    want = np.where(x < -1, np.log1p(-np.exp(x)), np.log(-np.expm1(x)))
    np.testing.assert_allclose(reference_free._log1mexp(*f32(x)), want, rtol=1e-5)
    slope = jax.vmap(jax.grad(reference_free._log1mexp))(*f32(x))
    np.testing.assert_allclose(slope, np.exp(x) / np.expm1(x), rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_refused(name):
    three, two, tokens = jnp.ones((2, 3)), jnp.ones((2, 2)), jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        call(name, three, three, tokens)
    if name.split(",")[0] in AVERAGED:
        with pytest.raises(ValueError, match="lengths"):
            call(name, two, jnp.ones((1, 2)), tokens)
    for hyper in (dict(beta=0), dict(beta=-1.0)):
        with pytest.raises(UserError, match="beta"):
            call(name, two, two, tokens, **hyper)
    if name in CPO:
        with pytest.raises(UserError, match="alpha"):
            call(name, two, two, tokens, alpha=-0.1)
    if name in ("cpo", "simpo", "alphapo"):
        with pytest.raises(UserError, match="label_smoothing"):
            call(name, two, two, tokens, label_smoothing=0.5)
