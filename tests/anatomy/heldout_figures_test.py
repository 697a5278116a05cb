"""Figures on a user's own data: held-out prompts, answered and scored by the run."""

import json
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from stagecraft import defaults, run
from stagecraft.anatomy import heldout_figures
from stagecraft.anatomy.heldout_figures import Asked
from tests.anatomy.world_figures_test import World as Stages
from tests.anatomy.world_figures_test import stage

ASKED = [Asked({"prompt": str(i), "answer": str(i % 5)}, ("grpo",)) for i in range(500)]


def value(completions, **_):
    """The number itself; none for 0."""
    return [float(text) if text != "0" else None for text in completions]


def right(completions, answer):
    """Whether it is the record's answer."""
    pairs = zip(completions, answer, strict=True)
    return [float(text == one) for text, one in pairs]


class Own(Stages):
    """A finished run whose stages answer numbers, without a world."""

    models = {"sft": (0, 1, 3), "dpo": (1, 3, 4), "grpo": (1, 3, 4)}

    def __init__(self, stages):
        super().__init__(stages)
        self.config.world = {"name": ""}
        self.config.model = {"max_length": 64}


@pytest.fixture
def measured(monkeypatch):
    """Measures {name: (kind, start_from, reward_from)}, `value` for grpo."""
    monkeypatch.setattr(
        heldout_figures.sampled.scores,
        "of_rows",
        lambda factor, rows, **_: np.array([factor * row[1] for row in rows]),
    )

    def measure(stages, verifiers=value):
        stages = {
            name: stage(kind, start) | ({"reward_from": reward} if reward else {})
            for name, (kind, start, reward) in stages.items()
        }
        if "grpo" in stages:
            own = {"verifiers": verifiers, "verifier_args": {}, "reward_from": ""}
            stages["grpo"] |= own
        return heldout_figures.measure(Own(stages), ASKED)

    return measure


SFT = {"sft": ("language_model", "", "")}
DPO = {"dpo": ("preference", "sft", "")}
GRPO = {"grpo": ("group_policy", "sft", "")}
REWARD = {"reward": ("reward", "sft", "")}
EXACT = float(np.mean(0.5 + 0.5 * np.sign(np.subtract.outer((1, 3, 4), (0, 1, 3)))))


def test_the_runs_own_reward_model_scores_and_wins(measured):
    figures = measured(SFT | REWARD | DPO)
    assert figures.keys() == {"sft", "dpo"}
    dpo, sft = figures["dpo"], figures["sft"]
    assert dpo["reward_mean"] == pytest.approx(10 * 8 / 3, rel=0.03)
    assert dpo["reward_mean_by"] == "reward"
    # Of independent samples; with random numbers in common dpo always wins.
    assert dpo["reward_win_rate"] == pytest.approx(EXACT, abs=0.03)
    assert "reward_win_rate" not in sft and "kl" not in sft
    assert dpo["kl"] == 0.5 and dpo["length"] == 2.0 and dpo["entropy"] == 0.5
    assert dpo["eos_rate"] == 1.0 and dpo["distinct"] == 3 / 500
    assert dpo["draws"]["count"] == 4
    assert dpo["draws"]["standard_error"]["reward_win_rate"] > 0
    assert dpo["n"]["reward_win_rate"] == 500


def test_verifiers_score_and_win_where_there_is_no_reward_model(measured):
    """None is no reward of 0: neither in the mean nor in a win."""
    figures = measured(SFT | GRPO)
    assert figures["sft"]["verifier_value"] == pytest.approx(2.0, rel=0.05)
    assert figures["grpo"]["verifier_value"] == pytest.approx(8 / 3, rel=0.03)
    sides = np.sign(np.subtract.outer((1, 3, 4), (1, 3)))
    exact = np.mean(0.5 + 0.5 * sides)
    assert figures["grpo"]["reward_win_rate"] == pytest.approx(exact, abs=0.03)
    assert "reward_mean" not in figures["grpo"]
    figures = measured(SFT | GRPO, right)["grpo"]
    assert figures["verifier_right"] == pytest.approx(3 / 15 * 1.0, abs=0.03)


def test_a_verifier_that_fails_at_the_end_loses_nothing_else(measured, caplog):
    def broken(completions):
        raise ValueError("no network")

    figures = measured(SFT | GRPO, broken)["grpo"]
    assert figures["kl"] == 0.5 and "reward_win_rate" not in figures
    assert caplog.text.count("held-out answers are not scored") == 1


