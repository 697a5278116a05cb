"""A model with its tokenizer: text in, text out. For judges, reports and people.

Work is cut into batches of one size and lengths are rounded up, so that a few compiled
programs serve every call and every stage's model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from stagecraft import losses, sharding
from stagecraft.errors import UserError
from stagecraft.models import sampling
from stagecraft.text.chat import beginning, generation_prompt

# Lengths are rounded up to a multiple of this, to bound the number of compilations.
ROUND = 16
# What a tokenizer writes for a part of a character.
HALF = "\ufffd"


@functools.partial(
    jax.jit,
    static_argnames=("max_new_tokens", "stop_ids", "temperature", "top_k", "top_p"),
)
def _generate(model, ids, mask, key, **settings):
    return sampling.generate(model, ids, mask, key, **settings)


@functools.partial(jax.jit, static_argnames="temperature")
def _logps(model, batch, temperature=1.0):
    targets, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    stats = model.token_logps(hidden, targets, temperature=temperature)
    return losses.sequence_logps(stats.logps, mask)


class Language:
    """A `Transformer` that reads and writes text.

    Args:
        model: a `Transformer`.
        tokenizer: a `text.tokenizer.Tokenizer`.
        batch_size: rows worked on at once; a multiple of the mesh's batch axes.
    """

    def __init__(self, model, tokenizer, *, batch_size=128):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def encode(self, prompt, *, chat_format):
        """Ids of a prompt: a text or messages as a chat turn, or a bare text."""
        if not chat_format:
            return [*beginning(self.tokenizer), *self.tokenizer.encode(prompt)]
        messages = prompt
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        return generation_prompt(messages, self.tokenizer)

    def stop_ids(self, *, chat_format):
        """Tokens that end what is written: a turn, or a text."""
        tokenizer = self.tokenizer
        if chat_format:
            return tokenizer.stops
        return tuple(dict.fromkeys((tokenizer.eos, *tokenizer.stops)))

    def complete(
        self,
        prompts,
        *,
        chat=True,
        temperature=0.0,
        max_new_tokens=32,
        seed=0,
        top_k=0,
        top_p=1.0,
    ):
        """Completions of texts.

        Args:
            prompts: list of str, or of message lists when `chat`.
            chat: as a user's turn to be answered; otherwise as text to be continued.
            temperature: 0 for greedy.
            max_new_tokens: int.
            seed: int; the same seed gives the same completions.
            top_k, top_p: truncate the distribution; 0 and 1.0 do not.

        Returns:
            list of (text, ended): whether it stopped by itself.
        """
        rows = [self.encode(p, chat_format=chat) for p in prompts]
        settings = dict(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_ids=self.stop_ids(chat_format=chat),
        )
        sampled = self.sample_ids(rows, seed=seed, **settings)
        return [
            (self.tokenizer.decode(ids[:-1] if ended else ids), ended)
            for ids, ended, _ in sampled
        ]

    def sample_ids(self, rows, *, seed=0, **settings):
        """Completions as ids: list of (ids through the stop token, ended, logps)."""
        if not rows:
            return []
        self._check_room(rows, settings["max_new_tokens"])
        length = _rounded(max(map(len, rows)))
        out = []
        for number, part in enumerate(_batches(rows, self.batch_size)):
            key = jax.random.fold_in(jax.random.key(seed), number)
            prompts = self.left_padded(part, length)
            got = _generate(self.model, *prompts, key, **settings)
            tokens, seen, ended = map(np.asarray, (got.tokens, got.mask, got.ended))
            logps = np.asarray(got.logps)
            for i in range(len(part)):
                keep = seen[i]
                written = [int(t) for t in tokens[i][keep]]
                out.append((written, bool(ended[i]), float(logps[i][keep].sum())))
        return out

    def stream(
        self,
        prompt,
        *,
        chat=True,
        temperature=0.0,
        max_new_tokens=32,
        seed=0,
        top_k=0,
        top_p=1.0,
    ):
        """One completion as it comes: a generator of (more text, ended).

        Joined, the texts are what `complete` returns. What is not yet a character is
        held back until it is.
        """
        row = self.encode(prompt, chat_format=chat)
        self._check_room([row], max_new_tokens)
        # A talk grows turn by turn; few lengths are few compilations.
        length = ROUND
        while length < len(row):
            length *= 2
        samples = sampling.stream(
            self.model,
            *self.left_padded([row], length),
            jax.random.fold_in(jax.random.key(seed), 0),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_ids=self.stop_ids(chat_format=chat),
        )
        said, ended = "", False
        while not ended and (sample := next(samples, None)) is not None:
            ended = bool(sample.ended[0])
            ids = np.asarray(sample.tokens[0])[np.asarray(sample.mask[0])].tolist()
            text = self.tokenizer.decode(ids[:-1] if ended else ids)
            if not ended and len(ids) < max_new_tokens:
                text = text.rstrip(HALF)
            yield text[len(said) :], ended
            said = text

    def _check_room(self, rows, max_new_tokens):
        longest, limit = max(map(len, rows)), self.model.config.max_length
        if longest + max_new_tokens > limit:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} "
                f"exceed the context of {limit} tokens (model.max_length); shorten one "
                "of them"
            )

    def left_padded(self, rows, length):
        """Left-padded ids and their mask, placed on the mesh."""
        ids = np.zeros((self.batch_size, length), np.int32)
        mask = np.zeros((self.batch_size, length), bool)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :] = row
            mask[i, length - len(row) :] = True
        # Rows that only fill the batch up hold one token, so that none is empty.
        mask[len(rows) :, -1] = True
        return placed(ids, mask)

    def logprob(self, prefixes, continuations):
        """Log-probability in nats of each text after its prefix, as bare text."""
        rows = [
            (self.encode(prefix, chat_format=False), self.tokenizer.encode(text))
            for prefix, text in zip(prefixes, continuations, strict=True)
        ]
        return self.logprob_ids(rows)

    def logprob_ids(self, rows, temperature=1.0):
        """Log-probability in nats of ids after ids: list of (prefix, continuation)."""
        if not rows:
            return []
        longest = max(len(a) + len(b) for a, b in rows)
        length = _rounded(longest)
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
            got = _logps(self.model, placed(batch)[0], temperature=temperature)
            out += np.asarray(got)[: len(part)].tolist()
        return out


def _rounded(length):
    return -(-length // ROUND) * ROUND


def _batches(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def placed(*arrays):
    """Arrays on the current mesh, split over the batch axes; as they are without."""
    current = jax.sharding.get_mesh()
    if current.empty:
        return jax.tree.map(jnp.asarray, arrays)
    return sharding.shard_batch(arrays, current)
