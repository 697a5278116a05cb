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
import contextlib
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
SPEAKERS = dict.fromkeys(("human", "Human"), "user") | {"developer": "system"}
SPEAKERS |= dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "model", "Assistant"), "assistant"
)
SPEAKERS |= dict.fromkeys(
    ("observation", "function", "function_response", "tool_response"), "tool"
)
# Roles whose text is a call of a tool, or several, as JSON.
CALLS = ("function_call", "tool_call")
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
    """

    def __init__(self, accepted):
        self.accepted = accepted
        self.counts, self.first = collections.Counter(), {}
        self._by_keys = {}  # of a record: the name of its form, and its texts' keys

    def see(self, where, record, mapping=None) -> Form:
        """Counts a record and returns its form; refuses one of two forms at once.

        Args:
            where: FILE:LINE.
            record: a dict.
            mapping: {"our key": "the file's key"}.
        """
        mapping = mapping or {}
        keys = tuple(record)
        if keys not in self._by_keys:
            name = _form(where, record, self.accepted, mapping)
            parts = [mapping.get(part, part) for part in _PARTS[name]]
            self._by_keys[keys] = name, [part for part in parts if part in record]
        name, parts = self._by_keys[keys]
        form = Form(name, _style([record[part] for part in parts]))
        self.counts[form] += 1
        if form not in self.first:
            self.first[form] = where, keys
        return form

    def forget(self, form):
        """Takes a record back that turned out to be none."""
        self.counts[form] -= 1
        if not self.counts[form]:
            del self.counts[form], self.first[form]

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
        value = [_message(message) for message in value]
    return chat.as_messages(value, role)


def conversation(value):
    """Returns the messages of a whole conversation, which may be JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return messages(value)


def _message(message):
    """Returns a message by our names: role, content, tool_calls, weight."""
    if not isinstance(message, dict):
        return message
    # Written from columns, a message has null for what only others have.
    wanted = ("role", "content", "from", "value")
    message = {k: v for k, v in message.items() if v is not None or k in wanted}
    if "from" in message:
        rest = {k: v for k, v in message.items() if k not in ("from", "value")}
        content = {"content": message["value"]} if "value" in message else {}
        message = {"role": message["from"]} | content | rest
    role = message.get("role")
    if role in CALLS:
        calls = _calls(role, message.get("content"))
        message |= {"role": "assistant", "content": "", "tool_calls": calls}
    elif isinstance(role, str) and role in SPEAKERS:
        message["role"] = SPEAKERS[role]
    if isinstance(message.get("function_call"), dict):  # OpenAI's older name
        call = {"type": "function", "function": message.pop("function_call")}
        message.setdefault("tool_calls", [call])
    if isinstance(message.get("content"), list):
        message["content"] = _joined_parts(message["content"])
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    if "train" in message:
        learned = message.pop("train")
        if not isinstance(learned, bool):
            raise UserError(f"a message's train is {learned!r}, expected true or false")
        if message["role"] == "assistant":
            message.setdefault("weight", int(learned))
    return message


def _joined_parts(parts):
    """Returns the text of content in parts; refuses what is no text by its type."""
    texts = []
    for part in parts:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            what = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(
                f"a message's content has a part of type {what!r}; text alone is "
                "read: leave such records out"
            )
    return "".join(texts)


def _calls(role, text):
    """Returns the tool calls that the text of a message of `CALLS` is."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise UserError(f"what {role!r} says is no JSON of a call ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(
            f"what {role!r} says is no call: expected JSON like "
            '{"name": "...", "arguments": {...}}'
        )
    return [{"type": "function", "function": call} for call in calls]


def _call(call):
    """Returns a tool call whose arguments are an object, not the JSON text of one."""
    if not isinstance(call, dict):
        return call
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = without_nulls(json.loads(function["arguments"] or "{}"))
    except ValueError:
        return call  # the text that a model wrote, JSON or not
    if not isinstance(arguments, dict):
        return call
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def without_nulls(value):
    """Returns a value without the keys that are null, also inside."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def with_system(record, turns):
    """Returns the messages with a record's own `system` text as their first turn."""
    system = record.get("system")
    if not isinstance(system, str) or not system.strip():
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"] != system:
        raise UserError(
            "has a system message, and another one under 'system'; drop one of them"
        )
    return turns


