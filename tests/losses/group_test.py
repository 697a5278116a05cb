"""Advantages within a group of samples, and the losses that go with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked
from stagecraft.errors import UserError
from stagecraft.losses import advantage, group, policy
from stagecraft.losses.aggregate import aggregate

GOLDEN = np.array([[1.0, 0.0, 0.0, 1.0]], np.float32)


def drawn(seed, n=5, g=4):
    """Rewards f32[n, g], and which of them are scored; the others are NaN."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(n, g)).astype(np.float32)
    scored = rng.random((n, g)) < 0.7
    scored[0], scored[1] = True, False
    scored[2] = np.arange(g) == 1
    return np.where(scored, rewards, np.nan).astype(np.float32), scored


def group_by_loop(rewards, scored, scale, eps):
    found = np.zeros(rewards.shape)
    real = rewards[scored]
    batch = real.std(ddof=1) if real.size > 1 else 0.0
    for n, row in enumerate(rewards):
        own = row[scored[n]]
        for g in np.flatnonzero(scored[n]):
            spread = own.std(ddof=1) if own.size > 1 else 0.0
            spread = {"group": spread, "batch": batch, "none": 1 - eps}[scale]
            found[n, g] = (row[g] - own.mean()) / (spread + eps)
    return found


def rloo_by_loop(rewards, scored, normalize=False):
    found, kept = np.zeros(rewards.shape), np.zeros(rewards.shape, bool)
    for n, g in zip(*np.nonzero(scored), strict=True):
        others = [rewards[n, h] for h in np.flatnonzero(scored[n]) if h != g]
        if others:
            found[n, g], kept[n, g] = rewards[n, g] - np.mean(others), True
    if normalize:
        real = found[kept]
        found[kept] = (real - real.mean()) / (real.std(ddof=1) + 1e-4)
    return found


def test_group_advantages_golden(run):
    got = run(group.group_advantages)(jnp.asarray(GOLDEN))
    np.testing.assert_allclose(got, 0.865875 * (2 * GOLDEN - 1), atol=1e-6)


def test_leave_one_out_golden(run):
    got = run(group.leave_one_out)(jnp.asarray(GOLDEN))
    np.testing.assert_allclose(got, 2 / 3 * (2 * GOLDEN - 1), atol=1e-6)


@pytest.mark.parametrize("eps", [1e-4, 0.1])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_the_loop(run, scale, eps):
    rewards, scored = drawn(0)
    function = functools.partial(group.group_advantages, scale=scale, eps=eps)
    got = run(function)(jnp.asarray(rewards), jnp.asarray(scored))
    assert got.dtype == jnp.float32
    want = group_by_loop(rewards, scored, scale, eps)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not np.asarray(got)[~scored].any()
    clean = np.nan_to_num(rewards)
    got = run(function)(jnp.asarray(clean))
    want = group_by_loop(clean, np.ones_like(scored), scale, eps)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_leave_one_out_is_the_loop(run, normalize):
    rewards, scored = drawn(1)
    function = functools.partial(group.leave_one_out, normalize=normalize)
    got = run(function)(jnp.asarray(rewards), jnp.asarray(scored))
    want = rloo_by_loop(rewards, scored, normalize)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not np.asarray(got)[~scored].any() and not np.asarray(got)[2].any()


