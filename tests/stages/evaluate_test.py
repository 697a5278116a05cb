"""Held-out loss of several terms: one number, exact over batches of any size."""

import jax
import numpy as np
import pytest

from stagecraft import masked
from tests.stages import cases


def test_the_whole_loss_is_the_weighted_sum_of_its_means():
    shared = cases.single()
    with jax.set_mesh(shared):
        changes = dict(objective="sigmoid,sft", objective_weights=(1.0, 0.5))
        made, raw, _ = cases.stage("preference", shared, **changes)
        state = made.init(jax.random.key(0))
        halves = [{k: v[i::2] for k, v in raw.items()} for i in range(2)]
        found = [made.evaluate(state, made.prepare(state, h, None)) for h in halves]
        merged = masked.compute(masked.merge(*found))
        whole = masked.compute(made.evaluate(state, made.prepare(state, raw, None)))
        _, metrics = made.update(state, made.prepare(state, raw, None))
    parts = float(merged["loss/rows"] + merged["loss/chosen"])
    assert float(merged["loss"]) == pytest.approx(parts, rel=1e-6)
    for name in ("loss", "loss/rows", "loss/chosen"):
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-5)
    assert float(merged["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
