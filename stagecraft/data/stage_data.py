"""The data of a stage: which files its config names, and what all its builders share.

A files spec names a user's files, or "world:NAME" (what the embedded world wrote),
"curation:NAME" (what the run curated), "stage:NAME" (records another stage wrote), or
"labels:NAME" (verdicts of people on a stage's answers); several are separated by
commas.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stagecraft import schema
from stagecraft.data import files, mixture, packing, readers, tally
from stagecraft.data.dataset import Dataset, hold_out
from stagecraft.data.rendering import Rendering
from stagecraft.data.tally import Tally
from stagecraft.models.locate import shortest_context
from stagecraft.text import chat

_log = logging.getLogger("stagecraft.data")
# Keys of a data config that name files.
SPECS = ("files", "heldout", "replay", "ptx", "demonstrations")
LABELS = "labels"  # folder of the work directory: verdicts of people, by stage


class StageData(NamedTuple):
    """What a stage is trained on.

    Attributes:
        dataset: None for a stage that writes records.
        heldout: what to evaluate on, or None.
        samples: a few prompts to watch the model on.
        prompts: all prompts, of a stage that samples.
        records: their whole records, in the same order: what a verifier looks at. A
            batch's `index` says which rows it holds.
        reference: demonstrations that a reward model is to give 0 on average, or None.
        digests: {spec: SHA-256 of the files}.
        reading: what became of the records in the files: see `tally.Tally.report`.
        asked: records of the held-out prompts, each with its "prompt".
    """

    dataset: Dataset | None = None
    heldout: Dataset | None = None
    samples: list | tuple = ()
    prompts: list | tuple = ()
    records: list | tuple = ()
    reference: Dataset | None = None
    digests: dict[str, str] | None = None
    reading: dict | None = None
    asked: list | tuple = ()


class Sources(NamedTuple):
    """What a builder makes the data of a stage from, beside the stage's config.

    Attributes:
        specs: {key of the data config: files spec}, of those that are set; with paths.
        tokenizer: a `text.tokenizer.Tokenizer`.
        seed: the experiment's.
        max_length: tokens that each of the stage's models holds.
        cache: folder of tokenised text.
        tally: a `Tally` of the records that are read.
    """

    specs: dict[str, str]
    tokenizer: object
    seed: int
    max_length: int
    cache: Path
    tally: Tally

    def rendering(self) -> Rendering:
        """Returns what renders the conversations of the stage."""
        return Rendering(self.tally.data, self.tokenizer, self.tally)


class Row(NamedTuple):
    """A record that becomes a row.

    Attributes:
        record: a Comparison, Judgement or Prompt, or a list of Judgements.
        part: number of the part of data.files that it is from; -1 for held-out files.
        documents: (ids, mask) of each sequence of the row.
        where: FILE:LINE of the record.
    """

    record: tuple | list
    part: int
    documents: tuple = ()
    where: str = ""


def stages_named(data) -> list[str]:
    """Returns the names of the stages whose records a data config reads."""
    specs = [data[k] for k in SPECS if k in data]
    parts = [p.strip() for spec in specs for p in spec.split(",")]
    return [p.removeprefix("stage:") for p in parts if p.startswith("stage:")]


def locate(spec, root) -> str:
    """Returns a files spec with paths in the work directory for what the run wrote."""
    root, parts = Path(root), []
    for part in (p.strip() for p in spec.split(",")):
        for folder in ("world", "curation"):
            if part.startswith(f"{folder}:"):
                part = str(root / folder / part.removeprefix(f"{folder}:"))
        if part.startswith("stage:"):
            part = str(root / part.removeprefix("stage:") / "records.jsonl")
        if part.startswith(f"{LABELS}:"):
            name = part.removeprefix(f"{LABELS}:")
            part = str(root / LABELS / name / "records.jsonl")
        parts.append(part)
    return ",".join(parts)


def texts(spec, root):
    """Yields the documents a tokenizer is trained on."""
    return readers.texts(locate(spec, root))


def build(stage, tokenizer, root, config, builder: Callable, name="") -> StageData:
    """Reads, checks, tokenises and splits the data of a stage.

    One line says what became of its records.

    Args:
        stage: its resolved config.
        tokenizer: a `Tokenizer`.
        root: the work directory.
        config: the experiment's config: seed, model.max_length, stages.
        builder: (stage, Sources) -> StageData, of the stage's kind.
        name: the stage's, for that line.
    """
    tally.check(stage.data)
    named = {k: stage.data[k] for k in SPECS if stage.data.get(k)}
    specs = {k: locate(spec, root) for k, spec in named.items()}
    paths = {k: files.expand(spec) for k, spec in specs.items()}
    digests = {named[k]: files.digest(paths[k]) for k in named}
    trained, held = (set(map(str, paths.get(k, ()))) for k in ("files", "heldout"))
    if both := trained & held:
        _log.warning(
            "data.heldout=%s: %s is in data.files too, and trained on; name a file of "
            "its test split",
            stage.data.heldout,
            min(both),
        )
    cache = Path(stage.data.get("cache") or Path(root) / "cache")
    length, _ = shortest_context(stage, config)
    counts = Tally(stage.data)
    if stage.data.control_tokens == "parse":
        tokenizer = tokenizer.parsing()
    sources = Sources(specs, tokenizer, config.seed, length, cache, counts)
    data = builder(stage, sources)
    counts.check()
    counts.say(name)
    return data._replace(digests=digests, reading=counts.report())


# -- what builders share ---------------------------------------------------------------


def order_seed(stage, sources) -> int:
    """Returns the seed of the order of rows; what is held out does not depend on it."""
    return sources.seed + stage.seed


def read_rows(read, spec, sources, number=None) -> list[Row]:
    """Reads the records of a files spec, each with the part of it that it is from.

    Args:
        read: `readers.comparisons` or its like.
        spec: of files.
        sources: a Sources. Parts matter where the stage's data config mixes them.
        number: of the one part that all of them are; None counts the parts.
    """
    data, counts = sources.tally.data, sources.tally
    mixture.check(data)
    apart = number is None and mixture.wanted(data)
    parts = schema.listed(spec) if apart else [spec]
    mapping, rows = readers.fields(data.fields), []
    for place, part in enumerate(parts):
        read_before = len(counts.places)
        records = read(part, mapping, counts)
        wheres = counts.places[read_before:]
        rows += [
            Row(record, place if number is None else number, where=where)
            for record, where in zip(records, wheres, strict=True)
        ]
    return rows


def split_rows(read, stage, sources) -> tuple[list[Row], list[Row]]:
    """Reads the records to train on, and those held out."""
    rows = read_rows(read, sources.specs["files"], sources)
    train, heldout = hold_out(rows, stage.data.heldout_share, sources.seed, _prompt_of)
    if "heldout" in sources.specs:
        heldout += read_rows(read, sources.specs["heldout"], sources, -1)
    return train, heldout


def prompt_key(prompt: str | list[dict]) -> str:
    """Returns what equal prompts have in common, be they texts or messages."""
    turns = [
        {k: v for k, v in message.items() if k != "weight"}
        for message in chat.as_messages(prompt)
    ]
    return json.dumps(turns, sort_keys=True)


def _prompt_of(row):
    several = isinstance(row.record, list)  # the judgements of one pair
    return prompt_key((row.record[0] if several else row.record).prompt)


def mixed_rows(stage, rows, size, seed):
    """Returns the `Mixture` of a stage's rows and its report; None and {} for none.

    Args:
        stage: its config.
        rows: list of Row.
        size: rows of a batch.
        seed: of the order.
    """
    if not mixture.wanted(stage.data):
        return None, {}
    at = np.array([row.part for row in rows])
    count = len(schema.listed(stage.data.files))
    members = [np.flatnonzero(at == part) for part in range(count)]
    return mixture.make(stage.data, members, None, stage.steps, size, seed)


def longest(rows) -> int:
    """Returns the tokens of the longest sequence."""
    return max(len(ids) for row in rows for ids, _ in row.documents)


def padded(arrays, train, heldout, report, stage, sources) -> StageData:
    """Makes datasets of padded rows, as long as the longest row needs.

    Args:
        arrays: (rows, length, number of the first) -> {name: array [N, ...]}.
        train, heldout: lists of Row.
        report: {name: number} about the rows.
        stage: its config.
        sources: a Sources.
    """
    answers = [document for row in train for document in row.documents]
    where = f"data.files={stage.data.files}"
    chat.check_ends(answers, sources.tokenizer, where, required=False)
    length = min(packing.rounded(longest(train)), stage.data.length)
    seed = order_seed(stage, sources)
    mixed, shares = mixed_rows(stage, train, stage.batch_size, seed)
    dataset = Dataset(
        [(arrays(train, length, 0), stage.batch_size)],
        seed=seed,
        mixture=mixed,
        buckets=stage.data.buckets,
        workers=stage.data.workers,
        report=report | shares,
    )
    if not heldout:
        return StageData(dataset)
    length = min(packing.rounded(max(length, longest(heldout))), stage.data.length)
    # Numbered on from the others, so that an index means one row.
    rows = arrays(heldout, length, len(train))
    evaluated = Dataset([(rows, stage.batch_size)], seed=sources.seed)
    records = [row.record for row in heldout]
    asked = [{"prompt": one.prompt} for one in records if not one.tools]
    return StageData(dataset, evaluated, asked=asked)
