"""The kinds of stages: the one table of their records."""

from stagecraft.stages import (
    comparisons,
    group_policy,
    language_model,
    online_preference,
    policy,
    preference,
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
        selection,
    )
}


def of(config):
    """Returns the record of a stage's kind, from its config."""
    return KINDS[config.kind]
