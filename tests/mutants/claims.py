"""Mistakes in the verdicts on claims, and in what a claim is held to."""

from tests.mutants.mutant import in_file

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
)
MUTANTS = _VERDICTS + _LAB
