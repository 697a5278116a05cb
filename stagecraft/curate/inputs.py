"""Input files cut into tasks, the same ones however many workers there are.

A task is a list of parts; a part is a stretch of one file. One large file is cut at
line ends (text at blank lines, parquet at row groups), many small ones share a task. A
compressed file is cut too: each part decompresses what lies before it.
"""

import glob
import hashlib
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from stagecraft.errors import UserError

PLAIN, LINES, PARQUET = (".txt",), (".jsonl",), (".parquet",)
PACKED = ("", ".gz", ".zst")
SUFFIXES = tuple(s + p for s in PLAIN + LINES for p in PACKED) + PARQUET

_CHUNK = 2**20
_LEAST, _MOST, _SHARE = 2**20, 2**28, 64
# A compressed file has fewer, larger parts: each repeats the decompression before it.
_PACKED_PARTS = 4


class Part(NamedTuple):
    """A stretch of a file.

    Attributes:
        path: the file, as it was named.
        source: what its documents are counted under where they do not say.
        kind: "text", "lines" or "parquet".
        start, end: bytes of the decompressed file; row groups of parquet.
        line: number of its first line, or row, from 1.
        damage: why the file ends here too early; "" where it does not.
    """

    path: str
    source: str
    kind: str
    start: int
    end: int
    line: int
    damage: str


class Survey(NamedTuple):
    """What there is to read.

    Attributes:
        tasks: a list of lists of Part.
        digest: SHA-256 of names and contents.
        files, size: how many, and their bytes on disk.
    """

    tasks: list
    digest: str
    files: int
    size: int


class Damage(Exception):
    """A compressed file ends before its time, or holds what is none of its format."""


def expand(spec):
    """[(path, source)] of a spec, sorted within each part of it.

    Args:
        spec: files, folders (all of a known kind in them, nothing hidden) and globs,
            separated by commas. Each part is a source.
    """
    found = []
    for source in filter(None, (part.strip() for part in spec.split(","))):
        path = Path(source)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES))
            inside = [p for p in inside if not _hidden(p.relative_to(path))]
            if not inside:
                raise UserError(f"{path}: holds no {', '.join(SUFFIXES)} files")
        elif path.is_file():
            inside = [path]
        else:
            inside = []
            if glob.has_magic(source):
                inside = [Path(p) for p in sorted(glob.glob(source, recursive=True))]
            if not inside:
                raise UserError(
                    f"{source}: no such file, folder or glob; check the path"
                )
        for path in inside:
            if not path.name.endswith(SUFFIXES):
                raise UserError(f"{path}: expected a {', '.join(SUFFIXES)} file")
        found += [(str(path), source) for path in inside if path.is_file()]
    if not found:
        raise UserError(f"files={spec!r}: names no file")
    return found


