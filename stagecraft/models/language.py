"""A model with its tokenizer: text in, text out, for evaluation and for people.

Work is cut into batches of one size and lengths are rounded up, so that a few compiled
programs serve every call and every stage's model.
"""

from collections.abc import Iterator

import jax
import numpy as np
from jax import Array

from stagecraft import losses, sharding
from stagecraft.errors import UserError
from stagecraft.models import sampling
from stagecraft.models.transformer import Transformer
from stagecraft.text.chat import beginning, generation_prompt
from stagecraft.text.tokenizer import Tokenizer

# Lengths are rounded up to a multiple of this, to bound the number of compilations.
ROUND = 16
# The text that tokenizers return for a part of a character.
HALF = "\ufffd"
# What `complete` and `stream` do by default.
GREEDY = {"max_new_tokens": 32, "temperature": 0.0}


@jax.jit
def _logps(model, batch):
    targets, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    stats = model.token_logps(hidden, targets)
    return losses.sequence_logps(stats.logps, mask)


class Language:
    """A `Transformer` that reads and writes text.

    Args:
        batch_size: rows worked on at once; a multiple of the mesh's batch axes.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, batch_size: int = 128
    ):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def encode(
        self, prompt: str | list[dict], *, chat_format: bool, tools=None
    ) -> list[int]:
        """Encodes a prompt: a text or messages as a chat turn, or a bare text."""
        if not chat_format:
            return [*beginning(self.tokenizer), *self.tokenizer.encode(prompt)]
        messages = prompt
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        # Templates without tools get none.
        offered = {"tools": tools} if tools else {}
        return generation_prompt(messages, self.tokenizer, **offered)

    def stop_ids(self, *, chat_format: bool) -> tuple[int, ...]:
        """Returns the tokens that end a completion: a turn, or a text."""
        tokenizer = self.tokenizer
        if chat_format:
            return tokenizer.stops
        return tuple(dict.fromkeys((tokenizer.eos, *tokenizer.stops)))

    def complete(
        self, prompts: list, *, chat: bool = True, seed: int = 0, tools=(), **settings
    ) -> list[tuple[str, bool]]:
        """Completes texts.

        Args:
            prompts: list of str, or of message lists when `chat`.
            chat: as a user's turn to be answered; otherwise as text to be continued.
            seed: the same seed gives the same completions.
            tools: for each prompt JSON schemas of tools, or None; () for none at all.
            **settings: fields of `sampling.SamplingParams`; without any, greedy with at
                most 32 tokens.

        Returns:
            list of (text, ended): whether it stopped by itself.
        """
        tools = tools or [None] * len(prompts)
        rows = [
            self.encode(prompt, chat_format=chat, tools=offered)
            for prompt, offered in zip(prompts, tools, strict=True)
        ]
        stop_ids = self.stop_ids(chat_format=chat)
        settings = GREEDY | {"stop_ids": stop_ids} | settings
        sampled = self.sample_ids(rows, seed=seed, **settings)
        return [
            (self.tokenizer.decode(ids[:-1] if ended else ids), ended)
            for ids, ended, _ in sampled
        ]

    def sample_ids(
        self, rows: list[list[int]], *, seed: int = 0, **settings
    ) -> list[tuple[list[int], bool, float]]:
        """Samples completions of ids.

        Args:
            rows: prompts.
            seed: as of `complete`.
            **settings: fields of `sampling.SamplingParams`.

        Returns:
            list of (ids through the stop token, ended, their log-probability in nats).
        """
        if not rows:
            return []
        self._check_room(rows, settings["max_new_tokens"])
        length = rounded(max(map(len, rows)))
        out = []
        for number, part in enumerate(_batches(rows, self.batch_size)):
            key = jax.random.fold_in(jax.random.key(seed), number)
            prompts = self.left_padded(part, length)
            sample = sampling.generate(self.model, *prompts, key, **settings)
            tokens, mask, logps, ended = sharding.to_host(tuple(sample))
            for i in range(len(part)):
                ids = [int(t) for t in tokens[i][mask[i]]]
                out.append((ids, bool(ended[i]), float(logps[i][mask[i]].sum())))
        return out

    def stream(
        self, prompt: str | list[dict], *, chat: bool = True, seed: int = 0, **settings
    ) -> Iterator[tuple[str, bool]]:
        """Yields one completion piece by piece: (more text, ended).

        Joined, the texts are what `complete` returns. Parts of a character are held
        back until it is complete. Arguments as of `complete`.
        """
        settings = GREEDY | {"stop_ids": self.stop_ids(chat_format=chat)} | settings
        row = self.encode(prompt, chat_format=chat)
        self._check_room([row], settings["max_new_tokens"])
        # A conversation grows turn by turn; few lengths are few compilations.
        length = ROUND
        while length < len(row):
            length *= 2
        samples = sampling.stream(
            self.model,
            *self.left_padded([row], length),
            jax.random.fold_in(jax.random.key(seed), 0),
            **settings,
        )
        yielded, ended = "", False
        while not ended and (sample := next(samples, None)) is not None:
            ended = bool(sample.ended[0])
            ids = np.asarray(sample.tokens[0])[np.asarray(sample.mask[0])].tolist()
            text = self.tokenizer.decode(ids[:-1] if ended else ids)
            if not ended and len(ids) < settings["max_new_tokens"]:
                text = text.rstrip(HALF)
            yield text[len(yielded) :], ended
            yielded = text

    def _check_room(self, rows, max_new_tokens):
        longest, limit = max(map(len, rows)), self.model.config.max_length
        if longest + max_new_tokens > limit:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} "
                f"exceed the context of {limit} tokens (model.max_length); shorten one "
                "of them"
            )

    def left_padded(self, rows: list[list[int]], length: int) -> tuple[Array, Array]:
        """Returns left-padded ids and their mask on the mesh."""
        ids = np.zeros((self.batch_size, length), np.int32)
        mask = np.zeros((self.batch_size, length), bool)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :] = row
            mask[i, length - len(row) :] = True
        # Rows that only fill the batch up hold one token, so that none is empty.
        mask[len(rows) :, -1] = True
        return sharding.on_mesh((ids, mask))

    def continuation_logps(
        self, rows: list[list[int]], continuations: list[list[int]]
    ) -> np.ndarray:
        """Returns how likely each of the same few continuations is after each row.

        Args:
            rows: ids of prompts; those too long for the context have no number.
            continuations: ids, at least one each.

        Returns:
            f64[rows, continuations], summed log-probabilities in nats; NaN in rows that
            leave no room for the longest continuation.
        """
        longest = max(map(len, continuations))
        tokens = np.zeros((len(continuations), longest), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, ids in enumerate(continuations):
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        out = np.full((len(rows), len(continuations)), np.nan)
        limit = self.model.config.max_length - longest
        # Rows of about one length together: what pads them is work for nothing.
        order = sorted(
            (i for i, row in enumerate(rows) if 0 < len(row) <= limit),
            key=lambda i: len(rows[i]),
        )
        for part in _batches(order, self.batch_size):
            length = min(padded(len(rows[part[-1]])), limit)
            prompts = self.left_padded([rows[i] for i in part], length)
            logps = sampling.continuation_logps(self.model, *prompts, tokens, mask)
            out[part] = sharding.to_host(logps)[: len(part)]
        return out

    def logprob(self, prefixes: list[str], continuations: list[str]) -> list[float]:
        """Returns the log-probability in nats of each text after its prefix."""
        rows = [
            (self.encode(prefix, chat_format=False), self.tokenizer.encode(text))
            for prefix, text in zip(prefixes, continuations, strict=True)
        ]
        return self.logprob_ids(rows)

    def logprob_ids(self, rows: list[tuple]) -> list[float]:
        """Returns log-probabilities in nats of ids after ids.

        Args:
            rows: list of (prefix, continuation), each a list of ids.
        """
        if not rows:
            return []
        longest = max(len(a) + len(b) for a, b in rows)
        length = rounded(longest)
        out = []
        for part in _batches(rows, self.batch_size):
            shape = (self.batch_size, length)
            batch = {k: np.zeros(shape, np.int32) for k in ("ids", "segments")}
            batch["mask"] = np.zeros(shape, bool)
            positions = np.arange(length, dtype=np.int32)
            batch["positions"] = np.tile(positions, (self.batch_size, 1))
            for i, (prefix, text) in enumerate(part):
                end = len(prefix) + len(text)
                batch["ids"][i, :end] = [*prefix, *text]
                batch["mask"][i, len(prefix) : end] = True
                batch["segments"][i, :end] = 1
            batch = sharding.on_mesh(batch)
            logps = _logps(self.model, batch)
            out += sharding.to_host(logps)[: len(part)].tolist()
        return out


def rounded(length: int) -> int:
    """Returns the length that prompts are padded to."""
    return -(-length // ROUND) * ROUND


def padded(length: int) -> int:
    """Returns the next of 16, 24, 32, 48, 64, 96, ...: two lengths each doubling.

    >>> [padded(n) for n in (1, 17, 25, 48, 49, 65)]
    [16, 24, 32, 48, 64, 96]
    """
    step = ROUND
    while step < length:
        if step * 3 // 2 >= length:
            return step * 3 // 2
        step *= 2
    return step


def _batches(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]
