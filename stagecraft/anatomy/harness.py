"""A model behind lm-evaluation-harness's interface: log-likelihoods and generations.

The numbers are those of the harness's own Hugging Face backend on the same weights: how
a context and its continuation are cut apart, what stands before an empty context, which
tokens a window of a long text holds, what is dropped of a text that is too long. Work
is sorted by length and padded to few lengths, so that few programs are compiled.

Here nothing of the harness is imported; `evaluate` puts the two together.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np

from stagecraft import sharding
from stagecraft.errors import UserError
from stagecraft.models import sampling
from stagecraft.text import chat

# The harness's own limit, for tasks that name none.
MAX_NEW_TOKENS = 256
# Tokens between two looks for the strings that end an answer.
LOOK = 16
# Every name a task may give the limit, the first that is there counts.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What else a task may say of a generation.
KNOWN = ("until", "do_sample", "temperature", "top_k", "top_p", *LIMITS)

_log = logging.getLogger("stagecraft")


@jax.jit
def _likelihoods(model, batch):
    """Returns summed log-probabilities, and whether all tokens were the likeliest."""
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    stats = model.token_logps(hidden, batch["targets"])
    logps = jnp.where(batch["mask"], stats.logps, 0.0).sum(-1)
    return logps, jnp.where(batch["mask"], stats.correct, 1.0).min(-1)


class Answers:
    """Answers the harness's requests; each has its arguments in `args`.

    Args:
        language: a `models.language.Language`.
        seed: of generations that are sampled.
    """

    def __init__(self, language, *, seed=0):
        super().__init__()
        self.language, self.seed = language, seed
        # Conversations as the harness holds them, texts, and their ids; None where the
        # text alone tells the ids.
        self._turns = {}

    @property
    def tokenizer_name(self):
        """Returns the key under which requests with a chat template are cached."""
        return self.language.tokenizer.digest

    def chat_template(self, chat_template=False):
        """Returns the source of the model's template; "" where turns are ids."""
        template = self.language.tokenizer.template
        return template.sources["default"] if chat_template and template else ""

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """Returns a conversation as a text that stands for its ids.

        Args:
            chat_history: [{"role", "content"}].
            add_generation_prompt: False where the last message is the beginning of the
                answer to continue.
        """
        messages, begun = list(chat_history), ""
        if not add_generation_prompt:
            begun = messages.pop()["content"]
        try:
            text, ids = self._conversation(messages)
        except UserError:  # as the harness does, where a template knows no system
            rest = [m for m in messages if m["role"] != "system"]
            if len(rest) == len(messages):
                raise
            _log.warning("the chat template takes no system message: left out")
            text, ids = self._conversation(rest)
        tokenizer = self.language.tokenizer
        plain = tokenizer.template is not None and self._read(text) == ids
        self._turns[text + begun] = None if plain else [*ids, *tokenizer.encode(begun)]
        return text + begun

    def _conversation(self, messages):
        tokenizer = self.language.tokenizer
        ids = chat.generation_prompt(messages, tokenizer)
        if tokenizer.template is not None:
            return tokenizer.template.text(messages, None, prompt=True), ids
        text = "".join(f"<|{m['role']}|>{m['content']}" for m in messages)
        return f"{text}<|assistant|>", ids

    def _read(self, text):
        """Returns the ids of a template's text: control tokens are what they spell."""
        tokenizer = self.language.tokenizer
        return tokenizer.encode_turns([], None, lambda *_: (text, []))[0]

    def _encode(self, text, *, turns=False):
        if turns:
            return self._read(text)
        tokenizer = self.language.tokenizer
        return [*chat.beginning(tokenizer), *tokenizer.encode(text)]

    def _context(self, text):
        return self._turns.get(text) or self._encode(text, turns=text in self._turns)

    def _prefix(self):
        """Returns the id of an empty context: bos, even if texts get none, or eos."""
        tokenizer = self.language.tokenizer
        named = getattr(tokenizer, "named_bos", None)
        candidates = (tokenizer.bos, named, tokenizer.eos)
        return next(i for i in candidates if i is not None)

    # -- log-likelihoods ---------------------------------------------------------------

    def loglikelihood(self, requests, **_):
        """Returns (log-probability in nats, is it greedy) of each (context, text)."""
        return self._scored([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests, **_):
        """Returns the log-probability in nats of each text, window by window."""
        rows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self._encode(text)
            size = self.language.model.config.max_length
            parts = windows(ids, self._prefix(), size)
            rows += parts
            owners += [number] * len(parts)
        totals = [0.0] * len(requests)
        for owner, (logp, _) in zip(owners, self._scored(rows), strict=True):
            totals[owner] += logp
        return totals

    def _pair(self, context, text):
        """Returns the ids of a context and its continuation, cut as by the harness."""
        if not context:
            ids = self.language.tokenizer.encode(text)
            if ids[:1] == [self._prefix()]:
                return ids[:1], ids[1:]
            return [self._prefix()], ids
        if self._turns.get(context):
            return self._turns[context], self.language.tokenizer.encode(text)
        turns, whole = context in self._turns, context + text
        # Spaces at the end belong to the word that follows.
        before = self._encode(context.rstrip(), turns=turns)
        after = self._encode(whole, turns=turns)[len(before) :]
        return before or [self._prefix()], after

    def _scored(self, rows):
        """Returns (log-probability, is it greedy) of each (ids before, ids)."""
        size, limit = self.language.batch_size, self.language.model.config.max_length
        for _, ids in rows:
            if len(ids) > limit:
                raise UserError(
                    f"a task's answer of {len(ids)} tokens exceeds the context of "
                    f"{limit} tokens (model.max_length)"
                )
        # As many as the last token's prediction needs; what is oldest is dropped.
        rows = [((*a, *b)[-limit - 1 :], len(b)) for a, b in rows]
        scores = [None] * len(rows)
        for length, numbers in _by_length([len(row) - 1 for row, _ in rows], limit):
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                batch = _batch([rows[i] for i in part], size, length)
                batch = sharding.on_mesh(batch)
                logps, greedy = _likelihoods(self.language.model, batch)
                for i, logp, best in zip(
                    part, np.asarray(logps), np.asarray(greedy), strict=False
                ):
                    scores[i] = (float(logp), bool(best))
        return scores

    # -- generations -------------------------------------------------------------------

    def generate_until(self, requests, **_):
        """Returns the text that follows each context, up to the strings that end it."""
        answers, groups = [None] * len(requests), {}
        for number, request in enumerate(requests):
            context, arguments = request.args
            settings, until = self._settings(arguments)
            groups.setdefault((settings, until), []).append((number, context))
        size, batches = self.language.batch_size, 0
        for (settings, until), members in groups.items():
            room = self.language.model.config.max_length - settings[0]
            rows = [self._context(context)[-room:] for _, context in members]
            rows = [row or [self._prefix()] for row in rows]
            for length, numbers in _by_length([len(row) for row in rows], room):
                for start in range(0, len(numbers), size):
                    part = numbers[start : start + size]
                    key = jax.random.fold_in(jax.random.key(self.seed), batches)
                    batches += 1
                    texts = self._generate(
                        [rows[i] for i in part], length, key, settings, until
                    )
                    for i, text in zip(part, texts, strict=True):
                        answers[members[i][0]] = text
        return answers

    def _settings(self, arguments):
        """Reads generation_kwargs: (tokens, temperature, top_k, top_p), until."""
        for key, value in arguments.items():
            if key not in KNOWN and not (key == "num_beams" and value == 1):
                raise UserError(
                    f"a task's generation_kwargs: {key}={value!r} is not known here; "
                    f"expected some of {', '.join(KNOWN)}"
                )
        limit = self.language.model.config.max_length
        given = [arguments[key] for key in LIMITS if arguments.get(key) is not None]
        # A small model's context has no room for the usual limit.
        tokens = int(given[0]) if given else min(MAX_NEW_TOKENS, limit // 2)
        if not 0 < tokens < limit:
            raise UserError(
                f"a task's generation_kwargs: max_gen_toks={tokens} leaves no room for "
                f"a prompt in the context of {limit} tokens (model.max_length)"
            )
        temperature = float(arguments.get("temperature") or 0.0)
        if arguments.get("do_sample") is False:
            temperature = 0.0
        until = arguments.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        drawing = int(arguments.get("top_k") or 0), float(arguments.get("top_p") or 1)
        return (tokens, temperature, *drawing), tuple(filter(None, until))

    def _generate(self, rows, length, key, settings, until):
        tokens, temperature, top_k, top_p = settings
        language = self.language
        samples = sampling.stream(
            language.model,
            *language.left_padded(rows, length),
            key,
            max_new_tokens=tokens,
            stop_ids=language.stop_ids(chat_format=False),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            every=LOOK,
        )
        for sample in samples:
            said = self._said(sample, len(rows))
            if all(ended or any(u in text for u in until) for text, ended in said):
                break
        texts = [text for text, _ in said]
        for one in until:
            texts = [text.split(one)[0] for text in texts]
        return texts

    def _said(self, sample, count):
        """Returns [(text, has it ended by itself)] of a `Sample`'s first rows."""
        tokens, mask, ended = map(
            np.asarray, (sample.tokens, sample.mask, sample.ended)
        )
        rows = [tokens[i][mask[i]].tolist() for i in range(count)]
        decode = self.language.tokenizer.decode
        return [
            (decode(row[:-1] if end else row), bool(end))
            for row, end in zip(rows, ended, strict=False)
        ]


def windows(ids, prefix, size):
    """Splits a long text into (ids before, ids); each id is predicted once.

    Each window sees as much of what is before as the context holds; the last reaches
    back for the part it does not predict.

    Args:
        ids: of the text.
        prefix: the id that stands before the first.
        size: tokens of the context.

    >>> windows([1, 2, 3, 4, 5], 0, 4)
    [([0], [1, 2, 3, 4]), ([1, 2, 3, 4], [5])]
    """
    rows, whole = [], [prefix, *ids]
    for start in range(0, len(ids), size):
        end = min(start + size, len(ids))
        # In `whole`, what predicts ids[start:end] begins one place earlier.
        first = max(end - size, 0)
        rows.append((whole[first : start + 1], whole[start + 1 : end + 1]))
    return rows


def _by_length(lengths, limit):
    """Returns [(padded length, numbers of its rows)], the longest first."""
    groups = {}
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        groups.setdefault(_padded(lengths[number], limit), []).append(number)
    return groups.items()


def _padded(length, limit):
    """Rounds up to 16, 24, 32, 48, 64, 96, ..., at most the context.

    >>> [_padded(n, 100) for n in (1, 17, 32, 33, 49, 70, 97)]
    [16, 24, 32, 48, 64, 96, 100]
    """
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, limit)


def _batch(rows, size, length):
    """Returns rows of (ids, how many of the last are scored) as [size, length]."""
    batch = {k: np.zeros((size, length), np.int32) for k in ("ids", "targets")}
    batch["segments"] = np.zeros((size, length), np.int32)
    batch["mask"] = np.zeros((size, length), bool)
    batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (size, 1))
    for i, (ids, scored) in enumerate(rows):
        end = len(ids) - 1
        batch["ids"][i, :end], batch["targets"][i, :end] = ids[:-1], ids[1:]
        batch["segments"][i, :end] = 1
        batch["mask"][i, end - scored : end] = True
    return batch