def test_two_samples_are_compared_with_each_other():
    got = group.leave_one_out(jnp.array([[3.0, 1.0]]))
    assert got.tolist() == [[2.0, -2.0]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("paid", [2.0, 0.1, -12.3, 1e6 / 3])
def test_a_group_paid_alike_teaches_nothing(scale, paid):
    rewards = jnp.array([[paid] * 7, [0.0, 1, 2, 3, 4, 5, 6]])
    assert not group.group_advantages(rewards, scale=scale)[0].any()
    assert not group.leave_one_out(rewards)[0].any()
    same = jnp.full((2, 7), paid)
    assert not group.group_advantages(same, scale=scale).any()
    assert not group.leave_one_out(same, normalize=True).any()


def test_group_gradients(check_gradient):
    rng = np.random.default_rng(2)
    scored = jnp.asarray(rng.random((3, 4)) < 0.8)
    rewards, weights = rng.normal(size=(2, 3, 4))
    for function in (
        group.group_advantages,
        functools.partial(group.group_advantages, scale="batch"),
        functools.partial(group.group_advantages, scale="none"),
        group.leave_one_out,
        functools.partial(group.leave_one_out, normalize=True),
    ):
        check_gradient(
            lambda x, f=function: jnp.sum(f(x, scored) * weights),
            rewards,
        )


def test_baseline_form_of_reinforce_plus_plus():
    """Group mean off, return-to-go of a score at the end, whitened over all tokens."""
    rewards = jnp.array([[1.0, 0.0], [3.0, 5.0]])
    centered = group.group_advantages(rewards, scale="none").reshape(-1)
    assert centered.tolist() == [0.5, -0.5, -1.0, 1.0]
    mask = jnp.arange(3)[None] < jnp.array([[1], [3], [2], [2]])
    zeros = jnp.zeros((4, 3))
    at_end = losses.kl_reward(centered, zeros, zeros, mask, kl_coef=0.0)
    got = losses.whiten(advantage.discounted_returns(at_end, mask), mask)
    each = np.repeat([0.5, -0.5, -1.0, 1.0], [1, 3, 2, 2])
    want = (each - each.mean()) / each.std()
    np.testing.assert_allclose(np.asarray(got)[np.asarray(mask)], want, rtol=1e-5)


def test_dynamic_sampling(run):
    rewards = jnp.array([[1.0, 1, 1], [0, 0, 0], [1, 0, 1], [-2, -2, -1]])
    assert run(group.dynamic_sampling)(rewards).tolist() == [False, False, True, True]
    share = run(group.frac_reward_zero_std)(rewards)
    assert share.tolist() == [1, 1, 0, 0] and share.dtype == jnp.float32


def test_dynamic_sampling_knows_only_scored_samples():
    rewards = jnp.array([[1.0, jnp.nan, 1], [1, jnp.nan, 0], [5, 1, 2], [1, 2, 3]])
    scored = jnp.array([[1, 0, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]) > 0
    got = group.dynamic_sampling(rewards, scored)
    assert got.tolist() == [False, True, False, False]


def test_what_is_kept_is_what_has_an_advantage():
    rng = np.random.default_rng(3)
    rewards = jnp.asarray(rng.integers(0, 2, (40, 3)), jnp.float32)
    moved = jnp.any(group.group_advantages(rewards) != 0, axis=1)
    np.testing.assert_array_equal(group.dynamic_sampling(rewards), moved)
    assert 0 < moved.sum() < 40


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_soft_overlong(run, dtype):
    lengths = np.array([0, 16384, 16385, 18432, 20479, 20480, 30000])
    function = functools.partial(group.soft_overlong, limit=20480, cache=4096)
    got = run(function)(jnp.asarray(lengths, dtype))
    want = [0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1]
    np.testing.assert_allclose(got, want, atol=1e-7)
    assert got.dtype == jnp.float32
    with pytest.raises(UserError, match="cache=0: expected from 1 to limit=9"):
        group.soft_overlong(jnp.ones(1), limit=9, cache=0)
    with pytest.raises(UserError, match="cache=10"):
        group.soft_overlong(jnp.ones(1), limit=9, cache=10)


def batch(seed, rows=9, width=6):
    """logps, old_logps, advantages f32[B, T], mask; one row empty, one of one token."""
    rng = np.random.default_rng(seed)
    logps, old = -rng.random((2, rows, width)).astype(np.float32)
    advantages = np.repeat(rng.normal(size=(rows, 1)), width, 1).astype(np.float32)
    lengths = np.array([width, 3, 1, 0, 4, 2, 5, width, 2])
    mask = np.arange(width) < lengths[:, None]
    return logps, old, advantages, mask


def sequence_by_loop(logps, old, advantages, mask, low, high, average):
    """Per-sequence losses f64[B] and ratios, with one advantage a row."""
    losses_, ratios = [], []
    for b in range(len(logps)):
        moved = [logps[b, t] - old[b, t] for t in np.flatnonzero(mask[b])]
        moved = np.sum(moved) / (max(len(moved), 1) if average else 1)
        ratio, a = np.exp(moved), advantages[b, 0]
        losses_.append(-min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a))
        ratios.append(ratio)
    return np.array(losses_), np.array(ratios)


SEQUENCE = [
    (group.gspo, {}, (3e-4, 4e-4, True)),
    (group.gspo, {"clip": 0.03, "clip_high": 0.05}, (0.03, 0.05, True)),
    (group.rloo_policy, {}, (0.2, 0.2, False)),
    (group.rloo_policy, {"clip": 0.3, "clip_high": 0.6}, (0.3, 0.6, False)),
]


@pytest.mark.parametrize("function, options, judge", SEQUENCE)
def test_sequence_losses_are_the_loop(run, function, options, judge):
    arrays = batch(4)
    loss, metrics = run(functools.partial(function, **options))(
        *map(jnp.asarray, arrays)
    )
    want, ratio = sequence_by_loop(*arrays, *judge)
    mask, a = arrays[3], arrays[2][:, 0]
    spread = np.where(mask, want[:, None], 0)
    np.testing.assert_allclose(loss, spread, rtol=1e-5, atol=1e-6)
    low, high = 1 - judge[0], 1 + judge[1]
    expected = {
        "val/ratio": ratio,
        "policy/ratio_max": ratio,
        "clip_ratio/low_mean": (ratio < low) & (a < 0),
        "clip_ratio/high_mean": (ratio > high) & (a > 0),
    }
    expected["clip_ratio/region_mean"] = (
        expected["clip_ratio/low_mean"] | expected["clip_ratio/high_mean"]
    )
    for name, value in expected.items():
        assert metrics[name].shape == (9,)
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    moved = np.where(mask, arrays[0] - arrays[1], 0)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], moved**2 / 2, rtol=1e-5)
    assert expected["clip_ratio/region_mean"].any()
    weights, count = aggregate("grpo", jnp.asarray(mask))
    got = jnp.sum(weights * loss) / jnp.sum(count)
    np.testing.assert_allclose(got, np.where(mask.any(1), want, 0).mean(), rtol=1e-5)


