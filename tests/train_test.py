"""The loop keeps what was trained, whatever fails or is asked of it between steps."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, masked, metrics, process, train
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


def test_a_failure_after_the_last_step_costs_no_training(tmp_path, monkeypatch):
    seen, steps, real_update = [], [], train._Loop.update

    def update(self, key):
        steps.append(self.step)
        return real_update(self, key)

    monkeypatch.setattr(train._Loop, "update", update)

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
    assert seen == [STEPS] * 3 and steps == [*range(STEPS)]
    assert state.model["policy"]["w"].tolist() == [10.0 * STEPS] * 2
    assert not (tmp_path / "unconcluded").exists()
    # What was concluded is what is saved, and it is concluded once.
    state, _ = trained(tmp_path, finish)
    assert seen == [STEPS] * 3
    assert state.model["policy"]["w"].tolist() == [10.0 * STEPS] * 2
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert lines.count("reward_mean") == 1


@pytest.mark.parametrize(
    ("part", "at"),
    [("evaluate", 2), ("evaluate", STEPS), ("sample", 2), ("sample", STEPS)]
    + [("finish", STEPS)],
)
def test_asked_to_stop_between_steps_it_goes_no_further(tmp_path, part, at):
    """The step is saved; what was under way is done by the command that goes on."""
    seen = []

    def ask(now, step):
        seen.append((now, int(step)))
        if (now, int(step)) == (part, at) and stops:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(state, raw, key):
        ask("evaluate", state.step)
        return {"rows": masked.Mean.of(jnp.ones(1))}

    def sample(model, step):
        ask("sample", step)
        return [{"prompt": "p", "completion": "c"}]

    def finish(state):
        ask("finish", state.step)
        return state, {"reward_mean": 1.0}

    config = defaults.stage("reward", steps=STEPS, batch_size=1)
    config.every.update(save=0, eval=1, sample=1)
    data = Dataset([({"n": np.arange(4)}, 1)], seed=0)
    heldout = Dataset([({"n": np.arange(2)}, 1)], seed=0)
    hooks = train.Hooks(heldout, sample, finish)

    def go_on(folder):
        stage, key = STAGE._replace(evaluate=evaluate), jax.random.key(0)
        train.train(stage, config, data, folder, name="x", key=key, hooks=hooks)

    stops = True
    with pytest.raises(process.Stopped, match=f"saved at step {at} of {STEPS}"):
        go_on(tmp_path / "run")
    assert seen[-1] == (part, at)
    stops = False
    seen.clear()
    go_on(tmp_path / "run")
    assert seen[0][1] == at  # no step is trained again
    go_on(tmp_path / "straight")
    files = [
        metrics.read(tmp_path / where / "metrics.jsonl")
        for where in ("run", "straight")
    ]
    for row in files[0] + files[1]:
        row.pop("seconds")
    assert files[0] == files[1]
