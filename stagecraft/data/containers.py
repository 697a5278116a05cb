"""Containers: from a file to its records or its text, whole or a stretch at a time.

    .txt                         lines of text, cut into documents where it is long
    .jsonl                       one JSON object a line
    .json                        a list of objects, or one object a line
    .csv                         rows of texts under a first line of names
    .parquet, .arrow             one record a row (Arrow: as `datasets` saves it)
    .array_record                one JSON object a record, as a line of .jsonl

The first four may be compressed: .gz, .zst. Training refuses a file with its first
fault, named as FILE:LINE or FILE:ROW with what was expected (`records`, `documents`);
curation sets each fault aside and reads on (`read`). A container is a function that
reads it and its line in `CONTAINERS`.
"""

import codecs
import contextlib
import csv
import functools
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from stagecraft.data import columns, streams
from stagecraft.data.forms import without_nulls
from stagecraft.data.streams import Damage, Remote
from stagecraft.errors import UserError

# A .txt file longer than this is cut at blank lines into documents of about this size.
DOCUMENT = 2000  # characters
# Rows of a columnar file that are held as Python values at once.
_ROWS = 1024
# A compressed file has fewer, larger stretches: each repeats the decompression before.
_COMPRESSED_STRETCHES = 4


class Stretch(NamedTuple):
    """Part of a file.

    Attributes:
        start, end: what the container counts: bytes once decompressed, row groups of
            parquet. None is the end of the file.
        first: number of its first line or row, from 1.
    """

    start: int = 0
    end: int | None = None
    first: int = 1


WHOLE = Stretch()


class Cut(NamedTuple):
    """A stretch to be read by itself.

    Attributes:
        size: its bytes.
        damage: why the file ends there too early; "" where it does not.
    """

    stretch: Stretch
    size: int
    damage: str = ""


class Fault(NamedTuple):
    """Why a line or a row is no record.

    Attributes:
        reason: one of few, to be counted by.
        detail: what is wrong with this one.
        message: both, with what to do.
    """

    reason: str
    detail: str
    message: str


_NOT_UTF8_ROW = Fault(
    "not UTF-8",
    "a text of the row",
    "a text of the row is not UTF-8; convert it to UTF-8",
)


class Container(NamedTuple):
    """How the files of one suffix are read.

    Attributes:
        read: (path, stretch) -> (number, record or Fault, bytes of its line or b"") of
            each record. Raises Damage where the file cannot be read further.
        cut: (path, size, digest) -> [Cut], each of about `size` bytes; updates the
            digest with the stored bytes. None reads every file whole.
        text: whether the records are lines of text.
        columns: whether all records have the same keys, null where one has no value.
        compressed: whether .gz and .zst may follow.
    """

    read: Callable
    cut: Callable | None = None
    text: bool = False
    columns: bool = False
    compressed: bool = False


def of(path) -> Container:
    """Returns the container of a file, by its suffix."""
    return CONTAINERS[suffix(path)]


def suffix(path) -> str:
    """Returns ".jsonl" of "a.jsonl.gz"."""
    name = path.name.removesuffix(streams.compression(path))
    return next(end for end in CONTAINERS if name.endswith(end))


def is_text(path) -> bool:
    return of(path).text


def name(path) -> str:
    """Returns what a file is called in messages: "jsonl.gz"."""
    return (suffix(path) + streams.compression(path)).removeprefix(".")


def where(path, number) -> str:
    """Returns FILE:LINE; the file alone for number 0."""
    return f"{path}:{number}" if number else str(path)


def read(path, stretch=WHOLE) -> Iterator[tuple[int, Any, bytes]]:
    """Yields (number, record or Fault, line) of each record.

    A record is a dict; of a text file it is a line of text.
    """
    container = of(path)
    for number, record, line in container.read(path, stretch):
        if not container.text and not isinstance(record, (dict, Fault)):
            kind = type(record).__name__
            message = f"expected a JSON object, got {kind}"
            record = Fault("no JSON object", f"it is {kind}", message)
        yield number, record, line


def cut(path, size, digest) -> list[Cut]:
    """Cuts a file into stretches of about `size` bytes.

    Updates the digest with the stored bytes. Of a damaged file what is good is cut.
    """
    try:
        return (of(path).cut or _uncut)(path, size, digest)
    except Damage as error:
        return [Cut(Stretch(0, 0), 0, error.detail)]