@pytest.mark.parametrize("function, options, judge", SEQUENCE)
def test_sequence_gradients_by_differences(check_gradient, function, options, judge):
    logps, old, advantages, mask = batch(5)
    rng = np.random.default_rng(5)
    weights, mask = rng.normal(size=mask.shape), jnp.asarray(mask)

    def total(*arrays):
        return jnp.sum(function(*arrays, mask, **options)[0] * weights)

    # Small moves, so that the rows lie on both sides of either clip.
    old = np.where(np.asarray(mask), logps + 0.05 * (old - logps), old)
    check_gradient(total, logps, old, advantages)


def test_clipped_sequences_have_no_gradient():
    arrays = list(map(jnp.asarray, batch(6)))
    mask = arrays[3]

    def total(x):
        loss, metrics = group.gspo(x, *arrays[1:])
        return jnp.sum(loss), metrics["clip_ratio/region_mean"]

    gradient, clipped = jax.grad(total, has_aux=True)(arrays[0])
    silent = ~np.asarray(gradient).any(axis=1)
    np.testing.assert_array_equal(silent, (clipped > 0) | ~mask.any(axis=1))
    assert clipped.any() and not silent.all()


TOKEN = [group.cispo, group.sapo]
ALL = [group.gspo, group.rloo_policy, *TOKEN, losses.ppo_policy]


