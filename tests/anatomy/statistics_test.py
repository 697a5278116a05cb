"""Intervals of a few seeds against printed tables, plain formulas and simulation."""

import math
import warnings

import numpy as np
import pytest
from scipy import special

from stagecraft.anatomy import statistics

# Two-sided 95% quantiles of Student's t, from any printed table.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize("freedom", QUANTILES)
def test_the_interval_is_students(freedom):
    rng = np.random.default_rng(freedom)
    values = rng.normal(3.0, 2.0, size=freedom + 1)
    mean, half = statistics.interval(list(values))
    spread = math.sqrt(sum((v - values.mean()) ** 2 for v in values) / freedom)
    assert mean == pytest.approx(values.mean())
    want = QUANTILES[freedom] * spread / math.sqrt(len(values))
    assert half == pytest.approx(want, rel=1e-3)


def test_without_spread_there_is_no_interval():
    assert statistics.difference([1.0], [2.0, 3.0]) == (-1.5, None)
    assert statistics.difference([1.0, 1.0], [0.5, 0.5]) == (0.5, None)
    found, half = statistics.difference([1.0, 1.0], [0.0, 1.0])  # one side's will do
    assert found == 0.5 and half == pytest.approx(12.706 * 0.5, rel=1e-3)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.0, 1.0, size=(4000, 3))
    held = [abs(m) <= half for m, half in map(statistics.interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def drawn(rng, seeds, draws, training):
    """Values of seeds, each a mean over draws of noise 1, and their errors."""
    rows = rng.normal(rng.normal(0.0, training, (seeds, 1)), 1.0, (seeds, draws))
    means, errors = zip(*map(statistics.over_draws, rows), strict=True)
    return list(means), [(error, draws - 1) for error in errors]


@pytest.mark.parametrize(
    ("seeds", "training"), [(3, 0.0), (3, 0.5), (3, 2.0), (2, 0.0), (1, 0.0)]
)
def test_intervals_of_drawn_figures_hold_the_truth_at_least_as_often(seeds, training):
    rng, held, apart = np.random.default_rng(seeds), [], []
    for _ in range(800):
        ones, errors = drawn(rng, seeds, 4, training)
        others, other_errors = drawn(rng, seeds, 4, training)
        mean, half = statistics.interval(ones, errors)
        change, wide = statistics.difference(ones, others, errors, other_errors)
        held.append(abs(mean) <= half)
        apart.append(abs(change) <= wide)
    assert min(np.mean(held), np.mean(apart)) >= 0.93
    if seeds == 1:  # nothing but the draw: no more often either
        assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_an_interval_is_never_tighter_than_the_measuring():
    """Three seeds that agree by chance, each known to .1 from 4 draws: t(9) .1 / √3."""
    values, errors = [1.0, 1.0, 1.0001], [(0.1, 3)] * 3
    floor = QUANTILES[9] * 0.1 / math.sqrt(3)
    assert statistics.interval(values, errors)[1] == pytest.approx(floor, rel=1e-3)
    assert statistics.interval(values)[1] < 0.001
    # Of a difference: 18 degrees of freedom, t = 2.101.
    wide = statistics.difference(values, [0.0] * 3, errors, errors)[1]
    assert wide == pytest.approx(2.101 * 0.1 * math.sqrt(2 / 3), rel=1e-3)
    # One seed: of the draws alone.
    assert statistics.interval([1.0], [(0.1, 3)])[1] == pytest.approx(0.3182, rel=1e-3)
    # Where seeds differ by more, theirs is the interval.
    values = [1.0, 2.0, 3.0]
    assert statistics.interval(values, errors) == statistics.interval(values)
    # Satterthwaite: an error of one draw alone keeps its own degrees of freedom.
    error, freedom = statistics.error_of_mean([(0.3, 3), (0.0, 3)])
    assert (error, freedom) == pytest.approx((0.15, 3))
    assert statistics.error_of_mean([(0.0, 3)] * 2) == (0.0, 6)


def test_draws_of_two_models_are_all_held_against_each_other():
    table = np.array([[0.0, 1.0], [1.0, 2.0], [2.0, 6.0]])
    mean, error = statistics.over_both(table)
    assert mean == 2.0
    rows, columns = [0.5, 1.5, 4.0], [1.0, 3.0]
    variance = np.var(rows, ddof=1) / 3 + np.var(columns, ddof=1) / 2
    assert error == pytest.approx(math.sqrt(variance))
    assert statistics.over_both(table[:1])[1] is None
    rng, means, variances = np.random.default_rng(0), [], []
    for _ in range(4000):  # P(X > Y): the error is that of the mean
        x, y = rng.normal(0.5, 1.0, (4, 30)), rng.normal(0.0, 1.0, (4, 30))
        mean, error = statistics.over_both((x[:, None] > y[None]).mean(axis=2))
        means.append(mean)
        variances.append(error**2)
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.25)
    assert np.mean(variances) > 0.97 * np.var(means)


def test_pairs_of_draws_of_one_model_leave_one_draw_out():
    table = np.full((4, 4), np.nan)
    table[np.triu_indices(4, 1)] = [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]
    mean, error = statistics.over_pairs(table)
    without = [(4 + 5 + 7) / 3, (2 + 3 + 7) / 3, (1 + 3 + 5) / 3, (1 + 2 + 4) / 3]
    deviations = np.subtract(without, np.mean(without))
    assert mean == pytest.approx(22 / 6)
    assert error == pytest.approx(math.sqrt(3 / 4 * np.sum(deviations**2)))
    assert statistics.over_pairs(table[:2, :2]) == (1.0, None)


def test_both_are_the_plain_formulas():
    """Student's and Welch's by hand, to 1e-9; one side may have no spread."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, m = rng.integers(2, 9, size=2)
        one = rng.normal(0.0, 10.0 ** rng.uniform(-3, 2), size=n)
        two = np.full(m, 0.1) if rng.random() < 0.2 else rng.normal(size=m)
        v, w = np.var(one, ddof=1) / n, np.var(two, ddof=1) / m
        freedom = (v + w) ** 2 / (v**2 / (n - 1) + w**2 / (m - 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mean, half = statistics.interval(list(one))
            change, wide = statistics.difference(list(one), list(two))
        assert mean == np.mean(one) and change == np.mean(one) - np.mean(two)
        quantiles = special.stdtrit([n - 1, freedom], 0.975)
        wanted = quantiles * np.sqrt([v, v + w])
        assert [half, wide] == pytest.approx(list(wanted), rel=1e-9)


def test_equal_values_that_are_no_round_numbers_have_no_spread():
    """Their mean may differ from them in the last bit, which is no spread."""
    assert statistics.difference([1.1636294901652025] * 7, [0.1] * 2)[1] is None


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (16, 250, 0.0398, 0.1014)],
)
def test_wilson(count, n, low, high):
    assert statistics.wilson(count, n) == pytest.approx((low, high), abs=5e-5)
    other = statistics.wilson(n - count, n)
    assert other == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_covers():
    rng = np.random.default_rng(0)
    for share, n in ((0.02, 40), (0.5, 25), (0.9, 15)):
        bounds = [statistics.wilson(hits, n) for hits in rng.binomial(n, share, 4000)]
        covered = np.mean([low <= share <= high for low, high in bounds])
        assert 0.92 < covered < 0.99


def test_two_groups_of_seeds_are_told_from_one():
    random = np.random.default_rng(0)
    one = [statistics.two_groups(random.normal(0.5, 0.1, 8), 0.02) for _ in range(500)]
    assert np.mean(np.array(one) > 6) < 0.04
    sides = [random.permutation([0.2] * 4 + [0.7] * 4) for _ in range(200)]
    noisy = [statistics.two_groups(x + random.normal(0, 0.05, 8), 0.02) for x in sides]
    assert np.mean(np.array(noisy) > 6) > 0.95
    # Seeds that differ by less than a figure is known to are alike.
    assert statistics.two_groups([0.5, 0.5, 0.5, 0.51, 0.51, 0.51], 0.02) < 0
    # By hand: two groups of the least SD, half of the values each, against SD .25.
    n, gain = 8, np.log(0.25 / 0.02)
    expected = 2 * n * gain - 2 * n * np.log(2) - 2 * np.log(n)
    got = statistics.two_groups([0.25] * 4 + [0.75] * 4, 0.02)
    assert got == pytest.approx(expected)
