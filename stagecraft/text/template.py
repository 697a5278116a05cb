"""A model's own chat template: conversations as text, and where the assistant speaks.

What is learned of a text is known by its characters. A template may say so itself, with
{% generation %} blocks. Of one that does not, the text up to an assistant's turn is
rendered with the prompt for an answer, then the text through it; where both begin the
whole, what lies between them is the turn. Where they do not, nobody knows what is the
assistant's, and the conversation is refused.
"""

import re

from stagecraft.errors import UserError
from stagecraft.text.sandbox import Failed, Sandbox

# Of our messages, and not for templates to see.
OWN = ("ended", "weight")
# Where to look for characters that a text does not hold: the last private plane.
PRIVATE = range(0x10FFFD, 0x100000, -1)


class Refusal(UserError):
    """A template that will not write these messages; it may write others."""


class Template:
    """One chat template, or several by name.

    Args:
        sources: {name: jinja text}; "default" is for conversations, "tool_use" for
            those with tools, where it is there.
        variables: {name: text} that templates may use: bos_token and its kin.
    """

    def __init__(self, sources, variables):
        self.sources, self.variables = sources, variables
        try:
            self._sandbox = Sandbox(sources)
        except Failed as error:
            raise UserError(f"chat template: {error}") from None

    def text(self, messages, tools=None, *, prompt=False):
        """The text of a conversation; with `prompt` up to where an answer is due."""
        return self._render([self._request(messages, tools, prompt=prompt)])[0]

    def conversation(self, messages, tools=None, *, turns="all"):
        """The text of a whole conversation and what is learned of it.

        Args:
            messages: see `chat.render`.
            tools: list of JSON schemas, or None.
            turns: "all" or "last".

        Returns:
            text, list of (start, end) in characters.
        """
        speaks = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if any(not m.get("ended", True) for m in messages[:-1]):
            raise UserError(
                "an answer before the last one was cut off (ended is false); a chat "
                "template has no place for it"
            )
        learned = [i for i in speaks if messages[i].get("weight", 1) != 0]
        if turns == "last":
            learned = [i for i in learned if i == speaks[-1]]
        cut = bool(messages) and not messages[-1].get("ended", True)
        name = self._name(tools)
        marks = unused(3, texts(messages), texts(tools or []))
        if self._sandbox.has_blocks[name]:
            return self._by_blocks(messages, tools, speaks, learned, cut, marks)
        return self._by_prefixes(messages, tools, learned, cut, marks)

    def _by_blocks(self, messages, tools, speaks, learned, cut, marks):
        opening, closing, stop = marks
        shown = _stopped(messages, stop) if cut else messages
        plain, marked = self._render(
            [
                self._request(messages, tools),
                self._request(shown, tools, opening=opening, closing=closing),
            ]
        )
        if cut:
            marked = _cut(marked, stop)
        text, spans = _unmarked(marked, opening, closing, cut)
        # A template that trims or measures what a block wrote meets the marks.
        if not (_begins(plain, text) if cut else plain == text):
            raise UserError(
                "chat template: its text changes when its {% generation %} blocks are "
                "marked (one stands inside a filter?), so what is learned is unknown"
            )
        if learned == speaks:
            return text, spans
        if len(spans) == len(speaks):
            kept = [spans[speaks.index(i)] for i in learned]
        else:
            turns = self._turns(messages, tools, learned, text)
            kept = [
                (start, end)
                for start, end in spans
                if any(low <= start and end <= high for low, high in turns)
            ]
        return text, kept

    def _by_prefixes(self, messages, tools, learned, cut, marks):
        requests = [self._request(messages, tools)]
        if cut:
            requests.append(self._request(_stopped(messages, marks[0]), tools))
        plain, *stopped = self._render(requests)
        text = plain
        if cut:
            text = _cut(stopped[0], marks[0])
            if not _begins(plain, text):
                raise UserError(
                    "chat template: does not write the answer that was cut off as it is"
                )
        return text, self._turns(messages, tools, learned, text)

    def _turns(self, messages, tools, learned, text):
        """(start, end) of each of these turns in the text, or a refusal."""
        requests = []
        for i in learned:
            requests.append(self._request(messages[:i], tools, prompt=True))
            requests.append(self._request(messages[: i + 1], tools))
        found, spans = self._render(requests), []
        for i, before, through in zip(learned, found[::2], found[1::2], strict=True):
            if i == len(messages) - 1:
                through = text
            if not (through.startswith(before) and text.startswith(through)):
                raise UserError(
                    f"chat template: the text up to message {i + 1} does not begin the "
                    "whole conversation's (it writes earlier turns in another way), so "
                    "what the assistant says is unknown; learn the last turn alone, or "
                    "use a template with {% generation %} blocks"
                )
            spans.append((len(before), len(through)))
        return spans

    def _name(self, tools):
        if tools is not None and "tool_use" in self.sources:
            return "tool_use"
        if "default" not in self.sources:
            raise UserError(
                f"chat template: has none named 'default' ({', '.join(self.sources)})"
            )
        return "default"

    def _request(self, messages, tools, *, prompt=False, opening="", closing=""):
        shown = [
            {k: v for k, v in message.items() if v is not None and k not in OWN}
            for message in messages
        ]
        variables = self.variables | {
            "messages": shown,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        marks = {"opening": opening, "closing": closing}
        return {"name": self._name(tools), "variables": variables} | marks

    def _render(self, requests):
        try:
            return self._sandbox.render(requests) if requests else []
        except Failed as error:
            kind = UserError if error.always else Refusal
            raise kind(f"chat template: {error}") from None


def texts(value):
    """Every text in messages or tools, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts(key)
            yield from texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts(item)


def replaced(value, change):
    """A copy of messages or tools with `change` done to every text."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {replaced(k, change): replaced(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [replaced(item, change) for item in value]
    return value


def unused(count, *groups):
    """Characters that none of the texts hold."""
    high = {c for group in groups for text in group for c in text if c > "\U00100000"}
    free = (chr(code) for code in PRIVATE if chr(code) not in high)
    return [next(free) for _ in range(count)]


def _stopped(messages, stop):
    """The messages, the last one's words followed by a mark."""
    *others, last = messages
    return [*others, last | {"content": (last.get("content") or "") + stop}]


def _cut(text, stop):
    if text.count(stop) != 1:
        raise UserError(
            "chat template: does not write the answer that was cut off as it is"
        )
    return text[: text.index(stop)]


def _begins(whole, part):
    # Spaces at the end of what was cut off are its own; a template would trim them.
    return whole.startswith(part.rstrip())


def _unmarked(marked, opening, closing, cut):
    """The text without its marks, and the outermost spans between them."""
    parts, spans, depth, length, start, begin = [], [], 0, 0, 0, 0
    for mark in re.finditer(f"[{opening}{closing}]", marked):
        parts.append(marked[begin : mark.start()])
        length, begin = length + len(parts[-1]), mark.end()
        if mark[0] == opening:
            start = start if depth else length
            depth += 1
            continue
        depth -= 1
        if depth < 0:
            break
        if depth == 0:
            spans.append((start, length))
    parts.append(marked[begin:])
    text = "".join(parts)
    if depth > 0 and cut:
        spans.append((start, len(text)))
    elif depth:
        raise UserError(
            "chat template: writes a part of a {% generation %} block, so what is "
            "learned is unknown"
        )
    return text, spans
