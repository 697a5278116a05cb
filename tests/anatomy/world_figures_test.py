"""What a stage is compared with in a world, and the figures of its samples."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from stagecraft import defaults
from stagecraft.anatomy import figures, roles, world_figures
from stagecraft.models import locate
from stagecraft.worlds.countries import probes
from stagecraft.worlds.countries.facts import split


class Run:
    """What `sft_model` asks of a run."""

    def __init__(self, stages, root=Path()):
        self.config = ConfigDict({"stages": stages})
        self.root = root

    def source(self, name):
        return locate.locate(name, self.root, self.config.stages)

    def chat_format(self, name):
        if name in self.config.stages:
            return self.config.stages[name]["format"] != "text"
        return json.loads((Path(name) / "stage.json").read_text())["format"] != "text"


def stage(kind, start_from="", form="chat"):
    return {"kind": kind, "start_from": start_from, "format": form}


GRAPH = {
    "pretrain": stage("language_model", form="text"),
    "sft": stage("language_model", "pretrain"),
    "dpo": stage("preference", "sft"),
    "dpo_2": stage("online_preference", "dpo"),
    "kto": stage("unpaired_preference", "dpo_2"),
    "grpo": stage("group_policy", "kto"),
    "ppo": stage("policy", "sft"),
    "best": stage("language_model", "sft"),
    "after_best": stage("preference", "best"),
    "scratch": stage("language_model"),
    "bare": stage("policy", "pretrain"),
}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        *(("dpo", "sft"), ("dpo_2", "sft"), ("kto", "sft"), ("grpo", "sft")),
        *(("ppo", "sft"), ("best", "sft"), ("after_best", "best")),
        *(("sft", None), ("pretrain", None), ("scratch", None), ("bare", None)),
    ],
)
def test_a_stage_is_compared_with_the_sft_model_above_it(name, base):
    assert world_figures.sft_model(Run(GRAPH), name) == base


def test_the_sft_model_may_be_another_runs(tmp_path):
    for name, kind, start in (
        ("sft", "language_model", "pretrain"),
        ("dpo", "preference", "sft"),
        ("half", "preference", "sft"),
    ):
        (tmp_path / name).mkdir()
        info = stage(kind, start) | {"finished": name != "half"}
        (tmp_path / name / "stage.json").write_text(json.dumps(info))
    stages = {
        name: stage("preference", str(tmp_path / name))
        for name in ("sft", "dpo", "half", "gone")
    }
    run = Run({f"from_{k}": v for k, v in stages.items()})
    assert world_figures.sft_model(run, "from_sft") == str(tmp_path / "sft")
    assert world_figures.sft_model(run, "from_dpo") == str(tmp_path / "sft")
    assert world_figures.sft_model(run, "from_half") is None
    assert world_figures.sft_model(run, "from_gone") is None


def test_every_kind_that_writes_text_speaks():
    kinds = {one["kind"] for one in GRAPH.values()}
    assert {kind for kind in defaults.KINDS if roles.of(kind).speaks} == kinds


def test_every_figure_of_the_probes_has_a_row():
    countries = split(0).dev
    prompts = probes.heldout_prompts(0, countries, "dev")
    samples = probes.sample_figures(prompts, [("Paris.", True)] * len(prompts))
    asked = {function.__name__ for function, _, _ in probes.PROBES}
    assert samples.keys() | asked <= figures.BY_NAME.keys()
    assert len(figures.BY_NAME) == len(figures.FIGURES)


def test_entropy_of_samples_is_that_of_the_distribution():
    """Answers of up to three tokens from a fixed distribution, the last ends them."""
    p = np.array([0.5, 0.2, 0.3])
    rng = np.random.default_rng(0)
    ids, logps = [], []
    for _ in range(20_000):
        row = []
        while len(row) < 3 and (not row or row[-1] != 2):
            row.append(int(rng.choice(3, p=p)))
        ids.append(row)
        logps.append(float(np.log(p[row]).sum()))
    measured = world_figures.length_and_entropy(ids, logps)
    length = 1 + 0.7 + 0.7**2  # a token more for each that did not end
    assert measured["length"] == pytest.approx(length, rel=0.01)
    assert measured["entropy"] == pytest.approx(-float(p @ np.log(p)), rel=0.01)


def test_silence_has_no_entropy():
    measured = world_figures.length_and_entropy([[], []], [0.0, 0.0])
    assert measured == {"length": 0.0, "entropy": 0.0}
    certain = world_figures.length_and_entropy([[1]], [0.0])
    assert math.copysign(1, certain["entropy"]) == 1