def survey(spec, text_key, document, task_bytes):
    """Reads every file once: where to cut it, and a digest of all.

    Args:
        spec: as `expand` takes.
        text_key: the column parquet files must have.
        document: characters of a .txt document; 0 for one a file, which is not cut.
        task_bytes: text of a task; 0 for a 64th of all, from 1 MiB to 256 MiB.
    """
    files = expand(spec)
    size = sum(map(os.path.getsize, (path for path, _ in files)))
    aim = task_bytes or min(max(size // _SHARE, _LEAST), _MOST)
    tasks, room, total = [], 0, hashlib.sha256()
    for path, source in files:
        try:
            parts, digest = _cut(path, source, text_key, document, aim)
        except OSError as error:
            raise UserError(f"{path}: cannot read it ({error.strerror})") from error
        total.update(f"{path}\n{source}\n{digest}\n".encode())
        for part, length in parts:
            if room < length or not tasks:
                tasks.append([])
                room = aim
            tasks[-1].append(part)
            room -= length
    return Survey(tasks, total.hexdigest(), len(files), size)


def stretch(path, start, end):
    """Chunks of bytes start to end of a file, decompressed where it is compressed."""
    if start == end:
        return
    position = start
    if not path.endswith((".gz", ".zst")):
        with open(path, "rb") as file:
            file.seek(start)
            while position < end and (data := file.read(min(_CHUNK, end - position))):
                yield data
                position += len(data)
    else:
        passed = 0
        for data in _unpack(path, _raw(path)):
            piece = data[max(start - passed, 0) : max(end - passed, 0)]
            passed += len(data)
            if piece:
                yield piece
                position += len(piece)
            if passed >= end:
                break
    if position < end:
        raise UserError(f"{path}: became shorter while it was read; start again")


def lines(chunks):
    """Lines with their ends of chunks of bytes."""
    rest = []
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        for line in whole:
            rest.append(line + b"\n")
            yield b"".join(rest)
            rest = []
        if last:
            rest.append(last)
    if rest:
        yield b"".join(rest)


def _cut(path, source, text_key, document, aim):
    """([(part, size)], digest) of a file."""
    if path.endswith(PARQUET):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return _row_groups(path, source, text_key), digest
    total = hashlib.sha256()
    name = path.removesuffix(".gz").removesuffix(".zst")
    kind = "text" if name.endswith(PLAIN) else "lines"
    aim *= 1 if name == path else _PACKED_PARTS
    if kind == "text" and not document:
        aim = float("inf")
    cuts, damage, position, number = [(0, 1)], "", 0, 0
    try:
        for number, line in enumerate(lines(_unpack(path, _raw(path, total))), 1):
            position += len(line)
            if position - cuts[-1][0] >= aim and (kind == "lines" or not line.strip()):
                cuts.append((position, number + 1))
    except Damage as error:
        # The whole lines before it are counted; the torn one is lost with the rest.
        damage = str(error)
    if cuts[-1][0] < position or len(cuts) == 1:
        cuts.append((position, number + 1))
    spans = list(zip(cuts, cuts[1:], strict=False))
    parts = [
        (
            Part(
                path,
                source,
                kind,
                start,
                end,
                line,
                damage if i == len(spans) - 1 else "",
            ),
            end - start,
        )
        for i, ((start, line), (end, _)) in enumerate(spans)
    ]
    return parts, total.hexdigest()


def _raw(path, total=None):
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            if total:
                total.update(data)
            yield data


def _unpack(path, chunks):
    """Decompressed chunks; Damage after the last good one."""
    if path.endswith(".gz"):
        yield from _members(chunks, lambda: zlib.decompressobj(wbits=31), "gzip")
    elif path.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"{path}: needs the package zstandard; install stagecraft[curate]"
            ) from None
        reader = zstandard.ZstdDecompressor()
        yield from _members(chunks, reader.decompressobj, "zstd")
    else:
        yield from chunks


def _members(chunks, fresh, name):
    """A file may hold several streams, one after the other."""
    stream, begun = fresh(), False
    for chunk in chunks:
        while chunk:
            try:
                data = stream.decompress(chunk)
            except Exception as error:  # zlib.error, ZstdError: no common base
                told = " ".join(str(error).split())
                raise Damage(f"damaged {name} data ({told})") from None
            begun = True
            if data:
                yield data
            chunk = b""
            if stream.eof:
                chunk, stream, begun = stream.unused_data, fresh(), False
    if begun:
        raise Damage(f"{name} file is cut off")


def _row_groups(path, source, text_key):
    parquet = arrow_parquet(path)
    try:
        meta = parquet.ParquetFile(path)
        names = meta.schema_arrow.names
        sizes = [
            (meta.metadata.row_group(i).num_rows, meta.metadata.row_group(i))
            for i in range(meta.metadata.num_row_groups)
        ]
    except Exception as error:  # pyarrow raises its own and OSError alike
        told = " ".join(str(error).split())[:200]
        return [(Part(path, source, "parquet", 0, 0, 1, f"not parquet ({told})"), 0)]
    if text_key and text_key not in names:
        raise UserError(
            f"{path}: no column {text_key!r}; it has {', '.join(map(repr, names))}; "
            "name the text's with text_key=COLUMN"
        )
    parts, row = [], 1
    for i, (rows, group) in enumerate(sizes):
        part = Part(path, source, "parquet", i, i + 1, row, "")
        parts.append((part, group.total_byte_size))
        row += rows
    return parts


def arrow_parquet(path):
    """The module pyarrow.parquet."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: needs the package pyarrow; install stagecraft[curate]"
        ) from None
    return pyarrow.parquet


def _hidden(path):
    return any(part.startswith(".") for part in path.parts)
