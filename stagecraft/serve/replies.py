"""Answers in OpenAI's forms, whole or piece by piece."""

import time
import uuid
from typing import Any, NamedTuple

from stagecraft.serve.engine import Token
from stagecraft.serve.requests import Asked
from stagecraft.serve.writing import Speller


class Shown(NamedTuple):
    """A token, and the characters of its choice's text before it."""

    token: Token
    offset: int


class Piece(NamedTuple):
    """The next of one choice.

    Attributes:
        index: number of the choice.
        text: what it adds.
        shown: the tokens it adds, where log-probabilities are asked for.
        drawn: how many tokens were drawn for it.
        finish: "stop" or "length" in the last piece, "" before.
    """

    index: int
    text: str
    shown: tuple[Shown, ...]
    drawn: int
    finish: str


class Reply:
    """The answer to one request.

    Args:
        asked: the `Asked`.
        served: name of the model.
        speller: of its tokens.
    """

    def __init__(self, asked: Asked, served: str, speller: Speller):
        self._asked, self._speller = asked, speller
        self._chat = asked.api == "chat"
        kind = "chatcmpl" if self._chat else "cmpl"
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served,
        }

    def whole(self, pieces: list[Piece], usage: dict) -> dict[str, Any]:
        """Returns the answer of all pieces."""
        choices = []
        for index in range(len(self._asked.prompts) * self._asked.n):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            choice = {"index": index, "finish_reason": own[-1].finish}
            choice["logprobs"] = self._logprobs([s for one in own for s in one.shown])
            if self._chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Returns the first chunk of a choice: in a chat, who speaks."""
        if not self._chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._chunk(index, {"delta": delta}, None, None)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Returns a piece as a chunk of a stream."""
        if self._chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        else:
            said = {"text": piece.text}
        logprobs = self._logprobs(piece.shown) if piece.shown else None
        return self._chunk(piece.index, said, logprobs, piece.finish or None)

    def counts(self, usage: dict) -> dict[str, Any]:
        """Returns the last chunk, of the counts alone."""
        return self._head | {"object": self._kind, "choices": [], "usage": usage}

    @property
    def _kind(self):
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, index, said, logprobs, finish):
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        return self._head | {"object": self._kind, "choices": [choice]}

    def _logprobs(self, shown):
        if self._asked.logprobs is None:
            return None
        if self._chat:
            return {"content": [self._content(one.token) for one in shown]}
        spell = self._speller.spell
        return {
            "tokens": [spell(one.token.id) for one in shown],
            "token_logprobs": [one.token.logp for one in shown],
            "top_logprobs": [self._table(one.token) for one in shown],
            "text_offset": [one.offset for one in shown],
        }

    def _content(self, token):
        top = [self._named(*one) for one in token.top]
        return self._named(token.id, token.logp) | {"top_logprobs": top}

    def _named(self, id_, logp):
        text = self._speller.spell(id_)
        return {"token": text, "logprob": logp, "bytes": list(text.encode("utf-8"))}

    def _table(self, token):
        """Returns {text: log-probability} of the likeliest tokens and the one chosen.

        Tokens that are shown alike, as halves of characters may be, are one: the best.
        """
        if token.logp is None:
            return None
        table = {}
        for id_, logp in (*token.top, (token.id, token.logp)):
            text = self._speller.spell(id_)
            table[text] = max(logp, table.get(text, logp))
        return table
