"""Shifted targets, their negative log-likelihood, and sums over completions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked
from stagecraft.losses.next_token import dft, z_loss


def random_rows(rng, shape):
    """Rows packed with a few documents and some padding at the end."""
    ids = rng.integers(1, 50, shape).astype(np.int32)
    lengths = rng.integers(1, 4, shape)
    segments = np.zeros(shape, np.int32)
    for row in np.ndindex(shape[:-1]):
        start = 0
        for number, length in enumerate(lengths[row][: shape[-1] // 3], 1):
            segments[row][start : start + length] = number
            start += length
    mask = (rng.random(shape) < 0.7) & (segments > 0)
    return ids, mask, segments


def shift_by_loop(ids, mask, segments):
    targets, target_mask = np.zeros_like(ids), np.zeros_like(mask)
    for row in np.ndindex(ids.shape[:-1]):
        for t in range(ids.shape[-1] - 1):
            targets[row][t] = ids[row][t + 1]
            same = segments[row][t] == segments[row][t + 1] != 0
            target_mask[row][t] = mask[row][t + 1] and same
    return targets, target_mask


@pytest.mark.parametrize("shape", [(4, 12), (3, 2, 9), (2, 1)])
def test_shift_is_the_loop(run, shape):
    rows = random_rows(np.random.default_rng(0), shape)
    got = run(losses.shift)(*map(jnp.asarray, rows))
    for array, want in zip(got, shift_by_loop(*rows), strict=True):
        assert array.dtype == want.dtype
        np.testing.assert_array_equal(array, want)


def test_mask_moves_with_the_targets():
    # <bos> <user> hi <assistant> yes <end>: learned from "yes" on.
    ids = jnp.array([[1, 2, 3, 4, 5, 6]])
    mask = jnp.array([[False, False, False, False, True, True]])
    targets, target_mask = losses.shift(ids, mask, jnp.ones_like(ids))
    assert targets[target_mask].tolist() == [5, 6]
    assert np.flatnonzero(target_mask[0]).tolist() == [3, 4]


def test_no_target_across_documents_nor_in_padding():
    ids = jnp.arange(8)[None]
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    _, target_mask = losses.shift(ids, jnp.ones((1, 8), bool), segments)
    assert np.flatnonzero(target_mask[0]).tolist() == [0, 1, 3]


def test_packed_is_the_sum_of_its_documents():
    rng = np.random.default_rng(1)
    table = np.log(rng.dirichlet(np.ones(10), size=10)).astype(np.float32)
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 1]]

    def total(rows, segments):
        ids = np.array(rows)
        targets, mask = losses.shift(ids, np.ones_like(ids, bool), np.array(segments))
        loss, _ = losses.next_token(jnp.asarray(table[ids, np.asarray(targets)]))
        return float(masked.sum(loss, mask)), int(mask.sum())

    packed = total([sum(documents, [])], [[1] * 5 + [2] * 2 + [3] * 3])
    alone = [total([d], [[1] * len(d)]) for d in documents]
    assert packed[1] == sum(n for _, n in alone) == 4 + 1 + 2
    np.testing.assert_allclose(packed[0], sum(x for x, _ in alone), rtol=1e-6)


def test_next_token_is_minus_logps(run, check_gradient):
    logps = -np.random.default_rng(2).random((3, 5)).astype(np.float32)
    loss, metrics = run(losses.next_token)(jnp.asarray(logps))
    np.testing.assert_array_equal(loss, -logps)
    assert metrics == {} and loss.dtype == jnp.float32
    mask = jnp.asarray(np.random.default_rng(3).random((3, 5)) < 0.5)
    check_gradient(lambda x: masked.mean(losses.next_token(x)[0], mask), logps)


def test_dft(run):
    p = np.array([[1.0, 0.5, 0.1], [1e-6, 0.9, 0.3]])
    logps = jnp.asarray(np.log(p), jnp.float32)
    loss, metrics = run(dft)(logps)
    np.testing.assert_allclose(loss, -p * np.log(p), rtol=1e-5, atol=1e-7)
    assert metrics == {} and loss.dtype == jnp.float32
    # No gradient through p: the slope is -p itself, not -p (1 + log p).
    slope = jax.grad(lambda x: jnp.sum(dft(x)[0]))(logps)
    np.testing.assert_allclose(slope, -p, rtol=1e-5)


def test_dft_weighs_every_logit_alike():
    # What maximum likelihood divides by p, dft takes back: the gradient to the target's
    # logit is p (1 - p) in place of 1 - p.
    logits = np.random.default_rng(5).normal(size=6)

    def slope(loss_fn):
        def total(x):
            return jnp.sum(loss_fn(jax.nn.log_softmax(x)[None, :1])[0])

        return jax.grad(total)(jnp.asarray(logits, jnp.float32))

    p = np.exp(logits[0]) / np.exp(logits).sum()
    np.testing.assert_allclose(slope(dft), p * slope(losses.next_token), rtol=1e-5)


def test_z_loss(run, check_gradient):
    log_z = np.random.default_rng(6).normal(size=(3, 4))
    loss, metrics = run(z_loss)(jnp.asarray(log_z, jnp.float32))
    np.testing.assert_allclose(loss, log_z**2, rtol=1e-5)
    np.testing.assert_allclose(metrics["log_z"], log_z, rtol=1e-6)
    check_gradient(lambda x: jnp.sum(z_loss(x)[0]), log_z)


def test_sequence_logps_is_a_sum_not_a_mean(run):
    logps = jnp.array([[-1.0, -2.0, -4.0], [-1.0, -2.0, jnp.nan], [jnp.inf] * 3])
    mask = jnp.array([[True, True, True], [False, True, False], [False] * 3])
    np.testing.assert_array_equal(run(losses.sequence_logps)(logps, mask), [-7, -2, 0])


def test_sequence_logps_keeps_leading_axes(check_gradient):
    rng = np.random.default_rng(4)
    logps, mask = -rng.random((3, 2, 5)), rng.random((3, 2, 5)) < 0.6
    got = losses.sequence_logps(jnp.asarray(logps, jnp.float32), jnp.asarray(mask))
    np.testing.assert_allclose(got, np.where(mask, logps, 0).sum(-1), rtol=1e-6)
    weights = rng.random((3, 2))
    check_gradient(
        lambda x: jnp.sum(losses.sequence_logps(x, jnp.asarray(mask)) * weights), logps
    )


def test_nan_outside_the_mask_stays_there():
    logps = jnp.array([[-1.0, jnp.nan, -3.0]])
    mask = jnp.array([[True, False, True]])

    def total(x):
        return masked.mean(losses.next_token(x)[0], mask)

    value, gradient = jax.value_and_grad(total)(logps)
    assert float(value) == 2.0
    np.testing.assert_array_equal(gradient, [[-0.5, 0, -0.5]])


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"segments \(2, 5\)"):
        losses.shift(
            jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), bool), jnp.ones((2, 5))
        )
