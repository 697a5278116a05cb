"""A graph of one stage of any kind, for tests of what a config may say."""

from stagecraft import defaults

PARENTS = {
    "language_model": {},
    "reward": dict(start_from="base"),
    "preference": dict(start_from="base"),
    "unpaired_preference": dict(start_from="base"),
    "online_preference": dict(start_from="base", verifiers="json:loads"),
    "policy": dict(start_from="base", verifiers="json:loads"),
    "group_policy": dict(start_from="base", verifiers="json:loads"),
    "selection": dict(start_from="base", verifiers="json:loads"),
    "comparisons": dict(start_from="base"),
    "revisions": dict(start_from="base", constitution="general"),
    "attacks": dict(start_from="base", target_from="base"),
}


def graph(kind, devices=1, **changes):
    """Pretraining and one stage more, on one device."""
    c = defaults.experiment()
    c.mesh = dict(data=devices, fsdp=1, tensor=1)
    c.world.name = "countries"
    data = dict(data=dict(files="none.jsonl"))
    c.stages.base = defaults.stage("language_model", **data)
    data |= {k: changes.pop(k) for k in list(changes) if k == "data"}
    data["data"]["files"] = "none.jsonl"
    c.stages.it = defaults.stage(kind, **(PARENTS[kind] | data | changes))
    return c
