"""A run on several processes is the run of one: its numbers, its files, its end."""

import signal

import pytest

from stagecraft import process, stores
from tests import object_stores
from tests.processes import same
from tests.processes.commands import ROOT, Program

CONFIG = f"--config={ROOT / 'tests' / 'processes' / 'experiment.py'}"
GONE = 128 + signal.SIGABRT


def command(folder, *more):
    return ["run", CONFIG, f"--workdir={folder}", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process with two devices."""
    root = tmp_path_factory.mktemp("whole")
    with Program(root / "log", command(root / "run"), 1, 2) as program:
        assert program.statuses() == {0: 0}, program.text(0)
    return root / "run"


def test_two_processes_have_the_numbers_and_files_of_one(whole, tmp_path):
    with Program(tmp_path / "log", command(tmp_path / "run"), 2, 1) as program:
        assert program.statuses() == {0: 0, 1: 0}, program.text(0) + program.text(1)
    assert same.differences(whole, tmp_path / "run") == []
    assert program.text(1) == ""  # process 0 speaks for all


def test_a_run_goes_on_from_what_a_lost_and_a_stopped_process_left(whole, tmp_path):
    run = command(tmp_path / "run")
    with Program(tmp_path / "killed", run, 2, 1) as program:
        program.wait_for("sft          starting")
        program.running[1].kill()
        assert program.statuses()[0] in (GONE, -signal.SIGABRT)
    assert "process 1 of this run is gone" in program.lines(0)[-1]
    with Program(tmp_path / "stopped", run, 2, 1) as program:
        program.wait_for("grpo         compiling")
        program.running[1].terminate()
        stopped = 128 + signal.SIGTERM
        assert program.statuses() == {0: stopped, 1: stopped}
    assert program.lines(0)[-1] == program.lines(1)[-1]
    assert "stopped; grpo is saved at step" in program.lines(0)[-1]
    # What two processes saved one restores.
    with Program(tmp_path / "again", run, 1, 2) as program:
        assert program.statuses() == {0: 0}, program.text(0)
    assert same.differences(whole, tmp_path / "run") == []


@pytest.mark.processes
def test_every_kind_has_the_numbers_and_files_of_one(whole, tmp_path):
    config = ROOT / "tests" / "processes" / "every_kind.py"
    runs = []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        arguments = ["run", f"--config={config}:base={whole}"]
        arguments.append(f"--workdir={root / 'run'}")
        with Program(root / "log", arguments, processes, 2 // processes) as program:
            assert set(program.statuses().values()) == {0}, program.text(0)
        runs.append(root / "run")
    assert same.differences(*runs) == []


@pytest.mark.processes
def test_a_folder_that_was_exported_is_read_by_two_processes(whole, tmp_path):
    folder, runs = tmp_path / "folder", []
    export = ["export", f"--workdir={whole}", "--stage=sft", f"--to={folder}"]
    recipe = f"recipes/sft_from_hf:model={folder},lora=2,steps=2,batch=4,length=64"
    data = whole / "world" / "demonstrations.jsonl"
    for processes in (2, 1):
        root = tmp_path / str(processes)
        tuned = ["run", f"--config={recipe},data={data}", f"--workdir={root / 'run'}"]
        for name, arguments in (("export", export), ("run", tuned)):
            log = root / name
            with Program(log, arguments, processes, 2 // processes) as program:
                assert set(program.statuses().values()) == {0}, program.text(0)
        runs.append(root / "run")
        export = [*export, "--overwrite"]
    assert same.differences(*runs) == []


@pytest.mark.parametrize("what", ["config", "workdir"])
def test_processes_that_differ_are_refused(what, tmp_path):
    def arguments(index):
        folder = tmp_path / (f"run{index}" if what == "workdir" else "run")
        steps = 3 + (what == "config" and index)
        return command(folder, f"--config.stages.sft.steps={steps}")

    with Program(tmp_path / "log", arguments, 2, 1) as program:
        assert program.statuses() == {0: 2, 1: 2}
    said = {
        "config": "another config than process 0 (stages.sft.steps: 3 -> 4)",
        "workdir": f"does not see what process 0 writes to --workdir={tmp_path}",
    }
    for index in range(2):
        [line] = program.lines(index)
        assert line.startswith("process 1 of 2: ") and said[what] in line
    assert not (tmp_path / "run" / "config.json").exists()
    assert not list(tmp_path.glob("run*/processes-*"))


@pytest.fixture
def store(request, monkeypatch):
    """A store on this machine; returns a function that begins on another machine."""

    def elsewhere(folder):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setattr(stores, "_mirrors", [])
        monkeypatch.setattr(process, "_cache", None)

    with request.param() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield elsewhere


@pytest.mark.parametrize("store", [object_stores.s3], indirect=True, ids=["s3"])
def test_a_killed_run_goes_on_elsewhere_from_what_the_store_holds(
    whole, store, tmp_path
):
    run = command("s3://bucket/runs/a")
    store(tmp_path / "one")
    with Program(tmp_path / "killed", run, 1, 2) as program:
        program.wait_for("sft               2/3")
        program.running[0].kill()
        assert program.statuses() == {0: -signal.SIGKILL}
    store(tmp_path / "two")
    with Program(tmp_path / "again", run, 1, 2) as program:
        assert program.statuses() == {0: 0}, program.text(0)
    assert "report: s3://bucket/runs/a/report.html" in program.text(0)
    assert "pretrain     starting" not in program.text(0)  # it was finished
    store(tmp_path / "three")
    assert same.differences(whole, stores.local("s3://bucket/runs/a")) == []


@pytest.mark.processes
@pytest.mark.parametrize("store", [object_stores.gs], indirect=True, ids=["gs"])
def test_two_processes_share_a_bucket(whole, store, tmp_path):
    run = command("gs://bucket/runs/a")
    store(tmp_path / "one")
    with Program(tmp_path / "killed", run, 2, 1) as program:
        program.wait_for("sft               2/3")
        program.running[1].kill()
        assert program.statuses()[0] in (GONE, -signal.SIGABRT)
    store(tmp_path / "two")
    with Program(tmp_path / "again", run, 2, 1) as program:
        assert program.statuses() == {0: 0, 1: 0}, program.text(0) + program.text(1)
    store(tmp_path / "three")
    assert same.differences(whole, stores.local("gs://bucket/runs/a")) == []
