"""How token losses become one number, and that splitting a batch never shows."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import masked
from stagecraft.errors import UserError
from stagecraft.losses.aggregate import AGGREGATIONS, aggregate, overlong_filter

WIDTH = 6


def drawn(seed):
    """Token losses with NaN outside the mask, and a mask with one row empty."""
    rng = np.random.default_rng(seed)
    mask = np.arange(WIDTH) < np.array([6, 3, 0, 1, 4])[:, None]
    loss = np.where(mask, rng.normal(size=mask.shape), np.nan)
    return loss.astype(np.float32), mask


def by_loop(name, loss, mask, max_length):
    rows = [loss[b, mask[b]] for b in range(len(mask))]
    if name == "grpo":
        return np.mean([row.mean() if row.size else 0.0 for row in rows])
    total = sum(row.sum() for row in rows)
    if name == "dr_grpo":
        return total / (len(rows) * max_length)
    return total / sum(row.size for row in rows)


def reduce(loss, *reductions):
    """The one reduction of a stage, over the parts of an accumulation window."""
    loss = np.split(loss, len(reductions))
    total = sum(
        float(r.sum(jnp.asarray(x))) for r, x in zip(reductions, loss, strict=True)
    )
    count = sum(float(jnp.sum(r.count)) for r in reductions)
    return total / count


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregate_is_the_loop(run, name):
    loss, mask = drawn(0)
    function = functools.partial(aggregate, name, max_length=9)
    reduction = run(function)(jnp.asarray(mask))
    assert reduction.weights.shape == mask.shape and reduction.count.shape == (5,)
    assert reduction.weights.dtype == reduction.count.dtype == jnp.float32
    assert not np.asarray(reduction.weights)[~mask].any()
    want = by_loop(name, loss, mask, 9)
    np.testing.assert_allclose(reduce(loss, reduction), want, rtol=1e-5)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole(name):
    loss, mask = drawn(1)
    whole = aggregate(name, jnp.asarray(mask), max_length=9)
    parts = [aggregate(name, jnp.asarray(m), max_length=9) for m in np.split(mask, 5)]
    np.testing.assert_allclose(reduce(loss, *parts), reduce(loss, whole), rtol=1e-5)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_padding_changes_nothing(name):
    loss, mask = drawn(2)
    pad = ((0, 0), (0, 3))
    wide = np.pad(loss, pad, constant_values=np.nan), np.pad(mask, pad)
    short = aggregate(name, jnp.asarray(mask), max_length=WIDTH)
    long = aggregate(name, jnp.asarray(wide[1]), max_length=WIDTH)
    np.testing.assert_allclose(reduce(wide[0], long), reduce(loss, short), rtol=1e-6)


def test_by_hand():
    # Losses 1, 1 and 4: mean of means 2.5, mean of tokens 2, over 2 rows of 4: 6 / 8.
    mask = jnp.array([[True, True], [True, False]])
    loss = np.array([[1.0, 1.0], [4.0, np.nan]], np.float32)
    got = [reduce(loss, aggregate(n, mask, max_length=4)) for n in AGGREGATIONS]
    assert dict(zip(AGGREGATIONS, got, strict=True)) == {
        "grpo": 2.5,
        "bnpo": 2.0,
        "dapo": 2.0,
        "dr_grpo": 0.75,
    }


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_full_rows_are_averaged_alike(name):
    loss = np.random.default_rng(3).normal(size=(4, WIDTH)).astype(np.float32)
    mask = jnp.ones((4, WIDTH), bool)
    got = reduce(loss, aggregate(name, mask, max_length=WIDTH))
    np.testing.assert_allclose(got, loss.mean(), rtol=1e-5)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_empty_mask_is_zero(name):
    nothing = jnp.zeros((2, 3), bool)
    reduction = aggregate(name, nothing, max_length=3)
    total = reduction.sum(jnp.full((2, 3), jnp.nan)) / reduction.total()
    assert float(total) == 0.0


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_one_token(name):
    reduction = aggregate(name, jnp.ones((1, 1), bool), max_length=1)
    assert reduce(np.array([[7.0]], np.float32), reduction) == 7.0


def test_overlong_filter(run):
    mask = jnp.array([[True, True], [True, True], [True, False]])
    ended = jnp.array([True, False, True])
    got = run(overlong_filter)(mask, ended)
    assert got.tolist() == [[True, True], [False, False], [True, False]]
    loss = np.array([[1.0, 1.0], [9.0, 9.0], [4.0, 0.0]], np.float32)
    # A row that was filtered out takes no tokens with it, but stays a completion.
    want = {"grpo": 5 / 3, "bnpo": 2.0, "dapo": 2.0, "dr_grpo": 1.0}
    for name, value in want.items():
        np.testing.assert_allclose(
            reduce(loss, aggregate(name, got, max_length=2)), value
        )
    with pytest.raises(ValueError, match="ended"):
        overlong_filter(mask, ended[:2])


def test_mean_of_tokens_is_the_masked_mean():
    loss, mask = drawn(4)
    want = masked.mean(jnp.asarray(loss), jnp.asarray(mask))
    got = reduce(loss, aggregate("dapo", jnp.asarray(mask)))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bad_input_is_refused():
    mask = jnp.ones((1, 2), bool)
    with pytest.raises(UserError, match="aggregate='dr_gpro'.*did you mean 'dr_grpo'"):
        aggregate("dr_gpro", mask)
    for wrong in (None, 0):
        with pytest.raises(UserError, match=f"max_length={wrong}: .*'dr_grpo' divides"):
            aggregate("dr_grpo", mask, max_length=wrong)
