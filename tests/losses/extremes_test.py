"""Every loss of every table is finite, and its gradient, whatever the log-probs."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses
from stagecraft.losses import policy

# Nats a token or a completion: from "never" to what no log-probability is.
WILD = np.array([-1e4, -351.0, -199.0, -45.0, -1.0, 0.0, 1e4], np.float32)
LOGPS = (
    *("policy_logps", "ref_logps", "chosen_logps", "document_logps"),
    *("logps", "old_logps", "log_z", "rewards", "kl", "delta"),
)
# The arguments with exponents of their own.
ARGUMENTS = {
    "alphapo": [dict(alpha=a) for a in (-1.0, 1e-3, 0.25, 1.0, 3.0)],
    "ppo_policy": [dict(dual_clip=3.0), dict(delta=4.0), {}],
}
DIVERGENCES = [
    *(dict(f_divergence=f) for f in losses.DIVERGENCES),
    *(dict(f_divergence="alpha", alpha=a) for a in (-3.0, 0.0, 0.99, 2.0, 5.0)),
]


def unique(table):
    return {function.__name__: function for function in table.values()}


def scored(name):
    return "scores" in inspect.signature(losses.PAIRS[name]).parameters


def columns(count):
    """Every combination of `count` wild numbers: f32[7^count, count]."""
    return np.array([*itertools.product(WILD, repeat=count)], np.float32)


def finite(function, arrays, **arguments):
    """Checks loss, metrics and the gradient of every log-probability."""
    given = {k: jnp.asarray(v) for k, v in arrays.items()}
    moving = {k: v for k, v in given.items() if k in LOGPS}
    fixed = {k: v for k, v in given.items() if k not in LOGPS}

    def total(moving):
        loss, metrics = function(**moving, **fixed, **arguments)
        return sum(jnp.sum(x) for x in jax.tree.leaves(loss)), (loss, metrics)

    gradient, told = jax.jit(jax.grad(total, has_aux=True))(moving)
    for leaf in jax.tree.leaves((gradient, told)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    # A norm is a root of squares, which have to be finite too.
    assert all((np.abs(g) < 1e18).all() for g in jax.tree.leaves(gradient))


def takes(function, arrays):
    names = inspect.signature(function).parameters
    return {k: v for k, v in arrays.items() if k in names}


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        (n, d)
        for n in unique(losses.PAIRS)
        for d in (DIVERGENCES if scored(n) else [{}])
    ],
    ids=str,
)
def test_pairs(name, divergence):
    function = losses.PAIRS[name]
    grid = columns(4)
    arrays = {
        "policy_logps": grid[:, :2],
        "ref_logps": grid[:, 2:],
        "lengths": np.ones((len(grid), 2), np.float32),
        "chosen_logps": grid[:, :2],
        "document_logps": grid,
        "preference": np.linspace(0, 1, len(grid), dtype=np.float32),
    }

    def loss(policy_logps, ref_logps=None, **more):
        own = dict(policy_logps=policy_logps)
        if ref_logps is not None:
            own["ref_logps"] = ref_logps
        if scored(name):
            own["scores"] = losses.divergence_scores(
                policy_logps, ref_logps, **divergence
            )
        return function(**own, **more)

    for arguments in ARGUMENTS.get(name, [{}]):
        finite(loss, takes(function, arrays), **arguments)


@pytest.mark.parametrize("name", unique(losses.UNPAIRED))
def test_single_completions(name):
    grid = columns(2)
    arrays = {
        "policy_logps": grid[:, 0],
        "ref_logps": grid[:, 1],
        "labels": np.arange(len(grid)) % 2 == 0,
    }
    for mean in (0.0, 1e4):
        arrays |= {"kl": np.float32(mean), "delta": np.float32(mean)}
        function = losses.UNPAIRED[name]
        finite(function, takes(function, arrays))


@pytest.mark.parametrize("name", unique(losses.POLICY))
def test_sampled_tokens(name):
    grid = np.array([*itertools.product(WILD, WILD, (-5.0, 0.0, 5.0))], np.float32)
    logps, old_logps, advantages = grid.reshape(-1, 3, 3).transpose(2, 0, 1)
    arrays = {
        "logps": logps,
        "old_logps": old_logps,
        "advantages": advantages,
        "mask": np.ones(logps.shape, bool),
        "entropy": np.abs(logps),
    }
    function = losses.POLICY[name]
    for arguments in ARGUMENTS.get(name, [{}]):
        finite(function, takes(function, arrays), **arguments)


@pytest.mark.parametrize("name", unique(losses.TOKENS))
def test_tokens_of_text(name):
    function, grid = losses.TOKENS[name], columns(2)
    finite(function, takes(function, {"logps": grid, "log_z": grid}))


@pytest.mark.parametrize("name", unique(losses.REWARDS))
def test_rewards(name):
    function, grid = losses.REWARDS[name], columns(2)
    arrays = {"rewards": grid, "present": np.ones(grid.shape, bool)}
    finite(function, takes(function, arrays), centering=0.01)


@pytest.mark.parametrize(
    ("estimator", "correction"), [("k2", False), ("k3", False), ("k3", True)]
)
def test_kl_in_the_loss(estimator, correction):
    grid = columns(3)
    arrays = dict(logps=grid[:, :1], ref_logps=grid[:, 1:2], old_logps=grid[:, 2:])
    options = dict(estimator=estimator, bias_correction=correction)
    finite(losses.kl_in_loss, arrays, **options)


def test_k3_ends_where_the_ratio_does():
    """At a gap of 199 nats: e^20 - 21, without gradient; the other way it is linear."""
    largest = np.exp(20.0) - 21
    policy_, reference = jnp.float32([[-199.0, 0.0, -21.0]]), jnp.zeros((1, 3))
    values, gradient = jax.vjp(lambda x: losses.k3(x, reference), policy_)
    np.testing.assert_allclose(values, [[largest, 0.0, largest]], rtol=1e-6)
    np.testing.assert_allclose(gradient(jnp.ones((1, 3)))[0], 0.0, atol=1e-6)
    above = losses.k3(reference, policy_)
    np.testing.assert_allclose(above, [[198.0, 0.0, 20.0]], rtol=1e-6)
    rewards = losses.kl_reward(
        jnp.zeros(1),
        policy_,
        reference,
        jnp.ones((1, 3), bool),
        kl_coef=0.5,
        estimator="k3",
    )
    expected = [[-0.5 * largest, 0.0, -0.5 * largest]]
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert policy.MAX_LOG_RATIO == 20.0


def test_what_no_limit_touches_is_as_it_was():
    """Within the limits nothing changes: k3, bent scores and squares by numpy."""
    x = np.linspace(-19, 19, 39, dtype=np.float64)[None]
    near, zeros = jnp.float32(x), jnp.zeros(x.shape)
    np.testing.assert_allclose(losses.k3(near, zeros), np.exp(-x) - 1 + x, rtol=1e-5)
    for power in (-1.0, -0.5, 1.0):
        scores = losses.divergence_scores(
            near, zeros, f_divergence="alpha", alpha=power + 1
        )
        np.testing.assert_allclose(scores, np.expm1(power * x) / power, rtol=1e-5)
    far = jnp.float32([[-1e4, 1e4]])
    loss, _ = losses.ipo_sum(far, jnp.zeros((1, 2)), beta=0.5)
    np.testing.assert_allclose(loss, [(2e4 + 1) ** 2], rtol=1e-6)
