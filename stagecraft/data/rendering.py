"""Conversations as ids and a mask, by the ways that a stage's data config names."""

from stagecraft.errors import UserError
from stagecraft.text import chat
from stagecraft.text.template import texts

# What is said of prompts whose completion changes their last token.
OFFERED = "offer tools that the tokenizer's template leaves out"
JOINED = "have a token of both the prompt and the completion, which is learned whole"


class Rendering:
    """Renders the conversations of a stage.

    Args:
        data: the stage's data config: render.
        tokenizer: a `text.tokenizer.Tokenizer`.
        notes: a Counter of what is to be said of them, such as texts that spell control
            tokens.
    """

    def __init__(self, data, tokenizer, notes):
        self.data, self.tokenizer, self.notes = data, tokenizer, notes

    def __call__(self, messages, tools=None, *, turns="all"):
        """Returns ids and mask of a conversation; templates without tools get none."""
        self._count(messages)
        if self.data.get("render") == "text":
            return self._continued(messages, tools)
        self._see_tools(messages, tools)
        settings = {"tools": tools} if tools else {}
        return chat.render(messages, self.tokenizer, turns=turns, **settings)

    def prompt(self, messages, tools=None):
        """Returns ids and mask of a prompt that an answer begins after."""
        self._count(messages)
        self._see_tools(messages, tools)
        settings = {"tools": tools} if tools else {}
        ids = chat.generation_prompt(messages, self.tokenizer, **settings)
        return ids, [False] * len(ids)

    def _count(self, messages):
        """Counts a conversation that spells control tokens in its messages."""
        if any(map(self.tokenizer.spells, texts(messages))):
            self.notes[spelled(self.tokenizer)] += 1

    def _see_tools(self, messages, tools):
        """Refuses calls, and counts tools, of which the template writes nothing."""
        template = self.tokenizer.template
        if template is None:
            return
        called = any(message.get("tool_calls") for message in messages)
        bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
        if called and _alike(template, (messages, tools), (bare, tools)):
            raise UserError(
                "has tool_calls that the tokenizer's template leaves out, so that an "
                "empty answer would be learned; name a template that writes them in "
                "tokenizer.template=FILE"
            )
        if tools and _alike(template, (messages, tools), (messages, None)):
            self.notes[OFFERED] += 1

    def _continued(self, messages, tools):
        roles = [message["role"] for message in messages]
        if tools or roles != ["user", "assistant"]:
            what = "tools" if tools else f"turns of {', '.join(roles)}"
            raise UserError(
                "data.render='text' is for a prompt and a completion that are texts, "
                f"but a record has {what}; set data.render='chat'"
            )
        prompt, answer = messages
        ended = answer.get("ended", True)
        parts = prompt["content"], answer["content"]
        *document, joined = chat.continuation(*parts, self.tokenizer, ended=ended)
        if joined:
            self.notes[JOINED] += 1
        return tuple(document)


def _alike(template, one, other):
    """Returns whether a template writes the same text of two (messages, tools)."""
    try:
        return template.text(*one) == template.text(*other)
    except UserError:
        return False  # a template that stops at one of them does look at it


def spelled(tokenizer) -> str:
    """Returns what is said of texts that spell control tokens."""
    if getattr(tokenizer, "parses", False):
        return "spell control tokens, read as those tokens"
    return (
        "spell control tokens, read as letters (data.control_tokens='parse' makes "
        "tokens of them)"
    )
