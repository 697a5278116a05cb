"""A disk that fills up: one line wherever it happens, and then the same bytes."""

import contextlib
import errno
import os
from concurrent import futures

import numpy as np
import pytest

from stagecraft import storage
from stagecraft.curate import curation, engine, publish, steps
from stagecraft.data import shards
from stagecraft.errors import UserError
from stagecraft.text.tokenizer import SentencePiece
from tests.curate import prose


@pytest.fixture
def made(tmp_path):
    """A config whose work passes through every writer."""
    rng = np.random.default_rng(0)
    found = prose.planted(rng, 40)
    prose.write(tmp_path / "a.jsonl", found)
    prose.write(tmp_path / "good.jsonl", found[:25])
    prose.write(tmp_path / "bad.jsonl", found[25:50])
    prose.write(tmp_path / "test.jsonl", found[:1])
    clean = [p.text for p in found if p.fault == "clean"]
    SentencePiece.train(clean, 320, tmp_path / "t.model")
    return {
        "files": str(tmp_path / "a.jsonl"),
        "task_bytes": 20_000,
        "quality": {k: str(tmp_path / f"{k}.jsonl") for k in ("good", "bad")},
        "contamination": {"files": str(tmp_path / "test.jsonl")},
        "tokenizer": str(tmp_path / "t.model"),
    }


class Disk:
    """Lets writers work until it is full, which it is in one phase and one writer."""

    def __init__(self):
        self.phase, self.full = "before", ("", None)

    def guard(self, name, write):
        def guarded(*arguments, **settings):
            if self.full == (self.phase, name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*arguments, **settings)

        return guarded


WRITERS = {
    "lines": (steps.gzip.GzipFile, "write"),
    "arrays": (np, "save"),
    "whole files": (storage.os, "replace"),
    "copies": (publish.shutil, "copyfile"),
    "shards": (shards._Writer, "add"),
}


@pytest.fixture
def disk(monkeypatch):
    """A `Disk` under all that is written, by threads instead of processes."""
    disk, run_here = Disk(), engine._run_here

    def noted(phase, *rest):
        disk.phase = phase.name
        run_here(phase, *rest)

    @contextlib.contextmanager
    def pool(_):
        with futures.ThreadPoolExecutor(1) as threads:
            yield threads

    monkeypatch.setattr(engine, "_run_here", noted)
    monkeypatch.setattr(engine, "_pool", pool)
    for name, (owner, attribute) in WRITERS.items():
        monkeypatch.setattr(owner, attribute, disk.guard(name, vars(owner)[attribute]))
    return disk


def test_wherever_the_disk_is_full_the_same_command_goes_on(made, disk, tmp_path):
    curation.curate(made | {"out": str(tmp_path / "whole")})
    out, told = tmp_path / "out", set()
    places = (
        *(("before", "whole files"), ("before", "arrays")),
        *(("filter", "lines"), ("filter", "arrays"), ("filter", "whole files")),
        ("choose", "arrays"),
        *(("finish", "lines"), ("finish", "arrays"), ("finish", "whole files")),
        *(("publish", "copies"), ("publish", "shards"), ("publish", "whole files")),
    )
    for place in places:
        disk.phase, disk.full = "before", place
        with pytest.raises(UserError, match="No space left on device") as error:
            curation.curate(made | {"out": str(out)})
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
        assert not out.exists()
        told.add(disk.phase)
    assert told == {"before", "filter", "choose", "finish", "publish"}
    disk.full = "", None
    curation.curate(made | {"out": str(out)})
    assert prose.files(out) == prose.files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out"]
