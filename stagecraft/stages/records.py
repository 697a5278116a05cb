"""The journal and the one writer of stages that sample, rate and write records.

WORKDIR/STAGE/journal.jsonl is appended and synced as a stage goes: a header that says
whose journal it is, then for each batch of prompts an entry with the sampled answers
and an entry with their verdicts. A stage that was killed replays its journal and
continues after it, so nothing that it holds is sampled or rated twice. records.jsonl is
a function of the journal alone, and written whole at the end.
"""

import collections
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from stagecraft import metrics, processes, schema, storage
from stagecraft.errors import UserError
from stagecraft.models import scores
from stagecraft.models.language import rounded

JOURNAL, RECORDS = "journal.jsonl", "records.jsonl"
VERSION = 1  # of the journal's format


class Recording(NamedTuple):
    """What a stage that writes records is given in addition to its config.

    Attributes:
        folder: WORKDIR/STAGE; its records.jsonl is written whole at the end.
        name: the stage's name, for the progress line and messages.
        language: a `models.language.Language`.
        asked: the prompts' records; taken in turn, in a shuffled order.
        key: the stage's random key.
        lineage: the stage's `lineage.LineageEntry`.
        reward: a `signals.reward.RewardModel`, or None.
        judge: a `signals.judge.LocalModel`, or None.
        world: name of the experiment's world, "" without one.
        target: a `models.language.Language` that is attacked, or None.
        known: texts of earlier attacks.
    """

    folder: Path
    name: str
    language: Any
    asked: list[dict]
    key: jax.Array
    lineage: Any
    reward: Any = None
    judge: Any = None
    world: str = ""
    target: Any = None
    known: Sequence[str] = ()


class Batch(NamedTuple):
    """Prompts whose answers were sampled and rated together.

    Attributes:
        prompts: texts or message lists.
        answers: for each prompt a list of (text, ended).
        verdicts: for each prompt the verdict on its answers, a JSON value.
        tools: for each prompt the JSON schemas of tools it was asked with, or None.
    """

    prompts: list
    answers: list
    verdicts: list
    tools: list


class Journal:
    """A file of JSON lines that are appended, synced, and replayed when it is reopened.

    Only process 0 writes; all processes replay.

    Args:
        path: the file.
        header: JSON values that decide the entries; a journal with another header is
            refused.
    """

    def __init__(self, path, header):
        self._lines = storage.AppendedLines(path)
        first, *rest = self._lines.values or [None]
        header = json.loads(json.dumps(header))
        if first is not None and (change := schema.difference(first, header)):
            raise UserError(
                f"{path}: is the journal of something else ({change}); choose "
                "another --workdir, or delete it to begin this stage again"
            )
        self._replay, self._since = collections.deque(rest), time.perf_counter()
        processes.barrier("journal")  # all have read it before it grows
        if first is None:
            self.append(header)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lines.close()

    def once(self, make, *args) -> tuple[dict, bool]:
        """Returns the next entry, and whether it was replayed.

        Args:
            make: called with `args` where the journal does not hold the entry yet;
                returns a dict of JSON values, to which its "seconds" are added.
        """
        if self._replay:
            return self._replay.popleft(), True
        entry = make(*args)
        now = time.perf_counter()
        seconds, self._since = round(now - self._since, 3), now
        return self.append(entry | {"seconds": seconds}), False

    def held(self) -> list[dict]:
        """Returns the entries that the journal held when it was opened.

        Those that `once` has returned are left out.
        """
        entries = list(self._replay)
        self._replay.clear()
        return entries

    def append(self, entry: dict) -> dict:
        """Appends an entry; returns it as reading the line again would."""
        return self._lines.append(entry)


def header(kind, lineage, rater, seed):
    """Returns a journal's header: all that decides its answers and verdicts.

    Args:
        kind: of the stage.
        lineage: the stage's `lineage.LineageEntry`.
        rater: identity of what rates the answers.
        seed: of the prompts' order, the sampling and the rater's noise.
    """
    return {
        "journal": VERSION,
        "kind": kind,
        "config": lineage.config,
        "tokenizer": lineage.tokenizer,
        "data": lineage.data,
        "parents": {role: one["id"] for role, one in lineage.parents.items()},
        "rater": rater,
        "seed": seed,
    }


