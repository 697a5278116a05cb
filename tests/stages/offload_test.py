"""What waits in the host's memory: the same numbers, and not on the devices."""

import jax
import numpy as np
import pytest

from stagecraft import checkpoint, sharding, tree
from stagecraft.pods.shapes import device_bytes
from stagecraft.stages import stage
from stagecraft.stages.kinds import KINDS
from stagecraft.stages.stage import Context
from tests.stages import cases

ADAM = dict(name="adamw", lr=0.01, warmup_steps=0, clip_norm=1.0)


def memories(tree):
    """The kinds of memory that arrays lie in, single numbers left out."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def begin(kind, mesh, offload):
    """A stage, its raw batch, and its state before the first step."""
    config = cases.config(kind, optimizer=ADAM, offload=offload)
    known = cases.models(mesh)
    # The critic's parent is the reward model: one model in two roles.
    played = dict(
        start="policy", reference="reference", reward="reward", value="reward"
    )
    roles = KINDS[kind].roles
    names = {f"{role}_from": by for role, by in played.items() if role in roles}
    parents = stage.place_parents(config, names, known)
    context = Context(mesh, cases.CONFIG, parents, stop_ids=(cases.STOP,))
    built = KINDS[kind].make(config, context)
    return built, cases.BATCH[kind](), built.init(jax.random.key(0)), parents


def steps(kind, mesh, offload, count=2):
    with jax.set_mesh(mesh):
        built, raw, state, parents = begin(kind, mesh, offload)
        for number in range(count):
            batch = built.prepare(state, raw, jax.random.key(number))
            state, metrics = built.update(state, batch)
    values = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
    return values, {k: float(v) for k, v in metrics.items()}, state, parents


@pytest.mark.parametrize(
    ("kind", "offload", "sizes"),
    [
        ("preference", ("optimizer", "reference"), (1, 1, 1)),
        ("preference", ("optimizer", "reference"), (2, 2, 2)),
        ("policy", ("optimizer", "reference", "reward"), (2, 2, 2)),
    ],
    ids=str,
)
def test_numbers_do_not_depend_on_where_arrays_wait(kind, offload, sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(*sizes, devices=devices)
    values, metrics, *_ = steps(kind, mesh, ())
    others, other_metrics, state, parents = steps(kind, mesh, offload)
    assert metrics == other_metrics
    for name, value in values.items():
        np.testing.assert_array_equal(value, others[name])
    assert memories(state.opt_state) == {sharding.HOST}
    assert sharding.HOST not in memories(state.model)
    for role, model in parents.items():
        away = role in offload or (role == "value" and "reward" in offload)
        assert memories(model) == {sharding.HOST} or not away


def test_the_programs_and_the_plan_know():
    mesh = cases.single()
    with jax.set_mesh(mesh):
        offload = ("optimizer", "reference", "reward")
        built, raw, state, parents = begin("policy", mesh, offload)
        programs = built.programs(raw)
    assert memories(programs["update"].arguments[0].opt_state) == {sharding.HOST}
    assert memories(programs["judge"].arguments[1]) == {sharding.HOST}
    assert memories(programs["score"].arguments[0]) == {sharding.HOST}
    for program in programs.values():
        program.lower()
    assert device_bytes(parents["reference"]) < 100 < device_bytes(parents["start"])
    moments = device_bytes(state.opt_state)
    assert moments < 100 < device_bytes(state.model)


def test_a_reference_that_is_the_start_is_copied_back_to_be_trained():
    mesh = cases.single()
    config = cases.config("preference", offload=("reference",))
    policy = cases.models(mesh)["policy"]
    names = dict(start_from="sft", reference_from="sft")
    parents = stage.place_parents(config, names, {"sft": policy})
    assert parents["start"] is parents["reference"] is not policy
    with jax.set_mesh(mesh):
        built = KINDS["preference"].make(config, Context(mesh, cases.CONFIG, parents))
        state = built.init(jax.random.key(0))
        batch = built.prepare(state, cases.BATCH["preference"](), jax.random.key(0))
        _, metrics = built.update(state, batch)
    assert sharding.HOST not in memories(state.model)
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-6)


def test_a_checkpoint_goes_back_to_where_it_was(tmp_path):
    mesh = cases.single()
    with jax.set_mesh(mesh):
        _, _, state, _ = begin("preference", mesh, ("optimizer",))
        saved = checkpoint.Checkpoints(tmp_path)
        train = {"opt_state": state.opt_state}
        saved.save(1, state.model, train, {})
        saved.wait()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (state.model, train),
        )
        _, restored, _ = saved.restore(1, *shapes)
        saved.close()
    assert memories(restored) == {sharding.HOST}
