"""Containers to documents and records, one at a time, every line checked.

    .txt                         documents, cut at blank lines where the file is long
    .jsonl                       one JSON object a line
    .json                        a list of objects, or one object a line
    .parquet, .arrow             one record a row (Arrow: as `datasets` saves it)
    .array_record                one JSON object a record, as a line of .jsonl

The first three may be compressed: .gz, .zst. Whatever is wrong is told as FILE:LINE, or
FILE:ROW, with what was expected.
"""

import codecs
import json

from stagecraft.data import files
from stagecraft.errors import UserError

# A .txt file longer than this is cut at blank lines into documents of about this size.
DOCUMENT = 2000  # characters
# Rows of a columnar file that are held as Python values at once.
_ROWS = 1024


def is_text(path):
    return files.suffix(path)[0] == ".txt"


def name(path):
    """What a file is called in messages: "jsonl.gz"."""
    return "".join(files.suffix(path)).removeprefix(".")


def records(path):
    """(FILE:LINE, record) of every record of a file; a record is a dict.

    Raises UserError for the first that is none, and for an empty file.
    """
    read = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".array_record": _array_record,
    }[files.suffix(path)[0]]
    count = 0
    for where, record in read(path):
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: expected a JSON object, got {type(record).__name__}"
            )
        count += 1
        yield where, record
    if not count:
        raise UserError(f"{path}: empty; expected one JSON object a line")


def documents(path):
    """The documents of a text file: it whole, or parts of about `DOCUMENT` characters.

    Parts end at blank lines, and a blank line joined between them gives the text back.
    """
    current, empty = "", True
    for paragraph in _paragraphs(path):
        if current and len(current) + len(paragraph) > DOCUMENT:
            if current.strip():
                empty = False
                yield current
            current = ""
        current += ("\n\n" if current else "") + paragraph
    if current.strip():
        empty = False
        yield current
    if empty:
        raise UserError(f"{path}: empty; expected text")


def _paragraphs(path):
    """What stands between blank lines, as text.split("\\n\\n") would give it."""
    lines = []
    for number, line in enumerate(files.lines(path), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"{path}:{number}: not UTF-8; convert the file to UTF-8"
            ) from None
        if text.endswith("\r\n"):
            text = text[:-2] + "\n"
        if text == "\n" and lines:
            yield "".join(lines)[:-1]
            lines = []
        else:
            lines.append(text)
    yield "".join(lines)


# -- records ---------------------------------------------------------------------------


def _jsonl(path):
    for number, line in enumerate(files.lines(path), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parsed(where, line)


def _json(path):
    """A list of records, told apart from lines of records by its first character."""
    found = files.lines(path)
    first = next((line for line in found if line.strip()), b"")
    if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _jsonl(path)
        return
    data = b"".join(files.chunks(path)).removeprefix(codecs.BOM_UTF8)
    for number, record in enumerate(_parsed(str(path), data), 1):
        yield f"{path}:{number}", record


def _parsed(where, data):
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start + 1} of the line); convert the "
            "file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg}, character {error.colno}); mend or "
            "drop the line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not readable as JSON ({error}); mend or drop the line"
        ) from None
    if b"\\u" in data and not _encodable(value):
        raise UserError(
            f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which "
            "is no character; mend or drop the line"
        )
    return value


def _encodable(value):
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path):
    parquet = files.optional("pyarrow.parquet", path)
    with files.open_bytes(path) as file:
        yield from _rows(
            path, lambda: parquet.ParquetFile(file).iter_batches(batch_size=_ROWS)
        )


def _arrow(path):
    """An Arrow file, in the streaming format of `datasets` or the one with a footer."""
    pyarrow = files.optional("pyarrow", path)

    def batches():
        try:
            return pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            found = pyarrow.ipc.open_file(file)
            return map(found.get_batch, range(found.num_record_batches))

    with files.open_bytes(path) as file:
        yield from _rows(path, batches)


def _rows(path, batches):
    """(FILE:ROW, record) of Arrow batches; a struct's absent keys, null, are left out.

    All rows of a column have the same keys there, so that a message without tool calls
    has them as null.
    """
    pyarrow = files.optional("pyarrow", path)
    number = 0
    try:
        for batch in batches():
            for start in range(0, len(batch), _ROWS):
                for record in batch.slice(start, _ROWS).to_pylist():
                    number += 1
                    yield f"{path}:{number}", _present(record)
    except (pyarrow.ArrowException, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: damaged, cut off, or not a {name(path)} file ({told})"
        ) from None


def _present(value):
    if isinstance(value, dict):
        return {k: _present(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_present(v) for v in value]
    return value


def _array_record(path):
    if isinstance(path, files.Remote):
        raise UserError(f"{path}: ArrayRecord is read from this machine; copy it here")
    module = files.optional("array_record.python.array_record_module", path)
    try:
        reader = module.ArrayRecordReader(str(path))
        total = reader.num_records()
        if not total:  # one that was cut off has no footer, and so no records
            raise ValueError("holds no records")
        for start in range(0, total, _ROWS):
            found = reader.read(start, min(start + _ROWS, total))
            for number, data in enumerate(found, start + 1):
                where = f"{path}:{number}"
                yield where, _parsed(where, data)
    except (ValueError, RuntimeError, IndexError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: damaged, cut off, or not an ArrayRecord file ({told})"
        ) from None
