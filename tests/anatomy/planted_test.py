"""Changes whose every figure is known beforehand, judged by numpy in float64."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from stagecraft.anatomy import between, changes, elements, nulls, spectra, weights
from stagecraft.anatomy.stored import Matrix, Weights
from stagecraft.errors import UserError
from tests import tiny

D = 128


def gaussian(seed, shape=(D, D), std=0.02):
    return (std * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def matrix(array, dtype="F32", name="layers/0/attention/query"):
    return Matrix(name, "query", 0, array.shape, dtype, lambda: array)


def compared(before, after, dtype="F32", **options):
    options = {"draws": 0} | options
    return weights.compare(matrix(before, dtype), matrix(after, dtype), **options)


def low_rank(w, rank, relative, seed=3):
    """A change of equal singular values, its norm so much of W0's; with its sides."""
    random = np.random.default_rng(seed)
    u = np.linalg.qr(random.normal(size=(w.shape[0], rank)))[0]
    v = np.linalg.qr(random.normal(size=(w.shape[1], rank)))[0]
    change = relative * np.linalg.norm(w) / rank**0.5 * (u @ v.T)
    return (w + change).astype(np.float32), u, v


def test_nothing_changed():
    w = gaussian(0)
    row = compared(w, w.copy(), draws=1)
    for key in ("relative_change", "effective_rank", "stable_rank", "rank"):
        assert row[key] == 0
    assert row["nss"] < 1e-12
    for key in ("exact", "bf16", "eta", "1e5"):
        assert row[f"unchanged_{key}"] == 1
    assert row["ulps"][0] == 1 and row["cosine"] == pytest.approx(1)
    assert row["rotation_write"] < 1e-4 and row["rotation_read"] < 1e-4
    for key in ("low_overlap", "high_overlap", "top_energy", "nss_scaled", "along"):
        assert row[key] is None
    assert row["null"]["isotropic"][0]["relative_change"] == 0


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("relative", [1e-3, 1e-2, 1e-1])
def test_the_rank_of_a_planted_change_is_counted_above_rounding(rank, relative):
    w = gaussian(1)
    after, u, v = low_rank(w, rank, relative)
    row = compared(w, after)
    assert row["rank"] == rank
    # By numpy's own tolerance for float64 it would be full: rounding is in all.
    change = after.astype(np.float64) - w
    assert np.linalg.matrix_rank(change) > 0.9 * D
    assert row["top_energy"] >= 1 - 1e-6
    assert row["effective_rank"] == pytest.approx(rank, rel=2e-3)
    assert row["stable_rank"] == pytest.approx(rank, rel=1e-3)
    assert row["relative_change"] == pytest.approx(relative, rel=1e-3)
    if relative >= 1e-2:
        main = spectra.Product(after, w).directions(rank)
        for planted, side in ((u, main.write), (v, main.read)):
            assert scipy.linalg.subspace_angles(planted, side).max() < 1e-3


def test_in_bfloat16_rounding_hides_a_small_rank():
    """Rank one of relative size .01: the usual count says almost full."""
    w = elements.cast(gaussian(2, (256, 256)), "BF16")
    after = elements.cast(low_rank(w, 1, 1e-2)[0], "BF16")
    row = compared(w, after, "BF16")
    assert np.linalg.matrix_rank((after - w).astype(np.float32)) >= 0.9 * 256
    assert row["rank"] == 1
    assert row["effective_rank"] < 1.5 and row["stable_rank"] < 1.1


def test_the_noise_edge_is_the_largest_value_that_rounding_makes():
    w = gaussian(5, (256, 256))
    after, _, _ = low_rank(w, 8, 1e-2)
    values = np.linalg.svd(after.astype(np.float64) - w, compute_uv=False)
    assert spectra.noise_edge(w, "F32") == pytest.approx(values[8], rel=0.1)


