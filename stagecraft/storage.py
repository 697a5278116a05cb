"""The files of a run: where they lie, and how they are written whole or not at all.

WORKDIR/config.json          the resolved config
WORKDIR/lineage.json         what each stage started from: digests of config, data
                             and parents
WORKDIR/tokenizer/           its files as they came
WORKDIR/world/               what the embedded world wrote
WORKDIR/STAGE/               stage.json, checkpoints/, metrics.jsonl, samples.jsonl,
                             TensorBoard events; journal.jsonl and records.jsonl of a
                             stage that writes records
WORKDIR/summary.json, prompt.json, report.html
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from stagecraft.errors import UserError


def write_text(path, text):
    """Writes a text file whole; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path, data):
    """Writes a file by rename: a reader sees the old one or the new, never a part."""
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


def write_json(path, value):
    """Writes a JSON file whole; keys keep their order."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path, default=None):
    """The value of a JSON file; `default` where there is no file."""
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


def digest(value):
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
