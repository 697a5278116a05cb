"""Which stages are asked, what is kept of their answers, and the table of them."""

import io

import pytest

from stagecraft import run
from stagecraft.anatomy import evaluate
from stagecraft.errors import UserError
from stagecraft.report import terminal


def record(stage, task="qa", value=0.5, **asked):
    settings = {"limit": 0, "shots": None, "chat": False} | asked
    cell = {"value": value, "stderr": None}
    return {"stage": stage, "task": task, **settings, "metrics": {"acc": cell}}


def test_stages_are_finished_and_write_text(tiny_run):
    current = run.open_run(tiny_run)
    assert evaluate._stages(current, ("sft", "dpo", "sft")) == ["sft", "dpo"]
    everyone = evaluate._stages(current, ("all",))
    assert everyone[0] == "pretrain" and "reward" not in everyone
    for name, message in (
        ("dop", "did you mean 'dpo'"),
        ("reward", "is of kind reward and writes no text; expected some of: pretrain"),
        ("comparisons", "is of kind comparisons and writes no text"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate._stages(current, (name,))


def test_a_missing_harness_is_one_line(tiny_run, monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[eval\]'"):
        evaluate.evaluate(run.open_run(tiny_run), ("sft",), ("qa",))


def test_results_add_up_and_replace_their_own_kind(tmp_path):
    path = tmp_path / evaluate.FILE
    assert evaluate.read(path) == []
    evaluate._keep(path, [record("sft"), record("dpo")])
    evaluate._keep(path, [record("dpo", value=0.75), record("dpo", chat=True)])
    found = [
        (r["stage"], r["chat"], r["metrics"]["acc"]["value"])
        for r in evaluate.read(path)
    ]
    assert found == [("sft", False, 0.5), ("dpo", False, 0.75), ("dpo", True, 0.5)]


def test_stages_stand_side_by_side():
    records = [
        record("dpo", value=0.25),
        record("sft"),
        record("sft", limit=8, shots=0, chat=True),
        record("other", task="zoo"),
    ]
    stages, rows = evaluate.side_by_side(records, ("pretrain", "sft", "dpo"))
    assert stages == ["sft", "dpo", "other"]
    assert [(row["task"], row["how"]) for row in rows] == [
        ("qa", ""),
        ("qa", "0-shot, chat, first 8"),
        ("zoo", ""),
    ]
    assert {s: c["value"] for s, c in rows[0]["cells"].items()} == {
        "dpo": 0.25,
        "sft": 0.5,
    }
    shown = io.StringIO()
    terminal.show_tasks(records, ("sft", "dpo"), file=shown)
    lines = shown.getvalue().splitlines()
    line = next(line for line in lines if "qa acc" in line)
    assert line.index("0.5") < line.index("0.25")
    assert any("0-shot, chat, first 8" in line for line in lines)
