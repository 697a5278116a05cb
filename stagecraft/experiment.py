"""An experiment is a graph of stages: here it is completed, checked and ordered.

All that can be refused is refused here, before anything is compiled or written.
"""

from pathlib import Path

from stagecraft import bounds, defaults, schema, trackers, worlds
from stagecraft.curate import config as curation
from stagecraft.data import stage_data
from stagecraft.errors import UserError
from stagecraft.models import locate
from stagecraft.models.translation import THE_RUNS
from stagecraft.runs import Run
from stagecraft.stages import kinds
from stagecraft.stages.kinds import KINDS


def resolve(config, *, check=True, devices=None):
    """Returns the complete config: defaults filled in, keys, types and names checked.

    Args:
        config: a ConfigDict or dict as an experiment's `get_config` returns.
        check: also refuse impossible values and combinations.
        devices: that the meshes must fit; None for all that JAX sees.

    Returns:
        a new ConfigDict. Raises UserError before anything is compiled.
    """
    given = {k: v for k, v in config.items() if k != "stages"}
    full = schema.merge(defaults.experiment(), given)
    if not config.get("stages"):
        raise UserError("stages: this experiment has none; add c.stages.NAME = ...")
    for name, stage in config["stages"].items():
        where = f"stages.{name}"
        taken = ("curation", "world", "runs", "tokenizer")
        if not name.replace("_", "").isalnum() or name in taken:
            raise UserError(f"{where}: expected a name of letters, digits and _")
        if not hasattr(stage, "items") or "kind" not in stage:
            raise UserError(f"{where}: needs kind=, one of {', '.join(defaults.KINDS)}")
        schema.choice(f"{where}.kind", stage["kind"], tuple(defaults.KINDS))
        full.stages[name] = schema.merge(defaults.KINDS[stage["kind"]](), stage, where)
    if check:
        _take_model(full)
        if full.curation:
            full.curation = curation.of_run(full.curation)
        _check(full, devices)
    return full


def outside(c):
    """Returns the folders outside this experiment that stages start from, each once."""
    parents = [stage.start_from for stage in c.stages.values()]
    return list(dict.fromkeys(p for p in parents if p and p not in c.stages))


def _take_model(c):
    """Fills c.model from the model that stages start from, if none starts from scratch.

    With several, it is filled from the first, and max_length from the one that holds
    most. Settings of how to compute stay the experiment's, and so does a max_length
    that was changed: it is the longest row of this run, beside the limit of each model.
    """
    if not outside(c) or any(not stage.start_from for stage in c.stages.values()):
        return
    sources = [locate.locate(name) for name in outside(c)]
    if any(not one.outward and one.record() is None for one in sources):
        return  # an unknown name, which is refused below
    model, given = sources[0].info()["model"], c.model.max_length
    for key in c.model:
        if key in model and key not in THE_RUNS:
            value = model[key]
            c.model[key] = tuple(value) if isinstance(value, list) else value
    lengths = [one.info()["model"]["max_length"] for one in sources]
    changed = given != defaults.model().max_length
    c.model.max_length = given if changed else max(lengths)
    if model.get("positions") == "learned" and c.model.max_length > max(lengths):
        raise UserError(
            f"model.max_length={given}: the model of {sources[0].name} has learned "
            f"positions for {max(lengths)} tokens and no more"
        )


def _check(c, devices):
    schema.choice("world.size", c.world.size, ("full", "tiny"))
    schema.positive("world.junk", c.world.junk, zero=True)
    schema.choice("world.sums", c.world.sums, (0, 2, 3))
    if not 0 <= c.world.style <= 1:
        raise UserError(f"world.style={c.world.style}: expected a share from 0 to 1")
    schema.choice("measure.split", c.measure.split, ("test", "dev"))
    schema.positive("measure.draws", c.measure.draws)
    schema.positive("measure.prompts", c.measure.prompts, zero=True)
    trackers.names(c.trackers)
    if c.world.name:
        worlds.get(c.world.name).check(c.world)
    for text in c.measure.bounds:
        bounds.parse(text)
    meshes = {name: Run(Path(), c, devices=devices).mesh(name) for name in c.stages}
    for name, stage in c.stages.items():
        for role in kinds.of(stage).roles:
            _check_role(c, name, role, meshes[name])
    order(c)
    for name, stage in c.stages.items():
        kinds.of(stage).check(f"stages.{name}", stage, c, meshes[name])


def _check_role(c, name, role, mesh):
    stage = c.stages[name]
    where, value = f"stages.{name}.{role}_from", stage[f"{role}_from"]
    models, required, _ = kinds.of(stage).roles[role]
    accepted = [kind.name for kind in KINDS.values() if kind.model in models]
    if not value:
        if required:
            raise UserError(
                f"{where}: is empty; a {stage.kind} stage needs a stage of kind "
                f"{' or '.join(accepted)}, the folder of a finished one, or hf:FOLDER"
            )
        return
    source = locate.locate(value, stages=c.stages)
    if source.outward:
        module = models[0] if len(models) == 1 else None
        try:
            source.examine(mesh, module=module)
        except UserError as error:
            raise UserError(f"{where}={value!r}: {error}") from None
    elif source.where == "here":
        if c.stages[value].kind not in accepted:
            raise UserError(
                f"{where}={value!r}: that stage is of kind {c.stages[value].kind}, "
                f"expected {' or '.join(accepted)}"
            )
    elif source.where == "nowhere":
        raise UserError(schema.unknown(f"{where}={value!r}", value, c.stages.keys()))
    else:
        source.info()


def parents(c, name):
    """Returns {ROLE_from: stage name or path}, empty roles filled by their fallback.

    A role left empty is played by another: the reference is the parent as it was.
    """
    stage, out = c.stages[name], {}
    for role, (_, _, fallback) in kinds.of(stage).roles.items():
        value = stage[f"{role}_from"] or (fallback and stage[f"{fallback}_from"])
        if value:
            out[f"{role}_from"] = value
    return out


def order(c, only=()):
    """Returns stage names, parents first; a circle is a UserError."""
    done, open_ = [], []

    def visit(name):
        if name in done:
            return
        if name in open_:
            circle = " -> ".join([*open_[open_.index(name) :], name])
            raise UserError(f"stages: they start from each other in a circle: {circle}")
        open_.append(name)
        files_of = stage_data.stages_named(c.stages[name].data)
        for parent in [*parents(c, name).values(), *files_of]:
            if parent in c.stages:
                visit(parent)
            elif parent in files_of:
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


def chosen(c, flag, only):
    """Returns the names a flag lists, parents first; all where it lists none."""
    for name in only:
        if name not in c.stages:
            raise UserError(
                f"{flag}={name}: no such stage; {schema.hint(name, c.stages)}"
                f"stages: {', '.join(c.stages)}"
            )
    return order(c, only)


def identity(plain):
    """Returns the part of a plain config that decides the numbers."""
    if not isinstance(plain, dict):
        return plain
    without = defaults.KEYS_WITHOUT_EFFECT
    return {k: identity(v) for k, v in plain.items() if k not in without}
