"""What losses over pairs share: scores, weights of tokens and pairs, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft.errors import UserError
from stagecraft.losses import pairs


def f32(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def test_alpha_joins_the_other_divergences(check_gradient):
    policy, reference = np.random.default_rng(0).normal(-20, 1, (2, 6, 2))
    for alpha, name in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        got = pairs.divergence_scores(
            policy, reference, f_divergence="alpha", alpha=alpha
        )
        np.testing.assert_allclose(
            got,
            pairs.divergence_scores(policy, reference, f_divergence=name),
            rtol=1e-5,
        )
    near = pairs.divergence_scores(
        policy, reference, f_divergence="alpha", alpha=1 + 1e-4
    )
    np.testing.assert_allclose(near, policy - reference, rtol=1e-3)
    for name in pairs.DIVERGENCES:
        check_gradient(
            lambda p, q, name=name: jnp.sum(
                pairs.divergence_scores(p, q, f_divergence=name)
            ),
            policy,
            reference,
        )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_length_desensitized(run, check_gradient, alpha):
    rng = np.random.default_rng(0)
    logps, mask = -rng.random((4, 2, 7)), rng.random((4, 2, 7)) < 0.6
    mask[0, 0] = False  # an empty completion shares no token
    want = np.zeros((4, 2))
    for row in range(4):
        shared = mask[row].sum(-1).min()
        for side in range(2):
            own = logps[row, side][mask[row, side]]
            want[row, side] = own[:shared].sum() + alpha * own[shared:].sum()
    function = functools.partial(pairs.length_desensitized, alpha=alpha)
    wild = np.where(mask, logps, np.nan)
    got = run(function)(*f32(wild), jnp.asarray(mask))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    check_gradient(lambda x: jnp.sum(function(x, mask) * want), logps)


def test_wpo_weights(run):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), (3, 2, 6))
    picked = np.log(p[..., 0])
    mask = rng.random((3, 2, 6)) < 0.7
    mask[1, 1] = False  # an empty completion weighs 1
    log_p2 = np.log((p**2).sum(-1))
    want = np.ones(3)
    for row, side in np.ndindex(3, 2):
        if mask[row, side].any():
            want[row] *= np.exp((picked - log_p2)[row, side][mask[row, side]].mean())
    arrays = f32(np.where(mask, picked, np.nan), np.where(mask, log_p2, np.nan))
    got = run(pairs.wpo_weights)(*arrays, jnp.asarray(mask))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    there = jnp.asarray(mask)
    gradient = jax.grad(lambda *x: pairs.wpo_weights(*x, there).sum(), argnums=(0, 1))
    assert not any(g.any() for g in gradient(*arrays))


def test_wrong_input_is_refused():
    two, mask = jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3), bool)
    with pytest.raises(ValueError, match="log_p2"):
        pairs.wpo_weights(two, jnp.ones((2, 2)), mask)
    with pytest.raises(UserError, match="f_divergence='kl': expected one of 'reverse"):
        pairs.divergence_scores(two, two, f_divergence="kl")
    with pytest.raises(UserError, match="alpha=1.5: must be at least 0 and at most 1"):
        pairs.length_desensitized(two, mask, alpha=1.5)


def test_ranges_name_the_number_and_its_limits():
    pairs.check_range(0, 0.5, a=0, b=np.float32(0.4))
    with pytest.raises(UserError, match=r"b=0.5: must be at least 0 and below 0.5$"):
        pairs.check_range(0, 0.5, a=0, b=0.5)
    with pytest.raises(UserError, match=r"weight=-1: must be at least 0$"):
        pairs.check_range(0, jnp.inf, weight=-1)
    with pytest.raises(UserError, match=r"beta=nan: must be above 0$"):
        pairs.check_positive(tau=1, beta=float("nan"))
