"""The data of a stage: which files its config names, and what all its builders share.

A files spec names a user's files, or "world:NAME" (what the embedded world wrote),
"curation:NAME" (what the run curated), "stage:NAME" (records another stage wrote), or
"labels:NAME" (verdicts of people on a stage's answers; of another run's stage as
"labels:WORKDIR/NAME"); several are separated by commas.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stagecraft import process, schema, stores
from stagecraft.data import conversations, files, mixture, readers, tally
from stagecraft.data.dataset import Dataset, hold_out
from stagecraft.data.documents import Rendered
from stagecraft.data.tally import Tally
from stagecraft.errors import UserError
from stagecraft.models.locate import shortest_context

_log = logging.getLogger("stagecraft.data")
# Keys of a data config that name files.
SPECS = ("files", "heldout", "replay", "ptx", "demonstrations", "known")
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
        known: texts that are no longer new.
    """

    dataset: Dataset | None = None
    heldout: Dataset | None = None
    samples: Sequence = ()
    prompts: Sequence = ()
    records: Sequence = ()
    reference: Dataset | None = None
    digests: dict[str, str] | None = None
    reading: dict | None = None
    asked: Sequence = ()
    known: Sequence = ()


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
            part = str(_labels(part, root)[-1])
        parts.append(part)
    return ",".join(parts)


def _labels(part, root):
    """Returns (work directory, stage, records) of a part that names labels."""
    folder, _, name = part.removeprefix(f"{LABELS}:").rpartition("/")
    folder = Path(folder or root)
    return folder, name, folder / LABELS / name / "records.jsonl"


def unlabelled(data, root) -> list[str]:
    """Returns what names labels that nobody has given yet, as in "labels:sft"."""
    specs = [data[k] for k in SPECS if data.get(k)]
    parts = [p for spec in specs for p in schema.listed(spec)]
    parts = [part for part in parts if part.startswith(f"{LABELS}:")]
    return [part for part in parts if not _labels(part, root)[-1].exists()]


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
    for part in unlabelled(stage.data, root):
        folder, labelled, _ = _labels(part, root)
        raise UserError(
            f"{name}: {part}: no labels yet; give some with: stagecraft label "
            f"--workdir={folder} --stage={labelled} and end it with ctrl-C; then this "
            "command goes on"
        )
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
    # In a mirror nothing would stay.
    beside = None if stores.named(root) != str(root) else Path(root) / "cache"
    cache = Path(stage.data.get("cache") or process.cache("tokens", beside))
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


def records(use, sources, **how) -> tuple[Rendered, int]:
    """Reads the records of a stage's files.

    Args:
        use, **how: as of `conversations.rendered`.
        sources: a Sources.

    Returns:
        the records, and how many of their sources are trained on: data.files, or each
        part of it where those are mixed. The held-out files are one source more.
    """
    data, specs = sources.tally.data, sources.specs
    mixture.check(data)
    parts = [specs["files"]]
    if mixture.wanted(data):
        parts = schema.listed(specs["files"])
    every = [*parts, *filter(None, [specs.get("heldout")])]
    mapping = readers.fields(data.fields)
    return conversations.rendered(use, every, sources, mapping=mapping, **how), len(
        parts
    )


def split(sources_of, parts, key, data, seed) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the rows to train on and of those held out, i64.

    Args:
        sources_of: the source of each row, i64[N].
        parts: how many sources are trained on.
        key: (number) -> what rows that are held out together have in common.
        data: the stage's data config.
        seed: of the experiment.
    """
    learned = np.flatnonzero(sources_of < parts)
    train, heldout = hold_out(learned.tolist(), data.heldout_share, seed, key)
    others = np.flatnonzero(sources_of >= parts)
    heldout = np.concatenate([heldout, others]).astype(np.int64)
    return np.array(train, np.int64), heldout


def mixed_rows(stage, parts_of, size, seed):
    """Returns the `Mixture` of a stage's rows and its report; None and {} for none.

    Args:
        stage: its config.
        parts_of: the part of data.files that each row is of, i64[N].
        size: rows of a batch.
        seed: of the order.
    """
    if not mixture.wanted(stage.data):
        return None, {}
    count = len(schema.listed(stage.data.files))
    members = [np.flatnonzero(parts_of == part) for part in range(count)]
    return mixture.make(stage.data, members, None, stage.steps, size, seed)
