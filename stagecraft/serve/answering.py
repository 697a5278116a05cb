"""One request's answer, piece by piece, out of the parts that the engine delivers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np

from stagecraft.models.language import Language
from stagecraft.serve.engine import Completion, Engine, Part
from stagecraft.serve.replies import Piece, Shown
from stagecraft.serve.requests import Asked, Prompt
from stagecraft.serve.writing import Writer
from stagecraft.text.tokenizer import Tokenizer


class Failed(Exception):
    """The engine could not complete a text, or nobody reads the answer any more."""


class _Choice:
    """One choice: what it echoes, and what is written of it."""

    def __init__(self, index: int, prompt: Prompt, asked: Asked, tokenizer: Tokenizer):
        self.index, self._asked = index, asked
        # In a chat a new turn begins; elsewhere a text goes on.
        before = [] if asked.api == "chat" else prompt.ids
        self._writer = Writer(tokenizer, asked.stops, before)
        self._echo, self._offsets = "", []
        if asked.echo:
            writer = Writer(tokenizer)
            for id_ in prompt.ids:
                self._offsets.append(writer.offset)
                writer.add(id_)
            writer.finish()
            self._echo = writer.text if prompt.text is None else prompt.text
        self._begun = False

    def piece(self, part: Part) -> Piece:
        """Returns the text and the tokens that a part adds."""
        shown = [
            Shown(token, offset)
            for token, offset in zip(part.prompt, self._offsets, strict=False)
        ]
        text = "" if self._begun else self._echo
        self._begun, finish, writer = True, part.finish, self._writer
        for token in part.tokens:
            shown.append(Shown(token, len(self._echo) + writer.offset))
            text += writer.add(token.id)
            if writer.stopped:
                break
        if finish and not writer.stopped:
            text += writer.finish()
        if writer.stopped:
            finish = "stop"
        written = len(shown) - len(part.prompt)
        tokens = () if self._asked.logprobs is None else tuple(shown)
        return Piece(self.index, text, tokens, written, finish)


class Answer:
    """The choices of one request, while they are written.

    Args:
        asked: the `requests.Asked`.
        language: the model.
        engine: what completes texts.

    Raises:
        engine.Busy: too much waits already.
    """

    def __init__(self, asked: Asked, language: Language, engine: Engine):
        self._asked, self._drawn = asked, 0
        self._queue: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()
        stop_ids = language.stop_ids(chat_format=asked.api == "chat")
        self._choices, self._completions = [], []
        for index in range(len(asked.prompts) * asked.n):
            prompt = asked.prompts[index // asked.n]
            choice = _Choice(index, prompt, asked, language.tokenizer)
            completion = Completion(
                prompt.ids,
                asked.max_tokens,
                self._deliver(index),
                stop_ids=stop_ids,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=_seed(asked.seed, index),
                echo=asked.echo and asked.logprobs is not None,
                tops=asked.logprobs or 0,
            )
            self._choices.append(choice)
            self._completions.append(completion)
        engine.submit(self._completions)

    def _deliver(self, index):
        loop, queue = asyncio.get_running_loop(), self._queue

        def deliver(part):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(queue.put_nowait, (index, part))

        return deliver

    def give_up(self) -> None:
        """Ends the answer: nobody reads it any more."""
        self._queue.put_nowait((-1, Part(error="the client hung up")))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields the pieces of all choices as they come.

        Raises:
            Failed: there will be no more.
        """
        open_ = set(range(len(self._choices)))
        try:
            while open_:
                index, part = await self._queue.get()
                if part.error and (index < 0 or index in open_):
                    raise Failed(part.error)
                if index not in open_:  # it ended before the block of steps did
                    continue
                piece = self._choices[index].piece(part)
                self._drawn += piece.drawn
                if piece.finish:
                    self._completions[index].given_up = True
                    open_.remove(index)
                yield piece
        finally:
            for completion in self._completions:
                completion.given_up = True

    def usage(self) -> dict[str, int]:
        """Returns the tokens read and drawn."""
        read = sum(len(prompt.ids) for prompt in self._asked.prompts)
        return {
            "prompt_tokens": read,
            "completion_tokens": self._drawn,
            "total_tokens": read + self._drawn,
        }


def _seed(seed, index):
    """Returns the 64 bits of a choice's own randomness."""
    words = np.random.SeedSequence([seed % 2**64, index]).generate_state(2)
    return int(words[0]) << 32 | int(words[1])
