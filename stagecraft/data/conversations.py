"""Conversations read and rendered once: demonstrations, pairs, judged answers, prompts.

They lie in the cache of tokenised text as shards: each sequence is a document, beside
it the mask, and beside the first of a record the record itself as JSON. So a later
start reads what it needs of them, and holds nothing in memory but numbers.

What became of the records, and every line that was said of them, is kept too. A file
that is refused leaves nothing behind.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stagecraft.data import cache, containers, files, readers, shards
from stagecraft.data.documents import Rendered
from stagecraft.data.records import Comparison, Conversation, Judgement, Prompt
from stagecraft.data.rendering import Rendering
from stagecraft.data.tally import Tally, place
from stagecraft.errors import UserError
from stagecraft.text import chat

# Numbers beside each sequence: its place among those of its record, the tokens to
# learn, whether an end of turn is one of them, whether its answer came to an end, and
# where the record is.
NUMBERS = ("rank", "learned", "ends", "ended", "file", "line")
BESIDE = ("mask", "record", "key")
# Records that a thread renders at a time, and threads: more wait for each other.
_BATCH, _THREADS = 32, 4
# Seconds between lines that say how far rendering is.
_PATIENCE = 10.0
_log = logging.getLogger("stagecraft.data")


class _Use(NamedTuple):
    """What records are used for, by the names of `readers`.

    Attributes:
        kind: their type.
        answers: (record) -> the messages of each sequence.
        prompt: (record) -> what held-out records have in common with no other.
        numbers: names of their fields that are kept as numbers; NaN is None.
        counts: (record) -> how many of what a tally counts it holds.
    """

    kind: type
    answers: Callable
    prompt: Callable = lambda one: one.prompt
    numbers: tuple[str, ...] = ()
    counts: Callable = lambda one: 1


def _asked(conversation):
    """Returns the messages before the last answer."""
    roles = [message["role"] for message in conversation.messages]
    return conversation.messages[: len(roles) - 1 - roles[::-1].index("assistant")]


_USES = {
    "demonstrations": _Use(Conversation, lambda one: [one.messages], _asked),
    "comparisons": _Use(
        Comparison,
        lambda one: [[*one.prompt, *answer] for answer in one.answers],
        numbers=("preference", "margin"),
        counts=lambda one: len(one.answers) * (len(one.answers) - 1) // 2,
    ),
    "judgements": _Use(
        Judgement, lambda one: [[*one.prompt, *one.completion]], numbers=("label",)
    ),
    "prompts": _Use(Prompt, lambda one: [chat.as_messages(one.prompt)]),
}


def rendered(use, specs, sources, *, turns="last", mapping=None) -> Rendered:
    """Returns the records of files, read and rendered once.

    Args:
        use: "demonstrations", "comparisons", "judgements" or "prompts".
        specs: files specs, each a source.
        sources: a `stage_data.Sources`; its tally counts the records.
        turns: which of the assistant's turns are learned, as of `chat.render`.
        mapping: {"our key": "the file's key"}, or None.
    """
    counts, parts = sources.tally, []
    for spec in specs:
        paths = files.expand(spec)
        one = _once(use, spec, paths, sources, turns, mapping)
        settings, begun = one.manifest["settings"], len(counts.recognised)
        counts.add(settings["reading"], paths)
        readers.say(counts.recognised[begun:])
        for line in settings["said"]:
            chat.say(line)
        parts.append((one, paths))
    return Rendered(parts, _USES[use].kind)


def prompt_key(prompt: str | list[dict]) -> str:
    """Returns what equal prompts have in common, be they texts or messages."""
    turns = [
        {k: v for k, v in message.items() if k != "weight"}
        for message in chat.as_messages(prompt)
    ]
    return json.dumps(turns, sort_keys=True)


def asked(conversation: Conversation) -> dict:
    """Returns the record of a prompt: what comes before the last answer."""
    return {"prompt": json.loads(prompt_key(_asked(conversation)))}


def _once(use, spec, paths, sources, turns, mapping):
    """Returns the shards of one source, written now where they are not in the cache."""
    data, tokenizer = sources.tally.data, sources.tokenizer
    suffixes = ["" if files.shards_here(p) else containers.suffix(p) for p in paths]
    # Everything that decides what is read, what is rendered, and what is said of it.
    settings = {
        "code": _code(),
        "content": files.digest(paths),
        "containers": suffixes,
        "use": use,
        "fields": mapping or {},
        "turns": turns,
        "render": data.get("render", "chat"),
        "bad": data.bad,
        "control_tokens": data.control_tokens,
        # With its chat template, and the moment that one reads on the clock.
        "tokenizer": {
            name: hashlib.sha256(content).hexdigest()
            for name, content in sorted(tokenizer.files.items())
        },
    }

    def write(target):
        here, render = Tally(data), _Renderer(use, turns, sources)
        with chat.listening() as said:
            shards.write(
                target,
                _documents(render, spec, paths, mapping, here, settings, said),
                tokenizer_digest=tokenizer.digest,
                vocab_size=tokenizer.vocab_size,
                columns=(*NUMBERS, *_USES[use].numbers, *BESIDE),
                settings=settings,
                empty=True,
            )

    return cache.once(sources.cache, settings, write, f"{spec}: {use}")


@functools.cache
def _code():
    """Returns a digest of the code that reads and renders, and of its libraries."""
    total = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(chat.__file__).parent):
        for path in sorted(folder.glob("*.py")):
            total.update(path.read_bytes())
    for library in ("jinja2", "sentencepiece", "tokenizers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            total.update(f"{library} {metadata.version(library)}".encode())
    return total.hexdigest()


def _documents(render, spec, paths, mapping, counts, settings, said):
    """Yields (ids, columns) of every sequence of a files spec.

    Then what became of the records, and what was said, is in the settings.
    """
    use, numbers = render.use, {str(path): n for n, path in enumerate(paths)}
    records = (
        (where, one)
        for where, read in readers.each(render.name, spec, mapping, counts)
        for one in (read if isinstance(read, list) else [read])
    )
    for where, one, sequences, notes, error in _shown(_ahead(render, records), spec):
        counts.notes.update(notes)
        if error is not None:
            counts.unwritten(where, error, use.counts(one))
            continue
        file, line = place(where, numbers)
        beside = {"file": file, "line": line, "key": _key(use.prompt(one))}
        for name in use.numbers:
            value = getattr(one, name)
            beside[name] = math.nan if value is None else float(value)
        fields = one._asdict()
        if "where" in fields:
            fields["where"] = ""  # a file may have another name when it is read again
        beside["record"] = json.dumps(fields).encode()
        for rank, (ids, columns) in enumerate(sequences):
            yield ids, beside | columns | {"rank": rank}
            beside |= {"record": b"", "key": b""}
    settings["reading"] = counts.kept_beside(paths)
    settings["said"] = sorted(said)


def _key(prompt):
    return hashlib.blake2b(prompt_key(prompt).encode(), digest_size=16).digest()


class _Renderer:
    """Renders one record; several threads may call it."""

    def __init__(self, name, turns, sources):
        self.name, self.use, self.turns = name, _USES[name], turns
        self.data, self.tokenizer = sources.tally.data, sources.tokenizer

    def __call__(self, item):
        """Returns a record's place, itself, its sequences, notes, and its refusal.

        A sequence is (ids, {column: value}).
        """
        (where, one), notes, error = item, collections.Counter(), None
        render, sequences = Rendering(self.data, self.tokenizer, notes), []
        try:
            for messages in self.use.answers(one):
                if self.name == "prompts":
                    ids, mask = render.prompt(messages, one.tools)
                else:
                    ids, mask = render(messages, one.tools, turns=self.turns)
                ended = messages[-1].get("ended", True)
                sequences.append((ids, self._columns(ids, mask, ended)))
        except UserError as refusal:
            error = refusal
        return where, one, sequences, notes, error

    def _columns(self, ids, mask, ended):
        return {
            "learned": sum(mask),
            "ends": chat.ends(ids, mask, self.tokenizer),
            "ended": ended,
            "mask": np.packbits(np.array(mask, bool)).tobytes(),
        }


def _ahead(function, items):
    """Yields the function of each item in order, a few batches ahead in threads.

    A chat template runs in a process of its own, and the tokenizer lets other threads
    run: what is left to Python is the smaller part.
    """
    count = min(os.cpu_count() or 1, _THREADS)
    items, waiting = iter(items), collections.deque()
    pool = ThreadPoolExecutor(count)
    try:
        while True:
            while len(waiting) < 2 * count:
                batch = list(itertools.islice(items, _BATCH))
                if not batch:
                    break
                waiting.append(pool.submit(lambda b=batch: [function(i) for i in b]))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _shown(items, what):
    """Yields the items; a line says now and then how many, where it takes long."""
    started = said = time.monotonic()
    for count, item in enumerate(items):
        now = time.monotonic()
        if now - said > _PATIENCE:
            rate, said = count / (now - started), now
            _log.info("%s: %d records rendered, %.0f a second", what, count, rate)
        yield item
