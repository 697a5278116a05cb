"""Work directories on object stores: what is copied, when, and what is refused."""

import http.server
import threading
import time
from pathlib import Path

import jax
import pytest

from stagecraft import process, runs, storage, stores
from stagecraft.errors import UserError
from tests.command_line import stagecraft


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Begins on a machine that has nothing yet."""

    def fresh():
        monkeypatch.setattr(stores, "_mirrors", [])
        monkeypatch.setattr(process, "_cache", tmp_path / "cache")

    fresh()
    return fresh


@pytest.fixture
def bucket(tmp_path):
    """A folder that is taken for a bucket."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    return folder


def names(folder):
    """The files below a folder."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(map(str, paths))


def test_what_is_written_whole_is_there_and_on_the_next_machine(machine, bucket):
    root = stores.local(f"file://{bucket}/run")
    storage.write_json(root / "config.json", {"a": 1})
    with storage.new_folder(root / "world") as folder:
        (folder / "text.jsonl").write_text("{}\n")
    assert names(bucket) == ["run/config.json", "run/world/text.jsonl"]
    machine()
    other = stores.local(f"file://{bucket}/run/")
    assert other != root and storage.read_json(other / "config.json") == {"a": 1}
    assert names(other) == ["config.json", "world/text.jsonl"]


def test_a_folder_that_is_not_whole_at_the_store_is_not_there(
    machine, bucket, monkeypatch
):
    root = stores.local(f"file://{bucket}/run")
    mirror = stores._mirror_of(root)

    def broken(paths, keys):
        Path(keys[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(keys[0]).write_text("half")
        raise OSError("gone")

    monkeypatch.setattr(mirror.store, "put", broken)

    def written(root, *files):
        with storage.new_folder(root / "world") as folder:
            for name in files:
                (folder / name).write_text(name)

    with pytest.raises(UserError, match=r"cannot write it \(gone\)"):
        written(root, "a", "b")
    assert len(names(bucket)) == 2
    monkeypatch.undo()
    machine()
    again = stores.local(f"file://{bucket}/run")
    assert not (again / "world").exists()
    written(again, "c")
    assert names(bucket) == ["run/world/c"]


def test_lines_are_copied_within_seconds_and_before_what_follows(
    machine, bucket, monkeypatch
):
    monkeypatch.setattr(stores, "SOON", 0.2)
    root = stores.local(f"file://{bucket}/run")
    lines = storage.AppendedLines(root / "sft" / "journal.jsonl")
    lines.append({"a": 1})
    copied = bucket / "run" / "sft" / "journal.jsonl"
    assert not copied.exists()
    until = time.monotonic() + 20
    while not copied.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert copied.read_text() == '{"a": 1}\n'
    monkeypatch.setattr(stores, "SOON", 1000)
    lines.append({"a": 2})
    storage.write_json(root / "sft" / "stage.json", {})
    assert len(copied.read_text().splitlines()) == 2
    lines.append({"a": 3})
    lines.close()
    assert len(copied.read_text().splitlines()) == 3


def test_a_copy_that_stops_halfway_leaves_what_was_there(machine, bucket, monkeypatch):
    root = stores.local(f"file://{bucket}/run")
    storage.write_json(root / "sft" / "stage.json", {"step": 1})

    def broken(path, key):
        Path(key).write_text("half")
        raise OSError("gone")

    monkeypatch.setattr(stores._mirror_of(root).store, "put_file", broken)
    with pytest.raises(UserError, match=r"cannot write it \(gone\)"):
        storage.write_json(root / "sft" / "stage.json", {"step": 2})
    machine()
    again = stores.local(f"file://{bucket}/run")
    assert storage.read_json(again / "sft" / "stage.json") == {"step": 1}


def test_the_oldest_is_copied_first(machine, bucket, monkeypatch):
    root = stores.local(f"file://{bucket}/run")
    mirror, order = stores._mirror_of(root), []
    monkeypatch.setattr(mirror, "_send", lambda name, stamp: order.append(name))
    for name in ("b", "c", "a"):
        (root / name).write_text(name)
        time.sleep(0.02)
    stores.push(root)
    assert order == ["b", "c", "a"]


def test_what_is_removed_is_removed_and_what_is_half_done_stays_here(machine, bucket):
    root = stores.local(f"file://{bucket}/run")
    for name in ("gone", ".half", "kept"):
        (root / name).write_text(name)
    (root / "curation.work").mkdir()
    (root / "curation.work" / "part").write_text("")
    stores.push(root)
    assert names(bucket) == ["run/gone", "run/kept"]
    (root / "gone").unlink()
    stores.push(root)
    assert names(bucket) == ["run/kept"]


def test_events_and_checkpoints_are_not_read(machine, bucket):
    for name in ("sft/events.out.tfevents.1", "sft/checkpoints/3/a", "sft/stage.json"):
        path = bucket / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    root = stores.local(f"file://{bucket}/run")
    assert names(root) == ["sft/stage.json"]
    place = stores.place(root / "sft" / "checkpoints")
    assert str(place) == f"{bucket}/run/sft/checkpoints" and (place / "3").is_dir()
    storage.write_json(root / "sft" / "stage.json", {"a": 1})
    assert len(names(bucket)) == 3


def test_a_second_look_sees_what_another_wrote(machine, bucket):
    root = stores.local(f"file://{bucket}/run")
    storage.write_json(root / "a.json", 1)
    (bucket / "run" / "b.json").write_text("2")
    (bucket / "run" / "a.json").unlink()
    assert stores.local(f"file://{bucket}/run", refresh=False) == root
    assert names(root) == ["a.json"]
    assert stores.local(f"file://{bucket}/run") == root
    assert names(root) == ["b.json"]


def test_others_follow_the_first_process(machine, bucket, monkeypatch):
    first = stores.local(f"file://{bucket}/run")
    storage.write_json(first / "a.json", 1)
    mirrors = stores._mirrors
    machine()
    other = stores.local(f"file://{bucket}/run")
    others = stores._mirrors

    def told():
        monkeypatch.setattr(stores, "_mirrors", mirrors)
        state = stores.shared()
        monkeypatch.setattr(stores, "_mirrors", others)
        return state

    (first / "b.json").write_text("2")
    monkeypatch.setattr(others[0], "_fetch", wrapped := Counted(others[0]._fetch))
    stores.follow(told())
    assert names(other) == ["a.json", "b.json"] and wrapped.asked == [["b.json"]]
    (first / "a.json").unlink()
    (first / "b.json").write_text("3")
    stores.follow(told())
    assert names(other) == ["b.json"] and (other / "b.json").read_text() == "3"


class Counted:
    """A function that remembers what it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, names):
        self.asked.append(names)
        return self.function(names)


