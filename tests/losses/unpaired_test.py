"""KTO, BCO and unpaired APO: numpy, golden numbers, gradients and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import masked
from stagecraft.errors import UserError
from stagecraft.losses import unpaired

LABELS = np.array([True, False, False, True, True, False])
NAMES = ("kto", "bco", "apo_zero_unpaired")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_numpy(name, ratio, labels, shift, beta, weights=(1.0, 1.0)):
    """Row by row, the way the papers write it."""
    loss = []
    for x, liked in zip(ratio, labels, strict=True):
        if name == "bco":
            value = sigmoid(beta * x - shift)
            loss.append(-np.log(value if liked else 1 - value))
            continue
        z = shift if name == "kto" else 0.0
        value = sigmoid(beta * (x - z)) if liked else sigmoid(beta * (z - x))
        loss.append(weights[not liked] * (1 - value))
    return np.array(loss)


def call(name, policy, reference, labels, shift, rows=None, **hyper):
    arrays = dict(policy_logps=policy, ref_logps=reference, labels=labels, rows=rows)
    if name != "apo_zero_unpaired":
        arrays["kl" if name == "kto" else "delta"] = shift
    return getattr(unpaired, name)(**arrays, **hyper)


def f32(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
@pytest.mark.parametrize("name", NAMES)
def test_numpy(run, name, weights):
    policy, reference = np.random.default_rng(0).normal(-20, 3, (2, 6))
    hyper = dict(beta=0.3)
    if name != "bco":
        hyper |= dict(desirable_weight=weights[0], undesirable_weight=weights[1])
    loss_fn = functools.partial(call, name, **hyper)
    loss, metrics = run(loss_fn)(*f32(policy, reference), LABELS, *f32(0.7))
    want = by_numpy(name, policy - reference, LABELS, 0.7, 0.3, weights)
    assert loss.shape == (6,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    if name != "apo_zero_unpaired":
        shift = metrics.pop("kl" if name == "kto" else "delta")
        np.testing.assert_allclose(shift, np.full(6, 0.7), rtol=1e-6)
    expected = {
        "rewards/chosen": (0.3 * (policy - reference), LABELS),
        "rewards/rejected": (0.3 * (policy - reference), ~LABELS),
        "logps/chosen": (policy, LABELS),
        "logps/rejected": (policy, ~LABELS),
    }
    assert {*metrics} == {*expected}
    for key, (values, rows) in expected.items():
        got = masked.Mean.of(*metrics[key]).compute()
        np.testing.assert_allclose(got, values[rows].mean(), rtol=1e-4)


def test_golden(run):
    ratio, labels = jnp.array([1.0, -0.5]), jnp.array([True, False])
    loss, _ = run(unpaired.kto)(ratio, jnp.zeros(2), labels, jnp.float32(0.2))
    np.testing.assert_allclose(loss, [0.480011, 0.482507], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradient(check_gradient, name):
    policy, reference = np.random.default_rng(1).normal(-5, 1, (2, 6))

    def total(policy, reference):
        loss, _ = call(name, policy, reference, LABELS, jnp.float64(0.3), beta=0.5)
        return jnp.sum(loss)

    check_gradient(total, policy, reference)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_no_gradient_through_the_reference_point(name):
    policy, reference = f32(*np.random.default_rng(2).normal(-5, 1, (2, 6)))

    def total(shift):
        return call(name, policy, reference, LABELS, shift)[0].sum()

    assert float(jax.grad(total)(jnp.float32(0.3))) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_liked_is_pushed_up_and_disliked_down(name):
    zero = jnp.zeros(6)

    def total(x):
        return call(name, x, zero, LABELS, jnp.float32(0.0))[0].sum()

    gradient = jax.grad(total)(zero)
    assert (gradient[LABELS] < 0).all() and (gradient[~LABELS] > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("liked", [True, False])
def test_one_label_alone(name, liked):
    """A metric over no rows is 0, and never NaN."""
    policy, reference = f32(*np.random.default_rng(3).normal(-5, 1, (2, 4)))
    labels = np.full(4, liked)
    loss, metrics = call(name, policy, reference, labels, jnp.float32(0.1))
    assert np.isfinite(loss).all()
    empty = "rejected" if liked else "chosen"
    for key in (f"rewards/{empty}", f"logps/{empty}"):
        assert float(masked.Mean.of(*metrics[key]).compute()) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_padding_rows_count_in_no_metric(name):
    policy, reference = np.random.default_rng(4).normal(-5, 1, (2, 6))
    rows = np.array([True, True, False, False, True, True])
    wild = np.where(rows, policy, np.nan)
    _, metrics = call(name, *f32(wild, reference), LABELS, jnp.float32(0.1), rows)
    for key, kept in (("chosen", LABELS & rows), ("rejected", ~LABELS & rows)):
        got = masked.Mean.of(*metrics[f"rewards/{key}"]).compute()
        want = 0.1 * (policy - reference)[kept].mean()
        np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_far_apart_does_not_overflow(name):
    far, zero = jnp.array([1e4, -1e4, 1e4, -1e4, 0.0, 0.0]), jnp.zeros(6)

    def total(x):
        return call(name, x, zero, LABELS, jnp.float32(0.0))[0].sum()

    value, gradient = jax.value_and_grad(total)(far)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_kto_with_reference_point_zero_is_apo_zero():
    policy, reference = f32(*np.random.default_rng(5).normal(-5, 1, (2, 6)))
    arrays = (policy, reference, LABELS, jnp.float32(0.0))
    kto, _ = call("kto", *arrays)
    np.testing.assert_array_equal(kto, call("apo_zero_unpaired", *arrays)[0])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_input_is_refused(name):
    one, two, shift = jnp.ones(6), jnp.ones((6, 2)), jnp.float32(0.0)
    with pytest.raises(ValueError, match="ref_logps"):
        call(name, one, two, LABELS, shift)
    with pytest.raises(ValueError, match=r"\[B\]"):
        call(name, two, two, jnp.ones((6, 2), bool), shift)
    with pytest.raises(ValueError, match="labels"):
        call(name, one, one, jnp.ones(6), shift)
    with pytest.raises(UserError, match="beta"):
        call(name, one, one, LABELS, shift, beta=0)
    if name != "bco":
        with pytest.raises(UserError, match="undesirable_weight"):
            call(name, one, one, LABELS, shift, undesirable_weight=-1)
