"""The quickstart on one, two and four processes (make test-processes)."""

import shutil
import signal
import time

import pytest

from tests.processes import same
from tests.processes.commands import Program

QUICKSTART = ["run", "--config=experiments/quickstart.py:tiny"]
MINUTES = 20 * 60
pytestmark = pytest.mark.processes


def run(root, processes, devices, *more):
    arguments = [*QUICKSTART, f"--workdir={root / 'run'}", *more]
    with Program(root / "log", arguments, processes, devices) as program:
        statuses = program.statuses(MINUTES)
        assert set(statuses.values()) == {0}, program.text(0)
    return root / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), 1, 8)


@pytest.mark.parametrize("processes, devices", [(2, 4), (4, 2)])
def test_any_number_of_processes(whole, tmp_path, processes, devices):
    assert same.differences(whole, run(tmp_path, processes, devices)) == []


def test_prompts_and_exports(whole, tmp_path):
    said, files = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        to = [f"--workdir={whole}", "--stage=dpo", f"--to={folder / 'model'}"]
        question = ["prompt", f"--workdir={whole}", "--samples=2", "What is it?"]
        for name, arguments in (("export", ["export", *to]), ("prompt", question)):
            log = folder / name
            with Program(log, arguments, processes, 2 // processes) as program:
                assert set(program.statuses(MINUTES).values()) == {0}, program.text(0)
        said.append(program.text(0))
        files.append(
            {
                p.name: p.read_bytes()
                for p in (folder / "model").iterdir()
                if p.is_file()
            }
        )
    assert said[0] == said[1] and files[0] == files[1]


def test_one_token_over_two_processes(tmp_path):
    """Tensor over processes: each holds all rows."""
    mesh = ["--config.mesh.data=1", "--config.mesh.tensor=2", "--only=pretrain,sft"]
    more = [*mesh, "--config.model.kv_heads=2"]
    one = run(tmp_path / "one", 1, 2, *more)
    assert same.differences(one, run(tmp_path / "two", 2, 1, *more)) == []


def test_four_processes_save_and_others_go_on(tmp_path):
    more = ["--only=pretrain", "--config.stages.pretrain.steps=6"]
    more += ["--config.stages.pretrain.every.save=1"]
    one = run(tmp_path / "one", 1, 2, *more)
    root = tmp_path / "four"
    arguments = [*QUICKSTART, f"--workdir={root / 'run'}", *more]
    with Program(root / "log", arguments, 4, 1) as program:
        program.wait_for("     2/6", seconds=MINUTES)
        program.running[2].terminate()
        assert set(program.statuses(MINUTES).values()) == {128 + signal.SIGTERM}
    for processes in (1, 2):
        again = tmp_path / f"again{processes}"
        shutil.copytree(root / "run", again / "run")
        finished = run(again, processes, 2 // processes, *more)
        assert same.differences(one, finished) == []


def test_who_is_slow_is_named(tmp_path):
    more = ["--only=pretrain", "--config.stages.pretrain.steps=400"]
    arguments = [*QUICKSTART, f"--workdir={tmp_path / 'run'}", *more]
    with Program(tmp_path / "log", arguments, 2, 1) as program:
        program.wait_for(" 20/400", seconds=MINUTES)
        program.running[1].send_signal(signal.SIGSTOP)
        time.sleep(8)
        program.running[1].send_signal(signal.SIGCONT)
        program.wait_for("it waits for process 1 (at step")
        assert "x the median of" in program.text(0)
