"""What a stage is compared with in a world, and the figures of its samples."""

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from stagecraft import defaults, worlds
from stagecraft.anatomy import figures, roles, sampled, world_figures
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
    assert sampled.sft_model(Run(GRAPH), name) == base


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
    assert sampled.sft_model(run, "from_sft") == str(tmp_path / "sft")
    assert sampled.sft_model(run, "from_dpo") == str(tmp_path / "sft")
    assert sampled.sft_model(run, "from_half") is None
    assert sampled.sft_model(run, "from_gone") is None


def test_every_kind_that_writes_text_speaks():
    kinds = {one["kind"] for one in GRAPH.values()}
    assert {kind for kind in defaults.KINDS if roles.of(kind).speaks} == kinds


def test_every_figure_of_the_probes_has_a_row():
    countries = split(0).dev
    prompts = probes.heldout_prompts(0, countries, "dev")
    answers = [("Paris.", True)] * len(prompts)
    own, every = probes.sample_figures(prompts, answers), sampled.habits(answers)
    assert not own.keys() & every.keys()
    asked = {function.__name__ for function, _, _ in probes.PROBES}
    assert own.keys() | every.keys() | asked <= figures.BY_NAME.keys()
    assert len(figures.BY_NAME) == len(figures.FIGURES)


def test_no_two_figures_have_one_name():
    evaluations = ("eval_loss", "eval_entropy", "eval_accuracy", "eval_reward")
    names = dict.fromkeys([*figures.BY_NAME, *figures.SHORT, *evaluations])
    titles = [figures.figure(name).title for name in names]
    assert sorted(set(titles)) == sorted(titles)


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
    measured = sampled.length_and_entropy(ids, logps)
    length = 1 + 0.7 + 0.7**2  # a token more for each that did not end
    assert measured["length"] == pytest.approx(length, rel=0.01)
    assert measured["entropy"] == pytest.approx(-float(p @ np.log(p)), rel=0.01)


def test_silence_has_no_entropy():
    measured = sampled.length_and_entropy([[], []], [0.0, 0.0])
    assert measured == {"length": 0.0, "entropy": 0.0}
    certain = sampled.length_and_entropy([[1]], [0.0])
    assert math.copysign(1, certain["entropy"]) == 1


# -- draws of sampled answers ----------------------------------------------------------


class Numbers:
    """A language model that answers one of a few numbers, each as often."""

    tokenizer = types.SimpleNamespace(decode=lambda ids: str(ids[0]))
    seeds = []

    def __init__(self, numbers):
        self.numbers = numbers

    def encode(self, prompt, *, chat_format):
        return [int(prompt)]

    def stop_ids(self, *, chat_format):
        return (99,)

    def sample_ids(self, rows, *, seed, **settings):
        self.seeds.append(seed)
        uniform = np.random.default_rng(seed).random(len(rows))
        which = np.floor(uniform * len(self.numbers)).astype(int)
        return [([self.numbers[i], 99], True, -1.0) for i in which]

    def logprob_ids(self, rows):
        return [-1.5] * len(rows)


def wins(prompts, ones, twos):
    first, second = (np.array([float(text) for text, _ in x]) for x in (ones, twos))
    return float(np.mean(0.5 + 0.5 * np.sign(first - second)))


WORLD = types.SimpleNamespace(
    split=lambda *of: types.SimpleNamespace(test="test", train="train"),
    rate=lambda prompt, answers, rng: None,
    probes=types.SimpleNamespace(
        ANSWER=2,
        PROBES=[],
        OF_KNOBS=(),
        heldout_prompts=lambda seed, entities, split: [str(i) for i in range(1000)],
        sample_figures=lambda prompts, answers: {
            "gold_mean": float(np.mean([float(text) for text, _ in answers]))
        },
        win_rate=wins,
        pair_order=lambda prompts, ones, twos, order: None,
    ),
)


class World(Run):
    """A finished run whose stages answer numbers; reward models multiply them."""

    models = {"pretrain": (0,), "sft": (0, 1, 3), "dpo": (1, 3, 4)}
    models |= {"twin": (0, 1, 3), "ppo": (1, 3, 4)}

    def __init__(self, stages, draws=4):
        super().__init__(stages)
        self.stages = list(stages)
        self.config.seed = 7
        self.config.world = dict(name="numbers", size="full", entities=0)
        self.config.measure = dict(split="test", draws=draws)

    def finished(self, name):
        return True

    def language(self, name, rows):
        return Numbers(self.models[name])

    def model(self, name):
        return {"reward": 10.0, "zz_other": 1000.0}[name]


@pytest.fixture
def measured(monkeypatch):
    """Measures {name: (kind, start_from, reward_from)} in the world of numbers."""
    monkeypatch.setitem(worlds.WORLDS, "numbers", WORLD)
    monkeypatch.setattr(
        sampled.scores,
        "of_rows",
        lambda factor, rows: np.array([factor * row[1] for row in rows]),
    )

    def measure(stages, draws=4):
        Numbers.seeds = []
        stages = {
            name: stage(kind, start) | ({"reward_from": reward} if reward else {})
            for name, (kind, start, reward) in stages.items()
        }
        return world_figures.measure(World(stages, draws))

    return measure


