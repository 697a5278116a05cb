"""Files of records, read as bytes and checked line by line.

    .txt                  documents, separated by blank lines when the file is long
    .jsonl, .jsonl.gz     one JSON object a line

Whatever is wrong is told as FILE:LINE with what was expected, before anything trains.
"""

import codecs
import difflib
import glob
import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path

from stagecraft.errors import UserError
from stagecraft.text import chat

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
# A .txt file longer than this is cut at blank lines into documents of about this size.
DOCUMENT = 2000  # characters
# Keys of records, which the `fields` of a stage may rename.
KEYS = ("text", "messages", "prompt", "completion", "chosen", "rejected")


def expand(spec):
    """The files a spec names, sorted within each part.

    Args:
        spec: a file, a directory (with what is in it, but nothing hidden) or a glob;
            several separated by commas, or a tuple.

    Returns:
        list[Path], not empty. Raises UserError for what is missing or unreadable.
    """
    parts = [spec] if isinstance(spec, os.PathLike) else spec
    parts = spec.split(",") if isinstance(spec, str) else map(str, parts)
    found = []
    for part in (p.strip() for p in parts if p.strip()):
        path = Path(part)
        if path.is_dir():
            inside = sorted(filter(_is_data, path.rglob("*")))
            inside = [p for p in inside if not _hidden(p.relative_to(path))]
            if not inside:
                raise UserError(
                    f"{path}: holds no {', '.join(SUFFIXES)} files; name a folder that "
                    "does"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        elif glob.has_magic(part) and (
            matches := sorted(glob.glob(part, recursive=True))
        ):
            found += map(Path, matches)
        else:
            raise UserError(f"{part}: no such file, folder or glob; check the path")
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: expected a {', '.join(SUFFIXES)} file")
    if not found:
        raise UserError(f"files={spec!r}: names no file")
    return found


def digest(paths):
    """SHA-256 of the files' contents in order; names and places do not count."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(_read(path)).digest())
    return total.hexdigest()


def fields(text):
    """{"our key": "the file's key"} from "prompt=question+completion=answer"."""
    mapping = {}
    for part in filter(None, text.split("+")):
        ours, _, theirs = (word.strip() for word in part.partition("="))
        if not ours or not theirs:
            raise UserError(
                f"fields={text!r}: expected our=theirs pairs joined by +, as in "
                "prompt=question+completion=answer"
            )
        if ours not in KEYS:
            near = difflib.get_close_matches(ours, KEYS, 1)
            raise UserError(
                f"fields={text!r}: no key {ours!r} to rename; ours are "
                f"{', '.join(KEYS)}" + (f" (did you mean {near[0]!r}?)" if near else "")
            )
        mapping[ours] = theirs
    return mapping


def texts(spec, mapping=None):
    """Documents: of .txt files, and the "text" of .jsonl records.

    Returns:
        list[str].
    """
    found = []
    for path in expand(spec):
        if path.name.endswith(".txt"):
            found += _documents(_decode(path, _read(path)))
            continue
        for where, record in _records(path):
            found.append(_field(where, record, "text", mapping, (str,)))
    return found


def demonstrations(spec, mapping=None):
    """Conversations to imitate: {"prompt","completion"} or {"messages"}.

    Returns:
        list of message lists.
    """
    found = []
    for where, record in _jsonl(spec, "demonstrations"):
        key = (mapping or {}).get("messages", "messages")
        if key in record:
            part = {"messages": record[key]}
        else:
            part = {
                name: _field(where, record, name, mapping, (str, list))
                for name in ("prompt", "completion")
            }
        found.append(_told(where, chat.conversation, part))
    return found


def comparisons(spec, mapping=None):
    """Pairs: {"prompt","chosen","rejected"}, each a text or messages.

    Optional: "chosen_ended" or "rejected_ended" false for an answer that a length limit
    cut off, which then gets no end of turn.

    Returns:
        list of (prompt messages, chosen messages, rejected messages).
    """
    found = []
    for where, record in _jsonl(spec, "comparisons"):
        one = []
        for name, role in (
            ("prompt", "user"),
            ("chosen", "assistant"),
            ("rejected", "assistant"),
        ):
            value = _field(where, record, name, mapping, (str, list))
            messages = _told(where, chat.as_messages, value, role)
            if record.get(f"{name}_ended") is False:
                messages = [*messages[:-1], messages[-1] | {"ended": False}]
            one.append(messages)
        prompt, *answers = one
        for answer in answers:
            _told(where, chat.check_turns, prompt + answer, ("assistant",))
        found.append(tuple(one))
    return found


def prompts(spec, mapping=None):
    """Prompts: {"prompt"}, a text or messages.

    Returns:
        list of (prompt, "FILE:LINE").
    """
    found = []
    for where, record in _jsonl(spec, "prompts"):
        value = _field(where, record, "prompt", mapping, (str, list))
        messages = _told(where, chat.as_messages, value)
        _told(where, chat.check_turns, messages, ("user",))
        found.append((value, where))
    return found


def _told(where, function, *args):
    try:
        return function(*args)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _field(where, record, name, mapping, types):
    key = (mapping or {}).get(name, name)
    if key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise UserError(
            f"{where}: no key {key!r}; it has {keys}; rename keys with fields, as in "
            f"{name}=YOUR_KEY"
        )
    value = record[key]
    if not isinstance(value, types):
        wanted = "a text" if types == (str,) else "a text or a list of messages"
        raise UserError(
            f"{where}: {key!r} is {type(value).__name__}, expected {wanted}"
        )
    return value


def _jsonl(spec, what):
    for path in expand(spec):
        if path.name.endswith(".txt"):
            raise UserError(f"{path}: {what} are records; expected .jsonl or .jsonl.gz")
        yield from _records(path)


def _records(path):
    """(FILE:LINE, object) for every line that is not blank."""
    count = 0
    data = _read(path).removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
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
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: expected a JSON object, got {type(record).__name__}"
            )
        if b"\\u" in line and not _encodable(record):
            raise UserError(
                f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which "
                "is no character; mend or drop the line"
            )
        count += 1
        yield where, record
    if not count:
        raise UserError(f"{path}: empty; expected one JSON object a line")


def _is_data(path):
    return path.name.endswith(SUFFIXES) and path.is_file()


def _hidden(path):
    return any(part.startswith(".") for part in path.parts)


def _encodable(record):
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read(path):
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.name.endswith(".gz") else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut-off gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None


def _decode(path, data):
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8; convert the file to UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"{path}: empty; expected text")
    return text


def _documents(text):
    """One document, or several of about DOCUMENT characters cut at blank lines."""
    documents, current = [], ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        if current and len(current) + len(paragraph) > DOCUMENT:
            documents.append(current)
            current = ""
        current += ("\n\n" if current else "") + paragraph
    documents.append(current)
    return [d for d in documents if d.strip()]
