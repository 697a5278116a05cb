"""What the devices run is in the open: every program is lowered from shapes alone."""

import jax
import numpy as np
import pytest

from stagecraft import sharding
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.stages import stage
from stagecraft.stages.kinds import KINDS
from tests.stages import cases

MESHES = ((1, 1, 1), (2, 2, 2))
# What makes every part of a stage act, beside what `cases` sets.
SETTINGS = {
    "preference": dict(sync_every=2),
    "unpaired_preference": dict(objective="bco"),
}
# The programs of each kind; each is called in a step.
PROGRAMS = {
    "language_model": {"update", "evaluate"},
    "reward": {"update", "evaluate"},
    "preference": {"reference", "update", "evaluate"},
    "unpaired_preference": {"reference", "policy", "update", "evaluate"},
    "online_preference": {"sample", "score", "judge", "update"},
    "policy": {"sample", "score", "judge", "update"},
    "group_policy": {"sample", "score", "judge", "update"},
}


def abstract_stage(kind, mesh, **changes):
    """A stage whose models are shapes: nothing is allocated."""
    config = cases.config(kind, **(SETTINGS.get(kind, {}) | changes))

    def models(key):
        body = Transformer(cases.CONFIG, key)
        return {"transformer": body, "scalar": ScalarModel(body, key)}

    shapes = sharding.abstract(models, mesh, jax.random.key(0))
    parents = {
        role: shapes[wanted.models[0]] for role, wanted in KINDS[kind].roles.items()
    }
    context = stage.Context(mesh, cases.CONFIG, parents, stop_ids=(cases.STOP,))
    return KINDS[kind].make(config, context)


def shapes_of(raw):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in raw.items()}


def test_every_kind_that_trains_is_here():
    assert set(PROGRAMS) == {kind.name for kind in KINDS.values() if kind.trains}


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_lower_from_shapes_alone(kind, rank, sizes):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    lora = dict(rank=rank, embeddings=True)
    with jax.set_mesh(mesh):
        made = abstract_stage(kind, mesh, lora=lora)
        programs = made.programs(shapes_of(cases.BATCH[kind]()))
        assert set(programs) == PROGRAMS[kind]
        for name, program in programs.items():
            leaves = jax.tree.leaves(program.arguments)
            assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves), name
            text = program.lower().as_text()
            assert "func.func public @main" in text, name


@pytest.mark.parametrize("kind", PROGRAMS)
def test_what_runs_has_the_shapes_that_were_lowered(kind):
    """The state, the prepared batch and their shardings are those of the program."""
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        made, raw, _ = cases.stage(kind, mesh, **SETTINGS.get(kind, {}))
        programs = made.programs(raw)
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, jax.random.key(1))
        expected_state, expected_batch, _ = programs["update"].arguments
        for real, shape in ((state, expected_state), (batch, expected_batch)):
            assert jax.tree.structure(real) == jax.tree.structure(shape)
            for x, s in zip(jax.tree.leaves(real), jax.tree.leaves(shape), strict=True):
                assert (x.shape, x.dtype) == (s.shape, s.dtype)
                assert x.sharding.is_equivalent_to(s.sharding, x.ndim)
        state, _ = made.update(state, batch)
        for x, s in zip(
            jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True
        ):
            assert x.sharding.is_equivalent_to(s.sharding, x.ndim)