@pytest.mark.parametrize("function", ALL)
def test_unmoved_policy_takes_the_plain_policy_gradient(function):
    """At ratio 1 every one of them is REINFORCE, up to how tokens share a sequence."""
    logps, _, advantages, mask = map(jnp.asarray, batch(7))
    more = (mask,) if function in (group.gspo, group.rloo_policy) else ()
    # A sequence's loss stands on each of its tokens, n times.
    n = jnp.maximum(masked.count(mask, axis=1), 1.0)[:, None]

    def total(x):
        loss, metrics = function(x, logps, advantages, *more)
        if function is group.rloo_policy:
            loss = loss / n
        return jnp.sum(masked.clear(loss, mask)), metrics

    def plain(x):
        return masked.sum(policy.reinforce(x, advantages)[0], mask)

    gradient, metrics = jax.grad(total, has_aux=True)(logps)
    np.testing.assert_allclose(gradient, jax.grad(plain)(logps), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(
        metrics["val/ratio"], jnp.ones_like(metrics["val/ratio"])
    )
    for name, value in metrics.items():
        if "clip" in name or "approxkl" in name:
            assert not value.any(), name


@pytest.mark.parametrize("clip_high", [5.0, 1.3])
def test_cispo_numpy(run, check_gradient, clip_high):
    logps, old, advantages, _ = batch(8)
    function = functools.partial(group.cispo, clip_high=clip_high)
    loss, metrics = run(function)(*map(jnp.asarray, (logps, old, advantages)))
    ratio = np.exp(logps - old)
    weight = np.minimum(ratio, clip_high)
    np.testing.assert_allclose(loss, -weight * advantages * logps, rtol=1e-5)
    cut = (ratio > clip_high) & (advantages > 0)
    np.testing.assert_array_equal(metrics["cispo_clip_ratio"], cut)
    assert cut.any() == (clip_high < 2)
    gradient = jax.grad(
        lambda x: jnp.sum(function(x, jnp.asarray(old), jnp.asarray(advantages))[0])
    )(jnp.asarray(logps))
    np.testing.assert_allclose(gradient, -weight * advantages, rtol=1e-5)
    # Where the weight is cut it stands still, and differences see the same.
    far, steps = np.float64(logps) - 3, np.float64(advantages)
    check_gradient(lambda x: jnp.sum(function(x, far, steps)[0]), logps)


@pytest.mark.parametrize("clip_high", [0.2, 1, 1.0])
def test_cispo_refuses_a_bound_that_crushes_every_weight(clip_high):
    one = jnp.ones((1, 1))
    with pytest.raises(
        UserError, match=f"clip_high={clip_high!r}: .*itself, not at 1 "
    ):
        group.cispo(one, one, one, clip_high=clip_high)


@pytest.mark.parametrize("options", [{}, {"tau_positive": 2.0, "tau_negative": 0.5}])
def test_sapo_numpy(run, check_gradient, options):
    logps, old, advantages, _ = batch(9)
    advantages[4] = 0.0
    function = functools.partial(group.sapo, **options)
    loss, _ = run(function)(*map(jnp.asarray, (logps, old, advantages)))
    up = options.get("tau_positive", 1.0)
    down = options.get("tau_negative", 1.05)
    tau = np.where(advantages > 0, up, down)
    ratio = np.exp(logps - old)
    gate = 4 / tau / (1 + np.exp(-tau * (ratio - 1)))
    np.testing.assert_allclose(loss, -gate * advantages, rtol=1e-5, atol=1e-7)
    check_gradient(lambda *x: jnp.sum(function(*x)[0]), logps, old, advantages + 1e-3)


def test_sapo_refuses_a_gate_without_slope():
    one = jnp.ones((1, 1))
    with pytest.raises(UserError, match="tau_negative=0: expected more than 0"):
        group.sapo(one, one, one, tau_negative=0)
    with pytest.raises(UserError, match="tau_positive=-1.0"):
        group.sapo(one, one, one, tau_positive=-1.0)


@pytest.mark.parametrize("function", ALL)
def test_wild_ratios_stay_finite(function):
    zeros, mask = jnp.zeros((3, 2)), jnp.ones((3, 2), bool)
    more = (mask,) if function in (group.gspo, group.rloo_policy) else ()
    advantages = jnp.array([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])
    wild = jnp.array([[300.0, 300.0], [300.0, -300.0], [300.0, 300.0]])

    def total(x):
        loss, metrics = function(x, zeros, advantages, *more)
        return jnp.sum(loss), metrics

    found = jax.value_and_grad(total, has_aux=True)(wild)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("function", [group.gspo, group.rloo_policy])
def test_nan_outside_the_mask_stays_there(function):
    mask = jnp.array([[True, False], [False, False]])
    dirty = jnp.where(mask, -1.0, jnp.nan)

    def total(logps, old):
        loss, metrics = function(logps, old, jnp.ones((2, 2)), mask)
        return jnp.sum(loss), metrics

    (value, metrics), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(
        dirty, dirty
    )
    assert float(value) == -1.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradients, metrics)))
    assert not np.asarray(gradients[0])[~np.asarray(mask)].any()


@pytest.mark.parametrize(
    "function",
    [group.group_advantages, group.leave_one_out, group.dynamic_sampling],
)
def test_a_group_of_one_is_refused(function):
    with pytest.raises(UserError, match="1 sample per prompt: .* at least 2"):
        function(jnp.ones((8, 1)))


def test_bad_input_is_refused():
    rows, row = jnp.ones((2, 3)), jnp.ones((1, 3))
    with pytest.raises(UserError, match="scale='grup'.*did you mean 'group'"):
        group.group_advantages(rows, scale="grup")
    with pytest.raises(ValueError, match="scored"):
        group.group_advantages(rows, row > 0)
    with pytest.raises(ValueError, match=r"\[N, G\]"):
        group.leave_one_out(jnp.ones(4))
    for function in TOKEN:
        with pytest.raises(ValueError, match="advantages"):
            function(rows, rows, row)
    for function in (group.gspo, group.rloo_policy):
        with pytest.raises(ValueError, match="mask"):
            function(rows, rows, rows, row > 0)
