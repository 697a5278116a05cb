"""A language-model stage whose experts are held in balance."""

import dataclasses

import jax
import numpy as np
import pytest

from stagecraft import sharding
from stagecraft.models.transformer import Transformer
from stagecraft.stages import language_model
from stagecraft.stages.stage import Context
from tests.stages import cases

CONFIG = dataclasses.replace(cases.CONFIG, experts=4, expert_width=8, balance_coef=0.0)


def once(mesh, coef, **changes):
    config = dataclasses.replace(CONFIG, balance_coef=coef)
    with jax.set_mesh(mesh):
        _, raw, stage = cases.stage("language_model", mesh, **changes)
        start = sharding.init_sharded(lambda key: Transformer(config, key), mesh)(
            jax.random.key(3)
        )
        made = language_model.make(stage, Context(mesh, config, {"start": start}))
        state = made.init(jax.random.key(0))
        before = np.asarray(state.model.layers.experts.router[...])
        state, metrics = made.update(state, made.prepare(state, raw, None))
        after = np.asarray(state.model.layers.experts.router[...])
    return {k: float(v) for k, v in metrics.items()}, after - before


def test_the_loss_is_added_and_told():
    plain, free = once(cases.single(), 0.0)
    told, held = once(cases.single(), 0.5)
    assert "aux_loss" not in plain
    assert told["aux_loss"] >= 1.5  # about k = 2, which perfect balance has
    assert 1 <= told["router_load_max"] <= 2
    assert told["loss"] == pytest.approx(plain["loss"] + 0.5 * told["aux_loss"])
    assert np.abs(held - free).max() > 1e-5


def test_it_is_that_of_the_whole_batch_on_any_mesh():
    alone, one = once(cases.single(), 0.5)
    split, other = once(sharding.make_mesh(2, 2, 2), 0.5)
    for name in ("loss", "aux_loss", "router_load_max"):
        assert split[name] == pytest.approx(alone[name], rel=1e-5)
    np.testing.assert_allclose(other, one, atol=1e-6)