def greeted(turns):
    """Returns messages whose first turn, if it is the assistant's, is context.

    There is nothing that it answers. FastChat leaves such a turn out of Vicuna's data;
    TRL hands it to the template.
    """
    first = 1 if turns[0]["role"] == "system" and turns[1:] else 0
    if turns[first]["role"] != "assistant" or len(turns) == first + 1:
        return turns
    return [*turns[:first], turns[first] | {"weight": 0}, *turns[first + 1 :]]


def is_transcript(text):
    return text.startswith("\n\nHuman:")


def transcript(text, *, whole=False):
    """Returns the turns of a transcript.

    Args:
        text: it.
        whole: whether an empty last turn of the assistant is an answer; else it is
            where the answer to a prompt begins, and left out.
    """
    _, *parts = _TURN.split(text)
    turns = [
        {"role": SPEAKERS[who], "content": words.strip()}
        for who, words in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not whole and turns[-1] == {"role": "assistant", "content": ""}:
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
            f"has no prompt, and {_no_opening(chosen, rejected)}; expected a prompt, "
            "or the same opening in both"
        )
    return chosen[:size], chosen[size:], rejected[size:]


def _no_opening(chosen, rejected):
    """Returns why two texts, or lists of messages, have no prompt in common."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side:
            return f"{name!r} is empty"
        if len(side) == 1 and side[0] == (chosen + rejected)[0] == rejected[0]:
            if isinstance(side, str):
                return f"{name!r} is {side!r} alone"
            return f"{name!r} is one message, of {side[0]['role']!r}, without an answer"
    return "chosen and rejected begin differently"


def pair(record_prompt, chosen, rejected):
    """Returns the messages of a pair's prompt and its two answers.

    Args:
        record_prompt: the record's prompt, or None where it has none.
        chosen, rejected: its answers: texts, or messages. Whole conversations, as
            hh-rlhf and UltraFeedback have them, hold the prompt: it must be the same.
    """
    whole = all(begins_conversation(side) for side in (chosen, rejected))
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
    prompt, *answers = implicit(_answered(chosen), _answered(rejected))
    if record_prompt is not None and messages(record_prompt) != prompt:
        last = messages(record_prompt)
        if prompt[-len(last) :] != last:
            raise UserError(
                "has a prompt, and another one in 'chosen' and 'rejected', which are "
                "whole conversations; drop the key, or leave the answers alone in them"
            )
    return prompt, *answers


def _answered(side):
    """Returns the messages of a whole conversation of a pair, an empty answer too."""
    if isinstance(side, str) and is_transcript(side):
        return transcript(side, whole=True)
    return messages(side)


def asked(record):
    """Returns a record whose prompt stands in conversations, with the prompt apart.

    Pairs of whole conversations (hh-rlhf) hold their prompt as what both have in
    common; of the "transcript" of an attack on a model (hh-rlhf's red-team-attempts)
    it is all up to the last turn of the human, which is to be answered anew.

    >>> attack = "\\n\\nHuman: Hi\\n\\nAssistant: No.\\n\\nHuman: Why?"
    >>> [turn["content"] for turn in asked({"transcript": attack})["prompt"]]
    ['Hi', 'No.', 'Why?']
    """
    if "prompt" in record:
        return record
    sides = [record.get(name) for name in ("chosen", "rejected")]
    if all(map(begins_conversation, sides)):
        return record | {"prompt": pair(None, *sides)[0]}
    text = record.get("transcript")
    if isinstance(text, str) and is_transcript(text):
        turns = transcript(text)
        while turns and turns[-1]["role"] != "user":
            turns.pop()
        return record | {"prompt": turns} if turns else record
    return record


def begins_conversation(value):
    if isinstance(value, str):
        return is_transcript(value)
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    role = value[0].get("role", value[0].get("from"))
    return isinstance(role, str) and SPEAKERS.get(role, role) in ("system", "user")


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
    value = without_nulls(value)
    if not isinstance(value, list) or not all(isinstance(t, dict) for t in value):
        raise UserError("'tools' is no list of JSON schemas, nor the JSON text of one")
    return value
