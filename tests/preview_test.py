"""What a run would do is said before it does it, and nothing is written."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from stagecraft import config_files, defaults, run, storage, tree
from stagecraft.errors import UserError
from stagecraft.preview import data, graph, plan
from stagecraft.preview.temporary import temporary
from tests.command_line import stagecraft
from tests.conftest import load_experiment, single_device


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path):
    """Text, demonstrations, pairs of files, and pairs that a stage writes; bytes."""
    c = single_device(defaults.experiment())
    c.tokenizer.path = "bytes"
    c.model.update(
        dict(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ff_width=32)
    )
    c.model.max_length = 64
    texts = write(tmp_path / "t.jsonl", [{"text": "x" * n} for n in (10, 30, 50, 90)])
    answers = [{"prompt": f"say {i}", "completion": f"{i}\tcats\x1b"} for i in range(8)]
    pairs = [
        {"prompt": "p", "chosen": "c" * n, "rejected": "r"} for n in (4, 8, 70, 80)
    ]
    shared = dict(batch_size=4, optimizer=dict(warmup_steps=0))
    c.stages.pretrain = defaults.stage(
        "language_model", data=dict(files=texts, length=32), steps=6, **shared
    )
    c.stages.sft = defaults.stage(
        "language_model",
        start_from="pretrain",
        data=dict(
            format="demonstrations",
            files=write(tmp_path / "a.jsonl", answers),
            length=48,
            packing="none",
        ),
        steps=3,
        **shared,
    )
    c.stages.reward = defaults.stage(
        "reward",
        start_from="sft",
        data=dict(files=write(tmp_path / "p.jsonl", pairs), length=48),
        steps=2,
        **(shared | dict(batch_size=2)),
    )
    c.stages.asked = defaults.stage(
        "comparisons",
        start_from="sft",
        rater="reward",
        reward_from="reward",
        data=dict(files=texts.replace("t.jsonl", "a.jsonl")),
        prompts=4,
        batch_size=4,
        sampling=dict(max_new_tokens=8),
    )
    c.stages.dpo = defaults.stage(
        "preference",
        start_from="sft",
        data=dict(files="stage:asked", length=48),
        steps=2,
        **shared,
    )
    return c


def shown(function, *arguments, **settings):
    out = io.StringIO()
    function(*arguments, file=out, **settings)
    return out.getvalue()


def section(text, name):
    """The lines about one stage."""
    return text.split(f"\n{name}  ")[1].split("\n\n")[0]


def test_rows_show_what_is_learned_and_every_control_character(config):
    text = section(shown(data.show, config, rows=8), "sft")
    for i in range(8):
        line = f"<|bos|><|user|>say {i}<|assistant|>⟦{i}␉cats␛<|end|>⟧"
        assert f"    {line}\n" in text + "\n"


def test_demonstrations_that_are_too_long_are_counted_once(config, tmp_path):
    rows = [{"prompt": "p", "completion": "c" * n} for n in (4, 6, 8, 90, 95)]
    c = config.stages.sft.data
    c.files = write(tmp_path / "long.jsonl", rows)
    text = section(shown(data.show, config, only=["sft"], rows=0), "sft")
    assert "5 documents read: 3 kept, 2 dropped" in text
    assert "documents 3," in text and "dropped 2," in text
    assert "40.0% are longer than data.length=48: dropped" in text
    c.too_long = "cut"
    text = section(shown(data.show, config, only=["sft"], rows=0), "sft")
    assert "5 documents read: 5 kept, 0 dropped" in text
    assert "40.0% fill data.length=48 or are cut there" in text


def test_on_a_terminal_what_is_learned_is_underlined(config):
    with temporary(config, None) as this:
        ids = np.array([258, 104, 105, 110, 111])
        learned = np.array([0, 0, 0, 1, 1], bool)
        console = Console(file=io.StringIO(), force_terminal=True)
        text = data.rendered(ids, learned, this.tokenizer, console)
    assert "⟦" not in text.plain and text.plain.endswith("hino")
    marked = [text.plain[s.start : s.end] for s in text.spans if "under" in s.style]
    assert marked == ["no"]


def test_counts_lengths_limits_and_epochs(config):
    text = shown(data.show, config, rows=0)
    pretrain = section(text, "pretrain")
    # bos and eos come to each text: 12, 32, 52 and 92 tokens in rows of 32.
    assert "4 documents read: 4 kept, 0 dropped" in pretrain
    assert "documents 4, tokens 188" in pretrain
    assert "min 12," in pretrain and "median 42," in pretrain and "max 92" in pretrain
    assert "50.0% are longer than data.length=32: split over rows" in pretrain
    assert "6 steps: 4.00 epochs, about 752 tokens" in pretrain  # of 6 rows
    reward = section(text, "reward")
    assert "4 pairs read: 2 kept, 2 dropped" in reward
    assert "50.0% are longer than data.length=48: dropped" in reward
    # bos, user, p, assistant, the answer, end.
    assert "min 6," in reward and "max 13" in reward
    assert "2 steps: 2.00 epochs" in reward
    assert "asks 4 prompts: 0.50 epochs" in section(text, "asked")
    assert "not there yet: asked" in section(text, "dpo")


def test_the_first_token_of_a_piece_is_not_learned(config):
    config.stages.pretrain.batch_size = 6  # all rows, of seven pieces
    text = shown(data.show, config, only=["pretrain"], rows=0)
    assert "a step: 6 rows, 188 tokens (181 learned) and 4 of padding" in text


def test_a_mixture_shows_its_shares(config, tmp_path):
    files = config.stages.pretrain.data.files
    more = write(tmp_path / "u.jsonl", [{"text": "y" * 20}] * 9)
    config.stages.pretrain.data.update(files=f"{files},{more}", shares=(3.0, 1.0))
    config.stages.pretrain.steps = 400
    text = section(shown(data.show, config, only=["pretrain"], rows=0), "pretrain")
    assert f"mixture: {files}: 75" in text and f"mixture: {more}: 2" in text


def test_one_stage_by_name(config):
    text = shown(data.show, config, only=["sft"], rows=0)
    assert "\nsft  " in text and "\npretrain  " not in text
    with pytest.raises(UserError, match="no such stage; did you mean 'sft'"):
        data.show(config, only=["sfd"])


def test_the_graph_has_every_edge():
    text = shown(graph.show, load_experiment("quickstart").get_config("tiny"))
    stages, indent, name = {}, {}, ""
    for line in text.splitlines():
        words = line.lstrip("│├└─ ")
        if ":" in words or words.startswith("records"):
            stages[name].append(words)
            continue
        name = words.split("  ")[0]
        stages[name], indent[name] = [], len(line) - len(words)
    assert stages["ppo"] == [
        "reference: sft",
        "reward: reward",
        "value: reward",
        "data: world:prompts.jsonl",
    ]
    assert stages["dpo"] == ["records of comparisons", "reference: sft"]
    assert stages["reward"] == ["records of comparisons"]
    # Children stand further right than what they start from.
    assert indent["pretrain"] == indent["sft_scratch"] < indent["sft"] < indent["dpo"]


def test_people_judges_and_constitutions_are_one_node_apart():
    graphs = []
    for signal in (
        dict(rater="world"),
        dict(rater="judge", judge_from="sft"),
        dict(rater="constitution", judge_from="sft", constitution="countries"),
    ):
        c = load_experiment("quickstart").get_config("tiny")
        c.stages.comparisons.update(signal)
        graphs.append(shown(graph.show, c).splitlines())
    people, judge, constitution = ({line.strip("│├└─ ") for line in g} for g in graphs)
    assert people - judge == {"rater: world"}
    assert judge - people == {"rater: judge", "judge: sft"}
    assert constitution - judge == {"rater: constitution", "constitution: countries"}


def test_the_plan_counts_what_the_run_then_does(config, tmp_path):
    """Parameters, bytes and FLOPs are those of the run's own records and ledger."""
    planned = {line["stage"]: line for line in plan.show(config)}
    root = tmp_path / "run"
    figures = run.run(config, root)
    done = run.open_run(root)
    for name in ("pretrain", "sft", "reward"):
        line = planned[name]
        assert line["flops"] == figures["cost"][name]["flops"]
        count = tree.count(done.model(name))
        assert line["parameters"] == line["trained"] == count
        # Two moments of AdamW beside each float32 parameter; counters of steps.
        assert 0 <= line["state_bytes"] - 12 * count < 64
        assert line["seconds"] > 0
    assert planned["asked"]["flops"] == figures["cost"]["asked"]["flops"]
    reward = tree.count(done.model("reward"))
    assert planned["asked"]["frozen_bytes"] == 4 * (reward + planned["sft"]["trained"])
    # Its pairs were not there: counted as rows of data.length.
    assert planned["dpo"]["step_tokens"] == 4 * 2 * 48
    assert planned["dpo"]["flops"] > 0

    # Afterwards the records are there, and what is finished is not planned again.
    before = {p: storage.digest(p.stat().st_mtime_ns) for p in root.rglob("*")}
    text = section(shown(data.show, config, root, ["dpo"]), "dpo")
    assert "chosen:" in text and "rejected:" in text
    assert plan.show(config, root) == []
    assert before == {p: storage.digest(p.stat().st_mtime_ns) for p in root.rglob("*")}
    config.seed = 1
    with pytest.raises(UserError, match="holds a run of another config"):
        data.show(config, root)


def test_a_dry_run_needs_no_workdir_and_refuses_what_a_run_refuses(tmp_path):
    folder = tmp_path / "x.py"
    folder.write_text(
        "from stagecraft import defaults\n"
        "def get_config(arg=''):\n"
        "    c = defaults.experiment()\n"
        "    c.tokenizer.path = 'bytes'\n"
        "    c.stages.a = defaults.stage('language_model', steps=20,\n"
        f"        data=dict(files='{tmp_path}/gone.txt', length=16))\n"
        "    return c\n"
    )
    with pytest.raises(UserError, match="gone.txt: no such file"):
        plan.show(config_files.load(folder, ""))


def test_the_commands_say_what_is_missing():
    for command in (["graph"], ["run", "--dry_run"]):
        status, _, error = stagecraft(*command)
        assert status == 2 and "--config is missing" in error
