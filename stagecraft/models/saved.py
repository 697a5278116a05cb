"""Finished stages on disk, read back as modules on any mesh."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from stagecraft import checkpoint, sharding
from stagecraft.lineage import StageRecord
from stagecraft.models.config import ModelConfig, check_mesh
from stagecraft.models.transformer import ScalarModel, Transformer

# What a stage's parameters are: a language model, or one with a scalar head.
MODULES = {
    "transformer": Transformer,
    "scalar": lambda config, key: ScalarModel(Transformer(config, key), key),
}


def describe(module: Transformer | ScalarModel) -> dict[str, Any]:
    """Returns what `load` needs to know of a module, as JSON."""
    name = "scalar" if isinstance(module, ScalarModel) else "transformer"
    body = module.body if name == "scalar" else module
    return {"module": name, "model": dataclasses.asdict(body.config)}


def abstract(info: dict[str, Any], mesh: jax.sharding.Mesh):
    """Returns the module as shapes with shardings: nothing is allocated.

    Args:
        info: {"module", "model"}, from `describe`.
        mesh: the mesh the parameters will be on.
    """
    config = ModelConfig(**info["model"])
    check_mesh(config, mesh)
    make = MODULES[info["module"]]
    return sharding.abstract(lambda key: make(config, key), mesh, jax.random.key(0))


def load(folder: str | Path, mesh: jax.sharding.Mesh) -> Transformer | ScalarModel:
    """Reads a finished stage's parameters, each device its own part.

    Args:
        folder: WORKDIR/STAGE.
        mesh: the mesh to put them on.
    """
    record = StageRecord.read_finished(folder)
    info = {"module": record.module, "model": record.model}
    module, _ = checkpoint.load_model(folder, abstract(info, mesh))
    return module
