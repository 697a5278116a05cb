"""Forms of records: which one a record has, and its parts as messages.

What users have is recognised by its keys (TRL's names, huggingface.co/docs/trl,
"Dataset formats and types") and by how its texts are written:

    text                {"text"}
    messages            {"messages"}, or {"conversations"}
    prompt-completion   {"prompt", "completion"}
    prompt-only         {"prompt"}
    preference          {"prompt", "chosen", "rejected"}; without the prompt it is what
                        the two have in common
    unpaired preference {"prompt", "completion", "label"}
    ranking             {"prompt", "ranked"}, which goes as preference

    standard            texts
    conversational      [{"role", "content"}, ...]
    from/value          [{"from", "value"}, ...], as ShareGPT has it
    transcript          "\\n\\nHuman: ...\\n\\nAssistant: ...", as hh-rlhf has it
"""

import collections
import json
import re
from typing import NamedTuple

from stagecraft.errors import UserError
from stagecraft.text import chat

# What tells a form, first come first served, among those a reader takes.
TEXT = {"text": ("text",)}
DEMONSTRATIONS = {
    "messages": ("messages", "conversations"),
    "prompt-completion": ("completion",),
}
COMPARISONS = {"preference": ("chosen", "ranked")}  # a pair is a ranking of two
JUDGEMENTS = {
    "unpaired preference": ("completion",),
    "preference": ("chosen",),
    "ranking": ("ranked",),  # which is refused
}
PROMPTS = {"prompt-only": ("prompt",)}

# Roles by the names of other collections.
SPEAKERS = dict.fromkeys(("human", "Human"), "user") | dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "model", "Assistant"), "assistant"
)
_TURN = re.compile(r"\n\n(Human|Assistant):")
# Keys whose values say how a record of a form is written.
_PARTS = {
    "text": (),
    "messages": ("messages", "conversations"),
    "prompt-completion": ("prompt", "completion"),
    "prompt-only": ("prompt",),
    "preference": ("prompt", "chosen", "rejected", "ranked"),
    "unpaired preference": ("prompt", "completion"),
    "ranking": ("prompt", "ranked"),
    "": (),
}


class Form(NamedTuple):
    """What a record is.

    Attributes:
        name: as in this file's docstring; "" where no key tells.
        style: "standard", "conversational", "from/value" or "transcript".
    """

    name: str
    style: str

    def __str__(self):
        return f"{self.name or 'no known form'}, {self.style}"


class Census:
    """Forms of the records of a file: how many of each, their keys, and the first.

    Args:
        accepted: the forms the reader takes, such as `DEMONSTRATIONS`.
        mapping: {"our key": "the file's key"}.
    """

    def __init__(self, accepted, mapping=None):
        self.accepted, self.mapping = accepted, mapping or {}
        self.counts, self.first = collections.Counter(), {}
        self._by_keys = {}  # of a record: the name of its form, and its texts' keys

    def see(self, where, record) -> Form:
        """Counts a record and returns its form; refuses one of two forms at once."""
        keys = tuple(record)
        if keys not in self._by_keys:
            name = _form(where, record, self.accepted, self.mapping)
            parts = [self.mapping.get(part, part) for part in _PARTS[name]]
            self._by_keys[keys] = name, [part for part in parts if part in record]
        name, parts = self._by_keys[keys]
        form = Form(name, _style([record[part] for part in parts]))
        self.counts[form] += 1
        if form not in self.first:
            self.first[form] = where, keys
        return form

    def one(self, path) -> Form:
        """Returns the form of all records; refuses and lists several."""
        if len(self.counts) == 1:
            return next(iter(self.counts))
        listed = []
        for form, count in self.counts.items():
            where, keys = self.first[form]
            keys = ", ".join(map(repr, keys))
            listed.append(f"{count} of {form} (first {where}, with keys {keys})")
        raise UserError(
            f"{path}: mixed forms: {'; '.join(listed)}; put each form in a file of its "
            "own"
        )


def _form(where, record, accepted, mapping):
    """Returns the name of a record's form among those a reader takes, or ""."""
    present = {}
    for form, keys in accepted.items():
        there = [k for ours in keys if (k := mapping.get(ours, ours)) in record]
        if there:
            present[form] = there
    # A key that `fields` names is meant, whatever else the record holds.
    meant = set(mapping.values())
    chosen = {f: k for f, k in present.items() if meant & set(k)} or present
    keys = [key for several in chosen.values() for key in several]
    # What does not go with "ranked" is refused where rankings are read.
    if len(keys) > 1 and mapping.get("ranked", "ranked") not in keys:
        raise UserError(
            f"{where}: has {' and '.join(map(repr, keys))}, any of which may be meant; "
            "say which with fields, as in fields='messages=messages' or "
            "fields='completion=completion'"
        )
    return next(iter(chosen), "")