def test_prompts_of_all_stages_in_turn_each_once(tmp_path):
    """At most measure.prompts; those without room are left out."""
    tokenizer = types.SimpleNamespace(
        template=None, bos=None, eos=0, stops=(0,), encode=lambda text: list(text)
    )
    files = {
        "sft": [{"prompt": [{"role": "user", "content": text}]} for text in "abc"],
        "grpo": [{"prompt": "b", "answer": "B"}, {"prompt": "d" * 40}, {"prompt": "e"}],
    }
    stages = {n: ConfigDict({"kind": "preference", "start_from": ""}) for n in files}
    for name, records in files.items():
        heldout_figures.write(tmp_path / name, [*records, records[0]])
        lines = (tmp_path / name / heldout_figures.FILE).read_text().splitlines()
        assert [json.loads(line) for line in lines] == records
    config = dict(stages=stages, measure={"prompts": 4}, model={"max_length": 64})
    self = types.SimpleNamespace(
        root=tmp_path,
        config=ConfigDict(config),
        stages=list(files),
        tokenizer=tokenizer,
        finished=lambda name: True,
    )

    def texts():
        return [
            one.record["prompt"]
            if isinstance(one.record["prompt"], str)
            else one.record["prompt"][0]["content"]
            for one in heldout_figures.prompts(self)
        ]

    class Language:
        def __init__(self, *_):
            pass

        def encode(self, prompt, *, chat_format):
            return [0] * (len(prompt) if isinstance(prompt, str) else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heldout_figures, "Language", Language)
        assert texts() == ["a", "b", "c", "e"]
        asked = heldout_figures.prompts(self)
        assert asked[1].stages == ("grpo", "sft")
        assert asked[1].record["answer"] == "B"
        self.config.measure.prompts = 2
        assert texts() == ["a", "b"]
        self.config.measure.prompts = 0
        assert texts() == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Demonstrations, pairs and prompts of one's own through sft, reward and dpo."""
    folder = tmp_path_factory.mktemp("own")
    questions = [f"What comes after {i}?" for i in range(40)]

    def lines(name, records):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / name).write_text(text)
        return str(folder / name)

    demonstrations = lines(
        "demonstrations.jsonl",
        [{"prompt": q, "completion": f"{i + 1}."} for i, q in enumerate(questions)],
    )
    pairs = lines(
        "pairs.jsonl",
        [
            {"prompt": q, "chosen": f"{i + 1}.", "rejected": "No."}
            for i, q in enumerate(questions)
        ],
    )
    c = defaults.experiment()
    c.mesh.data = 1
    texts = [{"text": f"{q} The answer is {i + 1}."} for i, q in enumerate(questions)]
    c.tokenizer.files = lines("text.jsonl", texts)
    c.tokenizer.vocab_size = 300
    c.model.update(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ff_width=32)
    c.model.max_length = 160
    c.measure.draws, c.measure.prompts = 2, 3
    brief = dict(steps=2, batch_size=4, optimizer=dict(warmup_steps=0))
    shared = dict(heldout_share=0.1, length=64)
    c.stages.sft = defaults.stage(
        "language_model",
        data=dict(format="demonstrations", files=demonstrations, **shared),
        **brief,
    )
    for name, kind in (("reward", "reward"), ("dpo", "preference")):
        c.stages[name] = defaults.stage(
            kind,
            start_from="sft",
            data=dict(files=pairs, **shared),
            **brief,
        )
    return folder / "run", run.run(c, folder / "run"), questions


def test_a_run_on_own_data_is_measured_on_its_held_out_prompts(finished):
    root, summary, questions = finished
    expected = {
        *("reward_mean", "length", "entropy", "eos_rate", "words"),
        *("distinct", "distinct_2"),
    }
    assert expected <= summary["sft"].keys()
    assert expected | {"kl", "reward_win_rate"} <= summary["dpo"].keys()
    assert summary["dpo"]["n"]["kl"] == 3 and summary["dpo"]["n"]["eval_loss"] == 4
    assert summary["dpo"]["draws"]["count"] == 2
    lines = (root / "dpo" / "heldout.jsonl").read_text().splitlines()
    assert len(lines) == 4
    shown = json.loads((root / "prompt.json").read_text())
    assert shown["prompt"] in questions
    assert shown["answers"].keys() == {"sft", "dpo"}
    page = (root / "report.html").read_text()
    assert "Reward win rate" in page and shown["prompt"] in page


def test_a_held_out_prompt_is_in_no_row_that_is_trained_on(finished):
    root, *_ = finished
    record = json.loads((root / "sft" / "stage.json").read_text())
    lines = (root / "sft" / "heldout.jsonl").read_text().splitlines()
    assert record["data"]["documents"] == 40 - len(lines) == 36
