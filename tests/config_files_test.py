"""Experiments by name from any folder, copies of them, and files that are none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stagecraft import cli, config_files
from stagecraft.errors import UserError

ROOT = Path(__file__).parents[1]


def load(path, argument=""):
    """In a process of its own, from the file's folder: {stage: kind}."""
    program = (
        "import sys; from pathlib import Path; from stagecraft import config_files; "
        "path = config_files.find(sys.argv[1]); "
        "print(*config_files.load(path, sys.argv[2]).stages)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, argument],
        cwd=Path(path).absolute().parent if os.sep in str(path) else "/",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_experiments_are_listed_with_what_they_are():
    names = config_files.shipped()
    assert {"quickstart", "objectives", "your_text", "curate"} <= set(names)
    assert "common" not in names  # has no get_config
    assert all(line.endswith((".", "?")) for line in names.values())


def test_by_name_and_copied_they_work_from_any_folder(tmp_path):
    stages = load("quickstart", "tiny")
    assert {"pretrain", "sft", "ppo", "dpo"} <= set(stages)
    mine = tmp_path / "deep" / "mine.py"
    done = subprocess.run(
        [sys.executable, "-m", "stagecraft", "new", str(mine), "--from=quickstart"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert f"stagecraft run --config={mine} --workdir=runs/mine" in done.stdout
    assert load(mine, "tiny") == stages


def test_a_copy_overwrites_nothing(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("# precious")
    with pytest.raises(UserError, match="mine.py: is there already"):
        config_files.copy("quickstart", mine)
    assert mine.read_text() == "# precious"
    with pytest.raises(UserError, match="expected a Python file"):
        config_files.copy("quickstart", tmp_path / "mine")


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="--config=quickstrat: .*'quickstart'"):
        config_files.find("quickstrat")


@pytest.mark.parametrize(
    "text, says",
    [
        ("def get_config(arg:\n", "line 1: "),
        ("x = 1\ny = nothing\n", "line 2 raised NameError: name 'nothing'"),
        ("def get_config(arg):\n    return {}['x']\n", "line 2 raised KeyError: 'x'"),
        ("import numpy\nnumpy.zeros(3).reshape(2)\n", "line 2 raised ValueError"),
        ("def get_config(arg):\n    return 3\n", "get_config returned int; expected"),
        ("x = 1\n", "has no function get_config"),
    ],
)
def test_a_file_that_is_no_experiment_is_one_line(text, says, tmp_path, capsys):
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert cli.main(["stagecraft", "run", "--config", str(path), "--workdir=x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"stagecraft: --config={path}: {says}")
