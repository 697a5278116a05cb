"""The loop keeps what was trained, whatever fails after the last step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, train
from stagecraft.data.dataset import Dataset
from stagecraft.stages.stage import Stage, State

STEPS = 3


def init(key):
    model = {"policy": {"w": jnp.zeros(2)}, "value": {"v": jnp.zeros(1)}}
    return State(jnp.zeros((), jnp.int32), model, {"m": jnp.zeros(1)}, {})


def update(state, batch):
    model = jax.tree.map(lambda x: x + 1, state.model)
    values = dict(loss=jnp.ones(()), grad_norm=jnp.ones(()), num_tokens=jnp.ones(()))
    return state._replace(step=state.step + 1, model=model), values


STAGE = Stage(
    init=init,
    prepare=lambda state, raw, key: raw,
    update=update,
    evaluate=None,
    work=lambda raw, batch=None: {"trained": 1, "length": 1},
    programs=None,
)


def trained(folder, finish):
    config = defaults.stage("reward", steps=STEPS, batch_size=1)
    config.every.save = 0
    data = Dataset([({"n": np.arange(4)}, 1)], seed=0)
    key = jax.random.key(0)
    hooks = train.Hooks(finish=finish)
    return train.train(STAGE, config, data, folder, name="x", key=key, hooks=hooks)


@pytest.mark.parametrize(
    ("staleness", "before", "after"),
    [(1, [None, 0, 1], [None, 3, 4]), (2, [None, 0, 0, 1], [None, 4, 4])],
)
def test_rollouts_are_begun_before_the_updates_they_miss(
    staleness, before, after, tmp_path
):
    """Also in a run that goes on: its first rollout is of the weights of then."""
    seen, begun = [], set()

    def name(raw, key):
        return int(raw["n"][0]), jax.random.key_data(key).tobytes()

    def ahead(state, raw, key):
        begun.add(name(raw, key))
        assert len(begun) <= staleness
        return int(state.step), name(raw, key)

    def prepare(state, raw, key, early):
        step, early_name = early or (None, name(raw, key))
        assert early_name == name(raw, key)
        begun.discard(early_name)
        seen.append(step)
        return raw

    stage = STAGE._replace(prepare=prepare, ahead=ahead)
    for updates in (before, after):
        steps = len(before) + (len(after) if updates is after else 0)
        config = defaults.stage("policy", steps=steps, batch_size=1)
        config.staleness = staleness
        data = Dataset([({"n": np.arange(4)}, 1)], seed=0)
        key = jax.random.key(0)
        train.train(stage, config, data, tmp_path, name="x", key=key)
        assert seen == updates and not begun
        seen.clear()


def test_a_failure_after_the_last_step_costs_no_training(tmp_path):
    seen = []

    def fails(state):
        seen.append(int(state.step))
        raise RuntimeError("no memory")

    def finish(state):
        seen.append(int(state.step))
        model = jax.tree.map(lambda x: x * 10, state.model)
        return state._replace(model=model), {"reward_mean": 1.0}

    for _ in range(2):
        with pytest.raises(RuntimeError):
            trained(tmp_path, fails)
    state, _ = trained(tmp_path, finish)
    assert seen == [STEPS] * 3
    assert state.model["policy"]["w"].tolist() == [10.0 * STEPS] * 2
    assert not (tmp_path / "unconcluded").exists()
    # What was concluded is what is saved, and it is concluded once.
    state, _ = trained(tmp_path, finish)
    assert seen == [STEPS] * 3
    assert state.model["policy"]["w"].tolist() == [10.0 * STEPS] * 2
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert lines.count("reward_mean") == 1
