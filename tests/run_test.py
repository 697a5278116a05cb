"""Running a graph: resuming, killing, changing things behind its back."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from stagecraft import defaults, metrics, process, run, schema, storage, train
from stagecraft import losses as loss_functions
from stagecraft.anatomy import summary
from stagecraft.errors import UserError

ROOT = Path(__file__).parent.parent

SMALL = dict(
    width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ff_width=32, max_length=32
)

SCRIPT = """
from stagecraft import defaults

def get_config(arg=""):
    c = defaults.experiment()
    c.mesh.data = 1
    c.tokenizer.files = c_files = "{text}"
    c.tokenizer.vocab_size = 320
    c.model.update({model})
    c.stages.pretrain = defaults.stage(
        "language_model",
        data=dict(files=c_files, length=16),
        steps={steps}, batch_size=8,
        optimizer=dict(warmup_steps=2, lr=1e-2),
        every=dict(log=1, save=5),
    )
    return c
"""


def sentences(folder):
    path = folder / "text.txt"
    words = ["the", "cat", "sat", "on", "mats", "and", "then", "ran", "far", "away"]
    path.write_text(
        "\n\n".join(
            " ".join(words[(i * j) % len(words)] for j in range(1, 40)) + f" {i}."
            for i in range(200)
        )
    )
    return path


@pytest.fixture
def text(tmp_path):
    return sentences(tmp_path)


def config_for(text, steps=20):
    scope = {}
    exec(SCRIPT.format(text=text, model=SMALL, steps=steps), scope)
    return scope["get_config"]()


def losses(root):
    rows = metrics.read(root / "pretrain" / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def launch(script, root, stderr=subprocess.DEVNULL):
    command = [sys.executable, "-m", "stagecraft", "run", f"--config={script}"]
    return subprocess.Popen(
        [*command, f"--workdir={root}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def test_a_stage_samples_apart_from_training(text, tmp_path):
    c = config_for(text, steps=3)
    c.mesh.data = 8
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"the cat {i}"} for i in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c.stages.grpo = defaults.stage(
        "group_policy",
        start_from="pretrain",
        data=dict(files=str(prompts)),
        verifiers="length",
        verifier_args=dict(most=3),
        sampling=dict(max_new_tokens=4),
        **dict(steps=3, batch_size=4, group_size=2, staleness=1),
        mesh=dict(data=4),
        rollout_mesh=dict(devices=2),
        optimizer=dict(warmup_steps=0),
        every=dict(log=1),
    )
    c.measure.prompts = 0
    run.run(c, tmp_path / "run")
    rows = metrics.read(tmp_path / "run" / "grpo" / "metrics.jsonl")
    ages = [row["sampling/staleness"] for row in rows if "loss" in row]
    assert ages == [0, 1, 1]


def test_killed_and_run_again_equals_uninterrupted(text, tmp_path):
    straight = tmp_path / "straight"
    run.run(config_for(text, 200), straight)
    script = tmp_path / "small.py"
    script.write_text(SCRIPT.format(text=text, model=SMALL, steps=200))
    root = tmp_path / "killed"
    for least in (7, 60):
        command = launch(script, root)
        deadline = time.time() + 120
        while time.time() < deadline and command.poll() is None:
            found = losses(root)
            if found and found[-1][0] >= least:
                break
            time.sleep(0.01)
        assert command.poll() is None, "it ended before it could be killed"
        command.send_signal(signal.SIGKILL)
        command.wait()
    assert launch(script, root).wait(timeout=200) == 0
    assert losses(root) == losses(straight)
    summaries = [
        storage.read_json(where / "summary.json") for where in (root, straight)
    ]
    for found in summaries:
        found.pop("seconds")
    assert summaries[0] == summaries[1]


def test_a_half_written_checkpoint_is_ignored(text, tmp_path):
    root = tmp_path / "run"
    run.run(config_for(text, 10), root)
    expected = losses(root)
    folder = root / "pretrain"
    # As if the process had died while it wrote step 10: only step 5 is whole.
    other = tmp_path / "other"
    run.run(config_for(text, 10), other)
    checkpoints = folder / "checkpoints"
    (checkpoints / "10").rename(checkpoints / "10.orbax-checkpoint-tmp-0")
    info = storage.read_json(folder / "stage.json")
    storage.write_json(folder / "stage.json", info | {"finished": False})
    run.run(config_for(text, 10), root)
    assert losses(root) == expected


def test_a_second_run_changes_nothing(text, tmp_path):
    root = tmp_path / "run"
    run.run(config_for(text, 5), root)
    before = {p: p.read_bytes() for p in root.rglob("*.json*")}
    run.run(config_for(text, 5), root)
    assert before == {p: p.read_bytes() for p in root.rglob("*.json*")}


def test_another_config_is_refused(text, tmp_path):
    root = tmp_path / "run"
    run.run(config_for(text, 5), root)
    other = config_for(text, 5)
    other.stages.pretrain.optimizer.lr = 0.5
    with pytest.raises(UserError, match=r"another config .*lr: 0.01 -> 0.5"):
        run.run(other, root)
    # How often it logs and on how many devices it runs is no part of the experiment.
    same = config_for(text, 5)
    same.stages.pretrain.every.log = 3
    same.mesh.data = 2
    run.run(same, root)


def test_changed_data_is_refused(text, tmp_path):
    root = tmp_path / "run"
    run.run(config_for(text, 5), root)
    folder = root / "pretrain"
    info = storage.read_json(folder / "stage.json")
    storage.write_json(folder / "stage.json", info | {"finished": False})
    text.write_text(text.read_text() + "\n\nanother line")
    with pytest.raises(UserError, match="its data changed since the stage began"):
        run.run(config_for(text, 5), root)


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
    config = config_for(text, 20)
    config.stages.pretrain.optimizer.lr = 1e30
    config.stages.pretrain.optimizer.clip_norm = 0.0
    with pytest.raises(UserError, match=r"pretrain: \w+ is (nan|inf) at step"):
        run.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "pretrain" / "not_finite.npz").exists()


def test_only_needs_its_parents(tmp_path, text):
    config = config_for(text, 5)
    with pytest.raises(UserError, match="--only.*did you mean 'pretrain'"):
        run.run(config, tmp_path / "run", only=("pretrian",))
    rows = [{"prompt": f"say {i}", "completion": "the cat"} for i in range(40)]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config.stages.sft = defaults.stage(
        "language_model",
        start_from="pretrain",
        data=dict(format="demonstrations", files=str(answers), length=32),
        steps=2,
        batch_size=4,
        optimizer=dict(warmup_steps=0),
    )
    with pytest.raises(UserError, match="sft needs pretrain, which is not finished"):
        run.run(config, tmp_path / "run", only=("sft",))
    run.run(config, tmp_path / "run", only=("pretrain",))
    found = run.run(config, tmp_path / "run", only=("sft",))
    assert 0 < found["weights"]["sft"]["relative_change"] < 1


def test_lineage_names_what_a_stage_came_from(tiny_run):
    stages = storage.read_json(tiny_run / "lineage.json")["stages"]
    assert stages["ppo"]["parents"]["reward_from"]["id"] == stages["reward"]["id"]
    assert stages["dpo"]["parents"]["reference_from"]["stage"] == "sft"
    assert stages["dpo"]["data"] == stages["reward"]["data"]
    assert len({s["id"] for s in stages.values()}) == len(stages)


def test_the_summary_of_the_graph(tiny_run):
    found = storage.read_json(tiny_run / "summary.json")
    for key in (
        "pretrain.cloze_accuracy",
        "pretrain.copy_probability",
        "pretrain.answer_rate",
        "sft.heldout_accuracy",
        "sft_scratch.heldout_accuracy",
        "reward.pair_accuracy",
        "reward.label_accuracy",
        "ppo.gold_win_rate",
        "dpo.gold_mean",
        "dpo.kl",
        "ppo.eos_rate",
        "ppo_hard.reward_mean",
        "weights.sft.relative_change",
        "weights.dpo.by_kind.query.unchanged_bf16",
        "cost.ppo.share",
        "cost.comparisons.share",
        "seconds.total",
    ):
        node = found
        for part in key.split("."):
            node = node[part]
        assert isinstance(node, float), key
    page = (tiny_run / "report.html").read_text()
    assert "ppo_hard" in page and "data-library" not in page


def test_seconds_are_split(tiny_run):
    info = storage.read_json(tiny_run / "ppo" / "stage.json")
    seconds = info["seconds"]
    assert {"compile", "sample", "score", "update", "save", "total"} <= seconds.keys()
    parts = sum(v for k, v in seconds.items() if k != "total")
    assert parts == pytest.approx(seconds["total"], rel=0.01, abs=0.02)


def test_a_run_stopped_before_its_tokenizer_is_one_line(tmp_path):
    config = schema.plain(defaults.experiment())
    storage.write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match="no tokenizer here.*same command goes on"):
        run.open_run(tmp_path)


# What looks at a step

STEPS = 10


class Crash(Exception):
    pass


def watched(text):
    c = config_for(text, STEPS)
    stage = c.stages.pretrain
    stage.ema_decay = 0.9
    stage.data.heldout_share = 0.1
    stage.every.update(dict(eval=5, sample=5))
    return c


def rows(root, name="metrics.jsonl"):
    found = metrics.read(root / "pretrain" / name)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of the same text that nothing disturbed."""
    root = tmp_path_factory.mktemp("watched")
    run.run(watched(sentences(root)), root / "run")
    return root / "run"