def collect(
    config, recording, header, asked, rate, *, samples, rng=None
) -> tuple[list[Batch], float]:
    """Samples answers to prompts and rates those that the journal does not hold.

    Args:
        config: the stage's config: batch_size, sampling.
        recording: a `Recording`.
        header: see `header`; batch n is sampled with its seed + n.
        asked: the prompts' records, in the order in which they are asked.
        rate: (records, [[(text, ended)] of each]) -> a JSON value for each record.
        samples: answers to each prompt.
        rng: a numpy Generator that `rate` draws from, or None. Its state is part of the
            journal, so that it draws the same whenever a stage was killed.

    Returns:
        the batches, and the seconds they took in all processes that worked on them.
    """
    parts = _parts(config, asked, samples)
    batches, seconds = [], 0.0

    def sample_batch(number, part):
        prompts = [record["prompt"] for record in part]
        each = [record for record in part for _ in range(samples)]
        settings = dict(config.sampling) | tools_of(each)
        seed = header["seed"] + number
        answers = recording.language.complete(
            [record["prompt"] for record in each], seed=seed, **settings
        )
        groups = [answers[i : i + samples] for i in range(0, len(each), samples)]
        return {"batch": number, "prompts": prompts, "answers": groups}

    def rate_batch(number, part, answers):
        entry = {"batch": number, "verdicts": rate(part, answers)}
        return entry | ({"rng": rng.bit_generator.state} if rng is not None else {})

    progress = metrics.Progress(recording.name, len(parts), unit="answers")
    try:
        with Journal(recording.folder / JOURNAL, header) as journal:
            for number, part in enumerate(parts):
                sampled, _ = journal.once(sample_batch, number, part)
                # As sampling returns them: a rater need not know of the journal.
                answers = [[tuple(a) for a in group] for group in sampled["answers"]]
                rated, replayed = journal.once(rate_batch, number, part, answers)
                if rng is not None:
                    rng.bit_generator.state = rated["rng"]
                prompts, verdicts = sampled["prompts"], rated["verdicts"]
                tools = [record.get("tools") for record in part]
                batches.append(Batch(prompts, answers, verdicts, tools))
                seconds += sampled["seconds"] + rated["seconds"]
                if not replayed:
                    progress.step(number + 1, {}, samples * len(part))
    finally:
        progress.close()
    return batches, seconds


def work(config, recording, samples) -> dict[str, float]:
    """Counts the tokens that a stage of records runs through its models.

    Args:
        config: the stage's config: prompts, batch_size, sampling.
        recording: a `Recording`.
        samples: answers to each prompt.

    Returns:
        {"sampled", "scalar_scored", "context"}, as `anatomy.cost.stage_flops` takes
        them. Each answer reads its prompt anew.
    """
    asked, _, _ = shuffled(recording.asked, config.prompts, recording.key)
    language, new = recording.language, config.sampling.max_new_tokens
    sampled, scored, seen = 0, 0, 0.0
    for part in _parts(config, asked, samples):
        rows = len(part) * samples
        longest = 0
        for record in part:
            more = {"tools": record["tools"]} if record.get("tools") else {}
            ids = language.encode(record["prompt"], chat_format=True, **more)
            longest = max(longest, len(ids))
        length = rounded(longest) + new
        lengths = [length]
        if recording.target is not None:  # it reads what was written, and answers
            lengths.append(rounded(new) + new)
        for length in lengths:
            tokens = length * -(-rows // language.batch_size) * language.batch_size
            sampled += tokens
            seen += tokens * (length + 1) / 2
        if recording.reward is not None:
            scored += scores.padded_tokens(rows, longest + new)
    return {"sampled": sampled, "scalar_scored": scored, "context": seen / sampled}


def tools_of(records) -> dict[str, list]:
    """Returns {"tools": those of each record, or None}; {} where no record has any."""
    tools = [record.get("tools") for record in records]
    return {"tools": tools} if any(tools) else {}


def _parts(config, asked, samples):
    size = max(config.batch_size // samples, 1)
    return [asked[i : i + size] for i in range(0, len(asked), size)]


def write(folder, records, name=RECORDS):
    """Writes records.jsonl, or another file of JSON lines, whole."""
    lines = (storage.to_json(record) + "\n" for record in records)
    storage.write_text(Path(folder) / name, "".join(lines))


def shuffled(asked, count, key):
    """Returns `count` records in a random order, all of them before any comes again.

    Args:
        asked: the prompts' records.
        count: how many to return.
        key: random key.

    Returns:
        (the records, the seed of their order, the numpy Generator that drew it).
    """
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    rng, order = np.random.default_rng(seed), []
    while len(order) < count:
        order += rng.permutation(len(asked)).tolist()
    return [asked[i] for i in order[:count]], seed, rng


def format(config) -> str:
    """Returns "records", what stage.json says such a stage writes."""
    del config
    return "records"
