"""A rollout is as long as its longest completion, and no number depends on that."""

import types

import jax
import numpy as np
import pytest

from stagecraft import sharding, tree
from stagecraft.stages import folding, rollout
from stagecraft.stages.stage import Context
from tests.stages import cases

NEW = 40  # its half is 20, a quarter 10
ENDS = 32  # tokens of the vocabulary that end a completion: 64 in all


def step(kind, mesh, stops, **changes):
    """An update: what went through the models, the work, metrics, and the weights."""
    changes = dict(sampling=dict(max_new_tokens=NEW, temperature=0.7)) | changes
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(cases, "Context", lambda *a, **k: Context(*a, **k | stops))
        built, raw, _ = cases.stage(kind, mesh, **changes)
        state = built.init(jax.random.key(0))
        batch = built.prepare(state, raw, jax.random.key(1))
        work = built.work(raw, batch)
        arrays = batch.get("rollout", batch)
        row = arrays["ids"].shape[-1]
        length = arrays["fold"].shape[-1] if "fold" in arrays else row
        state, metrics = built.update(state, batch)
    values = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
    shape = types.SimpleNamespace(row=row, length=length)
    return shape, work, {k: float(v) for k, v in metrics.items()}, values


STOPS = dict(stop_ids=tuple(range(8, 8 + ENDS)))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("policy", dict(micro_batches=2)),
        ("group_policy", {}),  # whose groups are chosen, so that rows stay apart
        ("group_policy", dict(oversample=1, batch_size=16)),
        ("online_preference", {}),
    ],
    ids=str,
)
def test_a_shorter_rollout_changes_no_number(kind, changes, monkeypatch):
    mesh = cases.single()
    shape, work, metrics, values = step(kind, mesh, STOPS, **changes)
    monkeypatch.setattr(folding, "WORTH_CUTTING", 0)
    whole, whole_work, whole_metrics, whole_values = step(kind, mesh, STOPS, **changes)
    assert whole.length == whole.row == 8 + NEW > shape.row
    folded = kind == "policy" or "oversample" in changes
    assert shape.length < 2 * shape.row if folded else shape.length == shape.row
    assert work["length"] == shape.length and whole_work["length"] == whole.length
    rows = 2 if folded else 1  # of the rollout in one that goes through the model
    share = shape.length / rows / whole.length
    assert work["trained"] == pytest.approx(share * whole_work["trained"])
    for name, value in metrics.items():
        assert value == pytest.approx(whole_metrics[name], rel=2e-5, abs=2e-6), name
    for name, value in values.items():
        np.testing.assert_allclose(value, whole_values[name], atol=2e-6)


def test_completions_that_were_cut_off_are_whole():
    shape, *_ = step("policy", cases.single(), dict(stop_ids=()))
    assert shape.row == shape.length == 8 + NEW


def test_on_a_mesh_rows_meet_those_of_their_device():
    mesh = sharding.make_mesh(2, 2, 2)
    shape, _, metrics, values = step("policy", mesh, STOPS)
    alone, _, expected, alone_values = step("policy", cases.single(), STOPS)
    assert alone.row == shape.row < 8 + NEW
    assert alone.length <= shape.length < 2 * shape.row
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for name, value in values.items():
        np.testing.assert_allclose(value, alone_values[name], atol=1e-5)


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
