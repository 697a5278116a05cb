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
from typing import Any

from stagecraft.data import containers, files, forms, keys
from stagecraft.data.keys import fields  # noqa: F401  (what callers rename keys with)
from stagecraft.data.records import Comparison, Conversation, Judgement, Prompt
from stagecraft.data.tally import Tally
from stagecraft.errors import UserError
from stagecraft.text import chat

# Keys that are read, or known to say nothing of a conversation, under any form.
_ALWAYS = ("tools", "system", "chat_template_kwargs", "reward")
# Who compared two answers, and what they said.
_ALWAYS += ("signal", "generator", "judge", "probability", "first", "logps", "mass")
_ALWAYS += ("bounded", "rationales", "tokens", "gold", "own")
_log = logging.getLogger("stagecraft.data")


def texts(spec, mapping=None, tally=None) -> Iterator[str]:
    """Reads documents, one at a time: of text files, and the "text" of records."""
    tally, recognised = tally or Tally(), []
    for path in files.expand(spec):
        files.refuse_shards(path)
        if containers.is_text(path):
            count = 0
            for text in containers.documents(path):
                count += 1
                yield text
            tally.read += count
            recognised.append((path, count, "documents of plain text"))
            continue
        census = forms.Census(forms.TEXT)
        for where, record in containers.records(path, tally.bad):
            try:
                record = keys.joined(where, record, mapping or {})
                text = _field(where, record, "text", mapping, (str,))
            except UserError as error:
                tally.bad(where, str(error))
                continue
            census.see(where, record, mapping)
            tally.read += 1
            yield text
        if census.counts:
            said = f"records of {census.one(path)}"
            recognised.append((path, census.counts.total(), said))
    say(recognised)


def demonstrations(spec, mapping=None, tally=None) -> list[Conversation]:
    """Reads conversations to imitate: {"prompt","completion"} or {"messages"}.

    An assistant's message may carry "weight" 0 (not to be learned) or 1.
    """
    return [one for _, one in each("demonstrations", spec, mapping, tally)]


