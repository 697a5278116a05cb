"""A parent that only its trained copy needs is not kept beside it."""

import jax
import numpy as np
import pytest

from stagecraft import experiment, run, tree
from stagecraft.data.stage_data import StageData
from stagecraft.pods.shapes import Vocabulary
from stagecraft.runs import Run
from stagecraft.stages.stage import make_copy
from tests import tiny
from tests.graphs import graph
from tests.stages import cases


def updated(kind, sole, **changes):
    """The parent, and the weights of the first step."""
    mesh = tiny.single()
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        start, make = make_copy(cases.models(mesh)["policy"], mesh)(), cases.Context
        patch.setattr(cases, "Context", lambda *a, **k: make(*a, **k, sole_roles=sole))
        stage, raw, _ = cases.stage(kind, mesh, start=start, **changes)
        state = stage.init(jax.random.key(0))
        state, _ = stage.update(state, stage.prepare(state, raw, jax.random.key(1)))
    return start, {name: np.asarray(x) for name, x in tree.named(state.model).items()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("language_model", {}), ("reward", {}), ("preference", dict(objective="simpo"))],
)
def test_a_stage_takes_the_arrays_of_a_parent_that_has_no_other_role(kind, changes):
    start, weights = updated(kind, ("start",), **changes)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))
    start, others = updated(kind, (), **changes)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(start))
    assert all(np.array_equal(others[name], weights[name]) for name in weights)


def test_an_adapter_leaves_its_parent_alone():
    start, _ = updated("language_model", ("start",), lora=dict(rank=2))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(start))


def test_a_policy_and_a_critic_from_one_model_take_nothing():
    start, _ = updated("policy", ("start",), without=("value",))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(start))


@pytest.mark.parametrize(
    ("alike", "sole"), [(True, ()), (False, ("start", "reference"))]
)
def test_a_run_says_which_roles_are_sole(tmp_path, alike, sole):
    config = experiment.resolve(graph("preference", devices=1))
    this = Run(tmp_path, config, Vocabulary(64))
    start = cases.models(tiny.single())["policy"]
    other = start if alike else cases.models(tiny.single())["reference"]
    parents = dict(start=start, reference=other)
    data = StageData(records=[{"prompt": ""}])
    stage, mesh = config.stages.it, this.mesh("it")
    assert run.context(this, stage, mesh, parents, data).sole_roles == sole
