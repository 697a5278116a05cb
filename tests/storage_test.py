"""Files of a run are written whole or not at all."""

import errno
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


def test_a_digest_does_not_depend_on_order():
    assert storage.digest({"a": 1, "b": 2}) == storage.digest({"b": 2, "a": 1})
    assert storage.digest({"a": 1}) != storage.digest({"a": 2})
