"""A model's own chat template: conversations as text, and the assistant's spans.

What is learned is a list of character spans. A template may mark them itself, with
{% generation %} blocks. For one that does not, the conversation up to an assistant's
turn is rendered with the prompt for an answer, then the conversation through that turn;
where the full text begins with both, the turn lies between them. Where it does not, the
assistant's part is unknown and the conversation is refused.
"""

import functools
import re

from stagecraft.errors import UserError
from stagecraft.text.sandbox import Failed, Sandbox

# Keys of our messages that templates must not see.
OWN = ("ended", "weight")
# Where to look for characters that a text does not hold: the last private plane.
PRIVATE = range(0x10FFFD, 0x100000, -1)


class Refusal(UserError):
    """A template refuses these messages; it may accept others."""


class Template:
    """One chat template, or several by name.

    Args:
        sources: {name: jinja text}; "default" is for conversations, "tool_use" for
            those with tools, where it is there.
        variables: {name: text} that templates may use: bos_token and its kin.
        moment: the time they read on the clock, in ISO format; "" for now.
    """

    def __init__(self, sources, variables, moment=""):
        self.sources, self.variables = sources, variables
        try:
            self._sandbox = Sandbox(sources, moment)
        except Failed as error:
            raise UserError(f"chat template: {error}") from None

    def text(self, messages, tools=None, *, prompt=False):
        """Returns a conversation's text; with `prompt` it stops before the answer."""
        return self._render([self._request(messages, tools, prompt=prompt)])[0]

    def conversation(self, messages, tools=None, *, turns="all"):
        """Returns the text of a whole conversation and the spans to learn.

        Args:
            messages: see `chat.render`.
            tools: list of JSON schemas, or None.
            turns: "all" or "last".

        Returns:
            text, list of (start, end) in characters.
        """
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if any(not m.get("ended", True) for m in messages[:-1]):
            raise UserError(
                "an answer before the last one was cut off (ended is false); a chat "
                "template has no place for it"
            )
        learned = [i for i in answers if messages[i].get("weight", 1) != 0]
        if turns == "last":
            learned = [i for i in learned if i == answers[-1]]
        cut = bool(messages) and not messages[-1].get("ended", True)
        name = self._name(tools)
        marks = unused(3, texts(messages), texts(tools or []))
        if self._sandbox.has_blocks[name]:
            return self._by_blocks(messages, tools, answers, learned, cut, marks)
        return self._by_prefixes(messages, tools, learned, cut, marks)

    @functools.cached_property
    def lead(self) -> int:
        """Characters from the start of a span to where the prompt for it ends.

        Of one short conversation, and negative where the prompt ends before; other
        messages may be written in another way.
        """
        asked = [{"role": "user", "content": "a"}]
        try:
            prompt = self.text(asked, prompt=True)
            answer = {"role": "assistant", "content": "b"}
            _, spans = self.conversation([*asked, answer])
        except UserError:
            return 0
        return len(prompt) - spans[-1][0] if spans else 0

    def _by_blocks(self, messages, tools, answers, learned, cut, marks):
        """Finds the spans by the template's own {% generation %} blocks."""
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
        if learned == answers:
            return text, spans
        if len(spans) == len(answers):
            return text, [spans[answers.index(i)] for i in learned]
        prefixes = self._render(self._prefixes(messages, tools, learned))
        turns = self._turns(messages, learned, text, prefixes)
        return text, [
            (start, end)
            for start, end in spans
            if any(low <= start and end <= high for low, high in turns)
        ]

    def _by_prefixes(self, messages, tools, learned, cut, marks):
        """Finds the spans by rendering the conversation up to and through each turn."""
        shown = _stopped(messages, marks[0]) if cut else messages
        # All at once: a question to another process takes as long as a rendering.
        prefixes = self._prefixes(messages, tools, learned)
        requests = [self._request(one, tools) for one in (messages, shown)[: 1 + cut]]
        plain, *rest = self._render([*requests, *prefixes])
        text = plain
        if cut:
            text = _cut(rest.pop(0), marks[0])
            if not _begins(plain, text):
                raise UserError(
                    "chat template: does not write the answer that was cut off as it is"
                )
        return text, self._turns(messages, learned, text, rest)

    def _prefixes(self, messages, tools, learned):
        """Requests for the text up to each of these turns and through it.

        Through the last message it is the whole conversation's, which needs none.
        """
        requests = []
        for i in learned:
            requests.append(self._request(messages[:i], tools, prompt=True))
            if i < len(messages) - 1:
                requests.append(self._request(messages[: i + 1], tools))
        return requests

    def _turns(self, messages, learned, text, prefixes):
        """Returns (start, end) of each of these turns in the text, or refuses.

        Args:
            prefixes: the texts that `_prefixes` asks for.
        """
        prefixes, spans = iter(prefixes), []
        for i in learned:
            before = next(prefixes)
            through = next(prefixes) if i < len(messages) - 1 else text
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
        variables = self.variables | dict(
            messages=shown, tools=tools, documents=None, add_generation_prompt=prompt
        )
        marks = {"opening": opening, "closing": closing}
        return {"name": self._name(tools), "variables": variables} | marks

    def _render(self, requests):
        try:
            return self._sandbox.render(requests) if requests else []
        except Failed as error:
            error_type = UserError if error.always else Refusal
            raise error_type(f"chat template: {error}") from None


def texts(value):
    """Yields every text in messages or tools, keys too."""
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
    """Returns a copy of messages or tools with `change` applied to every text."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {replaced(k, change): replaced(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [replaced(item, change) for item in value]
    return value


def unused(count, *groups):
    """Returns characters that occur in none of the texts."""
    high = {c for group in groups for text in group for c in text if c > "\U00100000"}
    free = (chr(code) for code in PRIVATE if chr(code) not in high)
    return [next(free) for _ in range(count)]


def _stopped(messages, stop):
    """Returns the messages with a mark after the last one's content."""
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
    """Returns the text without its marks, and the outermost spans between them."""
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