def comparisons(spec, mapping=None, tally=None) -> list[Comparison]:
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
        tally: counts pairs, those left out as "identical"; or None.
    """
    return [one for _, one in each("comparisons", spec, mapping, tally)]


def judgements(spec, mapping=None, tally=None) -> list[list[Judgement]]:
    """Reads answers judged one by one: {"prompt","completion","label": true or false}.

    Pairs, which have "chosen", are accepted too: the better answer is desirable, the
    other is not. "completion_ended" false is as in `comparisons`, and so are pairs of
    one text twice.

    Args:
        tally: as of `comparisons`; counts answers, two of a pair.

    Returns:
        the Judgements of each record: two of a pair, else one.
    """
    return [one for _, one in each("judgements", spec, mapping, tally)]


def prompts(spec, mapping=None, tally=None) -> list[Prompt]:
    """Reads prompts: {"prompt"}, a text or messages; other keys stay beside it.

    Pairs of whole conversations and transcripts of attacks are read too: `forms.asked`.
    """
    return [one for _, one in each("prompts", spec, mapping, tally)]


# -- one record ------------------------------------------------------------------------


def _demonstration(where, record, form, names, tally):
    if form.name == "messages":
        key = names.get("messages", "messages")
        used = (key if key in record else "conversations",)
        messages = forms.conversation(record[used[0]])
    else:
        prompt, completion = (
            _field(where, record, name, names, (str, list))
            for name in ("prompt", "completion")
        )
        used = _used(names, "prompt", "completion")
        messages = forms.messages(prompt)
        messages = messages + forms.messages(completion, "assistant")
    messages = _opened(record, messages, tally)
    chat.conversation({"messages": messages})
    one = Conversation(messages, forms.tools(record))
    tally.seen(record, used + _ALWAYS)
    return one


def _compared_answers(where, record, form, names, tally):
    one = _comparison(where, record, names, tally)
    answers = _distinct(one.answers)
    count = math.comb(len(one.answers), 2)
    identical = count - math.comb(len(answers), 2)
    used = _used(names, "prompt", "chosen", "rejected", "ranked", *_STRENGTH)
    ended = ("chosen_ended", "rejected_ended", "ranked_ended")
    if identical:
        tally.drop("identical", where, identical)
    if len(answers) < 2:
        tally.read += count
        return None
    tally.seen(record, used + ended + _ALWAYS, units=count)
    return one._replace(answers=answers)


def _judged_answers(where, record, form, names, tally):
    if form.name == "ranking":
        raise UserError(
            f"{where}: 'ranked' does not say which answers are desirable; expected "
            "'completion' with 'label', or 'chosen' with 'rejected'"
        )
    if form.name == "preference":
        used = _used(names, "prompt", "chosen", "rejected", *_STRENGTH)
        judged = _judged_pair(_comparison(where, record, names, tally))
        if not judged:
            tally.drop("identical", where, 2)
            tally.read += 2
            return None
    else:
        used = _used(names, "prompt", "completion", "label")
        prompt = _side(where, record, "prompt", names, "user")
        prompt = _opened(record, prompt, tally)
        completion = _side(where, record, "completion", names, "assistant")
        _compared(where, prompt, completion)
        label = _field(where, record, "label", names, (bool,))
        judged = [Judgement(prompt, completion, label, forms.tools(record))]
    ended = tuple(f"{name}_ended" for name in ("chosen", "rejected", "completion"))
    tally.seen(record, used + ended + _ALWAYS, units=len(judged))
    return judged


def _prompt(where, record, form, names, tally):
    value = _field(where, record, "prompt", names, (str, list))
    messages = forms.messages(value)
    opened = _opened(record, messages, tally)
    chat.check_turns(opened, ("user",))
    plain = form.style == "standard" and opened is messages
    tools = forms.tools(record)
    tally.seen(record, _used(names, "prompt") + _ALWAYS, only=keys.CONTENT)
    joined = [key for key in names.values() if "+" in key]
    record = {key: value for key, value in record.items() if key not in joined}
    return Prompt(value if plain else opened, where, record, tools)


_STRENGTH = ("preference", "margin")


def _used(names, *ours):
    """Returns the file's keys that are read for ours, those that are joined too."""
    theirs = (names.get(name, name) for name in ours)
    return tuple(part for key in theirs for part in (key, *key.split("+")))


def _opened(record, messages, tally):
    """Returns messages with the record's system text, and a greeting as context."""
    turns = forms.with_system(record, messages)
    opened = forms.greeted(turns)
    if opened is not turns:
        tally.notes["begin with the assistant, whose first turn is context"] += 1
    return opened


def _judged_pair(pair):
    """Returns the two judgements that a pair stands for; [] of one text twice."""
    if len(_distinct(pair.answers)) < 2:
        return []
    # Where chosen is less likely the better one, it is the undesirable one.
    first = pair.preference is None or pair.preference >= 0.5
    return [
        Judgement(pair.prompt, answer, label, pair.tools)
        for answer, label in zip(pair.answers, (first, not first), strict=True)
    ]


def _comparison(where, record, mapping, tally):
    names = mapping or {}
    with at(where):
        tools = forms.tools(record)
    if names.get("ranked", "ranked") in record:
        prompt = _side(where, record, "prompt", mapping, "user")
        prompt = _opened(record, prompt, tally)
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
        prompt = _opened(record, prompt, tally)
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


