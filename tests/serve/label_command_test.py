"""`stagecraft label` from the shell: killed, begun again, stopped."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys

import httpx
import pytest

from stagecraft.errors import UserError
from stagecraft.serve import label_app
from tests.conftest import ROOT

SAMPLING = dict(temperature=1.0, max_new_tokens=8)


@pytest.fixture
def copied(tiny_run, tmp_path):
    """A copy of the finished run's files that a label command needs."""
    root = tmp_path / "run"
    shutil.copytree(tiny_run, root, ignore=shutil.ignore_patterns("ppo*", "cache"))
    return root


class Page:
    """A running `stagecraft label` and a client with its session."""

    def __init__(self, root):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stagecraft", "label", f"--workdir={root}"]
            + ["--stage=sft", "--count=12", "--max_new_tokens=8", "--repeats=0"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        ready, _, _ = select.select([self.process.stdout], [], [], 120)
        line = self.process.stdout.readline() if ready else ""
        address, _, token = line.strip().partition("#")
        self.client = httpx.Client(base_url=address, timeout=30)
        assert self.client.post("/session", json={"token": token}).status_code == 200

    def ask(self, path, **more):
        answer = self.client.post(path, json={"rater": "ann", "tab": "t"} | more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def end(self, number):
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=60)
        self.client.close()
        return self.process.returncode, out


def test_killed_it_asks_nothing_twice(copied):
    folder = copied / "labels" / "sft"
    page = Page(copied)
    state = page.ask("/next")
    for choice in ("first", "tie", "second"):
        state = page.ask("/verdict", place=state["place"], choice=choice)
    status, _ = page.end(signal.SIGKILL)
    assert status == -signal.SIGKILL and not (folder / "records.jsonl").exists()
    answers = (folder / "answers.jsonl").read_bytes()

    page = Page(copied)
    again = page.ask("/next")
    assert again["done"] == 3 and again == state
    while again["place"] is not None:
        again = page.ask("/verdict", place=again["place"], choice="first")
    total, whole = again["total"], (folder / "records.jsonl").read_bytes()
    status, out = page.end(signal.SIGTERM)
    assert (folder / "answers.jsonl").read_bytes() == answers
    assert (folder / "records.jsonl").read_bytes() == whole
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == total and [r.get("preference") for r in rows].count(0.5) == 1
    assert all(len(row["generator"]) > 8 for row in rows)
    assert f"{total} in {folder / 'records.jsonl'}" in out and "ann" in out
    assert json.loads((folder / "report.json").read_text())["raters"]["ann"]
    assert status in (0, 143)


def test_what_cannot_be_labelled_is_one_line(copied):
    how = dict(sampling=SAMPLING)
    with pytest.raises(UserError, match="--stage=reward: .*writes text: .*sft"):
        label_app.label(copied, "reward", **how)
    with pytest.raises(UserError, match="none.jsonl: "):
        label_app.label(copied, "sft", prompts=str(copied / "none.jsonl"), **how)
    path = copied / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "a"}) + "\n")
    with pytest.raises(UserError, match="pairs.jsonl: "):
        label_app.label(copied, "mine", pairs=str(path), **how)
