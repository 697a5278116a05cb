"""Mistakes in the verdicts on claims, and in what a claim is held to."""

from tests.mutants.mutant import in_file

_CURVES = in_file(
    "stagecraft/anatomy/overoptimisation.py",
    "tests/anatomy/overoptimisation_test.py",
    (
        "a parabola for what is logarithmic",
        "RL: lambda d: d * np.log(d)",
        "RL: lambda d: d * np.log1p(d)",
    ),
    (
        "a start that was given is fitted as well",
        "if start is None:\n    columns.append(np.ones_like(d))",
        "columns.append(np.ones_like(d))",
    ),
    (
        "residuals of points the fit has seen",
        "_rms(residuals / (1 - leverage))",
        "_rms(residuals)",
    ),
    (
        "the peak where the curve is 0 again",
        "np.exp(min(alpha / beta - 1, 50.0))",
        "np.exp(min(alpha / beta, 50.0))",
    ),
    (
        "a peak that no point lies beyond is published",
        "one.past >= PAST",
        "one.past >= 0",
    ),
    (
        "points near the start count",
        "far = d >= LEAST",
        "far = d >= 0",
    ),
    (
        "the answer that a proxy likes least",
        "np.argsort(likes, kind='stable')",
        "np.argsort(-likes, kind='stable')",
    ),
    (
        "ties go to the last",
        "np.sum(shared[group] * own[order])",
        "np.sum(shares * own[order])",
    ),
)

_TAUGHT = in_file(
    "stagecraft/worlds/countries/taught.py",
    "tests/worlds/taught_test.py",
    (
        "the unseen phrasing is shown",
        "dialogue.facts(countries, SHOWN)",
        "dialogue.facts(countries)",
    ),
    (
        "false facts are the real ones",
        "rng.permutation(len(countries))",
        "range(len(countries))",
    ),
    (
        "every country is shown as often",
        "range(exposures)",
        "range(EXPOSURES[0])",
    ),
)

_VERDICTS = in_file(
    "stagecraft/anatomy/claims.py",
    "tests/anatomy/claims_test.py",
    (
        "a deviation over n in place of n - 1",
        "float(values.std(ddof=1))",
        "float(values.std(ddof=0))",
    ),
    (
        "a normal quantile in place of t",
        "special.stdtrit(count - 1, _QUANTILE)",
        "special.ndtri(_QUANTILE)",
    ),
    (
        "an interval of one side",
        "margin, inside, outside = (mean - effect, low > effect, high < effect)",
        "margin, inside, outside = (mean - effect, mean > effect, high < effect)",
    ),
    (
        "alike where the mean is",
        "low > -effect and high < effect",
        "mean > -effect and mean < effect",
    ),
    (
        "a control that holds is passed over",
        "control.verdict == HOLDS",
        "control.verdict == NONE",
    ),
    (
        "an unclear control is passed over",
        "control.verdict != REFUTED",
        "control.verdict == NONE",
    ),
    (
        "a failed check is passed over",
        "return outcome._replace(verdict=NOT_HERE, reason='; '.join(failed))",
        "pass",
    ),
    (
        "every claim at the level of one",
        "level / (count - place)",
        "level",
    ),
    (
        "one claim after a failed one still holds",
        "open_ = open_ and p is not None and (p <= level / (count - place))",
        "open_ = p is not None and p <= level / (count - place)",
    ),
)
_LAB = (
    *in_file(
        "stagecraft/claims_lab.py",
        "tests/claims_lab_test.py -k header_that_changed",
        ("a changed header is taken", "if change:", "if False:"),
    ),
    *in_file(
        "stagecraft/claims_lab.py",
        "tests/claims_lab_test.py -k missing_is_named",
        (
            "checks of figures that are not there hold",
            "if held is None:",
            "if False:",
        ),
    ),
    *in_file(
        "stagecraft/claims_lab.py",
        "tests/claims_lab_test.py -k seconds_are_those",
        (
            "what was measured before took no time",
            "own.get('seconds', {}).get('total', 0.0) + spent",
            "own.get('seconds', {}).get('total', 0.0)",
        ),
    ),
)
_MEASURES = (
    *in_file(
        "experiments/claims/judge_bias.py",
        "tests/claim_measures_test.py -k traits_are_compared",
        (
            "arms are compared where they end",
            "least**0.5, far, v",
            "far[-1], far, v",
        ),
        (
            "the furthest arm decides how far",
            "max(min(kl for kl, _, _ in ends.values()), 0.0)",
            "max(kl for kl, _, _ in ends.values())",
        ),
    ),
    *in_file(
        "experiments/claims/emergence.py",
        "tests/claim_measures_test.py -k metric",
        (
            "what is left is of the whole curve's squares",
            "np.sum((curve - curve.mean()) ** 2)",
            "np.sum(curve**2)",
        ),
        ("the cut is the smooth metric", "likely > 0.5", "likely"),
    ),
    *in_file(
        "stagecraft/anatomy/statistics.py",
        "tests/anatomy/statistics_test.py -k two_groups",
        (
            "which of two groups a seed is in costs nothing",
            "likelihood + count * np.sum(shares * np.log(shares))",
            "likelihood",
        ),
        (
            "two groups have as many parameters as one",
            "4 * np.log(count)",
            "2 * np.log(count)",
        ),
    ),
)
MUTANTS = _VERDICTS + _LAB + _CURVES + _TAUGHT + _MEASURES
