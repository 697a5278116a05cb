"""An experiment is a graph of stages: here it is completed, checked and ordered.

Whatever can be refused is refused here, before anything is compiled or written.
"""

from pathlib import Path

from stagecraft import defaults, mesh, optimizer, schema, worlds
from stagecraft.anatomy import summary
from stagecraft.data import feed
from stagecraft.errors import UserError
from stagecraft.models import saved
from stagecraft.models.config import ModelConfig, check_mesh
from stagecraft.signals import comparisons
from stagecraft.stages import language_model, policy, preference, reward

# Which other stage a key may name, and what kinds that stage may be of.
_LANGUAGE = ("language_model", "preference", "policy")
ROLES = {
    "language_model": {"start_from": _LANGUAGE},
    "reward": {"start_from": _LANGUAGE},
    "preference": {"start_from": _LANGUAGE, "reference_from": _LANGUAGE},
    "policy": {
        "start_from": _LANGUAGE,
        "reference_from": _LANGUAGE,
        "reward_from": ("reward",),
        "value_from": ("reward",),
    },
    "comparisons": {"start_from": _LANGUAGE},
}
# A role left empty is played by another: the reference is the parent as it was.
FALLBACK = {"reference_from": "start_from", "value_from": "reward_from"}
REQUIRED = {
    "reward": ("start_from",),
    "preference": ("start_from",),
    "policy": ("start_from", "reward_from"),
    "comparisons": ("start_from",),
}


def resolve(config, *, check=True):
    """The complete config: defaults filled in, every key, type and reference checked.

    Args:
        config: a ConfigDict or dict as an experiment's `get_config` returns.
        check: also refuse impossible values and combinations.

    Returns:
        a new ConfigDict. Raises UserError before anything is compiled.
    """
    given = {k: v for k, v in config.items() if k != "stages"}
    full = schema.merge(defaults.experiment(), given)
    if not config.get("stages"):
        raise UserError("stages: this experiment has none; add c.stages.NAME = ...")
    for name, stage in config["stages"].items():
        where = f"stages.{name}"
        if not name.replace("_", "").isalnum() or name in ("world", "runs"):
            raise UserError(f"{where}: expected a name of letters, digits and _")
        if not hasattr(stage, "items") or "kind" not in stage:
            raise UserError(f"{where}: needs kind=, one of {', '.join(defaults.KINDS)}")
        schema.choice(f"{where}.kind", stage["kind"], tuple(defaults.KINDS))
        full.stages[name] = schema.merge(defaults.KINDS[stage["kind"]](), stage, where)
    if check:
        _check(full)
    return full


def _check(c):
    schema.choice("world.size", c.world.size, ("full", "tiny"))
    schema.choice("measure.split", c.measure.split, ("test", "dev"))
    if c.world.name:
        worlds.get(c.world.name)
    for claim in c.measure.claims:
        summary.check_claim(claim)
    for name, stage in c.stages.items():
        where = f"stages.{name}"
        for role, kinds in ROLES[stage.kind].items():
            _check_role(c, name, role, kinds)
        if stage.kind == "comparisons":
            schema.positive(f"{where}.prompts", stage.prompts)
            comparisons.rater(stage.rater, c.world.name)
        else:
            _check_training(c, where, stage)
        schema.positive(f"{where}.batch_size", stage.batch_size)
        if not stage.data.files:
            raise UserError(f"{where}.data.files: is empty; name the files to read")
    order(c)


def _check_role(c, name, role, kinds):
    where, stage = f"stages.{name}.{role}", c.stages[name]
    value = stage[role]
    if not value:
        if role in REQUIRED.get(stage.kind, ()):
            raise UserError(
                f"{where}: is empty; a {stage.kind} stage needs a stage of kind "
                f"{' or '.join(kinds)}, or the folder of a finished one"
            )
        return
    if value in c.stages:
        if c.stages[value].kind not in kinds:
            raise UserError(
                f"{where}={value!r}: that stage is of kind {c.stages[value].kind}, "
                f"expected {' or '.join(kinds)}"
            )
    elif "/" not in value and not Path(value).exists():
        raise UserError(schema.unknown(f"{where}={value!r}", value, c.stages.keys()))
    else:
        saved.info(value)


