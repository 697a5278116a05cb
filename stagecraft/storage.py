"""Files and folders written whole or not at all, by process 0 alone.

What lies in the mirror of a work directory on an object store (`stores`) is copied
there: what is written whole before the call returns, appended lines within seconds.

The files of a run, and where they lie:

WORKDIR/config.json          the resolved config
WORKDIR/lineage.json         what each stage started from: digests of config, data
                             and parents
WORKDIR/tokenizer/           its files, unchanged
WORKDIR/world/, curation/    what the embedded world wrote, what was curated
WORKDIR/cache/               tokenised text and conversations
WORKDIR/STAGE/               stage.json, checkpoints/, metrics.jsonl, samples.jsonl,
                             heldout.jsonl, TensorBoard events; journal.jsonl and
                             records.jsonl of a stage that writes records, beside
                             them answers.jsonl of a judge behind an endpoint
WORKDIR/anatomy/             matrices.jsonl, anatomy.json, causes.json, anatomy.html
WORKDIR/summary.json, prompt.json, evaluations.json, report.html
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stagecraft import process, stores
from stagecraft.errors import UserError


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file by rename: a reader sees the old one or the new, never a part.

    Does nothing in a process that is not the first of its program.
    """
    if not process.is_first():
        return
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{path}: cannot write here ({error.strerror}); free space, or choose "
            "another --workdir or output folder"
        ) from error
    stores.push(path)


@contextlib.contextmanager
def new_folder(
    folder: str | Path, *, replace: bool = False, concurrent: bool = False
) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` when the block ends well.

    The temporary folder lies beside its target, so that the last step is a rename on
    one disk. When the block raises, nothing of it is left and what was at `folder`
    stays. Processes other than the first get a folder that is thrown away.

    Args:
        folder: the target; its parents are made.
        replace: whether a target that holds something is replaced or refused.
        concurrent: whether other processes may write the same target. Then every
            process writes, the first rename wins, and unfinished folders stay. Without,
            folders that a killed process left unfinished are removed.

    Raises:
        UserError: the target exists, or cannot be written.
    """
    folder, temporary = Path(folder).absolute(), None
    partial, old = f".{folder.name}.partial-", folder.with_name(f".{folder.name}.old")
    if not concurrent and not process.is_first():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    try:
        if not (replace or _is_free(folder)):
            raise UserError(f"{folder}: exists already; remove it or name another")
        folder.parent.mkdir(parents=True, exist_ok=True)
        for unfinished in () if concurrent else folder.parent.glob(f"{partial}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=partial))
        temporary.chmod(0o755)
        yield temporary
        if not replace or _is_free(folder):
            temporary.rename(folder)
        else:
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            try:
                temporary.rename(folder)
            except BaseException:
                old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); nothing was changed "
            "there: free space, or choose another --workdir or output folder"
        ) from error
    stores.push(folder, whole=True)


def _is_free(folder):
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file whole; keys keep their order."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Returns the text of a JSON file, one key a line."""
    return to_json(value, indent=1) + "\n"


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns the text of a value; NaN and infinity, which JSON has not, as null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False)


def _finite(value):
    """Returns a value with None for numbers that are not finite, however deep."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(path: str | Path, default: Any = None) -> Any:
    """Returns the value of a JSON file; `default` where there is no file."""
    path = Path(path)
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: not a JSON file ({error}); it was edited or damaged: "
            "restore it, or start in another --workdir"
        ) from error


class AppendedLines:
    """A file of JSON lines that grows by a line at a time, each synced to the disk.

    What a killed process leaves is read: whole lines, and a last one that was cut off,
    which the next one replaces. Only the first process of a program writes.

    Args:
        path: the file; it need not be there.

    Attributes:
        values: of the lines that it held when it was opened.
    """

    def __init__(self, path: str | Path):
        self.path, self._file = Path(path), None
        self.values, self._end = _whole_lines(self.path)

    def append(self, value: Any) -> Any:
        """Writes and syncs a line; returns the value as reading it would."""
        line = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if process.is_first():
            try:
                self._write(line.encode("utf-8") + b"\n")
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot write here ({error.strerror}); free space, "
                    "or choose another --workdir; the same command goes on from here"
                ) from error
        return json.loads(line)

    def _write(self, data):
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._file.truncate(self._end)
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        stores.push_soon(self.path)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            stores.push(self.path)


def _whole_lines(path):
    """Returns the values of a file's whole lines, and the bytes they take."""
    data = path.read_bytes() if path.exists() else b""
    *whole, _ = data.split(b"\n")
    values, end = [], 0
    for number, line in enumerate(whole, 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if end + len(line) + 1 == len(data):
                break
            raise UserError(
                f"{path}:{number}: not a line of JSON ({error}); the file was edited "
                "or damaged: delete it to begin this stage again"
            ) from error
        end += len(line) + 1
    return values, end


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
