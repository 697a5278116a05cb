"""The kinds of stages: the one table of their records."""

from stagecraft.stages import (
    attacks,
    comparisons,
    group_policy,
    language_model,
    online_preference,
    policy,
    preference,
    revisions,
    reward,
    selection,
    unpaired_preference,
)

KINDS = {
    module.KIND.name: module.KIND
    for module in (
        language_model,
        preference,
        unpaired_preference,
        online_preference,
        policy,
        group_policy,
        reward,
        comparisons,
        revisions,
        selection,
        attacks,
    )
}


def of_folder(module):
    """Returns the kind that a model made elsewhere counts as: it has but a parent.

    Args:
        module: "transformer" or "scalar".
    """
    return next(
        kind
        for kind in KINDS.values()
        if kind.model == module and set(kind.roles) == {"start"}
    )


def of(config):
    """Returns the record of a stage's kind, from its config."""
    return KINDS[config.kind]