def test_a_rescaling_moves_the_spectrum_and_no_direction():
    w = gaussian(3, (D, 3 * D))
    row = compared(w, (1.05 * w.astype(np.float64)).astype(np.float32))
    assert row["relative_change"] == pytest.approx(0.05, rel=1e-4)
    assert row["nss"] == pytest.approx(0.05, rel=1e-4)
    assert row["nss_scaled"] == pytest.approx((3 * D) ** 0.5, rel=1e-3)
    assert row["along"] == pytest.approx(1)
    assert max(row["rotation_write"], row["rotation_read"]) < 1e-2


@pytest.mark.parametrize("shape", [(D, 2 * D), (2 * D, D)])
def test_a_rotation_turns_one_side_and_keeps_the_spectrum(shape):
    """In the plane of the first direction that is written and the tenth."""
    random, angle = np.random.default_rng(4), 0.3
    u = np.linalg.qr(random.normal(size=(shape[0], D)))[0]
    v = np.linalg.qr(random.normal(size=(shape[1], D)))[0]
    s = np.linspace(2, 1, D)
    w = ((u * s) @ v.T).astype(np.float32)
    turned = u.copy()
    turned[:, 0] = np.cos(angle) * u[:, 0] + np.sin(angle) * u[:, 9]
    turned[:, 9] = np.cos(angle) * u[:, 9] - np.sin(angle) * u[:, 0]
    row = compared(w, ((turned * s) @ v.T).astype(np.float32))
    assert row["nss"] < 1e-6
    assert row["rotation_write"] == pytest.approx(np.degrees(angle), rel=1e-4)
    assert row["rotation_read"] < 1e-3
    in_plane = (s[0] ** 2 + s[9] ** 2) / np.sum(s**2)
    expected = 2 * np.sin(angle / 2) * in_plane**0.5
    assert row["relative_change"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "rank", "rv", "stable", "top"),
    [((D, D), 0.606, 0.805, 0.25, 0.211), ((D, 3 * D), 0.846, 0.953, 0.41, 0.140)],
)
def test_noise_looks_as_noise_of_its_shape_does(shape, rank, rv, stable, top):
    w = gaussian(6, shape)
    rows = [compared(w, w + 0.01 * gaussian(60 + i, shape)) for i in range(4)]
    mean = {key: np.mean([row[key] for row in rows]) for key in spectra_keys(rows)}
    n = min(shape)
    assert mean["effective_rank"] / n == pytest.approx(rank, rel=0.03)
    assert mean["effective_rank_rv"] / n == pytest.approx(rv, rel=0.03)
    assert mean["stable_rank"] / n == pytest.approx(stable, rel=0.08)
    assert mean["stable_rank_gaussian"] / n == pytest.approx(stable, rel=0.02)
    assert mean["top_energy"] == pytest.approx(top, rel=0.03)
    assert mean["nss_scaled"] == pytest.approx(1, abs=0.1)
    assert mean["intruders"] == 0
    assert abs(mean["along"]) < 4 / (w.size * 4) ** 0.5


def spectra_keys(rows):
    return [key for key, value in rows[0].items() if isinstance(value, float | int)]


