"""What is measured of a stage that averages its weights is of the average."""

import jax
import numpy as np
import pytest

from stagecraft import masked, train
from stagecraft.data.dataset import Dataset
from stagecraft.stages import reward
from tests.stages import cases
from tests.stages.reward_test import rewards_of


def trained(made, raw, steps=3):
    state = made.init(jax.random.key(0))
    for number in range(steps):
        batch = made.prepare(state, raw, jax.random.key(number))
        state, _ = made.update(state, batch)
    return state


@pytest.mark.parametrize("kind", cases.KINDS)
def test_held_out_figures_are_of_the_average(kind):
    """With the average in the model's place, the same; with the raw weights, not."""
    shared = cases.single()
    with jax.set_mesh(shared):
        changes = dict(ema_decay=0.9, optimizer=cases.OPTIMIZER | {"lr": 1.0})
        if kind == "group_policy":
            changes["kl_coef"] = 0.0  # which such steps would drive to infinity
        made, raw, _ = cases.stage(kind, shared, **changes)
        raw = raw | {"index": np.arange(16, dtype=np.int32)}
        state = trained(made, raw)

        def figures(model):
            extra = {k: v for k, v in state.extra.items() if k != "ema"}
            plain = state._replace(model=model, extra=extra)
            return cases.told(
                masked.compute(made.evaluate(plain, raw, jax.random.key(5)))
            )

        seen = masked.compute(made.evaluate(state, raw, jax.random.key(5)))
        average, moved = figures(state.extra["ema"]), figures(state.model)
    assert np.isfinite([*average.values()]).all()
    assert cases.told(seen) == average
    assert average != moved


def test_the_loss_of_the_average_by_numpy():
    shared = cases.single()
    with jax.set_mesh(shared):
        optimizer = cases.OPTIMIZER | {"lr": 3.0}
        made, raw, _ = cases.stage(
            "language_model", shared, ema_decay=0.9, optimizer=optimizer
        )
        state = trained(made, raw)
        data = Dataset([(raw, 4)], seed=0)
        told = train.evaluate(made, state, data, 4)
        saved = train.deployable(state)
        losses = []
        for model in (saved, state.model):
            targets = raw["mask"].copy()
            targets[:, 0] = False
            targets[:, 1:] &= raw["segments"][:, 1:] == raw["segments"][:, :-1]
            losses.append(-cases.token_logps(model, raw)[targets].mean())
    assert told["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-2


def test_the_reference_reward_is_that_of_the_average():
    shared = cases.single()
    with jax.set_mesh(shared):
        optimizer = cases.OPTIMIZER | {"lr": 1.0}
        made, raw, _ = cases.stage("reward", shared, ema_decay=0.9, optimizer=optimizer)
        state = trained(made, raw)
        rows = {k: v for k, v in cases.judged(rows=10).items() if k != "label"}
        wide = {k: v[:, None] for k, v in rows.items()}
        average, moved = (
            rewards_of(model, wide).mean()
            for model in (state.extra["ema"], state.model)
        )
        state, told = reward.normalize(state, Dataset([(rows, 8)], seed=0), 8)
        after = rewards_of(train.deployable(state), wide)
    assert told == {"reference_reward": pytest.approx(average, abs=1e-4)}
    assert abs(average - moved) > 1e-2
    assert abs(after.mean()) < 1e-4