def _check_training(c, where, stage):
    for key in ("steps", "micro_batches"):
        schema.positive(f"{where}.{key}", stage[key])
    rows = stage.batch_size
    if stage.kind == "policy":
        schema.positive(f"{where}.epochs", stage.epochs)
        schema.positive(f"{where}.minibatches", stage.minibatches)
        if stage.sampling.temperature <= 0:
            raise UserError(
                f"{where}.sampling.temperature={stage.sampling.temperature}: PPO needs "
                "samples; expected more than 0"
            )
        if rows % stage.minibatches:
            raise UserError(
                f"{where}.batch_size={rows}: not divisible by minibatches="
                f"{stage.minibatches}"
            )
        rows //= stage.minibatches
    elif stage.data.length > c.model.max_length:
        raise UserError(
            f"{where}.data.length={stage.data.length}: longer than the context, "
            f"model.max_length={c.model.max_length}"
        )
    if rows % stage.micro_batches:
        raise UserError(
            f"{where}.micro_batches={stage.micro_batches}: does not divide the "
            f"{rows} rows of one optimizer step"
        )
    sizes = mesh_sizes(c, stage)
    shards = mesh.make(**sizes).shape
    across = shards["data"] * shards["fsdp"]
    if (rows // stage.micro_batches) % across:
        raise UserError(
            f"{where}.batch_size={stage.batch_size}: {rows // stage.micro_batches} "
            f"rows at once do not divide over data * fsdp = {across} devices"
        )
    ModelConfig(vocab_size=c.tokenizer.vocab_size, **c.model).validate()
    check_mesh(
        ModelConfig(vocab_size=c.tokenizer.vocab_size, **c.model), mesh.make(**sizes)
    )
    optimizer.make(stage.optimizer, steps=stage.steps)
    OBJECTIVES[stage.kind](stage.objective, dict(stage.objective_args))


OBJECTIVES = {
    "language_model": language_model.make_objective,
    "reward": reward.make_objective,
    "preference": preference.make_objective,
    "policy": policy.make_objective,
}


def mesh_sizes(c, stage):
    return {axis: stage.mesh[axis] or c.mesh[axis] for axis in mesh.AXES}


def parents(c, name):
    """{role: stage name or path} of a stage, empty roles filled by their fallback."""
    stage, out = c.stages[name], {}
    for role in ROLES[stage.kind]:
        value = stage[role] or stage.get(FALLBACK.get(role, ""), "")
        if value:
            out[role] = value
    return out


def order(c, only=()):
    """Stage names, parents first; a circle is a UserError."""
    done, open_ = [], []

    def visit(name):
        if name in done:
            return
        if name in open_:
            circle = " -> ".join([*open_[open_.index(name) :], name])
            raise UserError(f"stages: they start from each other in a circle: {circle}")
        open_.append(name)
        needs = [*parents(c, name).values(), *feed.stages_named(c.stages[name].data)]
        for parent in needs:
            if parent in c.stages:
                visit(parent)
            elif parent in feed.stages_named(c.stages[name].data):
                raise UserError(
                    schema.unknown(
                        f"stages.{name}.data: stage:{parent}", parent, c.stages.keys()
                    )
                )
        open_.pop()
        done.append(name)

    for name in c.stages:
        visit(name)
    return [name for name in done if not only or name in only]


def identity(plain):
    """The part of a plain config that decides the numbers: not mesh, not every."""
    if not isinstance(plain, dict):
        return plain
    return {k: identity(v) for k, v in plain.items() if k not in ("mesh", "every")}
