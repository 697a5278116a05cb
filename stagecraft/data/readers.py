"""Reads files as texts, conversations, comparisons, judgements and prompts.

What containers there are is in `containers`, what forms in `forms`. The form of a file
is recognised and logged; a mistake in it is refused as FILE:LINE with what was
expected, before anything trains.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from stagecraft import schema
from stagecraft.data import containers, files, forms
from stagecraft.errors import UserError
from stagecraft.text import chat

# Keys of records, which the `fields` of a stage may rename.
_TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected", "ranked")
KEYS = (*_TEXTS, "label", "preference", "margin")
_log = logging.getLogger("stagecraft.data")


class Conversation(NamedTuple):
    """A conversation to imitate.

    Attributes:
        messages: its turns.
        tools: JSON schemas of what the assistant may call, or None.
    """

    messages: list
    tools: list | None = None


class Comparison(NamedTuple):
    """Answers to one prompt, compared.

    Attributes:
        prompt: messages.
        answers: a list of messages for each answer, the best first; two or more.
        preference: probability that the first is better than the second; None where
            the record has none.
        margin: by how much it is better; None likewise.
        tools: JSON schemas of what the assistant may call, or None.
    """

    prompt: list
    answers: tuple
    preference: float | None = None
    margin: float | None = None
    tools: list | None = None


class Judgement(NamedTuple):
    """One answer and whether it is desirable.

    Attributes:
        prompt, completion: messages.
        label: True for desirable.
        tools: as of a `Comparison`.
    """

    prompt: list
    completion: list
    label: bool
    tools: list | None = None


class Prompt(NamedTuple):
    """A prompt and where it came from.

    Attributes:
        prompt: a text or messages.
        where: "FILE:LINE".
        record: the whole record, its other keys (an answer to verify against) included.
        tools: as of a `Comparison`.
    """

    prompt: Any
    where: str
    record: dict
    tools: list | None = None


def fields(text) -> dict[str, str]:
    """Returns {"our key": "the file's key"} of "prompt=question+completion=answer"."""
    mapping = {}
    for part in filter(None, text.split("+")):
        ours, _, theirs = (word.strip() for word in part.partition("="))
        if not ours or not theirs:
            raise UserError(
                f"fields={text!r}: expected our=theirs pairs joined by +, as in "
                "prompt=question+completion=answer"
            )
        if ours not in KEYS:
            near = schema.nearest(ours, KEYS)
            raise UserError(
                f"fields={text!r}: no key {ours!r} to rename; ours are "
                f"{', '.join(KEYS)}" + (f" (did you mean {near!r}?)" if near else "")
            )
        mapping[ours] = theirs
    return mapping


def texts(spec, mapping=None) -> Iterator[str]:
    """Reads documents, one at a time: of text files, and the "text" of records."""
    log = _Log()
    for path in files.expand(spec):
        files.refuse_shards(path)
        if containers.is_text(path):
            count = 0
            for text in containers.documents(path):
                count += 1
                yield text
            log.file(path, count, "documents of plain text")
            continue
        census = forms.Census(forms.TEXT, mapping)
        for where, record in containers.records(path):
            census.see(where, record)
            yield _field(where, record, "text", mapping, (str,))
        log.file(path, census.counts.total(), f"records of {census.one(path)}")
    log.finish()


def demonstrations(spec, mapping=None) -> list[Conversation]:
    """Reads conversations to imitate: {"prompt","completion"} or {"messages"}.

    An assistant's message may carry "weight" 0 (not to be learned) or 1.
    """
    conversations = []
    for where, record, form in _records(
        spec, "demonstrations", forms.DEMONSTRATIONS, mapping
    ):
        if form.name == "messages":
            key = (mapping or {}).get("messages", "messages")
            key = key if key in record else "conversations"
            with at(where):
                messages = forms.messages(record[key])
        else:
            prompt, completion = (
                _field(where, record, name, mapping, (str, list))
                for name in ("prompt", "completion")
            )
            with at(where):
                messages = forms.messages(prompt)
                messages = messages + forms.messages(completion, "assistant")
        with at(where):
            chat.conversation({"messages": messages})
            conversations.append(Conversation(messages, forms.tools(record)))
    return conversations


def comparisons(spec, mapping=None, dropped=None) -> list[Comparison]:
    """Reads compared answers: {"prompt","chosen","rejected"} or {"prompt","ranked"}.

    Each answer is a text or messages; "ranked" lists two or more, the best first.
    Without a prompt, it is what chosen and rejected have in common. A pair may carry
    "preference", the probability (0 to 1) that chosen is better, and "margin", a
    number. "chosen_ended" or "rejected_ended" false, or a list of true and false in
    "ranked_ended", marks an answer that a length limit cut off, which then gets no end
    of turn.

    A pair of one text twice teaches nothing and is left out; a ranking keeps the best
    place of a text that it repeats.

    Args:
        dropped: a Counter to whose "identical" the pairs left out are added, or None.
    """
    compared, identical = [], 0
    for where, record, _ in _records(spec, "comparisons", forms.COMPARISONS, mapping):
        one = _comparison(where, record, mapping)
        answers = _distinct(one.answers)
        identical += math.comb(len(one.answers), 2) - math.comb(len(answers), 2)
        if len(answers) > 1:
            compared.append(one._replace(answers=answers))
    _report_identical(spec, identical, compared, dropped)
    return compared


def judgements(spec, mapping=None, dropped=None) -> list[list[Judgement]]:
    """Reads answers judged one by one: {"prompt","completion","label": true or false}.

    Pairs, which have "chosen", are accepted too: the better answer is desirable, the
    other is not. "completion_ended" false is as in `comparisons`, and so are pairs of
    one text twice.

    Args:
        dropped: as of `comparisons`; counts pairs.

    Returns:
        the Judgements of each record: two of a pair, else one.
    """
    judged, identical = [], 0
    for where, record, form in _records(spec, "judgements", forms.JUDGEMENTS, mapping):
        if form.name == "ranking":
            raise UserError(
                f"{where}: 'ranked' does not say which answers are desirable; expected "
                "'completion' with 'label', or 'chosen' with 'rejected'"
            )
        if form.name == "preference":
            pair = _comparison(where, record, mapping)
            if len(_distinct(pair.answers)) < 2:
                identical += 1
                continue
            # Where chosen is less likely the better one, it is the undesirable one.
            first = pair.preference is None or pair.preference >= 0.5
            judged.append(
                [
                    Judgement(pair.prompt, answer, label, pair.tools)
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
        with at(where):
            tools = forms.tools(record)
        judged.append([Judgement(prompt, completion, label, tools)])
    _report_identical(spec, identical, judged, dropped)
    return judged


def prompts(spec, mapping=None) -> list[Prompt]:
    """Reads prompts: {"prompt"}, a text or messages; other keys stay beside it."""
    read = []
    for where, record, form in _records(spec, "prompts", forms.PROMPTS, mapping):
        value = _field(where, record, "prompt", mapping, (str, list))
        with at(where):
            messages = forms.messages(value)
            chat.check_turns(messages, ("user",))
            tools = forms.tools(record)
        value = value if form.style == "standard" else messages
        read.append(Prompt(value, where, record, tools))
    return read


def _comparison(where, record, mapping):
    names = mapping or {}
    with at(where):
        tools = forms.tools(record)
    if names.get("ranked", "ranked") in record:
        prompt = _side(where, record, "prompt", mapping, "user")
        answers = _ranked(where, record, mapping, prompt)
        return Comparison(prompt, answers, tools=tools)
    prompt = None
    if names.get("prompt", "prompt") in record:
        prompt = _field(where, record, "prompt", mapping, (str, list))
    sides = [
        _field(where, record, name, mapping, (str, list))
        for name in ("chosen", "rejected")
    ]
    with at(where):
        prompt, *answers = forms.pair(prompt, *sides)
    answers = tuple(
        answer if record.get(f"{name}_ended") is not False else _cut_off(answer)
        for name, answer in zip(("chosen", "rejected"), answers, strict=True)
    )
    for answer in answers:
        _compared(where, prompt, answer)
    return Comparison(
        prompt,
        answers,
        _number(where, record, "preference", mapping, "a number from 0 to 1", 0, 1),
        _number(where, record, "margin", mapping, "a number"),
        tools,
    )


def _distinct(answers):
    """Returns answers without those whose text came before, whether or not it ended."""
    texts = [[{**m, "ended": True} for m in answer] for answer in answers]
    return tuple(a for i, a in enumerate(answers) if texts[i] not in texts[:i])


def _report_identical(spec, count, rows, dropped):
    """Counts and logs identical pairs; refuses files that hold nothing else."""
    if not count:
        return
    if not rows:
        raise UserError(
            f"{spec}: chosen and rejected are the same text in all {count} pairs; "
            "expected two different answers"
        )
    _log_once(f"{spec}: {count} pairs dropped: chosen and rejected are the same text")
    if dropped is not None:
        dropped["identical"] += count


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
        with at(where):
            answer = forms.messages(value, "assistant")
        answer = answer if whole else _cut_off(answer)
        _compared(where, prompt, answer)
        answers.append(answer)
    return tuple(answers)


def _side(where, record, name, mapping, role):
    """Returns a prompt or an answer as messages."""
    value = _field(where, record, name, mapping, (str, list))
    with at(where):
        messages = forms.messages(value, role)
    return _cut_off(messages) if record.get(f"{name}_ended") is False else messages


def _cut_off(messages):
    return [*messages[:-1], messages[-1] | {"ended": False}]


def _compared(where, prompt, answer):
    """Refuses an answer that does not follow its prompt, or has weight 0."""
    with at(where):
        chat.check_turns(prompt + answer, ("assistant",))
    if answer[-1].get("weight", 1) == 0:
        raise UserError(
            f"{where}: an answer to judge has weight 0; weights are for demonstrations"
        )


def _number(where, record, name, mapping, limits, low=-math.inf, high=math.inf):
    """Returns an optional number of a record; None where it has none."""
    key = (mapping or {}).get(name, name)
    if key not in record:
        return None
    value = record[key]
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not low <= value <= high:
        raise UserError(f"{where}: {key!r} is {value!r}, expected {limits}")
    return float(value)


@contextlib.contextmanager
def at(where):
    """Puts FILE:LINE before what is refused inside."""
    try:
        yield
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


def _records(spec, what, accepted, mapping):
    """Yields (FILE:LINE, record, Form) of all files and logs what each file holds.

    A file of mixed forms is refused at its end, so that all of them are listed.
    """
    log = _Log()
    for path in files.expand(spec):
        if files.shards_here(path):
            raise UserError(
                f"{path}: {what} are records, not ids; expected .jsonl or another "
                "container of records"
            )
        if containers.is_text(path):
            raise UserError(f"{path}: {what} are records; expected .jsonl or .jsonl.gz")
        census = forms.Census(accepted, mapping)
        for where, record in containers.records(path):
            yield where, record, census.see(where, record)
        log.file(path, census.counts.total(), f"records of {census.one(path)}")
    log.finish()


class _Log:
    """Logs what was recognised, one line for files alike."""

    def __init__(self):
        self.groups = {}

    def file(self, path, rows, what):
        key = containers.name(path), what
        self.groups.setdefault(key, []).append((path, rows))

    def finish(self):
        for (container, what), listed in self.groups.items():
            path, more = listed[0][0], len(listed) - 1
            name = f"{path} and {more} more" if more else path
            rows = sum(count for _, count in listed)
            _log_once(f"{name}: {container}, {rows} {what}")


@functools.cache
def _log_once(line):
    """Logs a line once: several stages may read one file."""
    _log.info(line)
