"""Verdicts by simulation and by hand; headers and expressions that cannot be."""

import numpy as np
import pytest
from scipy import stats

from stagecraft.anatomy import claims
from stagecraft.anatomy.claims import HOLDS, NONE, NOT_HERE, REFUTED, UNDECIDED
from stagecraft.errors import UserError

HEADER = """Words.

[claim]
number = 1
claim = "words"
source = "a paper"
primary = "a.x - b.x"
effect = 0.5
control = "words"
"""


def claim(**changes):
    return claims.read(HEADER, "x")._replace(**changes)


def rates(mean, seeds, **changes):
    """Shares of verdicts over 2,000 draws of a primary around a mean, SD 1."""
    rng, asked = np.random.default_rng(seeds), claim(effect=1.0, **changes)
    draws = rng.normal(mean, 1.0, (2000, seeds))
    verdicts = [claims.decide(asked, row).verdict for row in draws]
    return {name: verdicts.count(name) / 2000 for name in set(verdicts)}


# Three deviations of a share of 2,000 at 2.5%.
SLACK = 3 * np.sqrt(0.025 * 0.975 / 2000)


@pytest.mark.parametrize("seeds", [3, 4, 8])
def test_a_false_verdict_is_as_rare_as_it_says(seeds):
    at_effect = rates(1.0, seeds)
    assert at_effect[HOLDS] == pytest.approx(0.025, abs=SLACK)
    assert at_effect[REFUTED] == pytest.approx(0.025, abs=SLACK)
    assert rates(0.0, seeds).get(HOLDS, 0) < 0.025
    assert rates(2.0, seeds).get(REFUTED, 0) < 0.025
    # What is at the edge of being alike is called so as rarely.
    assert rates(1.0, seeds, alike=True).get(HOLDS, 0) <= 0.025 + SLACK


def test_power_grows_with_seeds_as_the_noncentral_t_has_it():
    for seeds in (4, 8):
        quantile = stats.t.ppf(0.975, seeds - 1)
        power = stats.nct.sf(quantile, seeds - 1, 2.0 * np.sqrt(seeds))
        assert rates(3.0, seeds)[HOLDS] == pytest.approx(power, abs=0.035)


def test_a_verdict_by_hand():
    values = [1.0, 2.0, 3.0, 4.0]
    outcome = claims.decide(claim(), values)
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert (outcome.mean, outcome.high - outcome.mean) == pytest.approx((2.5, half))
    assert outcome.low == pytest.approx(2.5 - half)
    assert outcome.p == pytest.approx(
        stats.ttest_1samp(values, 0.5, alternative="greater").pvalue
    )
    # It reaches from .45 to 4.55, and .5 is in it; one seed more at the same spread
    # would reach from .9.
    assert (outcome.verdict, outcome.seeds_needed) == (UNDECIDED, 5)
    assert claims.decide(claim(effect=0.4), values).verdict == HOLDS
    assert claims.decide(claim(effect=5.0), values).verdict == REFUTED


def test_alike_needs_an_interval_within_the_margin():
    asked = claim(alike=True, effect=1.0)
    assert claims.decide(asked, [-0.1, 0.1, 0.2, 0.0]).verdict == HOLDS
    wide = claims.decide(asked, [-2.0, 2.0, 1.0, -1.0])
    assert wide.verdict == UNDECIDED and wide.seeds_needed > 4
    assert claims.decide(asked, [-1.9, -2.1, -2.0, -2.2]).verdict == REFUTED
    test = [
        stats.ttest_1samp([-0.1, 0.1, 0.2, 0.0], margin, alternative=side).pvalue
        for margin, side in ((-1.0, "greater"), (1.0, "less"))
    ]
    p = claims.decide(asked, [-0.1, 0.1, 0.2, 0.0]).p
    assert p == pytest.approx(max(test))


def test_a_control_that_shows_the_same_refutes():
    values, same = [1.0, 1.1, 0.9, 1.0], [1.0, 1.2, 0.9, 1.1]
    asked = claim(control_primary="c.x")
    assert claims.decide(asked, values, [0.0, 0.1, -0.1, 0.05]).verdict == HOLDS
    outcome = claims.decide(asked, values, same)
    assert outcome.verdict == REFUTED and "control shows the same" in outcome.reason
    unclear = claims.decide(asked, values, [0.0, 1.0, 0.3, 0.6])
    assert unclear.verdict == UNDECIDED and "control may" in unclear.reason
    # A claim that does not hold needs no control for that.
    assert claims.decide(asked, [0.0, 0.1, 0.0, -0.1], same).verdict == REFUTED


def test_what_cannot_be_asked():
    asked = claim()
    assert claims.decide(asked, [1.0, 2.0]).verdict == NONE
    constant = claims.decide(asked, [2.0, 2.0, 2.0])
    assert constant.verdict == NOT_HERE and "left to chance" in constant.reason
    assert claims.decide(claim(exact=True), [2.0]).verdict == HOLDS
    assert claims.decide(claim(exact=True), [0.2, 0.2]).verdict == REFUTED
    outcome = claims.decide(asked, [1.0, 1.1, 0.9], failed=["seed 0: a.x > 2"])
    assert outcome.verdict == NOT_HERE and "a.x > 2" in outcome.reason
    assert outcome.mean == pytest.approx(1.0)


def test_holm_against_statsmodels_by_hand():
    # Multiplied by 4, 3, 2, 1 in order and kept from falling: .02, .024, .024, .03.
    assert claims.holm([0.005, 0.03, 0.008, 0.012]) == [True, False, True, True]
    assert claims.holm([0.02, 0.02]) == [False, False]
    assert claims.holm([0.012, 0.02]) == [True, True]
    assert claims.holm([0.02, None]) == [False, False]


@pytest.mark.parametrize(
    ("expression", "want"),
    [("a.x - b.x", 1.0), ("-a.x / 4", -0.5), ("log(a.y.z) + 2 * (b.x)", 4.0)],
)
def test_expressions(expression, want):
    figures = {"a": {"x": 2.0, "y": {"z": np.e**2}}, "b": {"x": 1.0}}
    assert claims.value(expression, figures) == pytest.approx(want)


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("a.q", "no figure a.q"),
        ("a", "no figure a"),
        ("a.x / (a.x - a.x)", "has no value"),
        ("log(a.x - 3)", "has no value"),
        ("exec('1')", "expected figures"),
        ("a.x if a.x else 1", "expected figures"),
        ("a.x ** 2", "expected figures"),
        ("a.x -", "not an expression"),
    ],
)
def test_expressions_that_have_no_value(expression, says):
    with pytest.raises(UserError, match="(?s).*") as error:
        claims.value(expression, {"a": {"x": 2.0}})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[claim]", "claim", "expected a line [claim]"),
        ("number = 1", "number = ", "not TOML"),
        ("number = 1", "numbr = 1", "unknown key numbr; did you mean 'number'?"),
        ("number = 1\n", "", "number is missing"),
        ("effect = 0.5", 'effect = "big"', "effect='big': expected a number"),
        ("effect = 0.5", "effect = -0.5", "turn the primary's sign round"),
        ("a.x - b.x", "open(a)", "open(a)"),
        ('control = "words"', 'control = "w"\nchecks = ["a.x is 2"]', "'a.x is 2'"),
    ],
)
def test_headers_that_cannot_be(old, new, says):
    assert old in HEADER
    with pytest.raises(UserError) as error:
        claims.read(HEADER.replace(old, new), "mine.py")
    assert says in str(error.value) and "\n" not in str(error.value)
