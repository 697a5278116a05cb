"""Masked reductions against numpy; what lies under False never gets out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stagecraft import masked

REDUCTIONS = {
    "sum": (masked.sum, np.sum),
    "mean": (masked.mean, np.mean),
    "var": (masked.var, np.var),
    "max": (masked.max, np.max),
}


def sample(shape=(3, 4, 5), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 2, shape).astype(np.float32)
    mask = rng.random(shape) < 0.4
    mask[0, 0] = False  # at least one row has nothing
    return x, mask


def by_numpy(function, x, mask, axis):
    """The reduction of each kept list of values; 0 for an empty list."""
    axes = range(x.ndim) if axis is None else np.atleast_1d(axis) % x.ndim
    others = [a for a in range(x.ndim) if a not in axes]
    shape = [x.shape[a] for a in others]
    rows = np.transpose(x, [*others, *axes]).reshape(*shape, -1)
    keep = np.transpose(mask, [*others, *axes]).reshape(*shape, -1)
    want = np.zeros(shape)
    for place in np.ndindex(*shape):
        kept = rows[place][keep[place]]
        want[place] = function(kept.astype(np.float64)) if kept.size else 0
    return want


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2)], ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_numpy(name, axis, compiled):
    ours, judge = REDUCTIONS[name]
    x, mask = sample()
    function = functools.partial(ours, axis=axis)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        got = (jax.jit(function) if compiled else function)(x, mask)
    want = by_numpy(judge, x, mask, axis)
    assert got.shape == want.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_empty_mask_is_zero(name):
    function, _ = REDUCTIONS[name]
    x = jnp.array([[jnp.nan, jnp.inf, 1.0]])
    value, gradient = jax.value_and_grad(
        lambda x: function(x, jnp.zeros((1, 3), bool))
    )(x)
    assert float(value) == 0 and not gradient.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_what_is_masked_reaches_neither_value_nor_gradient(name, bad):
    function, _ = REDUCTIONS[name]
    x, mask = sample()
    dirty = np.where(mask, x, bad).astype(np.float32)

    def total(x):
        return jnp.sum(jnp.square(function(x, mask, -1)))

    clean = jax.value_and_grad(total)(jnp.asarray(x))
    got = jax.value_and_grad(total)(jnp.asarray(dirty))
    np.testing.assert_array_equal(got[0], clean[0])
    np.testing.assert_array_equal(got[1], clean[1])
    assert not np.asarray(got[1])[~mask].any()


@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradient_by_differences(name):
    function, _ = REDUCTIONS[name]
    x, mask = sample((2, 2, 3), seed=1)
    x = x.astype(np.float64)
    with jax.enable_x64(True):
        total = jax.jit(lambda x: jnp.sum(jnp.sin(function(x, mask, -1))))
        got = jax.grad(total)(x)
        want = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[place] = 1e-6
            want[place] = (total(x + step) - total(x - step)) / 2e-6
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_variance_of_few():
    x, all_ = jnp.array([1.0, 2.0, 3.0]), jnp.ones(3, bool)
    np.testing.assert_allclose(masked.var(x, all_), 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(masked.var(x, all_, unbiased=True), 1, rtol=1e-6)
    one = jnp.array([False, True, False])
    assert float(masked.var(x, one)) == float(masked.var(x, one, unbiased=True)) == 0


def test_variance_far_from_zero_is_not_cancelled():
    x = jnp.array([1e4, 1e4 + 1, 1e4 + 2])
    np.testing.assert_allclose(masked.var(x, jnp.ones(3, bool)), 2 / 3, rtol=1e-3)


def test_max_of_negatives_is_not_the_zero_of_the_mask():
    x = jnp.array([-3.0, -2.0, 5.0])
    assert float(masked.max(x, jnp.array([True, True, False]))) == -2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.bool_])
def test_narrow_values_are_reduced_in_float32(dtype):
    x = jnp.ones(300, dtype)  # 300 needs more than the 8 bits of a bfloat16
    got = masked.sum(x, jnp.arange(300) < 299)
    assert got.dtype == jnp.float32 and float(got) == 299


def test_masks_that_do_not_fit_are_refused():
    x = jnp.ones((2, 3))
    reductions = [function for function, _ in REDUCTIONS.values()]
    for function in [*reductions, masked.Mean.of, masked.Max.of, masked.Min.of]:
        with pytest.raises(ValueError, match=r"mask \(2, 1\)"):
            function(x, jnp.ones((2, 1), bool))
        with pytest.raises(TypeError, match="boolean"):
            function(x, jnp.ones((2, 3)))


def test_clear_and_count():
    x, mask = jnp.array([1.0, jnp.nan]), jnp.array([True, False])
    assert masked.clear(x, mask).tolist() == [1, 0]
    assert float(masked.count(mask)) == 1 and masked.count(mask).dtype == jnp.float32
    gradient = jax.grad(lambda x: jnp.sum(jnp.exp(masked.clear(x, mask))))(x)
    np.testing.assert_allclose(gradient, [np.e, 0], rtol=1e-6)


def reduce_(x, mask):
    return {
        "mean": masked.Mean.of(x, mask),
        "top": {"max": masked.Max.of(x, mask), "min": masked.Min.of(x, mask)},
    }


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 2, 1)])
def test_micro_batches_add_up_to_the_whole(shape):
    x, mask = sample(shape)
    whole = masked.compute(reduce_(x, mask))
    start = masked.empty_like(jax.eval_shape(reduce_, x[0], mask[0]))

    @jax.jit
    def scanned(x, mask):
        def add(carry, part):
            now = reduce_(*part)
            return masked.merge(carry, now), now

        return jax.lax.scan(add, start, (x, mask))

    merged, stacked = scanned(x, mask)
    for got in (merged, masked.reduce(stacked)):
        got = masked.compute(got)
        assert got["mean"].shape == got["top"]["max"].shape == ()
        np.testing.assert_allclose(got["mean"], whole["mean"], rtol=1e-6)
        for name in ("max", "min"):
            np.testing.assert_array_equal(got["top"][name], whole["top"][name])
    np.testing.assert_allclose(whole["mean"], x[mask].mean(), rtol=1e-5)
    assert float(whole["top"]["max"]) == x[mask].max()
    assert float(whole["top"]["min"]) == x[mask].min()
    each = [p[m].mean() if m.any() else 0 for p, m in zip(x, mask, strict=True)]
    assert abs(float(whole["mean"]) - np.mean(each)) > 1e-3  # the usual mistake


def test_devices_add_up_to_the_whole():
    x, mask = sample((8, 3, 5))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.device_put((x, mask), rows)
    got = jax.jit(lambda *a: masked.compute(reduce_(*a)))(*spread)
    np.testing.assert_allclose(got["mean"], x[mask].mean(), rtol=1e-5)
    assert float(got["top"]["max"]) == x[mask].max()
    assert float(got["top"]["min"]) == x[mask].min()


def test_reductions_of_nothing_are_zero_and_change_nothing():
    x, nothing = jnp.array([jnp.nan, 2.0]), jnp.zeros(2, bool)
    for kind in (masked.Mean, masked.Max, masked.Min):
        empty = kind.of(x, nothing)
        assert float(empty.compute()) == float(kind.empty().compute()) == 0
        some = kind.of(jnp.array([-3.0]), jnp.array([True]))
        assert float(empty.merge(some).compute()) == -3
        assert float(some.merge(kind.empty()).compute()) == -3


def test_without_a_mask_all_places_count():
    x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    assert float(masked.Mean.of(x).compute()) == 3
    assert float(masked.Max.of(-x).compute()) == -1
    assert float(masked.Mean.of(jnp.float32(7)).compute()) == 7


def test_nan_under_true_is_shown():
    x, mask = jnp.array([jnp.nan, 2.0]), jnp.ones(2, bool)
    assert np.isnan(masked.Mean.of(x, mask).compute())
    assert np.isnan(masked.Max.of(x, mask).compute())


# -- reductions with weights, and the calibration error --------------------------------


def test_a_reduction_of_a_mask_is_the_masked_mean():
    x, mask = sample()
    dirty = np.where(mask, x, np.nan)
    found = masked.Reduction.of(mask)
    got = found.sum(jnp.asarray(dirty)) / found.total()
    np.testing.assert_allclose(got, x[mask].mean(), rtol=1e-5)
    mean = masked.Mean.weighted(jnp.asarray(dirty), found)
    np.testing.assert_allclose(mean.compute(), x[mask].mean(), rtol=1e-5)


def test_weighted_elements_count_by_their_weight():
    x, mask = sample()
    weights = np.random.default_rng(2).random(x.shape).astype(np.float32)
    weights[0, 1] = 0  # elements of weight 0 may be anything
    dirty = np.where(mask & (weights > 0), x, np.inf)
    found = masked.Reduction.of(jnp.asarray(mask), jnp.asarray(weights))
    got = float(found.sum(jnp.asarray(dirty)) / found.total())
    own = mask & (weights > 0)
    assert got == pytest.approx(np.average(x[own], weights=weights[own]), rel=1e-5)


def test_a_divisor_of_its_own():
    """Two completions of a limit of ten tokens: the sum over twenty."""
    mask = jnp.array([[True, True, False], [True, False, False]])
    found = masked.Reduction(mask.astype(jnp.float32), jnp.full(2, 10.0))
    assert float(found.total()) == 20
    values = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.nan, jnp.nan]])
    assert float(masked.Mean.weighted(values, found).compute()) == pytest.approx(7 / 20)


def test_a_reduction_of_nothing_is_zero_over_one():
    found = masked.Reduction.of(jnp.zeros(3, bool))
    values = jnp.full(3, jnp.nan)
    assert float(found.sum(values)) == 0 and float(found.total()) == 1
    gradient = jax.grad(lambda x: found.sum(x) / found.total())(values)
    assert not gradient.any()
    with pytest.raises(ValueError, match="one shape"):
        found.sum(jnp.zeros((3, 1)))


def test_parts_of_a_window_add_up_with_the_divisor_of_the_whole():
    x, mask = sample((4, 3, 5))
    whole = masked.Reduction.of(mask)
    parts = [masked.Reduction.of(m).sum(v) for v, m in zip(x, mask, strict=True)]
    np.testing.assert_allclose(np.sum(parts) / whole.total(), x[mask].mean(), rtol=1e-5)


def gap(confidence, hits, place, buckets=4):
    inside = jnp.asarray(place)[:, None] == jnp.arange(buckets)
    return masked.CalibrationError.of(
        jnp.asarray(confidence, jnp.float32), jnp.asarray(hits, jnp.float32), inside
    )


def test_the_calibration_error_merges_bucket_by_bucket():
    rng = np.random.default_rng(3)
    confidence, hits = rng.random(40), rng.random(40) < 0.6
    place = rng.integers(0, 5, 40)  # 4 is no bucket: rows that do not count
    error = (
        sum(abs((confidence - hits)[place == b].sum()) for b in range(4))
        / (place < 4).sum()
    )
    got = gap(confidence, hits, place)
    assert float(got.compute()) == pytest.approx(error, rel=1e-5)
    halves = [gap(confidence[h], hits[h], place[h]) for h in (np.s_[:13], np.s_[13:])]
    merged = masked.merge(*halves)
    assert float(merged.compute()) == pytest.approx(error, rel=1e-5)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *halves)
    assert float(masked.reduce(stacked).compute()) == pytest.approx(error, rel=1e-5)
    mean = np.mean([float(h.compute()) for h in halves])
    assert abs(mean - error) > 1e-3  # a mean of errors is another number
    empty = masked.empty_like({"gap": got})["gap"]
    assert float(empty.compute()) == 0
    np.testing.assert_array_equal(masked.merge(empty, got).compute(), got.compute())


def test_a_difference_of_means_merges_to_that_of_the_whole():
    x, mask = sample((4, 3, 5))
    other = ~mask

    def difference(x, mask, other):
        means = masked.Mean.of(x, mask), masked.Mean.of(x, other)
        return {"margin": masked.Sum.of(means, [1.0, -1.0])}

    expected = x[mask].mean() - x[other].mean()
    whole = masked.compute(difference(x, mask, other))
    np.testing.assert_allclose(whole["margin"], expected, rtol=1e-5)
    parts = [difference(*part) for part in zip(x, mask, other, strict=True)]
    merged = masked.empty_like(parts[0])
    for part in parts:
        merged = masked.merge(merged, part)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    for got in (merged, masked.reduce(stacked)):
        np.testing.assert_allclose(masked.compute(got)["margin"], expected, rtol=1e-5)