def _refuse_all_identical(spec, tally, pairs):
    """Refuses files that hold nothing but so many pairs of one text twice."""
    if pairs and tally.dropped.total() == tally.dropped["identical"]:
        raise UserError(
            f"{spec}: chosen and rejected are the same text in all {pairs} pairs; "
            "expected two different answers"
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
    """Puts FILE:LINE before what is refused inside, unless it is there."""
    try:
        yield
    except UserError as error:
        line = str(error).removeprefix(f"{where}: ")
        raise UserError(f"{where}: {line}") from None


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


# What each use of a record is read by: the forms it takes, and the conversion of one.
_USES = {
    "demonstrations": (forms.DEMONSTRATIONS, _demonstration),
    "comparisons": (forms.COMPARISONS, _compared_answers),
    "judgements": (forms.JUDGEMENTS, _judged_answers),
    "prompts": (forms.PROMPTS, _prompt),
}


def each(use, spec, mapping=None, tally=None) -> Iterator[tuple[str, Any]]:
    """Yields (FILE:LINE, record) of all files, one at a time.

    What is bad goes to the tally. A file of mixed forms is refused at its end, so that
    all of them are listed; where bad records are dropped, its most frequent form stays,
    and a file is held in memory until that is known.

    Args:
        use: "demonstrations", "comparisons", "judgements" or "prompts"; the functions
            of these names say what a record is.
        spec: as of `files.expand`.
        mapping: {"our key": "the file's key"}.
        tally: a `Tally`, or None.
    """
    tally, (accepted, convert) = tally or Tally(), _USES[use]
    begun, count = len(tally.recognised), 0
    for path in files.expand(spec):
        if files.shards_here(path):
            raise UserError(
                f"{path}: {use} are records, not ids; expected .jsonl or another "
                "container of records"
            )
        if containers.is_text(path):
            raise UserError(f"{path}: {use} are records; expected .jsonl or .jsonl.gz")
        census, names, held = forms.Census(accepted), {}, []
        for where, record in containers.records(path, tally.bad):
            form = None
            try:
                if use == "prompts" and not mapping:
                    with at(where):
                        record = forms.asked(record)
                names = mapping or keys.spelled(record, accepted)
                record = keys.joined(where, record, names)
                form = census.see(where, record, names)
                with at(where):
                    one = convert(where, record, form, names, tally)
            except UserError as error:
                tally.bad(where, str(error))
                if form:
                    census.forget(form)
                continue
            if one is None:
                continue
            count += 1
            if tally.drops_bad:
                held.append((form, where, one))
            else:
                yield where, one
        for _, where, one in _of_one_form(held, census, tally):
            yield where, one
        if census.counts:
            said = f"records of {census.one(path)}"
            if names and not mapping:
                pairs = ", ".join(f"{ours}={theirs}" for ours, theirs in names.items())
                said += f", read as {pairs}"
            tally.recognised.append((path, census.counts.total(), said))
    say(tally.recognised[begun:])
    if not count:
        share = 2 if use == "judgements" else 1
        _refuse_all_identical(spec, tally, tally.dropped["identical"] // share)


def _of_one_form(rows, census, tally):
    """Returns the (form, FILE:LINE, record) of a file's most frequent form.

    Only where bad records are dropped: otherwise mixed forms are refused, all listed.
    """
    if len(census.counts) < 2 or not tally.drops_bad:
        return rows
    [(most, _)] = census.counts.most_common(1)
    for form, where, one in rows:
        if form != most:
            count = len(one) if isinstance(one, list) else 1
            tally.drop(f"of another form ({form})", where, count)
    for form in [form for form in census.counts if form != most]:
        del census.counts[form], census.first[form]
    return [row for row in rows if row[0] == most]


def say(recognised):
    """Logs what was recognised, one line for files alike, and each line once.

    Args:
        recognised: (path, rows, what) of each file.
    """
    groups = {}
    for path, rows, what in recognised:
        groups.setdefault((containers.name(path), what), []).append((path, rows))
    for (container, what), listed in groups.items():
        path, more = listed[0][0], len(listed) - 1
        name = f"{path} and {more} more" if more else path
        rows = sum(count for _, count in listed)
        _log_once(f"{name}: {container}, {rows} {what}")


@functools.cache
def _log_once(line):
    """Logs a line once: several stages may read one file."""
    _log.info(line)
