"""A language-model stage whose experts are held in balance."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from stagecraft import sharding, tree
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


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 1, 2, 2)])
def test_it_is_that_of_the_whole_batch_on_any_mesh(sizes):
    alone, one = once(cases.single(), 0.5)
    split, other = once(sharding.make_mesh(*sizes), 0.5)
    for name in ("loss", "aux_loss", "router_load_max"):
        assert split[name] == pytest.approx(alone[name], rel=1e-5)
    np.testing.assert_allclose(other, one, atol=1e-6)


def by_numpy(model, raw):
    """E sum_e f_e P_e by layer, over all real tokens, from the router's own numbers."""
    real = raw["segments"] > 0
    arrays = [raw[k] for k in ("ids", "positions", "segments")]
    seen = []

    def add(total, routing):
        seen.append(jax.tree.map(np.asarray, routing))
        return total

    with jax.disable_jit():
        model._hidden(*arrays, add, jax.numpy.zeros(()))
    found = []
    for routing in seen:
        chosen = routing.chosen[real]
        share = [(chosen == e).sum() / real.sum() for e in range(CONFIG.experts)]
        mean = routing.probabilities[real].mean(0)
        found.append(CONFIG.experts * np.dot(share, mean))
    return np.mean(found)


@functools.cache
def step(sizes, parts):
    """The metrics and every parameter's change of one step, and what it began from."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    config = dataclasses.replace(CONFIG, layers=2, sparse=(1, 1), balance_coef=0.5)
    with jax.set_mesh(mesh):
        # Changes are then far above the rounding of the weights.
        changes = dict(optimizer=cases.OPTIMIZER | {"lr": 100.0}, micro_batches=parts)
        _, raw, stage = cases.stage("language_model", mesh, **changes)
        start = sharding.init_sharded(lambda key: Transformer(config, key), mesh)(
            jax.random.key(3)
        )
        made = language_model.make(stage, Context(mesh, config, {"start": start}))
        state = made.init(jax.random.key(0))
        before = tree.named(jax.device_get(state.model))
        state, metrics = made.update(state, made.prepare(state, raw, None))
        after = tree.named(jax.device_get(state.model))
    changes = {k: np.asarray(after[k]) - np.asarray(before[k]) for k in after}
    return cases.told(metrics), changes, made.work(raw), start, raw


def test_the_load_is_that_of_all_real_tokens():
    metrics, _, work, start, raw = step((1, 1, 1), 1)
    assert metrics["aux_loss"] == pytest.approx(by_numpy(start, raw), rel=1e-5)
    assert work.get("scored", 0) == 0


# In the last of each mesh a micro-batch has one row for every row shard.
@pytest.mark.parametrize(
    ("sizes", "parts"),
    [((1, 1, 1), 2), ((1, 1, 1), 16), ((2, 2, 2), 1), ((2, 2, 2), 4)],
)
def test_micro_batches_never_change_the_loss(sizes, parts):
    """Nor its gradient, which is the change of every parameter under plain SGD."""
    metrics, changes, work, _, raw = step(sizes, parts)
    whole, expected, *_ = step((1, 1, 1), 1)
    for name in ("loss", "aux_loss", "router_load_max"):
        assert metrics[name] == pytest.approx(whole[name], rel=1e-5), name
    for name, change in expected.items():
        largest = np.abs(change).max()
        np.testing.assert_allclose(changes[name], change, atol=1e-5 * largest + 1e-8)
    # The load is counted first, by a forward pass of its own.
    assert work.get("scored", 0) == (raw["ids"].size if parts > 1 else 0)


def test_layers_without_experts_between_them():
    """The load of each sparse layer meets that layer."""
    config = dataclasses.replace(CONFIG, layers=3, sparse=(1, 0, 1), balance_coef=0.5)
    mesh, found = cases.single(), []
    with jax.set_mesh(mesh):
        for parts in (1, 4):
            _, raw, stage = cases.stage("language_model", mesh, micro_batches=parts)
            start = Transformer(config, jax.random.key(3))
            made = language_model.make(stage, Context(mesh, config, {"start": start}))
            state = made.init(jax.random.key(0))
            _, metrics = made.update(state, made.prepare(state, raw, None))
            found.append(cases.told(metrics))
    for name in ("loss", "aux_loss", "router_load_max", "grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name
