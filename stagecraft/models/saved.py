"""Finished stages on disk, read back as modules on any mesh."""

import dataclasses
from pathlib import Path

import jax

from stagecraft import checkpoint, sharding, storage
from stagecraft.errors import UserError
from stagecraft.models.config import ModelConfig, check_mesh
from stagecraft.models.transformer import ScalarModel, Transformer

# What a stage's parameters are: a language model, or one with a scalar head.
MODULES = {
    "transformer": Transformer,
    "scalar": lambda config, key: ScalarModel(Transformer(config, key), key),
}


def describe(module):
    """What `load` needs to know of a module, as JSON."""
    kind = "scalar" if isinstance(module, ScalarModel) else "transformer"
    body = module.body if kind == "scalar" else module
    return {"module": kind, "model": dataclasses.asdict(body.config)}


def abstract(info, mesh):
    """The module as shapes with shardings: nothing is allocated.

    Args:
        info: {"module", "model"}, from `describe`.
        mesh: where it is to live.
    """
    config = ModelConfig(**info["model"])
    check_mesh(config, mesh)
    make = MODULES[info["module"]]
    return sharding.abstract(
        lambda key: make(config, key), jax.random.key(0), mesh=mesh
    )


def info(folder):
    """A stage's stage.json; a UserError where there is no finished stage."""
    folder = Path(folder)
    found = storage.read_json(folder / "stage.json")
    if found is None:
        raise UserError(
            f"{folder}: no stage here (no stage.json); expected WORKDIR/STAGE of a run"
        )
    if not found["finished"]:
        raise UserError(f"{folder}: this stage is not finished; run it again to resume")
    return found


def load(folder, mesh):
    """Reads a finished stage's parameters, each device its own part.

    Args:
        folder: WORKDIR/STAGE.
        mesh: where to put them.

    Returns:
        a `Transformer` or a `ScalarModel`.
    """
    module, _ = checkpoint.load_model(folder, abstract(info(folder), mesh))
    return module