def records(path, on_fault=None) -> Iterator[tuple[str, dict]]:
    """Yields (FILE:LINE, record) of every record of a file.

    A null is what is absent, in every container: rows of columns all have the same
    keys, and lines of JSON made from them say null.

    Args:
        path: the file.
        on_fault: (FILE:LINE, what is wrong) -> None, called for each line that is no
            record; None raises a UserError for the first. An empty file always does.
    """
    count, columns = 0, of(path).columns
    for number, record, line in read(path):
        place = where(path, number)
        count += 1
        if isinstance(record, Fault):
            if on_fault is None:
                raise UserError(f"{place}: {record.message}")
            on_fault(place, record.message)
            continue
        # Without the word there is none, which a look at the bytes says sooner.
        nulls = columns or not line or b"null" in line
        yield place, without_nulls(record) if nulls else record
    if not count:
        raise UserError(f"{path}: empty; expected one JSON object a line")


def documents(path) -> Iterator[str]:
    """Yields the text of a file, whole or in parts of about `DOCUMENT` characters.

    Parts end at blank lines, and a blank line joined between them gives the text back.
    """
    text, empty = "", True
    for paragraph in _paragraphs(path):
        if text and len(text) + len(paragraph) > DOCUMENT:
            if text.strip():
                empty = False
                yield text
            text = ""
        text += ("\n\n" if text else "") + paragraph
    if text.strip():
        empty = False
        yield text
    if empty:
        raise UserError(f"{path}: empty; expected text")


def _paragraphs(path):
    """Yields what stands between blank lines, as text.split("\\n\\n") would give it."""
    lines = []
    for number, line, _ in read(path):
        if isinstance(line, Fault):
            raise UserError(f"{path}:{number}: {line.message}")
        if line == "\n" and lines:
            yield "".join(lines)[:-1]
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


# -- lines -----------------------------------------------------------------------------


def _lines(path, stretch):
    pieces = streams.stretch(path, stretch.start, stretch.end)
    for number, line in enumerate(streams.lines(pieces), stretch.first):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _text(path, stretch):
    for number, line in _lines(path, stretch):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, _not_utf8(error), line
            continue
        yield number, text[:-2] + "\n" if text.endswith("\r\n") else text, line


def _jsonl(path, stretch):
    for number, line in _lines(path, stretch):
        if line.strip():
            yield number, _parsed(line), line


def _json(path, stretch):
    """Reads a list of records, or lines of them; the first character tells which."""
    lines = streams.lines(streams.chunks(path))
    first = next((line for line in lines if line.strip()), b"")
    if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _jsonl(path, stretch)
        return
    data = b"".join(streams.chunks(path)).removeprefix(codecs.BOM_UTF8)
    values = _parsed(data)
    if isinstance(values, Fault):
        yield 0, values, data
        return
    for number, record in enumerate(values, 1):
        yield number, record, b""


def _csv(path, stretch):
    """Reads rows of texts; a quoted one may hold commas, quotes and ends of lines."""
    data = b"".join(streams.chunks(path)).removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, _not_utf8(error), b""
        return
    csv.field_size_limit(max(len(data), csv.field_size_limit()))
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    names = None
    with _readable(path):
        for row in rows:
            if names is None:
                names = _names(path, row)
            elif len(row) == len(names):
                record = dict(zip(names, row, strict=True))
                record.pop("", None)
                yield rows.line_num, record, b""
            elif row:
                detail = f"{len(row)} values under {len(names)} names"
                message = f"{detail}; quote a value that holds a comma"
                yield rows.line_num, Fault("not a row", detail, message), b""


def _names(path, row):
    """Returns the names of a CSV file's columns; one without a name is not read."""
    twice = [f"two are {name!r}" for name in row if name and row.count(name) > 1]
    if twice or not any(row):
        raise Damage(path, "its first line names its columns", [*twice, "none is"][0])
    return row