def test_mirrors_of_processes_that_are_gone_are_removed(machine, tmp_path, bucket):
    left = tmp_path / "cache" / "workdirs" / "tmpleft"
    left.mkdir(parents=True)
    left.with_name("tmpleft.lock").write_text("")
    root = stores.local(f"file://{bucket}/run")
    assert not left.exists() and root.exists()
    machine()
    stores.local(f"file://{bucket}/other")
    assert root.exists()  # of one that is alive


def test_tokens_lie_in_the_cache_of_this_machine(
    machine, tmp_path, bucket, monkeypatch
):
    assert process.cache("tokens", tmp_path / "run") == tmp_path / "cache" / "tokens"
    monkeypatch.setattr(process, "_cache", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert process.cache("tokens", tmp_path / "run") == tmp_path / "run"
    assert process.cache("tokens") == tmp_path / "stagecraft" / "tokens"


# -- what is refused -------------------------------------------------------------------


def test_runs_at_addresses_are_compared(machine, bucket):
    address = f"file://{bucket}/run"
    (bucket / "run").mkdir()
    (bucket / "run" / "config.json").write_text("{}")
    status, _, error = stagecraft("compare", address)
    told = f"stagecraft: {address}/config.json: not the config of a run\n"
    assert (status, error) == (2, told)


@pytest.mark.parametrize("address", ["az://bucket/run", "gs://", "memory://a"])
def test_other_addresses_are_refused(machine, address):
    status, _, error = stagecraft("status", f"--workdir={address}")
    assert status == 2 and f"--workdir={address}: expected a folder, or" in error


def test_a_client_that_is_not_installed_is_named(machine, monkeypatch):
    def absent(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    told = r"s3://b/run: Install s3fs to access S3: .* -m pip install .*\[stores\]'"
    with pytest.raises(UserError, match=told):
        stores.local("s3://b/run")


def test_a_store_that_does_not_answer_is_given_up(machine, bucket, monkeypatch):
    monkeypatch.setattr(stores, "REACHING", 0.1)
    monkeypatch.setattr(stores._Mirror, "_listed", lambda self: time.sleep(2))
    told = r"cannot read it \(no answer within 0.1 s\)"
    with pytest.raises(UserError, match=told):
        stores.local(f"file://{bucket}/run")


DENIED = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"""


class Denying(http.server.BaseHTTPRequestHandler):
    """Answers every request as S3 does without permission; lists, if it may."""

    listing, protocol_version = b"", "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        listed = self.command == "GET" and self.listing
        self.send_response(200 if listed else 403)
        self.send_header("Content-Type", "application/xml")
        body = listed or DENIED
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("listing, what", [(b"", "read"), (b"<a/>", "write")])
def test_a_bucket_without_permission_is_one_line(machine, monkeypatch, listing, what):
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    handler = type("Handler", (Denying,), {"listing": listing})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
            monkeypatch.setenv(f"AWS_{name}", "us-east-1")
        began, config = time.monotonic(), "--config=quickstart:tiny"
        status, out, error = stagecraft("run", config, "--workdir=s3://bucket/run")
        assert time.monotonic() - began < 20
        server.shutdown()
    assert (status, out) == (2, "")
    assert error.startswith(
        f"stagecraft: --workdir=s3://bucket/run: cannot {what} it (Access Denied); "
    )
    assert error.count("\n") == 1


def test_a_missing_run_is_named_by_its_address(machine, bucket):
    status, _, error = stagecraft("report", f"--workdir=file://{bucket}/run")
    assert status == 2
    assert error == f"stagecraft: file://{bucket}/run: no run here (no config.json)\n"
    with pytest.raises(UserError, match="holds no run"):
        runs.read(f"file://{bucket}/run")


def test_what_is_written_elsewhere_lies_on_this_machine(machine):
    to = "--to=gs://bucket/model"
    status, _, error = stagecraft("export", "--workdir=a", "--stage=sft", to)
    assert status == 2 and f"{to}: expected a path of this machine" in error


def test_one_flag_says_where_the_cache_is(machine, tmp_path, monkeypatch):
    assert stagecraft("list", f"--cache={tmp_path / 'here'}")[0] == 0
    assert process.cache("tokens", tmp_path) == tmp_path / "here" / "tokens"
    given = {}
    monkeypatch.setattr(jax.config, "update", given.__setitem__)
    process.reuse_programs()
    folder = Path(given["jax_compilation_cache_dir"])
    assert folder.parent == tmp_path / "here" / "compiled"
    assert stagecraft("list")[0] == 0
    given.clear()
    process.reuse_programs()  # $JAX_COMPILATION_CACHE_DIR, which the tests set
    assert given == {}
