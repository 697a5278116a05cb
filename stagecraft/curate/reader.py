"""Documents of a part of a file; a line that cannot be read is set aside.

Nothing in the data raises: what cannot be read is a Bad with its FILE:LINE and reason,
and what follows it is read all the same.
"""

import json
from typing import Any, NamedTuple

from stagecraft.data import containers, streams
from stagecraft.data.containers import Fault

_SHOWN = 200  # bytes of a bad line that are kept


class Text(NamedTuple):
    """A document.

    Attributes:
        where: "FILE:LINE", or "FILE:ROW" of columns.
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


def read(part, text_key, source_key, document):
    """Yields the Text and Bad of a part, in order.

    Args:
        part: an `inputs.Part`.
        text_key, source_key: the keys of records that hold the text and, perhaps, the
            name of the source.
        document: characters a .txt document is collected up to; 0 for a whole file.
    """
    container = containers.of(streams.path_of(part.file))
    if container.text:
        yield from _plain(part, document)
        return
    for where, record, line in _records(part):
        if isinstance(record, Bad):
            yield record
            continue
        item = _document(part, where, record, line, text_key, source_key)
        if container.columns and isinstance(item, Text):
            rest = {k: _storable(v) for k, v in item.record.items()}
            item = item._replace(record=rest)
        yield item


def texts_of_records(part):
    """Yields (FILE:LINE, all texts of a record together) and Bad, of a part."""
    if containers.is_text(streams.path_of(part.file)):
        for item in _plain(part, 0):
            yield item if isinstance(item, Bad) else (item.where, item.text)
        return
    for where, record, _ in _records(part):
        if isinstance(record, Bad):
            yield record
        else:
            yield where, "\n".join(_texts(record))


def _records(part):
    """Yields (FILE:LINE, record or Bad, line) of a part, to where it is damaged."""
    path, number = streams.path_of(part.file), part.stretch.first - 1
    empty = part.stretch.end == part.stretch.start
    try:
        for number, record, line in (
            () if empty else containers.read(path, part.stretch)
        ):
            where = containers.where(path, number)
            if isinstance(record, Fault):
                record = _bad(part, where, record.reason, record.detail, line)
            yield where, record, line
    except streams.Damage as error:
        where = containers.where(path, number + 1)
        yield where, _damaged(part, where, error.detail), b""
    if part.damage:
        where = f"{path}:end"
        yield where, _damaged(part, where, part.damage), b""


def _damaged(part, where, detail):
    detail = f"{detail}; what follows is lost"
    return Bad(where, part.source, "damaged file", detail, "")


def _bad(part, where, reason, detail, line):
    shown = line[:_SHOWN].decode("utf-8", errors="backslashreplace").rstrip("\r\n")
    return Bad(where, part.source, reason, detail, shown)


def _document(part, where, record, line, text_key, source_key):
    """Returns the Text of a record, or Bad where it has none."""
    text = record.get(text_key)
    if not isinstance(text, str):
        reason, detail = "text is no text", f"{text_key!r} is {type(text).__name__}"
        if text_key not in record:
            keys = ", ".join(map(repr, list(record)[:6])) or "none"
            reason, detail = "no text", f"no key {text_key!r}; it has {keys}"
        rest = {k: v for k, v in record.items() if k != text_key}
        return _bad(part, where, reason, detail, line or str(rest).encode())
    source = record.get(source_key)
    if not isinstance(source, str) or not source:
        source = part.source
    rest = {k: v for k, v in record.items() if k != text_key}
    return Text(text, where, source, rest)


def _plain(part, document):
    """Collects paragraphs to documents; a line that is not UTF-8 is left out."""
    lines, size, first, blank = [], 0, None, False
    for where, text, _ in _records(part):
        if isinstance(text, Bad):
            yield text
            continue
        if blank and text.strip() and document and size >= document:
            yield Text("".join(lines).strip("\n"), first, part.source, {})
            lines, size, first = [], 0, None
        blank = not text.strip()
        if first is None and blank:
            continue
        first = first or where
        lines.append(text)
        size += len(text)
    if lines:
        yield Text("".join(lines).strip("\n"), first, part.source, {})


def _storable(value: Any) -> Any:
    """Returns what JSON cannot hold (dates, bytes, decimals) as its text."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def _texts(value):
    """Yields every text in a record, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
