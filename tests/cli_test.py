"""The commands as a user meets them: help, one line for every mistake, exit status."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stagecraft import storage
from stagecraft.anatomy import bias, verdicts
from tests.command_line import stagecraft

ROOT = Path(__file__).parent.parent
TAKEN_FOR = re.compile(r": (txt|jsonl), \d+ (records|documents) of |\d+ \w+ read, ")

EXPERIMENT = """
from stagecraft import defaults

def get_config(arg=""):
    c = defaults.experiment()
    c.mesh.data = 1
    c.tokenizer.files = "{folder}/text.jsonl"
    c.tokenizer.vocab_size = 300
    c.model.update(dict(width=16, layers=1, heads=2, kv_heads=1, head_dim=8,
                        ff_width=32, max_length=32))
    c.stages.pretrain = defaults.stage(
        "language_model", data=dict(files="{folder}/text.jsonl", length=16), steps=2,
        batch_size=4, optimizer=dict(warmup_steps=0))
    c.stages.sft = defaults.stage(
        "language_model", start_from="pretrain", steps=2, batch_size=4,
        data=dict(format="demonstrations", files="{folder}/answers.jsonl", length=32),
        optimizer=dict(warmup_steps=0))
    return c
"""


def process(*arguments, told=None):
    """Runs the command in a process of its own; (exit status, stdout, stderr)."""
    found = subprocess.run(
        [sys.executable, "-m", "stagecraft", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"},
        input=told,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return found.returncode, found.stdout, found.stderr


@pytest.fixture
def folder(tmp_path):
    """An experiment with good files, for a test to spoil."""
    rows = [{"text": f"the cat sat on mat number {i} and then left"} for i in range(64)]
    write(tmp_path / "text.jsonl", rows)
    rows = [{"prompt": f"say {i}", "completion": f"{i} cats"} for i in range(16)]
    write(tmp_path / "answers.jsonl", rows)
    (tmp_path / "small.py").write_text(EXPERIMENT.format(folder=tmp_path))
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refused(folder, *arguments, says, by=stagecraft):
    """Runs and expects one line of error, status 2, and nothing half-written.

    What the files before it were taken for is no error.
    """
    work = folder / "run"
    status, _, error = by(
        "run", f"--config={folder}/small.py", f"--workdir={work}", *arguments
    )
    said = [line for line in error.splitlines() if line.startswith("stagecraft:")]
    lines = [line for line in said if not TAKEN_FOR.search(line)]
    assert status == 2, error
    assert len(lines) == 1 and "Traceback" not in error, error
    assert says in lines[0], lines[0]
    assert not (work / "pretrain" / "checkpoints").exists()
    return lines[0]


def test_help_names_every_command():
    status, out, _ = process("--help")
    assert status == 0
    for command in ("run", "prompt", "chat", "report", "compare"):
        assert command in out
        status, told, _ = stagecraft(command, "--help")
        flag = "--baseline" if command == "compare" else "--workdir"
        assert status == 0 and flag in told and "stagecraft" in told


def test_commands_are_checked():
    status, _, error = stagecraft("rnu")
    assert status == 2 and "did you mean 'run'" in error
    status, _, error = stagecraft("report", "--workdir=/nowhere/at/all")
    assert status == 2 and "no run here" in error
    status, _, error = stagecraft("run", "--config=nowhere.py", "--workdir=x")
    assert status == 2 and "nowhere.py: no such file" in error


def test_files_that_are_wrong(folder):
    text = folder / "text.jsonl"
    good = text.read_bytes()
    text.unlink()
    refused(folder, says="text.jsonl: no such file")
    text.write_bytes(b"")
    refused(folder, says="text.jsonl: empty")
    text.write_bytes(good + b'{"text": "cut\n')
    refused(folder, says="text.jsonl:65: not JSON")
    text.write_bytes(good + b'{"txt": "no such key"}\n')
    refused(folder, says="text.jsonl:65: no key 'text'; it has 'txt'")
    text.write_bytes(good + b'{"text": "\xff"}\n')
    refused(folder, says="text.jsonl:65: not UTF-8", by=process)


def test_configs_that_are_wrong(folder):
    refused(
        folder,
        "--config.stages.sft.optimizer.lrr=1",
        says="--config.stages.sft.optimizer.lrr: unknown key; did you mean 'lr'?",
    )
    refused(folder, "--config.stages.sft.steps=many", says="steps")
    refused(folder, "--only=sfd", says="did you mean 'sft'")
    refused(
        folder,
        "--config.stages.sft.start_from=pretrian",
        says="did you mean 'pretrain'",
    )
    refused(folder, "--config.mesh.data=9", says="mesh: data=9")
    refused(folder, "--config.model.kv_heads=3", says="model.kv_heads")
    refused(
        folder,
        "--config.mesh.tensor=2",
        "--config.model.heads=2",
        says="does not divide over mesh.tensor",
    )


def test_a_config_file_runs_once(folder):
    """It may write the data it names; overrides reach it."""
    script = folder / "small.py"
    line = f"    open({str(folder / 'count')!r}, 'a').write('.')\n    return c\n"
    script.write_text(script.read_text().replace("    return c\n", line))
    refused(folder, "--config.stages.sft.batch_size=-4", says="sft.batch_size=-4")
    assert (folder / "count").read_text() == "."
    status, _, error = stagecraft("run", "--config", script, "--config.seed=many")
    assert status == 2 and "config.seed" in error and "Traceback" not in error
    status, _, error = stagecraft("run", f"--workdir={folder}/run")
    assert status == 2 and "--config is missing" in error


def test_answers_that_teach_nothing(folder):
    rows = [{"prompt": "word " * 40, "completion": "yes"} for _ in range(16)]
    write(folder / "answers.jsonl", rows)
    refused(folder, says="16 of 16 demonstrations would be lost")


def test_a_prompt_longer_than_the_context(folder):
    rows = [{"prompt": "hello"}, {"prompt": "word " * 60}]
    write(folder / "prompts.jsonl", rows)
    script = (
        (folder / "small.py").read_text().replace("    return c\n", "")
        + f'''
    c.stages.pairs = defaults.stage("comparisons", start_from="sft",
        rater="tests.cli_test:first", data=dict(files="{folder}/prompts.jsonl"),
        sampling=dict(max_new_tokens=4))
    return c
'''
    )
    (folder / "small.py").write_text(script)
    refused(folder, says="prompts.jsonl:2: a prompt of")


def first(prompt, answers, rng):
    """A rater for the test above."""
    return 0


def test_a_workdir_that_cannot_be_written(folder):
    work = folder / "run"
    work.mkdir()
    work.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if os.access(work, os.W_OK):
            # Root writes anywhere: a file where the folder should be is as good.
            work.chmod(stat.S_IRWXU)
            work.rmdir()
            work.write_text("a file")
        refused(folder, says="choose another --workdir")
    finally:
        work.chmod(stat.S_IRWXU)


def test_prompt_and_report(tiny_run):
    status, out, error = process(
        "prompt", f"--workdir={tiny_run}", "What is the capital of France?"
    )
    assert status == 0, error
    for stage in ("pretrain", "sft", "ppo", "dpo"):
        assert stage in out
    status, out, error = stagecraft("report", f"--workdir={tiny_run}")
    assert status == 0 and out.strip().endswith("report.html")
    rater = storage.read_json(tiny_run / "summary.json")["raters"]["comparisons"]
    records = tiny_run / "comparisons" / "records.jsonl"
    measured = bias.measure(verdicts.read(records, "countries"))
    assert rater and rater.keys() == measured.keys()
    text = (tiny_run / "report.html").read_text()
    assert 'id="raters"' in text
    for name, one in rater.items():
        assert one["value"] == measured[name].value
        assert f"{one['value']:.3f}" in text


def test_compare_prints_a_table_and_writes_a_page(tiny_run, tmp_path):
    page = tmp_path / "sides.html"
    status, out, error = stagecraft(
        # Flags may stand behind the folders.
        *("compare", tiny_run, "--stages=sft,dpo,ppo", f"--out={page}")
    )
    assert status == 0, error
    assert out.strip().endswith("sides.html")
    for told in ("dpo", "ppo", "Gold win rate", "Entropy", "one seed on a side"):
        assert told in out
    found = json.loads((tmp_path / "sides.json").read_text())
    assert [arm["arm"] for arm in found["arms"]] == ["sft", "dpo", "ppo"]
    dpo = found["arms"][1]["figures"]
    assert 0 < dpo["length"]["mean"] <= 34 and dpo["entropy"]["mean"] > 0
    assert page.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give the folders of runs"),
        (("/nowhere/at/all",), "no run here"),
        (("RUN", "RUN"), "given twice"),
        (("RUN", "--stages=dqo"), "did you mean 'dpo'"),
        (("RUN", "--baseline=dqo"), "did you mean 'dpo'"),
        (("RUN", "--out=OUT/sides.json"), "NAME.html"),
    ],
)
def test_compare_refuses_in_one_line(tiny_run, tmp_path, arguments, says):
    filled = [
        a.replace("RUN", str(tiny_run)).replace("OUT", str(tmp_path)) for a in arguments
    ]
    if not any(a.startswith("--out") for a in filled):
        filled.append(f"--out={tmp_path}/sides.html")
    status, _, error = stagecraft("compare", *filled)
    assert status == 2 and says in error, error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_chat_answers_and_ends(tiny_run):
    told = "Hello!\nWhat is the capital of France?\n" + "long " * 99
    told += "\n/reset\nHello!\n/quit\nnot asked\n"
    chat = ("chat", f"--workdir={tiny_run}")
    status, out, error = process(*chat, "--stage=dpo", told=told)
    assert status == 0, error
    # The same question gets the same answer after a reset; what is too long, none.
    first, _, long, again = out.strip().splitlines()
    assert first == again and first.startswith("dpo> ")
    assert "exceed the context" in long and "/reset" in long
    status, _, error = stagecraft(*chat, "--stage=reward")
    assert status == 2 and "expected a finished stage that writes text" in error
