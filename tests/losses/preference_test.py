"""Losses over pairs with a reference: numpy, golden numbers, gradients and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked
from stagecraft.errors import UserError
from stagecraft.losses import preference

# Chosen rises by 1 over the reference, rejected falls by 0.5.
POLICY, REFERENCE = np.array([[-10.0, -12.0]]), np.array([[-11.0, -11.5]])
LENGTHS = np.array([[5.0, 8.0]])


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def kl_of_two(p, q):
    """KL of a coin (p, 1 - p) from a coin (q, 1 - q)."""
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def by_rank(a, b):
    """Each of `a` less the one of `b` that is as manieth in size."""
    smaller = [sum(other < x for other in a) for x in a]
    return np.array([x - sorted(b)[k] for x, k in zip(a, smaller, strict=True)])


# Name: hyper-parameters beside beta; the formula in numpy from the log-ratios c, r, the
# lengths n, beta b, and the margins p of the policy and q of the reference; the golden
# number at b = 0.1.
CASES = {
    "dpo": ({}, lambda c, r, n, b, p, q: softplus(-b * (c - r)), 0.620957),
    "dpo, smoothed": (
        dict(label_smoothing=0.1),
        lambda c, r, n, b, p, q: softplus(-b * (c - r)) + 0.1 * b * (c - r),
        0.635957,
    ),
    "hinge": ({}, lambda c, r, n, b, p, q: np.maximum(0, 1 - b * (c - r)), 0.85),
    "ipo": (
        {},
        lambda c, r, n, b, p, q: (c / n[:, 0] - r / n[:, 1] - 0.5 / b) ** 2,
        22.443906,
    ),
    "ipo_sum": ({}, lambda c, r, n, b, p, q: (c - r - 0.5 / b) ** 2, 12.25),
    "exo_pair": (
        {},
        lambda c, r, n, b, p, q: kl_of_two(sigmoid(b * (c - r)), 1 - 1e-3),
        2.505517,
    ),
    "nca_pair": (
        {},
        lambda c, r, n, b, p, q: (
            1.5 * softplus(-b * c) + 0.5 * b * c + 0.5 * softplus(b * r)
        ),
        1.350825,
    ),
    "robust": (
        dict(label_smoothing=0.1),
        lambda c, r, n, b, p, q: (
            (0.9 * softplus(-b * (c - r)) - 0.1 * softplus(b * (c - r))) / 0.8
        ),
        0.602207,
    ),
    "bco_pair": (
        {},
        lambda c, r, n, b, p, q: softplus(-b * c) + softplus(b * r),
        1.312856,
    ),
    "sppo_hard": (
        {},
        lambda c, r, n, b, p, q: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
        36.25,
    ),
    "apo_zero": (
        {},
        lambda c, r, n, b, p, q: 1 - sigmoid(b * c) + sigmoid(b * r),
        0.962523,
    ),
    "apo_down": (
        {},
        lambda c, r, n, b, p, q: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
        0.987549,
    ),
    "discopop": (
        {},
        lambda c, r, n, b, p, q: (
            softplus(-b * (c - r)) * (1 - sigmoid(b * (c - r) / 0.05))
            + np.exp(-b * (c - r)) * sigmoid(b * (c - r) / 0.05)
        ),
        0.849338,
    ),
    "sigmoid_norm": (
        {},
        lambda c, r, n, b, p, q: softplus(-b * (c / n[:, 0] - r / n[:, 1])),
        0.680108,
    ),
    # A batch of one has nothing to sort: both are dpo.
    "aot": (
        {},
        lambda c, r, n, b, p, q: softplus(-b * by_rank(p, q)),
        0.620957,
    ),
    "aot_unpaired": (
        dict(label_smoothing=0.1),
        lambda c, r, n, b, p, q: softplus(-b * by_rank(c, r)) + 0.1 * b * by_rank(c, r),
        0.635957,
    ),
}
SCORED = tuple(name for name in CASES if name != "aot")
NORMALISED = ("ipo", "sigmoid_norm")
# f'(u) of each divergence; 0 where u = 1.
DIVERGENCES = {
    "reverse_kl": np.log,
    "forward_kl": lambda u: 1 - 1 / u,
    "js": lambda u: np.log(2 * u / (u + 1)),
    "alpha": lambda u: 2 * (1 - u**-0.5),  # alpha 1/2
}


def bound(name, lengths, *, divergence=None, **hyper):
    """A function of policy and reference alone.

    Args:
        name: of `CASES`.
        lengths: f32[B, 2].
        divergence: settings of `divergence_scores`; None leaves the scores out.
        **hyper: of the loss.
    """
    function = getattr(preference, name.split(",")[0])
    if function.__name__ in NORMALISED:
        hyper["lengths"] = jnp.asarray(lengths)

    def loss(policy, reference):
        more = {}
        if divergence is not None:
            more["scores"] = losses.divergence_scores(policy, reference, **divergence)
        return function(policy, reference, **hyper, **more)

    return loss


def random_pairs(seed, rows=6, scale=3.0):
    rng = np.random.default_rng(seed)
    policy, reference = rng.normal(-20, scale, (2, rows, 2))
    return policy, reference, rng.integers(1, 9, (rows, 2)).astype(float)


def f32(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


@pytest.mark.parametrize("name", CASES)
def test_golden(run, name):
    hyper, _, want = CASES[name]
    loss_fn = bound(name, *f32(LENGTHS), **hyper)
    loss, _ = run(loss_fn)(*f32(POLICY, REFERENCE))
    np.testing.assert_allclose(loss, [want], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_numpy(run, name):
    hyper, formula, _ = CASES[name]
    policy, reference, lengths = random_pairs(0)
    loss_fn = bound(name, *f32(lengths), beta=0.3, **hyper)
    loss, metrics = run(loss_fn)(*f32(policy, reference))
    ratio = policy - reference
    spread, base = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    want = formula(ratio[:, 0], ratio[:, 1], lengths, 0.3, spread, base)
    assert loss.shape == (6,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, want, rtol=1e-4, atol=1e-6)
    check_metrics(metrics, policy, reference, 0.3)


def check_metrics(metrics, policy, reference, beta):
    rewards = beta * (policy - reference)
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
        assert metrics[name].shape == value.shape
        assert metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradient(check_gradient, name):
    hyper, _, _ = CASES[name]
    policy, reference, lengths = random_pairs(1, rows=4, scale=1.0)
    loss_fn = bound(name, lengths, beta=0.5, **hyper)
    check_gradient(lambda p, q: jnp.sum(loss_fn(p, q)[0]), policy, reference)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", SCORED)
def test_divergences(run, name, divergence):
    hyper, formula, _ = CASES[name]
    policy, reference, lengths = random_pairs(2, scale=0.7)
    settings = dict(f_divergence=divergence)
    loss_fn = bound(name, *f32(lengths), divergence=settings, beta=0.3, **hyper)
    loss, metrics = run(loss_fn)(*f32(policy, reference))
    c, r = DIVERGENCES[divergence](np.exp(policy - reference)).T
    want = formula(c, r, lengths, 0.3, None, None)
    np.testing.assert_allclose(loss, want, rtol=2e-4, atol=1e-5)
    check_metrics(metrics, policy, reference, 0.3)  # stay those of the log-ratio


@pytest.mark.parametrize(
    "divergence, want",
    [("forward_kl", 0.631154), ("js", 0.660652), ("alpha", 0.627691)],
)
def test_golden_divergences(divergence, want):
    loss_fn = bound("dpo", None, divergence=dict(f_divergence=divergence))
    loss, _ = loss_fn(*f32(POLICY, REFERENCE))
    np.testing.assert_allclose(loss, [want], atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_far_apart_stay_finite(divergence):
    loss_fn = bound("dpo", None, divergence=dict(f_divergence=divergence))

    def total(x):
        return jnp.sum(loss_fn(x, jnp.zeros_like(x))[0])

    far = jnp.array([[0.0, -1e4], [-1e4, 0.0], [-1e4, -1e4]])
    value, gradient = jax.value_and_grad(total)(far)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", SCORED)
def test_reference_free_takes_it_as_zero(name):
    policy, reference, lengths = random_pairs(4)
    hyper, _, _ = CASES[name]
    settings = dict(reference_free=True)
    free = bound(name, *f32(lengths), divergence=settings, **hyper)
    zero = bound(name, *f32(lengths), **hyper)
    loss, metrics = free(*f32(policy, reference))
    want, _ = zero(*f32(policy, np.zeros_like(policy)))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    check_metrics(metrics, policy, reference, 0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels(run, check_gradient, smoothing):
    policy, reference, _ = random_pairs(5)
    p = np.array([0.0, 1.0, 0.5, 0.9, 0.3, 0.7])
    loss_fn = functools.partial(losses.dpo, beta=0.3, label_smoothing=smoothing)
    loss, _ = run(loss_fn)(*f32(policy, reference, p))
    ratio = 0.3 * (policy - reference)
    margin = ratio[:, 0] - ratio[:, 1]
    right = p * (1 - smoothing) + (1 - p) * smoothing
    want = right * softplus(-margin) + (1 - right) * softplus(margin)
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    check_gradient(lambda *x: jnp.sum(loss_fn(*x)[0]), policy, reference, p)


def test_hard_labels_are_the_ends_of_soft_ones():
    policy, reference = f32(POLICY, REFERENCE)
    hard, _ = losses.dpo(policy, reference)
    sure, _ = losses.dpo(policy, reference, jnp.ones(1))
    np.testing.assert_array_equal(sure, hard)
    other, _ = losses.dpo(policy, reference, jnp.zeros(1))
    swapped, _ = losses.dpo(policy[:, ::-1], reference[:, ::-1])
    np.testing.assert_allclose(other, swapped, rtol=1e-6)
    # A probability the model agrees with is where the gradient vanishes.
    margin = 0.1 * (POLICY - REFERENCE) @ [1, -1]
    grad = jax.grad(lambda x: losses.dpo(x, reference, *f32(sigmoid(margin)))[0].sum())
    np.testing.assert_allclose(grad(policy), np.zeros((1, 2)), atol=1e-8)


def test_equal_policies():
    logps = jnp.array([[-5.0, -9.0], [-100.0, -1.0]])
    loss, metrics = losses.dpo(logps, logps, beta=0.1)
    np.testing.assert_allclose(loss, np.log(2) * np.ones(2), rtol=1e-6)
    assert not metrics["rewards/margins"].any()
    assert not metrics["rewards/accuracies"].any()  # a tie is no success
    gradient = jax.grad(lambda x: jnp.sum(losses.dpo(x, logps, beta=0.1)[0]))(logps)
    np.testing.assert_allclose(gradient, [[-0.05, 0.05]] * 2, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_swapping_the_pair_swaps_the_verdict(name):
    hyper, _, _ = CASES[name]
    policy, reference = f32(POLICY, REFERENCE)
    loss, metrics = bound(name, *f32(LENGTHS), **hyper)(policy, reference)
    swapped, other = bound(name, *f32(LENGTHS[:, ::-1]), **hyper)(
        policy[:, ::-1], reference[:, ::-1]
    )
    # discopop falls before it rises, where its exponential part is switched off.
    assert loss[0] < swapped[0] or name == "discopop"
    assert metrics["rewards/accuracies"][0] == 1 and other["rewards/accuracies"][0] == 0
    np.testing.assert_allclose(
        metrics["rewards/margins"], -other["rewards/margins"], rtol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_far_apart_does_not_overflow(name):
    hyper, _, _ = CASES[name]
    loss_fn = bound(name, jnp.ones((3, 2)), **hyper)
    far = jnp.array([[0.0, -1e4], [-1e4, 0.0], [0.0, 0.0]])
    loss, _ = loss_fn(far, jnp.zeros((3, 2)))
    assert np.isfinite(loss).all()
    gradient = jax.grad(lambda x: jnp.sum(loss_fn(x, jnp.zeros((3, 2)))[0]))(far)
    assert np.isfinite(gradient).all()
    if name == "dpo":
        np.testing.assert_allclose(loss, [0.0, 1000.0, np.log(2)], atol=1e-4)


def test_per_token_and_sums_agree_on_single_tokens():
    policy, reference, _ = random_pairs(6)
    one = jnp.ones((6, 2))
    arrays = f32(policy, reference)
    for averaged, summed in (("ipo", "ipo_sum"), ("sigmoid_norm", "dpo")):
        want, _ = getattr(preference, summed)(*arrays)
        got, _ = getattr(preference, averaged)(*arrays, one)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", NORMALISED)
def test_empty_completion_is_not_a_division_by_zero(name):
    zero = jnp.zeros((2, 2))
    loss, _ = getattr(preference, name)(zero, zero, zero)
    assert np.isfinite(loss).all()


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_padding_rows_are_not_sorted_in(run, check_gradient, name):
    loss_fn = functools.partial(getattr(preference, name), beta=0.5)
    policy, reference, _ = random_pairs(7, rows=5, scale=1.0)
    rows = np.array([True, False, True, True, False, False, True, True])
    wide = [np.full((8, 2), np.nan) for _ in range(2)]
    for array, real in zip(wide, (policy, reference), strict=True):
        array[rows] = real
    loss, _ = run(loss_fn)(*f32(*wide), jnp.asarray(rows))
    want, _ = loss_fn(*f32(policy, reference))
    np.testing.assert_allclose(np.asarray(loss)[rows], want, rtol=1e-5)

    def total(x):
        loss, _ = loss_fn(x, *f32(wide[1]), jnp.asarray(rows))
        return masked.mean(loss, jnp.asarray(rows))

    gradient = jax.grad(total)(*f32(wide[0]))
    assert np.isfinite(gradient).all() and not gradient[~rows].any()
    zeros = [np.where(rows[:, None], x, 0.0) for x in wide]
    check_gradient(lambda p, q: jnp.sum(loss_fn(p, q, rows)[0]), *zeros)


def test_aot_forgets_who_was_whose():
    policy, reference, _ = random_pairs(8)
    shuffled = np.random.default_rng(0).permutation(6)
    loss, _ = preference.aot(*f32(policy, reference))
    other, _ = preference.aot(*f32(policy, reference[shuffled]))
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    one = [f32(policy[i : i + 1], reference[i : i + 1]) for i in range(6)]
    apart = np.array([preference.aot(*x)[0][0] for x in one])
    assert abs(apart - np.asarray(loss)).max() > 1e-2  # the batch matters


def test_sft_is_the_likelihood_of_the_chosen(run, check_gradient):
    policy, reference, _ = random_pairs(9)
    tokens = -np.random.default_rng(0).random((6, 4))
    loss, metrics = run(preference.sft)(*f32(policy, reference, tokens))
    assert {*loss} == {"chosen"}
    np.testing.assert_allclose(loss["chosen"], -tokens, rtol=1e-6)
    check_metrics(metrics, policy, reference, 0.1)
    check_gradient(
        lambda x: jnp.sum(preference.sft(policy, reference, x)[0]["chosen"]), tokens
    )


def test_nan_outside_the_completion_stays_there():
    logps = jnp.array([[[-1.0, jnp.nan], [-2.0, -3.0]]])  # [1, 2, T]
    mask = jnp.array([[[True, False], [True, True]]])

    def total(x):
        sums = losses.sequence_logps(x, mask)
        return jnp.sum(losses.dpo(sums, jnp.zeros_like(sums))[0])

    value, gradient = jax.value_and_grad(total)(logps)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert gradient[0, 0, 1] == 0 and gradient[0, 0, 0] < 0 < gradient[0, 1, 0]


@pytest.mark.parametrize("name", CASES)
def test_empty_batch_mask_is_zero(name):
    zero = jnp.zeros((2, 2))
    loss, _ = bound(name, zero, **CASES[name][0])(zero, zero)
    assert float(masked.mean(loss, jnp.zeros(2, bool))) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_refused(name):
    function = bound(name, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="ref_logps"):
        function(jnp.ones((2, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        function(jnp.ones((2, 3)), jnp.ones((2, 3)))
    for beta in (0, -0.1, float("nan")):
        with pytest.raises(UserError, match="beta"):
            bound(name, jnp.ones((2, 2)), beta=beta)(jnp.ones((2, 2)), jnp.ones((2, 2)))


@pytest.mark.parametrize(
    "name, hyper",
    [
        ("dpo", dict(label_smoothing=0.5)),
        ("dpo", dict(label_smoothing=-0.1)),
        ("robust", dict(label_smoothing=0.5)),
        ("exo_pair", dict(label_smoothing=0)),
        ("exo_pair", dict(label_smoothing=0.5)),
        ("aot", dict(label_smoothing=1)),
        ("aot_unpaired", dict(label_smoothing=0.5)),
        ("discopop", dict(tau=0.0)),
    ],
)
def test_numbers_out_of_range_are_refused(run, name, hyper):
    (key,) = hyper
    function = functools.partial(getattr(preference, name), **hyper)
    with pytest.raises(UserError, match=key):
        run(function)(jnp.ones((2, 2)), jnp.ones((2, 2)))


def test_shapes_beside_the_pair_are_refused():
    two = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="preference"):
        losses.dpo(two, two, jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="lengths"):
        preference.ipo(two, two, jnp.ones(2))
    with pytest.raises(ValueError, match="rows"):
        preference.aot(two, two, jnp.ones((1,), bool))
    with pytest.raises(ValueError, match="scores"):
        losses.dpo(two, two, scores=jnp.ones((1, 2)))


def test_hyper_parameters_may_be_traced():
    # A schedule may move beta: what jit traces cannot be refused, and is not.
    loss = jax.jit(lambda b: losses.dpo(*f32(POLICY, REFERENCE), beta=b)[0])(0.1)
    np.testing.assert_allclose(loss, [0.620957], atol=1e-6)


def test_every_loss_with_a_reference_is_a_case():
    names = {name.split(",")[0] for name in CASES} | {"sft"}
    assert {loss.__name__ for loss in preference.LOSSES} == names


@pytest.mark.parametrize("name", SCORED)
def test_scores_of_the_reverse_kl_are_what_is_compared_without_any(name):
    """A stage passes scores, a notebook does not: the same bits either way."""
    policy, reference, lengths = random_pairs(10)
    hyper, _, _ = CASES[name]
    given = bound(name, *f32(lengths), divergence={}, **hyper)
    absent = bound(name, *f32(lengths), **hyper)
    one, other = (jax.jit(f)(*f32(policy, reference)) for f in (given, absent))
    jax.tree.map(np.testing.assert_array_equal, one, other)
