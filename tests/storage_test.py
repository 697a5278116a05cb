"""Files of a run are written whole or not at all."""

import errno
import json
import os

import pytest

from stagecraft import storage
from stagecraft.errors import UserError


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    storage.write_json(path, {"a": 1})

    def broken(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", broken)
    told = r"config\.json: cannot write here .No space left on device.; free space"
    with pytest.raises(UserError, match=told):
        storage.write_json(path, {"a": 2})
    assert storage.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_json_is_named(tmp_path):
    path = tmp_path / "lineage.json"
    path.write_text('{"a":')
    with pytest.raises(UserError, match=r"lineage\.json: not a JSON file"):
        storage.read_json(path)
    assert storage.read_json(tmp_path / "none.json", {"x": 1}) == {"x": 1}


def test_what_json_has_not_is_written_as_null(tmp_path):
    nan, infinite = float("nan"), float("inf")
    value = {"a": nan, "b": [1.0, -infinite, {"c": (infinite, "NaN")}], "d": True}
    storage.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()

    def refuse(name):
        raise AssertionError(name)

    want = {"a": None, "b": [1.0, None, {"c": [None, "NaN"]}], "d": True}
    assert json.loads(text, parse_constant=refuse) == want
    assert storage.to_json({"é": 0.5}) == '{"é": 0.5}'


def test_a_digest_does_not_depend_on_order():
    assert storage.digest({"a": 1, "b": 2}) == storage.digest({"b": 2, "a": 1})
    assert storage.digest({"a": 1}) != storage.digest({"a": 2})


def files(folder):
    return {p.name: p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_appears_whole(tmp_path):
    with storage.new_folder(tmp_path / "a" / "new") as temporary:
        (temporary / "one").write_text("1")
        assert not (tmp_path / "a" / "new").exists()
    assert files(tmp_path) == {"one": "1"} and not temporary.exists()
    assert (tmp_path / "a" / "new").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError, "No space left"),
        (UserError("no document is left"), UserError, "no document is left"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_folder_that_fails_leaves_nothing(tmp_path, replace, error, raised, says):
    target = tmp_path / "out"
    if replace:
        target.mkdir()
        (target / "old").write_text("0")
    with (  # noqa: PT012
        pytest.raises(raised, match=says) as caught,
        storage.new_folder(target, replace=replace) as temporary,
    ):
        (temporary / "one").write_text("1")
        raise error
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] * replace
    assert files(tmp_path) == ({"old": "0"} if replace else {})


def test_a_folder_that_is_there_is_refused_or_replaced(tmp_path):
    (tmp_path / "out").mkdir()  # an empty one is as good as none
    for text in ("1", "2"):
        with storage.new_folder(tmp_path / "out", replace=text == "2") as temporary:
            (temporary / text).write_text(text)
        assert files(tmp_path) == {text: text}
    with (
        pytest.raises(UserError, match="out: exists already; remove it or name"),
        storage.new_folder(tmp_path / "out"),
    ):
        raise AssertionError("must not begin")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file: exists already"),
        storage.new_folder(tmp_path / "file"),
    ):
        raise AssertionError("must not begin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_what_a_killed_process_left_goes(tmp_path):
    left = tmp_path / ".out.partial-killed"
    for concurrent in (True, False):
        left.mkdir(exist_ok=True)
        target = tmp_path / f"{'other' if concurrent else 'out'}"
        with storage.new_folder(target, concurrent=concurrent):
            assert left.exists() == concurrent


def test_of_two_that_write_one_folder_the_first_stays(tmp_path):
    with (  # noqa: PT012
        pytest.raises(UserError, match="cannot be written"),
        storage.new_folder(tmp_path / "out", concurrent=True) as late,
    ):
        (late / "late").write_text("2")
        with storage.new_folder(tmp_path / "out", concurrent=True) as early:
            (early / "early").write_text("1")
    assert files(tmp_path) == {"early": "1"}
