"""The stages of an experiment as shapes on devices that are not here.

Nothing is allocated and no data is read: models are what their configs make, batches
the longest that a config allows.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from stagecraft import experiment, run, runs, sharding, train
from stagecraft.data import stage_data
from stagecraft.errors import UserError
from stagecraft.models import saved
from stagecraft.models.translation import HOW
from stagecraft.preview import assumed
from stagecraft.signals import verifiers
from stagecraft.stages import kinds
from stagecraft.stages.stage import Program, State, place_parents
from stagecraft.text import tokenizer as tokenizers


class Vocabulary(NamedTuple):
    """What shapes depend on of a tokenizer."""

    vocab_size: int
    stops: tuple[int, ...] = (1,)
    control_ids: tuple[int, ...] = ()
    template: Any = None


class StageShapes(NamedTuple):
    """A stage that trains, as shapes.

    Attributes:
        name: of the stage.
        config: its resolved config.
        mesh: its mesh.
        model: the config of the model it trains, as a mapping.
        scalar: that of its reward model; None without one.
        programs: {name: Program}, what the devices run in a step.
        state: the `State` that training carries.
        parents: {stage: module} of the models it starts from or keeps beside.
        work: tokens of a step by what is done with them, as of `Stage.work`.
    """

    name: str
    config: ConfigDict
    mesh: jax.sharding.Mesh
    model: dict[str, Any]
    scalar: dict[str, Any] | None
    programs: dict[str, Program]
    state: State
    parents: dict[str, Any]
    work: dict[str, float]


def vocabulary(config: ConfigDict) -> tuple[Vocabulary, str]:
    """Returns what is known of a run's tokenizer, and a remark where it is not here."""
    path, size = config.tokenizer.path, config.tokenizer.vocab_size
    if path:
        try:
            known = tokenizers.load(path)
        except UserError:
            text = (
                f"tokenizer.path={path} is not here: planned with "
                f"tokenizer.vocab_size={size}"
            )
            return Vocabulary(size), text
        return Vocabulary(known.vocab_size, known.stops, known.control_ids), ""
    return Vocabulary(size), ""


def stages(
    config: ConfigDict,
    devices: Sequence[Any],
    only: Sequence[str] = (),
    *,
    layers: int = 0,
) -> Iterator[StageShapes]:
    """Yields the stages that train, parents first.

    Args:
        config: what an experiment's `get_config` returns.
        devices: of the topology.
        only: names of the stages to yield; () for all.
        layers: that every model has, its first ones; 0 for as many as it has.

    Raises:
        UserError: a config that a run would refuse too, of these devices.
    """
    config = experiment.resolve(config, devices=devices)
    config.model.layers = layers or config.model.layers
    names = experiment.chosen(config, "--stage", only)
    this = runs.Run(Path(), config, devices=devices)
    this.tokenizer, _ = vocabulary(config)
    for name, stage in config.stages.items():
        if this.rollout_mesh(stage):
            raise UserError(
                f"stages.{name}.rollout_mesh.devices={stage.rollout_mesh.devices}: a "
                "stage on two meshes cannot be planned yet; set it to 0"
            )
    described = {}
    for name in experiment.order(config):
        if kinds.of(config.stages[name]).trains:
            shapes = _stage(this, name, described, layers)
            if name in names:
                yield shapes


def _stage(this, name, described, layers):
    """Builds a stage from shapes; notes what its model is for those that follow."""
    config, stage, mesh = this.config, this.config.stages[name], this.mesh(name)
    roles = experiment.parents(config, name)
    roles.pop("judge_from", None)  # it answers questions, outside of the programs
    infos = {
        parent: _info(this, parent, described, layers) for parent in roles.values()
    }
    with on(mesh):
        models = {p: saved.abstract(info, mesh) for p, info in infos.items()}
        parents = place_parents(stage, roles, models)
        if "start" in parents:  # a tokenizer that is not here has what it embeds
            rows = infos[roles["start_from"]]["model"]["vocab_size"]
            this.tokenizer = this.tokenizer._replace(vocab_size=rows)
        context = run.context(this, stage, mesh, parents, _records(stage))
        functions = kinds.of(stage).make(stage, context)
        raw = assumed.batch(stage, config)
        sharding.check_rows(len(next(iter(raw.values()))), mesh)
        programs = functions.programs(raw)
        state = programs["update"].arguments[0]
        described[name] = saved.describe(train.deployable(state, functions.frozen))
        work = dict(functions.work(raw))
    reward = infos.get(roles.get("reward_from", ""))
    return StageShapes(
        name=name,
        config=stage,
        mesh=mesh,
        model=described[name]["model"],
        scalar=reward and reward["model"],
        programs=programs,
        state=state,
        parents={
            name: parents[role.removesuffix("_from")] for role, name in roles.items()
        },
        work=work,
    )


def _records(stage):
    """Returns data whose records, not there yet, have what the verifiers ask for."""
    if not stage.get("verifiers"):
        return stage_data.StageData()
    functions = verifiers.find(stage.verifiers, stage.verifier_args)
    keys = {p.name for one in functions for p in one.parameters}
    return stage_data.StageData(records=[{"prompt": ""} | dict.fromkeys(keys, "")])


def on(mesh: jax.sharding.Mesh):
    """Returns a context in which functions are traced for a mesh that is not here.

    Unlike under `jax.set_mesh`, what is not traced, such as a key, stays here.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _info(this, parent, described, layers):
    """Returns {"module", "model"} of a stage here or of a model from outside."""
    if parent in described:
        return described[parent]
    if parent in this.config.stages:
        raise UserError(
            f"{parent}: a stage that trains nothing has no model to start from"
        )
    source = this.source(parent)
    info = source.info()
    how = {key: this.config.model[key] for key in HOW}
    how |= {"layers": layers} if layers else {}
    return info | {"model": info["model"] | how} if source.outward else info


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of arrays or shapes.

    What lies in the host's memory is none of the device's.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        placement = getattr(leaf, "sharding", None)
        if placement and placement.memory_kind == sharding.HOST:
            continue
        shape = placement.shard_shape(leaf.shape) if placement else leaf.shape
        count = 1
        for size in shape:
            count *= size
        total += count * _itemsize(leaf.dtype)
    return total


def _itemsize(dtype):
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def resident(argument: Any) -> bool:
    """Returns whether an argument lies on the devices all stage long: has weights."""
    leaves = jax.tree.leaves(argument, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return any(isinstance(leaf, nnx.Variable) for leaf in leaves)
