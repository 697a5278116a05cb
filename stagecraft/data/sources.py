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
import math
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from stagecraft.errors import UserError
from stagecraft.text import chat

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
# A .txt file longer than this is cut at blank lines into documents of about this size.
DOCUMENT = 2000  # characters
# Keys of records, which the `fields` of a stage may rename.
KEYS = (
    "text",
    "messages",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "ranked",
    "label",
    "preference",
    "margin",
)


class Comparison(NamedTuple):
    """Answers to one prompt, compared.

    Attributes:
        prompt: messages.
        answers: a list of messages for each answer, the best first; two or more.
        preference: probability that the first is better than the second; None where
            the record has none.
        margin: by how much it is better; None likewise.
    """

    prompt: list
    answers: tuple
    preference: float | None = None
    margin: float | None = None


class Judgement(NamedTuple):
    """One answer and whether it is desirable.

    Attributes:
        prompt, completion: messages.
        label: True for desirable.
    """

    prompt: list
    completion: list
    label: bool


class Prompt(NamedTuple):
    """A prompt and where it came from.

    Attributes:
        prompt: a text or messages.
        where: "FILE:LINE".
        record: the whole record, its other keys (an answer to verify against) included.
    """

    prompt: Any
    where: str
    record: dict


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

    An assistant's message may carry "weight" 0 (not to be learned) or 1.

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
    """Answers compared: {"prompt","chosen","rejected"}, or {"prompt","ranked"}.

    Each answer is a text or messages; "ranked" lists two or more, the best first.
    A pair may carry "preference", the probability (0 to 1) that chosen is better, and
    "margin", a number. "chosen_ended" or "rejected_ended" false, or a list of true and
    false in "ranked_ended", marks an answer that a length limit cut off, which then
    gets no end of turn.

    Returns:
        list[Comparison].
    """
    return [
        _comparison(where, record, mapping)
        for where, record in _jsonl(spec, "comparisons")
    ]


def judgements(spec, mapping=None):
    """Answers judged one by one: {"prompt","completion","label": true or false}.

    Pairs, told by their "chosen", are accepted too: the better answer is desirable, the
    other is not. "completion_ended" false is as in `comparisons`.

    Returns:
        list of lists of Judgement, one a record: two of a pair, else one.
    """
    found = []
    names = mapping or {}
    for where, record in _jsonl(spec, "judgements"):
        if names.get("ranked", "ranked") in record:
            raise UserError(
                f"{where}: 'ranked' does not say which answers are desirable; expected "
                "'completion' with 'label', or 'chosen' with 'rejected'"
            )
        if names.get("chosen", "chosen") in record:
            pair = _comparison(where, record, mapping)
            # Where chosen is less likely the better one, it is the undesirable one.
            first = pair.preference is None or pair.preference >= 0.5
            found.append(
                [
                    Judgement(pair.prompt, answer, label)
                    for answer, label in zip(
                        pair.answers, (first, not first), strict=True
                    )
                ]
            )
            continue
        prompt = _side(where, record, "prompt", mapping, "user")
        completion = _side(where, record, "completion", mapping, "assistant")
        _compared(where, prompt, completion)
        label = _field(where, record, "label", mapping, (bool,))
        found.append([Judgement(prompt, completion, label)])
    return found


def prompts(spec, mapping=None):
    """Prompts: {"prompt"}, a text or messages; other keys are kept beside it.

    Returns:
        list[Prompt].
    """
    found = []
    for where, record in _jsonl(spec, "prompts"):
        value = _field(where, record, "prompt", mapping, (str, list))
        messages = _told(where, chat.as_messages, value)
        _told(where, chat.check_turns, messages, ("user",))
        found.append(Prompt(value, where, record))
    return found


def _comparison(where, record, mapping):
    names = mapping or {}
    prompt = _side(where, record, "prompt", mapping, "user")
    if names.get("ranked", "ranked") in record:
        return Comparison(prompt, _ranked(where, record, mapping, prompt))
    answers = tuple(
        _side(where, record, name, mapping, "assistant")
        for name in ("chosen", "rejected")
    )
    for answer in answers:
        _compared(where, prompt, answer)
    return Comparison(
        prompt,
        answers,
        _number(where, record, "preference", mapping, "a number from 0 to 1", 0, 1),
        _number(where, record, "margin", mapping, "a number"),
    )


def _ranked(where, record, mapping, prompt):
    names = mapping or {}
    for other in ("chosen", "rejected", "preference", "margin"):
        if names.get(other, other) in record:
            raise UserError(
                f"{where}: has both 'ranked' and {names.get(other, other)!r}, which "
                "belongs to a pair; drop one"
            )
    values = _field(where, record, "ranked", mapping, (list,))
    ended = record.get("ranked_ended", [True] * len(values))
    if len(values) < 2:
        raise UserError(
            f"{where}: 'ranked' has {len(values)} answers, expected two or more, the "
            "best first"
        )
    if (
        not isinstance(ended, list)
        or len(ended) != len(values)
        or not all(isinstance(e, bool) for e in ended)
    ):
        raise UserError(
            f"{where}: 'ranked_ended' is {ended!r}, expected true or false for each of "
            f"the {len(values)} answers"
        )
    answers = []
    for value, whole in zip(values, ended, strict=True):
        answer = _told(where, chat.as_messages, value, "assistant")
        answer = answer if whole else _cut_off(answer)
        _compared(where, prompt, answer)
        answers.append(answer)
    return tuple(answers)


def _side(where, record, name, mapping, role):
    """A prompt or an answer as messages."""
    value = _field(where, record, name, mapping, (str, list))
    messages = _told(where, chat.as_messages, value, role)
    return _cut_off(messages) if record.get(f"{name}_ended") is False else messages


def _cut_off(messages):
    return [*messages[:-1], messages[-1] | {"ended": False}]


def _compared(where, prompt, answer):
    """Refuses an answer that does not follow its prompt, or that none may learn."""
    _told(where, chat.check_turns, prompt + answer, ("assistant",))
    if answer[-1].get("weight", 1) == 0:
        raise UserError(
            f"{where}: an answer to judge has weight 0; weights are for demonstrations"
        )


def _number(where, record, name, mapping, limits, low=-math.inf, high=math.inf):
    """An optional number of a record; None where it has none."""
    key = (mapping or {}).get(name, name)
    if key not in record:
        return None
    value = record[key]
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not low <= value <= high:
        raise UserError(f"{where}: {key!r} is {value!r}, expected {limits}")
    return float(value)


def _told(where, function, *args):
    try:
        return function(*args)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


_WANTED = {
    (str,): "a text",
    (str, list): "a text or a list of messages",
    (list,): "a list of answers",
    (bool,): "true or false",
}


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
        wanted = _WANTED[types]
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
