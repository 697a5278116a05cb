"""A rollout is as long as its longest completion, and no number depends on that."""

import jax
import numpy as np
import pytest

from stagecraft import sharding, tree
from stagecraft.stages import rollout
from stagecraft.stages.stage import Context
from tests.stages import cases

NEW = 40  # `padded` offers 16, 24 and 32 below it
ENDS = 20  # tokens of the vocabulary that end a completion: 64 in all


def step(kind, mesh, stops, **changes):
    """An update: shapes of what was prepared, metrics, changes, and the work."""
    changes = dict(sampling=dict(max_new_tokens=NEW, temperature=0.7)) | changes
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(cases, "Context", lambda *a, **k: Context(*a, **k | stops))
        built, raw, _ = cases.stage(kind, mesh, **changes)
        state = built.init(jax.random.key(0))
        batch = built.prepare(state, raw, jax.random.key(1))
        work = built.work(raw, batch)
        rows = batch.get("rollout", batch)["ids"].shape
        state, metrics = built.update(state, batch)
    values = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
    return rows, work, {k: float(v) for k, v in metrics.items()}, values


STOPS = dict(stop_ids=tuple(range(8, 8 + ENDS)))


@pytest.mark.parametrize("kind", ["policy", "group_policy", "online_preference"])
def test_a_shorter_rollout_changes_no_number(kind, monkeypatch):
    mesh = cases.single()
    rows, work, metrics, values = step(kind, mesh, STOPS)
    monkeypatch.setattr(rollout, "padded", lambda tokens: NEW)
    whole_rows, whole_work, whole_metrics, whole_values = step(kind, mesh, STOPS)
    assert whole_rows[-1] == 8 + NEW and rows[-1] < whole_rows[-1]
    assert work["length"] == rows[-1] and whole_work["length"] == whole_rows[-1]
    assert work["trained"] * whole_rows[-1] == whole_work["trained"] * rows[-1]
    for name, value in metrics.items():
        assert value == pytest.approx(whole_metrics[name], rel=2e-5, abs=2e-6), name
    for name, value in values.items():
        np.testing.assert_allclose(value, whole_values[name], atol=2e-6)


def test_completions_that_were_cut_off_are_whole():
    rows, *_ = step("policy", cases.single(), dict(stop_ids=()))
    assert rows[-1] == 8 + NEW


def test_on_a_mesh_rows_stay_where_they_are():
    mesh = sharding.make_mesh(2, 2, 2)
    rows, _, metrics, _ = step("policy", mesh, STOPS)
    alone = step("policy", cases.single(), STOPS)
    assert rows == alone[0] and rows[-1] < 8 + NEW
    assert metrics["loss"] == pytest.approx(alone[2]["loss"], rel=1e-4)


def test_a_longest_completion_decides():
    mask = np.zeros((3, 9), bool)
    mask[0, :4] = mask[1, :7] = mask[2, :1] = True
    assert rollout.longest(mask) == 7
    samples = dict(tokens=mask.astype(int), mask=mask, ended=np.ones(3, bool))
    samples["ids"] = np.pad(samples["tokens"], ((0, 0), (5, 0)), constant_values=3)
    short = rollout.trim(samples, 7)
    assert {k: v.shape for k, v in short.items()} == dict(
        tokens=(3, 7), mask=(3, 7), ended=(3,), ids=(3, 12)
    )
    np.testing.assert_array_equal(short["ids"][:, 5:], short["tokens"])
    assert short["mask"].sum() == mask.sum()
