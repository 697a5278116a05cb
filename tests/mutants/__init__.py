"""The mistakes that `tests/mutations.py` makes, by where they are made."""

from tests.mutants import (
    adapters,
    anatomy,
    behaviour,
    claims,
    constitutional,
    contact,
    curation,
    data,
    draws,
    families,
    folders,
    inputs,
    judging,
    measuring,
    meshes,
    objectives,
    pages,
    people,
    pods,
    previews,
    rollouts,
    rounds,
    sampled,
    serving,
    several,
    steps,
    stores,
    training,
    verified,
    worlds,
)

MUTANTS = (
    *(objectives.MUTANTS + sampled.MUTANTS + steps.MUTANTS + rollouts.MUTANTS),
    *(inputs.MUTANTS + training.MUTANTS + data.MUTANTS),
    *(families.MUTANTS + adapters.MUTANTS),
    *(curation.MUTANTS + measuring.MUTANTS + draws.MUTANTS),
    *(contact.MUTANTS + previews.MUTANTS + folders.MUTANTS),
    *(judging.MUTANTS + people.MUTANTS + verified.MUTANTS + anatomy.MUTANTS),
    *(constitutional.MUTANTS + rounds.MUTANTS + claims.MUTANTS + serving.MUTANTS),
    *(meshes.MUTANTS + behaviour.MUTANTS + pods.MUTANTS + several.MUTANTS),
    *(stores.MUTANTS + pages.MUTANTS + worlds.MUTANTS),
)

# Mistakes of the rule book's list that cannot be made here.
NOT_APPLICABLE = {
    "dropout on in the reference": (
        "an adapter's dropout needs a key, which nothing but an update has"
    ),
}
