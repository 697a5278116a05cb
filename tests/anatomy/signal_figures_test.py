"""What stages learned from: counted, and held against the gold score."""

import json

import pytest

from stagecraft import defaults, runs
from stagecraft.anatomy import signal_figures

FACT = "What is the capital of France?"
RIGHT, OTHER = "The capital of France is Paris.", "The capital of France is Rome."
ROWS = [
    {"prompt": FACT, "chosen": RIGHT, "rejected": OTHER},
    {"prompt": FACT, "chosen": OTHER, "rejected": RIGHT, "preference": 0.8},
    {"prompt": FACT, "chosen": OTHER, "rejected": RIGHT, "preference": 0.5},  # a tie
    {"prompt": FACT, "chosen": "It is Rome.", "rejected": OTHER},  # gold's tie
    {"prompt": FACT, "chosen": OTHER, "rejected": RIGHT, "rejected_ended": False},
    {"prompt": FACT, "ranked": [RIGHT, "It is Paris.", OTHER]},
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose reward model, PPO and DPO are finished, on labels of people."""
    folder = tmp_path / "labels" / "sft"
    folder.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "records.jsonl").write_text("".join(lines[:-1]))
    (tmp_path / "ranked.jsonl").write_text(lines[-1])
    config = defaults.experiment()
    config.world.name = "countries"
    labels = dict(files="labels:sft")
    stage = defaults.stage
    config.stages.sft = stage("language_model")
    config.stages.reward = stage("reward", data=dict(files=f"{tmp_path}/ranked.jsonl"))
    config.stages.dpo = stage("preference", data=labels)
    config.stages.ppo = stage("policy", reward_from="reward")
    config.stages.gone = stage("preference", data=dict(files=f"{tmp_path}/gone.jsonl"))
    config.stages.outside = stage("policy", reward_from="elsewhere/reward")
    monkeypatch.setattr(runs.Run, "finished", lambda run, name: name != "waits")
    config.stages.waits = stage("preference", data=labels)
    return runs.Run(tmp_path, config, stages=list(config.stages))


def test_labels_are_counted_and_held_against_gold(run):
    figures = signal_figures.measure(run)
    # Three decide: right, wrong, and wrong again though the other was cut off.
    assert figures["dpo"] == {
        "labels": 5,
        "signal_accuracy": 1 / 3,
        "n": {"signal_accuracy": 3},
    }
    ranked = {"labels": 3, "signal_accuracy": 1.0, "n": {"signal_accuracy": 3}}
    assert figures["reward"] == figures["ppo"] == ranked
    assert figures["gone"] == {}
    assert {*figures} == {"dpo", "reward", "ppo", "gone"}
