"""Input files cut into tasks, the same ones however many workers there are.

A task is a list of parts; a part is a stretch of one file. One large file is cut at
line ends (text at blank lines, parquet at row groups), many small ones share a task. A
compressed file is cut too: each part decompresses what lies before it.
"""

import hashlib
import math
from typing import NamedTuple

from stagecraft.data import containers, files, streams
from stagecraft.data.containers import Stretch
from stagecraft.errors import UserError

_LEAST, _MOST, _SHARE = 2**20, 2**28, 64


class Part(NamedTuple):
    """A stretch of a file, as a worker gets it.

    Attributes:
        file: the path or address, as text.
        source: what its documents are counted under where they do not say.
        damage: why the file ends here too early; "" where it does not.
    """

    file: str
    source: str
    stretch: Stretch
    damage: str = ""

    @classmethod
    def from_json(cls, values) -> "Part":
        file, source, stretch, damage = values
        return cls(file, source, Stretch(*stretch), damage)


class Survey(NamedTuple):
    """What there is to read.

    Attributes:
        tasks: the parts of each task.
        digest: SHA-256 of names and contents.
        files, size: how many, and their bytes as stored.
    """

    tasks: list[list[Part]]
    digest: str
    files: int
    size: int


def survey(spec, text_key, document, task_bytes) -> Survey:
    """Reads every file once: where to cut it, and a digest of all.

    Args:
        spec: as `files.expand` takes; each part of it is a source.
        text_key: the column that files of columns must have; "" asks for none.
        document: characters of a .txt document; 0 for one a file, which is not cut.
        task_bytes: text of a task; 0 for a 64th of all, from 1 MiB to 256 MiB.
    """
    paths = files.by_part(spec)
    for path, _ in paths:
        files.refuse_shards(path)
    size = sum(streams.size(path) for path, _ in paths)
    aim = task_bytes or min(max(size // _SHARE, _LEAST), _MOST)
    tasks, room, total = [], 0, hashlib.sha256()
    for path, source in paths:
        whole = containers.is_text(path) and not document
        contents = hashlib.sha256()
        cuts = containers.cut(path, math.inf if whole else aim, contents)
        if text_key and containers.of(path).columns and not cuts[0].damage:
            _check_columns(path, text_key)
        total.update(f"{path}\n{source}\n{contents.hexdigest()}\n".encode())
        for cut in cuts:
            if room < cut.size or not tasks:
                tasks.append([])
                room = aim
            tasks[-1].append(Part(str(path), source, cut.stretch, cut.damage))
            room -= cut.size
    return Survey(tasks, total.hexdigest(), len(paths), size)


def _check_columns(path, text_key):
    """Refuses a file of columns without that of the text, by its first row."""
    try:
        _, row, _ = next(containers.read(path), (0, None, b""))
    except streams.Damage:
        return  # which is counted where the file is read
    if isinstance(row, dict) and text_key not in row:
        raise UserError(
            f"{path}: no column {text_key!r}; it has {', '.join(map(repr, row))}; "
            "name the text's with text_key=COLUMN"
        )