SFT = {"sft": ("language_model", "", "")}
DPO = {"dpo": ("preference", "sft", "")}
TWIN = {"twin": ("preference", "sft", "")}
REWARDS = {"zz_other": ("reward", "sft", ""), "reward": ("reward", "sft", "")}


def test_win_rates_are_of_independent_samples(measured):
    """P(A > B) by hand, .778; with random numbers in common A always wins, 1."""
    figures = measured(SFT | DPO | TWIN)
    ones, twos = np.meshgrid((1, 3, 4), (0, 1, 3))
    exact = np.mean(0.5 + 0.5 * np.sign(ones - twos))
    assert exact == pytest.approx(7 / 9)
    assert figures["dpo"]["gold_win_rate"] == pytest.approx(exact, abs=0.02)
    # A model against itself: .5, but not because every answer is the same.
    assert figures["twin"]["gold_win_rate"] == pytest.approx(0.5, abs=0.02)
    assert figures["twin"]["gold_win_rate"] != 0.5
    assert "gold_win_rate" not in figures["sft"]


def test_every_draw_has_a_seed_of_its_own(measured):
    measured(SFT | DPO | TWIN)
    assert len(Numbers.seeds) == len(set(Numbers.seeds)) == 3 * 4
    names = ("sft", "dpo", "/runs/a/sft", "sft_seed1")
    seeds = {
        sampled.draw_seed(seed, name, draw)
        for seed in (0, 1)
        for name in names
        for draw in range(4)
    }
    assert len(seeds) == 2 * 4 * 4 and all(0 <= one < 2**31 for one in seeds)
    # Wherever the other run lies; and fixed, so that a figure can be had again.
    one, two = (sampled.draw_seed(0, f"/{x}/sft", 0) for x in "ab")
    assert one == two and sampled.draw_seed(0, "sft", 0) == 409061519


def test_answers_do_not_depend_on_other_stages(measured):
    alone, among = measured(SFT | DPO), measured(SFT | TWIN | DPO | REWARDS)
    for key in ("gold_mean", "gold_win_rate", "kl", "length"):
        assert alone["dpo"][key] == among["dpo"][key]


def test_sampled_figures_are_means_over_draws(measured):
    figures, draws = measured(SFT | DPO)["dpo"], []
    for draw in range(4):
        seed = sampled.draw_seed(7, "dpo", draw)
        samples = Numbers((1, 3, 4)).sample_ids([0] * 1000, seed=seed)
        draws.append(np.mean([ids[0] for ids, *_ in samples]))
    assert figures["gold_mean"] == pytest.approx(np.mean(draws))
    error = figures["draws"]["standard_error"]
    assert error["gold_mean"] == pytest.approx(np.std(draws, ddof=1) / 2)
    assert figures["draws"]["count"] == 4 and figures["kl"] == 0.5
    assert figures["eos_rate"] == 1.0 and figures["distinct"] == 3 / 1000
    numbers = {key for key, value in figures.items() if isinstance(value, float)}
    assert numbers == error.keys()
    one = measured(SFT | DPO | REWARDS, draws=1)["dpo"]
    assert one["draws"] == {"count": 1, "standard_error": {}}
    assert one["n"] == dict.fromkeys(numbers | {"reward_mean"}, 1000)


def test_a_policy_is_scored_by_the_reward_model_it_was_trained_on(measured):
    ppo = {"ppo": ("policy", "sft", "reward")}
    figures = measured(SFT | REWARDS | ppo | DPO)
    mean = figures["ppo"]["gold_mean"]
    assert figures["ppo"]["reward_mean"] == pytest.approx(10 * mean)
    assert figures["ppo"]["reward_mean_by"] == "reward"
    # Trained on none: the first reward stage of the graph on the same base.
    mean = figures["dpo"]["gold_mean"]
    assert figures["dpo"]["reward_mean"] == pytest.approx(1000 * mean)
    assert figures["dpo"]["reward_mean_by"] == "zz_other"
    assert "reward_mean" not in measured(SFT | DPO)["dpo"]


def test_a_reward_model_without_an_order_has_no_figure(measured):
    """Every pair a tie by gold: left out, and no NaN."""
    assert "pair_accuracy" not in measured(SFT | REWARDS)["reward"]


def test_a_knob_asks_the_formats_it_is_for_where_it_is_on(measured, monkeypatch):
    def knob(name):
        return lambda language, entities, role: ({name: 1.0}, {name: len(entities)})

    knobs = (
        ("size", knob("of_both"), ("text", "chat")),
        ("size", knob("of_turns"), ("chat",)),
        ("entities", knob("off"), ("text", "chat")),
    )
    monkeypatch.setattr(WORLD.probes, "OF_KNOBS", knobs)
    pretrain = {"pretrain": ("language_model", "", "")}
    monkeypatch.setattr(World, "chat_format", lambda self, name: name != "pretrain")
    own = measured(pretrain | SFT)
    assert own["pretrain"] == {"of_both": 1.0, "n": {"of_both": len("test")}}
    assert own["sft"]["of_both"] == own["sft"]["of_turns"] == 1.0
    assert not {"off"} & own["sft"].keys()