@pytest.mark.parametrize(
    ("part", "at"),
    # What fails in an update has looked at the step before it already.
    [(part, at) for part in ("sample", "evaluate") for at in (5, STEPS)]
    + [("update", 5)],
)
def test_nothing_that_looks_at_a_step_loses_it(text, tmp_path, straight, part, at):
    """A rerun evaluates and samples that very step, and trains no step again."""
    root, seen = tmp_path / "run", []

    def sampler(real):
        def crash(model, step):
            if step == at:
                raise Crash
            return real(model, step)

        return crash

    def evaluate(stage, state, *arguments):
        if int(state.step) == at:
            raise Crash
        return real_evaluate(stage, state, *arguments)

    def stops(self, key):
        if self.step == at:
            raise Crash
        return real_update(self, key)

    real_sampler, real_evaluate = run._sampler, train.evaluate
    real_update = train._Loop.update
    with pytest.MonkeyPatch.context() as patch:
        if part == "update":
            patch.setattr(train._Loop, "update", stops)
        elif part == "sample":
            patch.setattr(run, "_sampler", lambda *a: sampler(real_sampler(*a)))
        else:
            patch.setattr(train, "evaluate", evaluate)
        with pytest.raises(Crash):
            run.run(watched(text), root)
    assert [p.name for p in (root / "pretrain" / "checkpoints").iterdir()] == [str(at)]

    def update(self, key):
        seen.append(self.step)
        return real_update(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Loop, "update", update)
        run.run(watched(text), root)
    assert seen == [*range(at, STEPS)]
    assert rows(root) == rows(straight)
    assert rows(root, "samples.jsonl") == rows(straight, "samples.jsonl")
    ends = [storage.read_json(where / "summary.json") for where in (root, straight)]
    for one in ends:
        one.pop("seconds")
    assert ends[0] == ends[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_the_step_and_goes_on(text, tmp_path, straight, number):
    root, real_update = tmp_path / "run", train._Loop.update

    def update(self, key):
        if self.step == 7:  # in the middle of the eighth step
            os.kill(os.getpid(), number)
        return real_update(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Loop, "update", update)
        with pytest.raises(process.Stopped) as stop:
            run.run(watched(text), root)
    assert stop.value.signal == number
    assert f"pretrain is saved at step 8 of {STEPS}" in stop.value.text
    assert [p.name for p in (root / "pretrain" / "checkpoints").iterdir()] == ["8"]
    assert signal.getsignal(number) is not None  # that of before
    run.run(watched(text), root)
    assert rows(root) == rows(straight)


def test_asked_twice_it_stops_at_once(text, tmp_path):
    real_update = train._Loop.update

    def update(self, key):
        for _ in range(2 if self.step == 7 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return real_update(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Loop, "update", update)
        with pytest.raises(KeyboardInterrupt) as stop:
            run.run(watched(text), tmp_path / "run")
    assert not stop.value.text
    steps = (tmp_path / "run" / "pretrain" / "checkpoints").iterdir()
    assert [p.name for p in steps] == ["5"]


def test_a_step_is_saved_when_the_last_save_is_old(text, tmp_path, monkeypatch):
    saved, real_save = [], train._Loop.save
    clock = types.SimpleNamespace(monotonic=lambda: 60.0 * clock.minutes, minutes=0)
    real_update = train._Loop.update

    def update(self, key):
        clock.minutes += 1
        return real_update(self, key)

    def save(self):
        saved.append(self.step)
        return real_save(self)

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train._Loop, "update", update)
    monkeypatch.setattr(train._Loop, "save", save)
    c = watched(text)
    c.stages.pretrain.every.save = 0
    run.run(c, tmp_path / "run")
    assert saved == [*range(5, STEPS, 5), STEPS]
    assert c.stages.pretrain.every.save_minutes == 5


def test_a_command_that_is_stopped_says_so(text, tmp_path):
    """Another process, asked by SIGTERM: one line, and the status launchers know."""
    script, root = tmp_path / "small.py", tmp_path / "run"
    script.write_text(SCRIPT.format(text=text, model=SMALL, steps=100_000))
    command = launch(script, root, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while time.time() < deadline and command.poll() is None and not losses(root):
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    _, errors = command.communicate(timeout=100)
    assert command.returncode == 128 + signal.SIGTERM
    last = errors.decode().splitlines()[-1]
    (step,) = [p.name for p in (root / "pretrain" / "checkpoints").iterdir()]
    assert last == (
        f"stagecraft: stopped; pretrain is saved at step {step} of 100000; the same "
        "command goes on from there"
    )


def test_a_line_is_the_mean_over_the_steps_since_the_last(text, tmp_path, straight):
    """Also across a stop between two lines."""
    c, root = watched(text), tmp_path / "run"
    c.stages.pretrain.every.log = 4
    real_update = train._Loop.update

    def update(self, key):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real_update(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Loop, "update", update)
        with pytest.raises(process.Stopped):
            run.run(c, root)
    run.run(c, root)
    each = {row["step"]: row for row in rows(straight) if "loss" in row}
    lines = {row["step"]: row for row in rows(root) if "loss" in row}
    assert list(lines) == [1, *range(4, STEPS, 4), STEPS]
    start = 0
    for step, line in lines.items():
        steps = [each[number] for number in range(start + 1, step + 1)]
        for key, value in line.items():
            if key in ("step", "learning_rate", "num_tokens"):
                assert value == each[step][key]
            else:
                mean = np.mean([row[key] for row in steps])
                assert value == pytest.approx(mean, rel=1e-12), key
        start = step


def test_held_out_rows_are_looked_at_ten_times(text, tmp_path):
    c = watched(text)
    c.stages.pretrain.every.eval = defaults.every().eval
    c.stages.pretrain.steps = 23
    run.run(c, tmp_path / "run")
    steps = [row["step"] for row in rows(tmp_path / "run") if "eval_loss" in row]
    assert steps == [*range(2, 23, 2), 23]


def test_figures_are_of_the_model_that_is_saved(text, straight):
    """The last eval_loss, recomputed by numpy from what lies in the folder."""
    this = run.open_run(straight)
    with jax.set_mesh(this.mesh()):
        model, total, count = this.model("pretrain"), 0.0, 0
        for batch in run.data_of(this, "pretrain").heldout.epoch(8):
            targets, mask = loss_functions.shift(
                *(batch[k] for k in ("ids", "mask", "segments"))
            )
            logits = model.logits(*(batch[k] for k in ("ids", "positions", "segments")))
            logits = np.asarray(logits, np.float64)
            logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            logps = np.take_along_axis(logps, np.asarray(targets)[..., None], -1)
            total -= logps[..., 0][np.asarray(mask)].sum()
            count += int(mask.sum())
    told = summary._last_evaluation(this, "pretrain")["eval_loss"]
    assert told == pytest.approx(total / count, rel=1e-5)
    # The weights that were trained are elsewhere by now.
    last = [row["loss"] for row in rows(straight) if "loss" in row][-1]
    assert abs(told - last) > 0.05


def test_num_tokens_adds_up_what_is_no_padding(text, straight):
    this = run.open_run(straight)
    with jax.set_mesh(this.mesh()):
        data = run.data_of(this, "pretrain").dataset
        each = [(data.batch_at(n)["segments"] > 0).sum() for n in range(STEPS)]
    told = [row["num_tokens"] for row in rows(straight) if "num_tokens" in row]
    assert told == np.cumsum(each).tolist()
    work = storage.read_json(straight / "pretrain" / "stage.json")["tokens"]
    assert work == {"trained": STEPS * 8 * 16, "context": 8.5}
