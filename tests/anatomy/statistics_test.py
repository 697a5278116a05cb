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
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


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