def _style(values):
    styles = set()
    for value in values:
        if isinstance(value, str):
            styles.add("transcript" if is_transcript(value) else "standard")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            styles.add("from/value" if "from" in value[0] else "conversational")
    order = ("from/value", "conversational", "transcript", "standard")
    return next((style for style in order if style in styles), "standard")


# -- values as messages ----------------------------------------------------------------


def messages(value, role="user"):
    """Returns the messages of a text, a transcript or a list.

    >>> messages("\\n\\nHuman: Hi\\n\\nAssistant: Hello.")[1]
    {'role': 'assistant', 'content': 'Hello.'}
    >>> messages([{"from": "human", "value": "Hi"}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, str) and role == "user" and is_transcript(value):
        return transcript(value)
    if isinstance(value, list):
        value = [_role_and_content(message) for message in value]
    return chat.as_messages(value, role)


def _role_and_content(message):
    if not isinstance(message, dict):
        return message
    # Written from columns, a message has null for what only others have.
    wanted = ("role", "content", "from", "value")
    message = {k: v for k, v in message.items() if v is not None or k in wanted}
    if "from" not in message:
        return message
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    speaker = message["from"]
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    content = {"content": message["value"]} if "value" in message else {}
    return {"role": role} | content | rest


def is_transcript(text):
    return text.startswith("\n\nHuman:")


def transcript(text):
    """Returns the turns of a transcript, without an empty last one."""
    _, *parts = _TURN.split(text)
    turns = [
        {"role": SPEAKERS[who], "content": words.strip()}
        for who, words in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def implicit(chosen, rejected):
    """Splits two texts that begin alike, as TRL's extract_prompt.

    The prompt is their longest common opening, of messages or of characters, and leaves
    each something of its own; a space before the answers goes with them.

    >>> implicit("The sky is blue.", "The sky is green.")
    ('The sky is', ' blue.', ' green.')
    """
    least = min(len(chosen), len(rejected))
    size = 0
    while size < least and chosen[size] == rejected[size]:
        size += 1
    if size == least:
        size = max(least - 1, 0)
    elif size and chosen[size - 1] == " ":
        size -= 1
    if not size:
        raise UserError(
            "has no prompt, and chosen and rejected begin differently; expected a "
            "prompt, or the same opening in both"
        )
    return chosen[:size], chosen[size:], rejected[size:]


def pair(record_prompt, chosen, rejected):
    """Returns the messages of a pair's prompt and its two answers.

    Args:
        record_prompt: the record's prompt, or None where it has none.
        chosen, rejected: its answers: texts, or messages. Whole conversations, as
            hh-rlhf and UltraFeedback have them, hold the prompt: it must be the same.
    """
    whole = all(_begins_conversation(side) for side in (chosen, rejected))
    if record_prompt is not None and not whole:
        return (
            messages(record_prompt),
            messages(chosen, "assistant"),
            messages(rejected, "assistant"),
        )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(
            "'chosen' and 'rejected' differ: one is a text, the other messages"
        )
    if isinstance(chosen, str) and not whole:
        prompt, *answers = implicit(chosen, rejected)
        return messages(prompt), *(messages(a, "assistant") for a in answers)
    prompt, *answers = implicit(messages(chosen), messages(rejected))
    if record_prompt is not None and messages(record_prompt) != prompt:
        last = messages(record_prompt)
        if prompt[-len(last) :] != last:
            raise UserError(
                "has a prompt, and another one in 'chosen' and 'rejected', which are "
                "whole conversations; drop the key, or leave the answers alone in them"
            )
    return prompt, *answers


def _begins_conversation(value):
    if isinstance(value, str):
        return is_transcript(value)
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    first = _role_and_content(value[0])
    return first.get("role") in ("system", "user")


def tools(record):
    """Returns the tools of a record, JSON schemas or the JSON text of them, or None."""
    if record.get("chat_template_kwargs"):
        raise UserError(
            "'chat_template_kwargs' is "
            f"{record['chat_template_kwargs']!r}, which is not passed on to templates; "
            "drop the key"
        )
    value = record.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise UserError(f"'tools' is no JSON ({error})") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(t, dict) for t in value):
        raise UserError("'tools' is no list of JSON schemas, nor the JSON text of one")
    return value
