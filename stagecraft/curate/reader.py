"""Documents of a part of a file, byte by byte: a bad line is told, never a file lost.

Nothing in the data raises: what cannot be read is a Bad with its FILE:LINE and reason,
and what follows it is read all the same.
"""

import codecs
import json
from typing import Any, NamedTuple

from stagecraft.curate import inputs

_SHOWN = 200  # bytes of a bad line that are kept


class Text(NamedTuple):
    """A document.

    Attributes:
        text: str.
        where: "FILE:LINE", or "FILE:ROW" of parquet.
        source: what it is counted under.
        record: the other keys of its record.
    """

    text: str
    where: str
    source: str
    record: dict


class Bad(NamedTuple):
    """What could not be read.

    Attributes:
        where, source: as of Text.
        reason: one of few, to be counted by.
        detail: what is wrong here.
        data: how the line begins.
    """

    where: str
    source: str
    reason: str
    detail: str
    data: str


class _Refused(Exception):
    """(reason, detail) of a record that is no document."""


def read(part, text_key, source_key, document):
    """Text and Bad of a part, in order.

    Args:
        part: an `inputs.Part`.
        text_key, source_key: the keys of records that hold the text and, perhaps, the
            name of the source.
        document: characters a .txt document is collected up to; 0 for a whole file.
    """
    if part.kind == "parquet":
        yield from _parquet(part, text_key, source_key)
    elif part.kind == "text":
        yield from _plain(part, document)
    else:
        for where, line in _lines(part):
            if line.strip():
                yield _judged(part, where, line, text_key, source_key)
    if part.damage and part.kind != "parquet":
        yield Bad(
            f"{part.path}:end",
            part.source,
            "damaged file",
            f"{part.damage}; what follows is lost",
            "",
        )


def _lines(part):
    chunks = inputs.stretch(part.path, part.start, part.end)
    for number, line in enumerate(inputs.lines(chunks), part.line):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield f"{part.path}:{number}", line


def _judged(part, where, line, text_key, source_key):
    try:
        record = _json(line)
        return _document(part, where, record, text_key, source_key)
    except _Refused as error:
        return _bad(part, where, *error.args, line)


def _bad(part, where, reason, detail, line):
    shown = line[:_SHOWN].decode("utf-8", errors="backslashreplace").rstrip("\r\n")
    return Bad(where, part.source, reason, detail, shown)


def _json(line):
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Refused("not UTF-8", f"byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        told = f"{error.msg}, character {error.colno}"
        raise _Refused("not JSON", told) from None
    except (ValueError, RecursionError) as error:
        raise _Refused("not JSON", " ".join(str(error).split())[:80]) from None
    if not isinstance(record, dict):
        raise _Refused("no JSON object", f"it is {type(record).__name__}")
    if b"\\u" in line:
        _encodable(record)
    return record


def _encodable(record):
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _Refused("half a surrogate pair", "which is no character") from None


def _document(part, where, record, text_key, source_key):
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:6])) or "none"
        raise _Refused("no text", f"no key {text_key!r}; it has {keys}")
    text = record.pop(text_key)
    if not isinstance(text, str):
        told = f"{text_key!r} is {type(text).__name__}"
        raise _Refused("text is no text", told)
    source = record.get(source_key)
    if not isinstance(source, str) or not source:
        source = part.source
    return Text(text, where, source, record)


def _plain(part, document):
    """Paragraphs collected to documents; a line that is not UTF-8 is left out."""
    found, size, first, blank = [], 0, None, False
    for where, line in _lines(part):
        try:
            text = line.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            told = f"byte {error.start + 1} of the line"
            yield _bad(part, where, "not UTF-8", told, line)
            continue
        if blank and text.strip() and document and size >= document:
            yield Text("".join(found).strip("\n"), first, part.source, {})
            found, size, first = [], 0, None
        blank = not text.strip()
        if first is None and blank:
            continue
        first = first or where
        found.append(text)
        size += len(text)
    if found:
        yield Text("".join(found).strip("\n"), first, part.source, {})


def _parquet(part, text_key, source_key):
    if part.damage:
        yield Bad(part.path, part.source, "damaged file", part.damage, "")
        return
    row = part.line
    try:
        file = inputs.arrow_parquet(part.path).ParquetFile(part.path)
        for batch in file.iter_batches(256, row_groups=range(part.start, part.end)):
            for i in range(len(batch)):
                where = f"{part.path}:{row}"
                row += 1
                try:
                    record = batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield Bad(where, part.source, "not UTF-8", "a text of the row", "")
                    continue
                yield _row(part, where, record, text_key, source_key)
    except Exception as error:  # pyarrow raises its own and OSError alike
        told = " ".join(str(error).split())[:200]
        yield Bad(
            f"{part.path}:{row}",
            part.source,
            "damaged file",
            f"{told}; the rest of its row group is lost",
            "",
        )


def _row(part, where, record, text_key, source_key):
    try:
        found = _document(part, where, record, text_key, source_key)
        _encodable(found.text)
    except _Refused as error:
        return _bad(
            part, where, *error.args, str(record)[:_SHOWN].encode("utf-8", "replace")
        )
    return found._replace(record={k: _storable(v) for k, v in record.items()})


def _storable(value: Any):
    """What JSON cannot hold (dates, bytes, decimals) as its text."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def records(part):
    """(FILE:LINE, all texts of the record together) and Bad, of evaluation files."""
    if part.kind == "text":
        for found in _plain(part, 0):
            yield found if isinstance(found, Bad) else (found.where, found.text)
        return
    if part.kind == "parquet":
        yield from _rows_as_texts(part)
        return
    for where, line in _lines(part):
        if not line.strip():
            continue
        try:
            yield where, "\n".join(_texts(_json(line)))
        except _Refused as error:
            yield _bad(part, where, *error.args, line)


def _rows_as_texts(part):
    if part.damage:
        yield Bad(part.path, part.source, "damaged file", part.damage, "")
        return
    file = inputs.arrow_parquet(part.path).ParquetFile(part.path)
    row = part.line
    for batch in file.iter_batches(256, row_groups=range(part.start, part.end)):
        for record in batch.to_pylist():
            yield f"{part.path}:{row}", "\n".join(_texts(record))
            row += 1


def _texts(value):
    """Every text in a record, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
