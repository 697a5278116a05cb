"""Conversations and documents as ids and a mask of the tokens to learn.

    <bos> <|user|> question <|assistant|> answer <|end|> <|user|> ...
    <bos> document <eos>

The mask marks targets: in a conversation every assistant turn with its <|end|> (or the
last alone; none whose weight is 0), in a document everything but bos. Each part is
tokenised on its own, so that no piece spans the border between prompt and target.

A tokenizer that brings a chat template writes conversations its own way instead. The
whole text is tokenised at once, as transformers does, and a token is a target where it
holds a character of an assistant's turn; see `template`. Two things are mended: the end
of a turn that directly follows what is learned is learned too, and where the last
characters of a prompt and the first of its answer would be one token, they are apart,
as they are when a model answers.
"""

import bisect
import contextlib
import functools
import logging
import os
from collections.abc import Sequence

import numpy as np

from stagecraft.errors import UserError
from stagecraft.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
# Those that a tokenizer without a template has pieces for.
PIECES = ("system", "user", "assistant")

_log = logging.getLogger("stagecraft.text")
# Which assistant turns of a conversation are learned.
TURNS = ("all", "last")


def document(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Encodes a plain document.

    Returns:
        ids list[int], mask list[bool]: all but bos are targets.
    """
    ids, begun = _begun(text, tokenizer)
    if ids[-1:] != [tokenizer.eos]:  # text whose control tokens are parsed may end so
        ids.append(tokenizer.eos)
    return ids, [False] * begun + [True] * (len(ids) - begun)


def continuation(
    prompt: str, completion: str, tokenizer: Tokenizer, *, ended: bool = True
) -> tuple[list[int], list[bool], bool]:
    """Encodes a text and what follows it, without turns; eos is learned as its end.

    As TRL's SFTTrainer does with texts: the two are tokenised as one text, and what it
    begins with of the prompt's own tokens is given.

    Args:
        prompt, completion: texts.
        tokenizer: a `Tokenizer`.
        ended: whether eos follows.

    Returns:
        ids list[int], mask list[bool]; whether a token holds the end of the prompt
        and the beginning of the completion, which is learned whole then.
    """
    given, _ = _begun(prompt, tokenizer)
    ids, _ = _begun(prompt + completion, tokenizer)
    if ended and ids[-1:] != [tokenizer.eos]:
        ids.append(tokenizer.eos)
    count = len(os.path.commonprefix([given, ids]))
    mask = [False] * count + [True] * (len(ids) - count)
    return ids, mask, count < len(given)


def _begun(text, tokenizer):
    """Returns the ids of a text behind its beginning, and how many are that."""
    ids, before = tokenizer.encode(text), beginning(tokenizer)
    if before and ids[:1] != before:  # nor may it be spelled by the text itself
        ids = [*before, *ids]
    return list(ids), len(before)


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids before a text: bos, or none where the tokenizer puts none."""
    return [] if tokenizer.bos is None else [tokenizer.bos]


def render(
    messages: list[dict], tokenizer: Tokenizer, *, turns: str = "all", tools=None
) -> tuple[list[int], list[bool]]:
    """Encodes a whole conversation.

    Args:
        messages: [{"role", "content"}]; one with "ended" False was cut off by a length
            limit and gets no end of turn; an assistant's with "weight" 0 is context
            and not learned. With a template also "tool_calls" and role "tool".
        turns: "all" to learn every assistant turn, "last" the last one alone.
        tools: JSON schemas of the tools a template may offer, or None.

    Returns:
        ids list[int], mask list[bool]: True on the assistant's words and end of turn.
    """
    template = tokenizer.template
    if template is None:
        return _pieces(messages, tokenizer, turns, tools)

    def write(messages, tools):
        return template.conversation(messages, tools, turns=turns)

    encoded = tokenizer.encode_turns(messages, tools, write)
    starts = [start for start, _ in encoded[2]]
    if _within(encoded[1], {*starts, *(start + template.lead for start in starts)}):
        encoded = _apart(encoded, messages, tools, tokenizer, write)
    ids, offsets, spans = encoded
    return ids, _with_ends(ids, _touched(offsets, spans), offsets, spans, tokenizer)


def generation_prompt(
    messages: list[dict], tokenizer: Tokenizer, *, tools=None
) -> list[int]:
    """Encodes a conversation up to where the assistant's answer begins."""
    template = tokenizer.template
    if template is None:
        return [*_pieces(messages, tokenizer, "all", tools)[0], tokenizer.assistant]

    def write(messages, tools):
        return template.text(messages, tools, prompt=True), []

    return tokenizer.encode_turns(messages, tools, write)[0]


def _pieces(messages, tokenizer, turns, tools):
    if tokenizer.end is None:
        raise UserError(
            "this tokenizer has no chat template and no pieces for turns, so it is for "
            "plain text; train one with tokenizer.files, name a template with "
            "tokenizer.template=FILE, or set data.render='text' where prompt and "
            "completion are texts"
        )
    if tools:
        raise UserError("tools need a tokenizer with a chat template that offers them")
    last = max(
        (i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1
    )
    ids, mask = [tokenizer.bos], [False]
    pieces = {role: getattr(tokenizer, role) for role in PIECES}
    for number, message in enumerate(messages):
        if message["role"] not in pieces or message.get("tool_calls"):
            raise UserError(
                f"message {number + 1} is of a tool or calls one; that needs a "
                "tokenizer with a chat template that writes such turns"
            )
        words = tokenizer.encode(message["content"])
        is_answer = message["role"] == "assistant"
        learned = is_answer and message.get("weight", 1) != 0
        learned = learned and (turns == "all" or number == last)
        ids += [pieces[message["role"]], *words]
        mask += [False] + [learned] * len(words)
        if is_answer and message.get("ended", True):  # others end where the next begins
            ids.append(tokenizer.end)
            mask.append(learned)
    return ids, mask


def _touched(offsets, spans):
    """Tells which tokens hold a character of a span.

    Args:
        offsets: (start, end) of each token in characters, in order.
        spans: (start, end), in order.

    >>> _touched([(0, 2), (2, 4), (3, 4), (4, 4), (4, 6)], [(3, 4)])
    [False, True, True, False, False]
    """
    if not spans or not offsets:
        return [False] * len(offsets)
    starts, ends = np.array(offsets).T
    first, last = np.array(spans).T
    # Of the spans that end behind a token's start, the first; else the last of all.
    nearest = np.minimum(np.searchsorted(last, starts, side="right"), len(spans) - 1)
    shared = np.maximum(starts, first[nearest]) < np.minimum(ends, last[nearest])
    return shared.tolist()


def _within(offsets, places):
    """Tells whether a token spans one of these places in the text.

    >>> _within([(0, 2), (2, 4)], {2}), _within([(0, 2), (2, 4)], {3})
    (False, True)
    """
    return any(start < place < end for start, end in offsets for place in places)


def _apart(encoded, messages, tools, tokenizer, write):
    """Encodes answers apart from the prompts they follow, where they melt together.

    Args:
        encoded: ids, offsets and spans of the text as a whole.
        messages, tools: see `render`.
        tokenizer: one with a template.
        write: see `encode_turns`.
    """
    ids, offsets, _ = encoded
    text, cuts = write(messages, tools)[0], []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = tokenizer.template.text(messages[:number], tools, prompt=True)
            prompt = generation_prompt(messages[:number], tokenizer, tools=tools)
        except UserError:  # a template that takes no such conversation
            continue
        melted = ids[: len(prompt)] != prompt and _within(offsets, {len(before)})
        if melted and text.startswith(before):
            cuts.append(len(before))
    if not cuts:
        return encoded
    again = tokenizer.encode_turns(messages, tools, write, cuts)
    if tokenizer.decode(again[0]) != tokenizer.decode(ids):
        say(
            "the first characters of an answer are one token with the last of its "
            "prompt, and this tokenizer cannot part them: such answers are learned "
            "from another token than the model is asked with"
        )
        return encoded
    say(
        "the first characters of an answer (a newline, a space) would be one token "
        "with the last of its prompt: they are tokenised apart, as when the model "
        "answers"
    )
    return again


def _with_ends(ids, mask, offsets, spans, tokenizer):
    """Returns the mask with the end of each turn, where it directly follows the turn.

    A template may write it behind its {% generation %} block, or before the next turn.
    """
    stops, places = {*tokenizer.stops}, [start for start, _ in offsets]
    for start, end in spans:
        first, after = (bisect.bisect_left(places, place) for place in (start, end))
        if not stops.isdisjoint(ids[first:after]):
            continue
        last = after
        while last < len(ids) and ids[last] not in stops:
            if tokenizer.decode([ids[last]]).strip():
                break
            last += 1
        if last < len(ids) and ids[last] in stops:
            mask[after : last + 1] = [True] * (last + 1 - after)
            say(
                "the chat template writes the end of a turn outside of what it marks "
                "as the assistant's: it is learned with the answer that it directly "
                "follows"
            )
    return mask


# Sets of lines, of whoever notes what is said meanwhile.
_listeners = []


def say(line):
    """Prints a line about conversations, once."""
    for lines in _listeners:
        lines.add(line)
    _say_once(line)


@functools.cache
def _say_once(line):
    _log.warning(line)


@contextlib.contextmanager
def listening():
    """Yields the set of lines that are said of conversations meanwhile."""
    lines = set()
    _listeners.append(lines)
    try:
        yield lines
    finally:
        _listeners[:] = [one for one in _listeners if one is not lines]


def ends(ids: Sequence, mask: Sequence, tokenizer: Tokenizer) -> bool:
    """Returns whether a conversation has an end of turn to learn."""
    stops = {*tokenizer.stops}
    backwards = zip(reversed(ids), reversed(mask), strict=True)
    return any(learned and token in stops for token, learned in backwards)


def check_ends(ends: int, total: int, where: str, *, required: bool) -> None:
    """Says in how many conversations the model learns to end its turn.

    Args:
        ends: how many have an end of turn to learn.
        total: how many have anything to learn.
        where: the key of the data, for the line.
        required: whether all are to, and data in which none does are refused; without,
            a line says where none does.
    """
    if ends >= total or (ends and not required):
        return
    line = f"{where}: {ends} of {total} conversations hold an end of turn to learn"
    if required and not ends:
        raise UserError(
            f"{line}, so the model would never stop: the chat template writes none "
            "after an answer, or no token that ends one; use one that does "
            "(tokenizer.template=FILE)"
        )
    _log.warning("%s; without it the model does not learn to stop", line)


def as_messages(value, role="user"):
    """Returns a text as one message of `role`, or a list of messages once checked.

    >>> as_messages("Hello")
    [{'role': 'user', 'content': 'Hello'}]
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError("expected a text or a list of messages")
    for message in value:
        if not isinstance(message, dict) or "role" not in message:
            raise UserError('expected messages like {"role": "user", "content": "..."}')
        if message["role"] not in ROLES:
            raise UserError(
                f"role {message['role']!r}: expected one of {', '.join(ROLES)}"
            )
        calls = message.get("tool_calls")
        if calls is not None:
            _check_calls(message, calls)
        if "content" not in message and not calls:
            raise UserError('expected messages like {"role": "user", "content": "..."}')
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls):
            raise UserError("expected every message's content to be a text")
        if "weight" in message:
            _check_weight(message)
    return value


def _check_calls(message, calls):
    if message["role"] != "assistant":
        raise UserError(
            f"a message of {message['role']!r} has tool_calls; only an assistant calls "
            "tools"
        )
    fit = isinstance(calls, list) and all(
        isinstance(call, dict) and "name" in (call.get("function") or call)
        for call in calls
    )
    if not fit:
        raise UserError(
            'expected tool_calls like [{"type": "function", "function": {"name": '
            '"...", "arguments": {...}}}]'
        )


def _check_weight(message):
    weight = message["weight"]
    if message["role"] != "assistant":
        raise UserError(
            f"a message of {message['role']!r} has a weight; only the assistant's are "
            "learned"
        )
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UserError(
            f"a message's weight is {weight!r}, expected 0 (not learned) or 1"
        )


def check_turns(messages, last=ROLES):
    """Checks that roles take turns as in a conversation; returns the messages.

    Args:
        messages: a whole conversation: perhaps a system message, then a user's and an
            assistant's in turn; tools may answer an assistant, who then goes on, or
            the user does. An assistant's turn of weight 0 may come before a user's.
        last: roles it may end with.
    """
    allowed, opens = ("system", "user"), True
    for number, message in enumerate(messages, 1):
        # An assistant may open a conversation by what is context alone.
        greets = opens and message["role"] == "assistant" and message.get("weight") == 0
        opens = message["role"] == "system"
        if message["role"] not in allowed and not greets:
            raise UserError(
                f"message {number} is of {message['role']!r}, expected "
                f"{' or '.join(map(repr, allowed))}; a system message may come first, "
                "then user and assistant take turns"
            )
        allowed = {
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("assistant", "tool", "user"),
        }[message["role"]]
    if messages[-1]["role"] not in last:
        raise UserError(
            f"the last message is of {messages[-1]['role']!r}, expected "
            f"{' or '.join(map(repr, last))}"
        )
    return messages


def conversation(record):
    """Returns the messages of {"messages"} or {"prompt", "completion"}."""
    if "messages" in record:
        messages = as_messages(record["messages"])
    else:
        answer = as_messages(record["completion"], role="assistant")
        messages = as_messages(record["prompt"]) + answer
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise UserError("expected at least one assistant message to learn from")
    return check_turns(messages)
