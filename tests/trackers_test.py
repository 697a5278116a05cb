"""Trackers are told everything in order, never more than once, and can do no harm."""

import json
import logging
import sys
import types

import pytest

from stagecraft import defaults, experiment, metrics, run, trackers
from stagecraft.errors import UserError
from tests.conftest import load_experiment, single_device


class Recorder:
    """Notes every call of a tracker's module and of what it returns."""

    def __init__(self, calls, **values):
        self.calls, self.values = calls, values

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            found = self.values.get(name, Recorder(self.calls, **self.values))
            if isinstance(found, Exception):
                raise found
            return found

        return call


@pytest.fixture
def fake(monkeypatch):
    """fake("wandb", method=value) puts a module in its place; returns its calls."""

    def put(name, **values):
        calls = []
        module = Recorder(calls, **values)
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return put


def write(folder, names, steps=(1,)):
    told = trackers.watching(names, folder, name="run/sft", config={"seed": 3})
    with told as watch:
        writer = metrics.Writer(folder, watch=watch)
        for step in steps:
            writer.write(step, 0.0, {"loss": 1.0 / step})
        writer.write_samples(steps[-1], [{"prompt": "a", "completion": "b"}])
        writer.close()


def known(folder):
    return json.loads((folder / trackers.FILE).read_text())


def test_wandb_is_told_all_and_a_resumed_run_goes_on(fake, tmp_path):
    calls = fake("wandb")
    write(tmp_path, "wandb", steps=(1, 2))
    names = [name for name, _, _ in calls]
    assert names == ["init", "log", "log", "Table", "add_data", "log", "finish"]
    begun = calls[0][2]
    assert begun["project"] == "stagecraft" and begun["name"] == "run/sft"
    assert begun["config"] == {"seed": 3} and begun["resume"] == "allow"
    assert [c[1:] for c in calls[1:3]] == [
        (({"loss": 1.0},), {"step": 1}),
        (({"loss": 0.5},), {"step": 2}),
    ]
    assert calls[4][1] == ("a", "b") and calls[5][2] == {"step": 2}
    assert known(tmp_path) == {"wandb": begun["id"]}
    again = fake("wandb")
    write(tmp_path, "wandb")
    assert again[0][2]["id"] == begun["id"]


def test_trackio_goes_on_by_its_name(fake, tmp_path):
    calls = fake("trackio")
    write(tmp_path, "trackio")
    name = calls[0][2]["name"]
    assert name.startswith("run/sft-") and known(tmp_path) == {"trackio": name}
    assert calls[1] == ("log", ({"loss": 1.0},), {"step": 1})
    assert calls[2] == ("log", ({"samples/0": "b"},), {"step": 1})
    assert calls[-1][0] == "finish"
    again = fake("trackio")
    write(tmp_path, "trackio")
    assert again[0][2]["name"] == name and again[0][2]["resume"] == "allow"


def test_mlflow_gives_the_id_itself(fake, tmp_path):
    begun = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r7"))
    calls = fake("mlflow", start_run=begun)
    write(tmp_path, "mlflow")
    assert [name for name, _, _ in calls] == [
        *("set_experiment", "start_run", "log_dict", "log_metrics", "log_dict"),
        "end_run",
    ]
    assert calls[1][2] == {"run_name": "run/sft"}
    assert calls[3][1:] == (({"loss": 1.0},), {"step": 1})
    assert known(tmp_path) == {"mlflow": "r7"}
    again = fake("mlflow", start_run=begun)
    with trackers.watching("mlflow", tmp_path, name="run/sft", config={}) as watch:
        watch.scalars(1, {"loss": 1.0, "loss/policy": 2.0})
    assert again[-2][1] == ({"loss": 1.0, "loss.policy": 2.0},)
    assert again[1][2] == {"run_id": "r7"}
    assert "log_dict" not in [name for name, _, _ in again[:3]]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_one_that_fails_is_off_and_the_rest_goes_on(fake, tmp_path, caplog, where):
    calls = fake("wandb", **{where: RuntimeError("no\nnetwork")})
    other = fake("trackio")
    with caplog.at_level(logging.WARNING, logger="stagecraft"):
        write(tmp_path, "wandb,trackio", steps=(1, 2, 3))
    [said] = caplog.messages
    assert said == "wandb failed and is off from here on (no network)"
    assert [name for name, _, _ in calls].count(where) == 1
    assert [name for name, _, _ in other].count("log") == 4
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_runs_end_when_training_does_not(fake, tmp_path):
    calls = fake("wandb")
    watching = trackers.watching("wandb", tmp_path, name="r", config={})
    with pytest.raises(KeyError), watching:
        raise KeyError("training")
    assert calls[-1][0] == "finish"


def test_off_by_default(tmp_path):
    write(tmp_path, defaults.experiment().trackers)
    assert not (tmp_path / trackers.FILE).exists()


def test_names_are_checked_and_missing_packages_named(monkeypatch):
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        trackers.names("wandbb")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[mlflow\]'"):
        trackers.names("mlflow")


def test_a_run_may_be_resumed_with_another_tracker():
    plain = {"seed": 0, "trackers": ""}
    assert experiment.identity(plain) == experiment.identity({"seed": 0})


def test_a_stage_tells_its_tracker_what_it_writes(fake, tmp_path):
    calls = fake("wandb")
    config = single_device(load_experiment("quickstart").get_config("tiny"))
    config.trackers = "wandb"
    with config.unlocked():
        config.stages = {"pretrain": config.stages["pretrain"]}
    config.stages.pretrain.steps = 2
    config.stages.pretrain.every = {"log": 1, "sample": 2}
    run.run(config, tmp_path / "here")
    assert calls[0][2]["name"] == "here/pretrain"
    assert calls[0][2]["config"]["stage"] == "pretrain"
    rows = metrics.read(tmp_path / "here" / "pretrain" / "metrics.jsonl")
    logged = [(a[0], k["step"]) for n, a, k in calls if n == "log"]
    scalars = [(values, step) for values, step in logged if "samples" not in values]
    assert [step for _, step in scalars] == [row["step"] for row in rows]
    for (values, _), row in zip(scalars, rows, strict=True):
        assert values == {k: row[k] for k in row if k not in ("step", "seconds")}
    assert len(logged) == len(scalars) + 1 and calls[-1][0] == "finish"