def _parsed(data):
    """Returns the value of JSON text in bytes, or a Fault."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        detail = f"{error.msg}, character {error.colno}"
        return Fault("not JSON", detail, f"not JSON ({detail}); mend or drop the line")
    except (ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())[:80]
        message = f"not readable as JSON ({detail}); mend or drop the line"
        return Fault("not JSON", detail, message)
    if b"\\u" in data and not _encodable(value):
        return Fault(
            "half a surrogate pair",
            "which is no character",
            "holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
            "character; mend or drop the line",
        )
    return value


def _not_utf8(error):
    detail = f"byte {error.start + 1} of the line"
    message = f"not UTF-8 ({detail}); convert the file to UTF-8"
    return Fault("not UTF-8", detail, message)


def _encodable(value):
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _cut_lines(path, size, digest, blank=False):
    """Cuts a file at line ends, or after blank lines alone.

    The whole lines before damage are counted; the torn one is lost with the rest.
    """
    size *= _COMPRESSED_STRETCHES if streams.compression(path) else 1
    ends, position, number, damage = [(0, 1)], 0, 0, ""
    try:
        pieces = streams.chunks(path, digest)
        for number, line in enumerate(streams.lines(pieces), 1):
            position += len(line)
            if position - ends[-1][0] >= size and not (blank and line.strip()):
                ends.append((position, number + 1))
    except Damage as error:
        damage = error.detail
    if ends[-1][0] < position or len(ends) == 1:
        ends.append((position, number + 1))
    pairs = zip(ends, ends[1:], strict=False)
    cuts = [Cut(Stretch(a, b, first), b - a) for (a, first), (b, _) in pairs]
    return [*cuts[:-1], cuts[-1]._replace(damage=damage)]


# -- rows ------------------------------------------------------------------------------


def _uncut(path, size, digest):
    """Returns the whole file as one stretch."""
    for _ in streams.stored(path, digest):
        pass
    return [Cut(WHOLE, streams.size(path))]


def _parquet(path, stretch):
    parquet = streams.optional("pyarrow.parquet", path)

    def batches():
        data = parquet.ParquetFile(file)
        groups = range(data.metadata.num_row_groups)[stretch.start : stretch.end]
        return data.iter_batches(batch_size=_ROWS, row_groups=groups)

    with streams.open_bytes(path) as file:
        yield from _rows(path, batches, stretch.first)


def _cut_row_groups(path, size, digest):
    parquet = streams.optional("pyarrow.parquet", path)
    _uncut(path, size, digest)
    with streams.open_bytes(path) as file, _readable(path):
        data = parquet.ParquetFile(file).metadata
        groups = [data.row_group(i) for i in range(data.num_row_groups)]
    cuts, row = [], 1
    for i, group in enumerate(groups):
        cuts.append(Cut(Stretch(i, i + 1, row), group.total_byte_size))
        row += group.num_rows
    return cuts


def _arrow(path, stretch):
    """Reads the streaming format of `datasets`, or the one with a footer."""
    pyarrow = streams.optional("pyarrow", path)

    def batches():
        try:
            return pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            data = pyarrow.ipc.open_file(file)
            return map(data.get_batch, range(data.num_record_batches))

    with streams.open_bytes(path) as file:
        yield from _rows(path, batches, 1)


def _rows(path, batches, first):
    number = first
    with _readable(path):
        for batch in batches():
            for start in range(0, len(batch), _ROWS):
                for record in columns.values(batch.slice(start, _ROWS)):
                    yield number, _NOT_UTF8_ROW if record is None else record, b""
                    number += 1


def _array_record(path, stretch):
    if isinstance(path, Remote):
        raise UserError(f"{path}: ArrayRecord is read from this machine; copy it here")
    module = streams.optional("array_record.python.array_record_module", path)
    with _readable(path):
        reader = module.ArrayRecordReader(str(path))
        total = reader.num_records()
        if not total:  # one that was cut off has no footer, and so no records
            raise ValueError("holds no records")
        for start in range(0, total, _ROWS):
            lines = reader.read(start, min(start + _ROWS, total))
            for number, line in enumerate(lines, start + 1):
                yield number, _parsed(line), line


@contextlib.contextmanager
def _readable(path):
    """Turns what libraries raise on a bad file into Damage."""
    bad = (ArithmeticError, LookupError, OSError, RuntimeError, ValueError, csv.Error)
    try:
        yield
    except bad as error:
        what = f"damaged, cut off, or not a {name(path)} file"
        raise Damage(path, what, error) from None


_cut_paragraphs = functools.partial(_cut_lines, blank=True)
CONTAINERS = {
    ".txt": Container(_text, _cut_paragraphs, text=True, compressed=True),
    ".jsonl": Container(_jsonl, _cut_lines, compressed=True),
    ".json": Container(_json, compressed=True),
    ".csv": Container(_csv, compressed=True),
    ".parquet": Container(_parquet, _cut_row_groups, columns=True),
    ".arrow": Container(_arrow, columns=True),
    ".array_record": Container(_array_record),
}
SUFFIXES = tuple(
    suffix + end
    for suffix, container in CONTAINERS.items()
    for end in ("", *(streams.COMPRESSED if container.compressed else ()))
)
