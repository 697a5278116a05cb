"""The mistakes that `tests/mutations.py` makes, by where they are made."""

from tests.mutants import families, inputs, objectives, sampled, steps

MUTANTS = (
    objectives.MUTANTS
    + sampled.MUTANTS
    + steps.MUTANTS
    + inputs.MUTANTS
    + families.MUTANTS
)

# Mistakes of the rule book's list that cannot be made here.
NOT_APPLICABLE = {
    "dropout on in the reference": (
        "no layer has dropout, so there is nothing to leave on"
    ),
}