def test_intruders_are_new_directions_and_near_ties_are_none():
    random = np.random.default_rng(7)
    u = np.linalg.qr(random.normal(size=(D, D)))[0]
    v = np.linalg.qr(random.normal(size=(D, D)))[0]
    s = np.geomspace(10, 0.1, D)
    w = ((u * s) @ v.T).astype(np.float32)
    # A direction that is spread over all of W0's, twice as large as any.
    new = u @ np.full(D, D**-0.5)
    row = compared(w, (w + 20 * np.outer(new, v[:, 50])).astype(np.float32))
    assert row["intruders"] == 1 and row["intruders_apart"] == 1
    # Thirty equal values: their vectors are any of that span, and after noise others.
    s[:30] = 10 + 1e-4 * np.arange(30)[::-1]
    w = ((u * s) @ v.T).astype(np.float32)
    row = compared(w, w + gaussian(70, std=1e-2))
    assert row["intruders"] > 0 and row["intruders_apart"] == 0


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_main_directions_are_those_of_numpy(shape):
    before, after = gaussian(8, shape), gaussian(9, shape)
    change = after.astype(np.float64) - before
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    product = spectra.Product(after, before)
    found = product.directions(5)
    np.testing.assert_allclose(product.values(), s, rtol=1e-10)
    np.testing.assert_allclose(found.values, s[:6], rtol=1e-9)
    np.testing.assert_allclose(np.abs(found.write.T @ u[:, :5]), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(np.abs(found.read.T @ vt[:5].T), np.eye(5), atol=1e-6)
    u0 = np.linalg.svd(before.astype(np.float64), full_matrices=False)[0]
    cosines = spectra.Before(before, full=True).cosines(u[:, :3])
    np.testing.assert_allclose(cosines, np.abs(u0.T @ u[:, :3]), atol=1e-6)


def test_values_above_the_exact_size_come_from_the_gram_matrix(monkeypatch):
    monkeypatch.setattr(spectra, "EXACT", 10)
    monkeypatch.setattr(spectra, "_BYTES", 4000)  # many blocks
    after = gaussian(10, (50, 30))
    expected = np.linalg.svd(after.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(spectra.Product(after).values(), expected, rtol=1e-9)


def test_a_change_of_some_weights_by_some_units_in_the_last_place():
    w = elements.cast(gaussian(11), "BF16")
    step = elements.ulp(w, "BF16")
    spacing = w.astype(ml_dtypes.bfloat16)
    expected = np.spacing(np.abs(spacing)).astype(np.float32)
    np.testing.assert_array_equal(step, expected)
    chosen = np.random.default_rng(0).permutation(w.size)[:1000]
    mask = np.zeros(w.size, np.float32)
    mask[chosen] = 1
    row = compared(w, w + 4 * step * mask.reshape(w.shape), "BF16")
    assert 1 - row["unchanged_exact"] == pytest.approx(1000 / w.size)
    assert row["unchanged_bf16"] == row["unchanged_exact"]
    assert row["ulps"][5] == pytest.approx(1000 / w.size)  # above 2, up to 4
    assert compared(w, w + step / 4)["unchanged_bf16"] == 1
    # Away from zero, since below a power of two the steps are half as far.
    away = np.sign(w) * step
    assert compared(w, w + away * 0.75)["unchanged_bf16"] == 0
    even = (w.astype(ml_dtypes.bfloat16).view(np.uint16) & 1) == 0
    row = compared(w, w + away * 0.5)  # ties go to even
    assert row["unchanged_bf16"] == np.mean(even)
    assert row["unchanged_exact"] == 0


def test_a_change_below_a_unit_in_the_last_place_is_lost_by_chance():
    w = gaussian(12, (256, 256))
    step = elements.ulp(w, "BF16")
    row = compared(w, w + np.sign(w) * step * np.float32(0.3))
    expected, sd = 0.7, (0.3 * 0.7 / w.size) ** 0.5
    # Across a power of two the step doubles; that is one in 128.
    assert row["unchanged_bf16"] == pytest.approx(expected, abs=3 * sd + 1 / 256)


def test_the_rule_of_eta_and_a_cast_are_two_figures():
    """Isotropic, of relative size .0165: .039 by the one, .107 by the other."""
    w = gaussian(13, (512, 512))
    row = compared(w, w + 0.0165 * gaussian(130, w.shape), depth="none")
    assert row["unchanged_eta"] == pytest.approx(0.0387, abs=0.003)
    assert row["unchanged_bf16"] == pytest.approx(0.107, abs=0.004)


@pytest.mark.parametrize(("base", "overlap"), [("BF16", 0.757), ("F32", 0.646)])
def test_noise_avoids_large_weights_in_bfloat16(base, overlap):
    """As published of reinforcement learning, at its density of 27.76%."""
    w = elements.cast(gaussian(14, (512, 512)), base)
    noise = gaussian(140, w.shape, 1.0)
    scales = np.geomspace(1e-6, 1e-2, 60)
    density = [np.mean(elements.visible(w, w + np.float32(s) * noise)) for s in scales]
    scale = np.float32(np.interp(0.2776, density, scales))
    row = compared(w, w + scale * noise, depth="none")
    assert 1 - row["unchanged_bf16"] == pytest.approx(0.2776, abs=0.01)
    assert row["low_overlap"] == pytest.approx(overlap, abs=0.02)
    assert row["high_overlap"] < 0.12


def test_overlaps_are_with_exact_thirds_of_the_magnitudes():
    w = gaussian(15, (64, 96))
    after = w.copy()
    order = np.argsort(np.abs(w), axis=None)
    after.flat[order[: w.size * 3 // 10]] *= 2
    row = compared(w, after, depth="none")
    assert row["low_overlap"] == 1 and row["high_overlap"] == 0
    after = w.copy()
    after.flat[order[-(w.size * 3 // 10) :]] *= 2
    row = compared(w, after, depth="none")
    assert row["low_overlap"] == 0 and row["high_overlap"] == pytest.approx(1, abs=1e-3)
    shares = (0.3, 0.7)
    expected = np.quantile(np.abs(w), shares, method="inverted_cdf")
    np.testing.assert_array_equal(elements.quantiles(w, shares), expected)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_the_null_has_the_norm_of_the_change_after_rounding(dtype):
    w = elements.cast(gaussian(16, (256, 300)), dtype)
    for relative in (3e-4, 3e-3, 3e-2):
        norm = relative * np.linalg.norm(w)
        noise = nulls.isotropic(w, norm, dtype, name="a", draw=0)
        assert np.linalg.norm(noise - w) == pytest.approx(norm, rel=0.03)
        np.testing.assert_array_equal(elements.cast(noise, dtype), noise)
    again = nulls.isotropic(w, norm, dtype, name="a", draw=0)
    np.testing.assert_array_equal(noise, again)
    assert (nulls.isotropic(w, norm, dtype, name="a", draw=1) != noise).any()
    assert (nulls.isotropic(w, norm, dtype, name="b", draw=0) != noise).any()


def test_a_figure_of_noise_lies_in_the_band_of_its_null():
    w = gaussian(17)
    row = compared(w, w + 0.016 * gaussian(170), draws=3)
    for key in ("effective_rank", "unchanged_bf16", "nss_scaled", "low_overlap"):
        low, mean, high = weights.band(row["null"], key)["isotropic"]
        assert low <= mean <= high
        assert row[key] == pytest.approx(mean, rel=0.15)


# -- between stages --------------------------------------------------------------------


def model(arrays, name=""):
    """`Weights` of query matrices, layer by layer."""
    names = [f"layers/{i}/attention/query" for i in range(len(arrays))]
    matrices = {
        n: Matrix(n, "query", i, a.shape, "F32", lambda a=a: a)
        for i, (n, a) in enumerate(zip(names, arrays, strict=True))
    }
    return Weights(name, tiny.config(layers=len(arrays)), matrices, name)


def stage(name, before, after):
    return changes.Pair(name, "base", changes.PARENT, before, model(after, name), {})


def test_stages_that_share_a_direction_have_its_cosine():
    """D_i = a S + e_i: cosine a^2 / (a^2 + 1) of any two; corrected, one."""
    parts, a = [gaussian(20, (256, 256))], 0.5
    base = model(parts, "base")
    common = gaussian(21, (256, 256), 1e-3)

    def after(seed):
        return [parts[0] + a * common + gaussian(seed, (256, 256), 1e-3)]

    stages = [stage(n, base, after(200 + i)) for i, n in enumerate("abcd")]
    rows = [
        between.compare(one, other)
        for i, one in enumerate(stages)
        for other in stages[i + 1 :]
    ]
    for row in rows:
        assert row["cosine"] == pytest.approx(0.2, abs=0.02)
        assert row["cosine_null"] == 1 / 256
    siblings = {"a": ["b"], "b": ["a"], "c": ["d"], "d": ["c"]}
    for row in between.corrected(rows, siblings):
        assert row["cosine_corrected"] == pytest.approx(1, abs=0.1)
    flipped = stage("z", base, [2 * parts[0] - after(200)[0]])
    assert between.compare(stages[1], flipped)["cosine"] < -0.15
    assert between.corrected(rows, {})[0]["cosine_corrected"] is None


def test_unrelated_stages_overlap_by_chance():
    parts = [gaussian(30 + i) for i in range(6)]
    base = model(parts, "base")
    one, other = (
        stage(n, base, [w + gaussian(s + i, std=2e-4) for i, w in enumerate(parts)])
        for n, s in (("a", 300), ("b", 400))
    )
    row = between.compare(one, other)
    sd = 0.0108 / 6**0.5  # 128, 8 directions, 6 matrices
    for side in ("write", "read"):
        assert row[f"overlap_{side}_chance"] == 8 / D
        assert row[f"overlap_{side}"] == pytest.approx(8 / D, abs=4 * sd)
    # Both see the same small weights: more than independence, as two noises have it.
    assert row["changed_overlap"] == pytest.approx(row["changed_null"], abs=0.005)
    assert row["changed_overlap"] > row["changed_chance"] + 0.005


def test_the_overlap_of_subspaces_that_share_one_direction():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(D, 7)))[0]
    assert between.subspace_overlap(q[:, :4], q[:, 3:]) == pytest.approx(1 / 4)
    assert between.subspace_overlap(q, q) == pytest.approx(1)


def test_masks_overlap_by_chance():
    random = np.random.default_rng(0)
    n, p, q = 16384, 0.2, 0.3
    a, b = random.random(n) < p, random.random(n) < q
    sd = (n * p * q * (1 - p) * (1 - q)) ** 0.5
    assert np.sum(a & b) == pytest.approx(n * p * q, abs=4 * sd)


# -- lineage ---------------------------------------------------------------------------


def test_models_whose_channels_were_permuted_are_refused():
    parts = [gaussian(40 + i) for i in range(3)]
    order = np.random.default_rng(0).permutation(D)
    other = model([w[order][:, order] for w in parts], "permuted")
    with pytest.raises(UserError, match=r"median cosine of their weights is -?0\.0"):
        weights.check_lineage(model(parts, "base"), other)
    assert weights.check_lineage(model(parts), model(parts)) == pytest.approx(1)


def test_a_copy_in_another_dtype_is_a_change_of_its_floor():
    w = gaussian(50, (256, 256))
    for dtype, floor in (("BF16", 1.66e-3), ("F16", 2.1e-4)):
        for pair in (
            (matrix(w), matrix(elements.cast(w, dtype), dtype)),
            (matrix(elements.cast(w, dtype), dtype), matrix(w)),
        ):
            row = weights.compare(*pair, draws=0)
            assert row["relative_change"] == pytest.approx(floor, rel=0.03)
            assert row["dtype_floor"] == pytest.approx(row["relative_change"], rel=1e-3)
            assert row["unchanged_bf16"] is row["ulps"] is row["low_overlap"] is None
    assert compared(w, w)["dtype_floor"] is None


def test_a_value_that_is_no_number_is_named():
    w = gaussian(51)
    broken = w.copy()
    broken[3, 4] = np.nan
    for pair in ((w, broken), (broken, w)):
        with pytest.raises(UserError, match="layers/0/attention/query: holds values"):
            compared(*pair)


def test_memory_is_two_matrices_and_their_gram_matrix(tmp_path):
    """Of a tall matrix on disk: a copy in float64, or a third, would not fit."""
    shape = (1 << 15, D)
    arrays = {}
    for seed, name in enumerate(("before", "after")):
        path = tmp_path / name
        mapped = np.memmap(path, ml_dtypes.bfloat16, "w+", shape=shape)
        random = np.random.default_rng(seed)
        mapped[...] = 0.02 * random.standard_normal(shape, np.float32)
        if name == "after":
            mapped[...] = 0.01 * mapped[...] + arrays["before"][...]
        mapped.flush()
        arrays[name] = np.memmap(path, ml_dtypes.bfloat16, "r", shape=shape)
    pair = [
        Matrix(
            "embed", "embed", None, shape, "BF16", lambda a=a: np.asarray(a, np.float32)
        )
        for a in arrays.values()
    ]
    tracemalloc.start()
    try:
        weights.compare(*pair, draws=1, others={"control": pair[1]})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    one = 4 * shape[0] * shape[1]
    assert peak < 2 * one + 2 * 8 * D**2 + (64 << 20)
