"""`stagecraft status`: how far each stage has come, of a run in any state."""

import json
import re

import pytest

from stagecraft import runs
from stagecraft.errors import UserError
from stagecraft.report import terminal


def write(folder, rows, **record):
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    if record:
        (folder / "stage.json").write_text(json.dumps(record))


def test_each_stage_with_its_step_its_save_and_its_loss(tmp_path, capsys):
    stages = {
        "pretrain": dict(kind="language_model", start_from="", steps=40),
        "sft": dict(kind="language_model", start_from="pretrain", steps=1200),
        "dpo": dict(kind="preference", start_from="sft", steps=30),
    }
    (tmp_path / "config.json").write_text(json.dumps(dict(stages=stages)))
    rows = [dict(step=10, seconds=3.0, loss=2.5), dict(step=40, seconds=9.6, loss=1.25)]
    record = dict(stages["pretrain"], finished=True, seconds=dict(total=12.0))
    write(tmp_path / "pretrain", rows, **record)
    (tmp_path / "pretrain" / "checkpoints" / "40").mkdir(parents=True)
    write(tmp_path / "sft", [dict(step=600, seconds=61.0, loss=0.5)])
    (tmp_path / "sft" / "checkpoints" / "500").mkdir(parents=True)
    (tmp_path / "sft" / "checkpoints" / "600.orbax-checkpoint-tmp").mkdir()

    terminal.show_status(runs.read(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert cells["pretrain"] == ["–", "finished", "step", "40", "1.25", "12"]
    at = ["at", "step", "600", "of", "1,200"]
    assert cells["sft"] == ["pretrain", *at, "step", "500", "0.5", "61"]
    assert cells["dpo"] == ["sft", "not", "started", "–", "–", "–"]
    # In a notebook, the same cells.
    page = runs.Run(tmp_path, None)._repr_html_()
    cells = re.findall(r"<td style=\"text-align:(left|right)\">(.*?)</td>", page)
    assert cells[6:12] == [
        *(("left", "sft"), ("left", "pretrain"), ("left", "at step 600 of 1,200")),
        *(("right", "step 500"), ("right", "0.5"), ("right", "61")),
    ]


def test_where_there_is_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        runs.read(tmp_path)
