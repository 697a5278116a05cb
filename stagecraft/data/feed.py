"""From a stage's `data` config to its batches: read, checked, tokenised, split.

A files spec names user's files, or "world:NAME" (what the embedded world wrote), or
"stage:NAME" (records another stage made); several are separated by commas.
"""

import collections
import functools
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stagecraft import defaults, schema
from stagecraft.data import corpus, files, mixture, packing, readers
from stagecraft.data.dataset import Dataset, hold_out, order_seed
from stagecraft.errors import UserError
from stagecraft.text import chat


class Feed(NamedTuple):
    """What a stage is fed.

    Attributes:
        dataset: a `Dataset`; None for a comparisons stage.
        heldout: a `Dataset` to evaluate on, or None.
        digests: {spec: SHA-256 of the files}.
        samples: a few prompts to watch the model on.
        prompts: all prompts, of a stage that samples.
        records: their whole records, in the same order: what a verifier looks at. A
            batch's `index` says which rows it holds.
        reference: a `Dataset` of demonstrations that a reward model is to give 0 on
            average, or None.
    """

    dataset: Dataset | None
    heldout: Dataset | None
    digests: dict
    samples: list
    prompts: list
    records: list
    reference: Dataset | None


# Keys of a data config that name files.
SPECS = ("files", "heldout", "replay", "ptx", "demonstrations")


def stages_named(data):
    """Names of the stages whose records a data config reads."""
    specs = [data[k] for k in SPECS if k in data]
    parts = [p.strip() for spec in specs for p in spec.split(",")]
    return [p.removeprefix("stage:") for p in parts if p.startswith("stage:")]


def locate(spec, root):
    """A files spec with world: and stage: replaced by paths in the work directory."""
    root, parts = Path(root), []
    for part in (p.strip() for p in spec.split(",")):
        if part.startswith("world:"):
            part = str(root / "world" / part.removeprefix("world:"))
        elif part.startswith("stage:"):
            part = str(root / part.removeprefix("stage:") / "records.jsonl")
        parts.append(part)
    return ",".join(parts)


def texts(spec, root):
    """The documents a tokenizer is trained on."""
    return readers.texts(locate(spec, root))


def build(stage, tokenizer, root, config):
    """The feed of one stage.

    Args:
        stage: its resolved config.
        tokenizer: a `Tokenizer`.
        root: the work directory.
        config: the experiment's config: seed, model.max_length.
    """
    data = stage.data
    specs = {k: data[k] for k in SPECS if data.get(k)}
    digests = {
        spec: files.digest(files.expand(locate(spec, root))) for spec in specs.values()
    }
    make = {
        "language_model": corpus.build,
        "reward": _comparisons,
        "preference": _comparisons,
        "unpaired_preference": _judgements,
        "policy": _prompts,
        "group_policy": _prompts,
        "online_preference": _prompts,
        "comparisons": _prompts,
        "selection": _prompts,
    }[stage.kind]
    located = {k: locate(spec, root) for k, spec in specs.items()}
    empty = dict(dataset=None, heldout=None, samples=[], prompts=[], records=[])
    empty["reference"] = None
    cache = Path(data.get("cache") or Path(root) / "cache")
    made = empty | make(stage, located, tokenizer, config, cache)
    return Feed(digests=digests, **made)


# -- comparisons and prompts -----------------------------------------------------------


class _Row(NamedTuple):
    """A record that becomes a row.

    Attributes:
        record: as `sources` read it.
        part: the number of the part of data.files that it is from.
        documents: (ids, mask) of each sequence of the row.
    """

    record: Any
    part: int
    documents: tuple = ()


def _read(read, spec, data):
    """The records of a files spec, by `readers.comparisons` or its like: `_Row`s.

    Only where sources are mixed is it asked which part of the spec one is from.
    """
    mixture.check(data)
    parts = mixture.split(spec) if mixture.wanted(data) else [spec]
    mapping = readers.fields(data.fields)
    return [
        _Row(record, number)
        for number, part in enumerate(parts)
        for record in read(part, mapping)
    ]


def _split(read, specs, data, config):
    """Records to learn from, and those held out."""
    found = _read(read, specs["files"], data)
    kept, held = hold_out(found, data.heldout_share, config.seed)
    if "heldout" in specs:
        more = read(specs["heldout"], readers.fields(data.fields))
        held += [_Row(record, -1) for record in more]
    return kept, held


def _mixed(stage, kept, size, seed):
    """The `Mixture` of the rows a stage learns from, and what is told about it.

    Args:
        kept: `_Row`s.
        size: rows of a batch.
        seed: of the order.
    """
    if not mixture.wanted(stage.data):
        return None, {}
    at = np.array([row.part for row in kept])
    count = len(mixture.split(stage.data.files))
    members = [np.flatnonzero(at == part) for part in range(count)]
    return mixture.make(stage.data, members, None, stage.steps, size, seed)


def _comparisons(stage, specs, tokenizer, config, cache):
    data = stage.data
    dropped = collections.Counter()
    read = functools.partial(readers.comparisons, dropped=dropped)
    kept, held = _split(read, specs, data, config)
    if stage.kind == "preference":  # every two of a ranking are a pair
        kept, held = _expanded(kept), _expanded(held)

    def fitting(rows):
        found = []
        for row in rows:
            one = row.record
            documents = tuple(
                # Only the last turn is what was compared; earlier answers are context.
                corpus.rendered(
                    [*one.prompt, *answer], tokenizer, one.tools, turns="last"
                )
                for answer in one.answers
            )
            found.append(row._replace(documents=documents))
        return [r for r in found if _longest([r]) <= data.length]

    fit, fit_held = fitting(kept), fitting(held)
    pairs, total = _pairs_in(fit), _pairs_in(kept)
    report = {"pairs": pairs, "dropped": total - pairs + dropped.total(), **dropped}
    if not fit:
        raise UserError(
            f"data.files={data.files}: all {total} pairs are longer than "
            f"data.length={data.length} tokens; raise it"
        )
    everything = [row.record for row in fit + fit_held]

    def arrays(rows, length, start):
        out = packing.pad_answers([row.documents for row in rows], length)
        out["index"] = np.arange(start, start + len(rows), dtype=np.int32)
        # Training and held-out rows have the same arrays, whichever of them need one.
        if any(len(c.answers) > 2 for c in everything):
            out["present"] = out["segments"].any(-1)
        for name, absent in (("preference", 1.0), ("margin", 0.0)):
            if any(getattr(c, name) is not None for c in everything):
                values = [getattr(row.record, name) for row in rows]
                values = [absent if v is None else v for v in values]
                out[name] = np.array(values, np.float32)
        return out

    made = _padded(arrays, fit, fit_held, report, stage, config)
    if "demonstrations" in specs:
        made["reference"] = _reference(specs["demonstrations"], stage, tokenizer)
    return made


def _reference(spec, stage, tokenizer):
    """Demonstrations as padded rows, their last turn under the mask."""
    found = [
        corpus.rendered(one.messages, tokenizer, one.tools, turns="last")
        for one in readers.demonstrations(spec)
    ]
    fit = [document for document in found if len(document[0]) <= stage.data.length]
    if not fit:
        raise UserError(
            f"data.demonstrations={spec}: all {len(found)} are longer than "
            f"data.length={stage.data.length} tokens; raise it"
        )
    length = packing.rounded(max(len(ids) for ids, _ in fit))
    rows = packing.pad(fit, min(length, stage.data.length))
    return Dataset([(rows, stage.batch_size)], seed=0)


def _judgements(stage, specs, tokenizer, config, cache):
    data = stage.data
    # The two answers of a pair stay on one side of the split.
    dropped = collections.Counter()
    read = functools.partial(readers.judgements, dropped=dropped)
    kept, held = _split(read, specs, data, config)

    def fitting(groups):
        rows = []
        for one, part in ((j, row.part) for row in groups for j in row.record):
            messages = [*one.prompt, *one.completion]
            document = corpus.rendered(messages, tokenizer, one.tools, turns="last")
            rows.append(_Row(one, part, (document,)))
        return [row for row in rows if _longest([row]) <= data.length], len(rows)

    fit, total = fitting(kept)
    if not fit:
        raise UserError(
            f"data.files={data.files}: all {total} answers are longer than "
            f"data.length={data.length} tokens; raise it"
        )
    desirable = sum(row.record.label for row in fit)
    if desirable in (0, len(fit)):
        raise UserError(
            f"data.files={data.files}: every label is {bool(desirable)}; expected "
            "desirable and undesirable answers"
        )
    report = {
        "answers": len(fit),
        "desirable": desirable,
        "dropped": total - len(fit) + 2 * dropped.total(),
        **dropped,
    }

    def arrays(rows, length, start):
        out = packing.pad([row.documents[0] for row in rows], length)
        out["index"] = np.arange(start, start + len(rows), dtype=np.int32)
        out["label"] = np.array([row.record.label for row in rows], bool)
        return out

    return _padded(arrays, fit, fitting(held)[0], report, stage, config)


def _expanded(rows):
    """Each ranking as its pairs."""
    return [
        row._replace(record=row.record._replace(answers=pair))
        for row in rows
        for pair in itertools.combinations(row.record.answers, 2)
    ]


def _pairs_in(rows):
    return sum(math.comb(len(row.record.answers), 2) for row in rows)


def _longest(rows):
    return max(len(ids) for row in rows for ids, _ in row.documents)


def _prompts(stage, specs, tokenizer, config, cache):
    data = stage.data
    found = _read(readers.prompts, specs["files"], data)
    room = config.model.max_length - stage.sampling.max_new_tokens
    limit = min(data.prompt_length or room, room)
    rows = []
    for one in (row.record for row in found):
        known = {"tools": one.tools} if one.tools else {}
        messages = chat.as_messages(one.prompt)
        ids = chat.generation_prompt(messages, tokenizer, **known)
        if len(ids) > limit:
            raise UserError(
                f"{one.where}: a prompt of {len(ids)} tokens, but there is room for "
                f"{limit} (model.max_length={config.model.max_length}, "
                f"sampling.max_new_tokens={stage.sampling.max_new_tokens}, "
                f"data.prompt_length={data.prompt_length}); shorten it or raise "
                "model.max_length"
            )
        rows.append(ids)
    prompts = [row.record.prompt for row in found]
    # Under our name for it, whatever theirs is: verifiers look for it there.
    records = [row.record.record | {"prompt": row.record.prompt} for row in found]
    made = dict(prompts=prompts, records=records)
    if stage.kind in defaults.RECORDS:
        return made
    arrays = packing.pad_prompts(rows, min(packing.rounded(max(map(len, rows))), limit))
    arrays["index"] = np.arange(len(rows), dtype=np.int32)
    report = {"prompts": len(rows)}
    asked = stage.batch_size
    if stage.kind == "group_policy":  # some are dropped once they are scored
        asked *= stage.oversample
    seed = order_seed(stage, config)
    mixed, told = _mixed(stage, found, asked, seed)
    beside = _pretraining(data, specs, tokenizer, config, cache, report)
    dataset = Dataset(
        [(arrays, asked)],
        seed=seed,
        mixture=mixed,
        workers=data.workers,
        beside=beside,
        report=report | told,
    )
    return made | dict(dataset=dataset, samples=prompts[:4])


def _pretraining(data, specs, tokenizer, config, cache, report):
    """Rows of text to go with the prompts of a batch (PPO-ptx), if any are wanted."""
    rows = data.get("ptx_rows")
    if bool(rows) != ("ptx" in specs):
        raise UserError(
            f"data.ptx={data.ptx!r} with data.ptx_rows={rows}: set both to mix "
            "pretraining text in, or neither"
        )
    if not rows:
        return []
    schema.positive("data.ptx_rows", rows)
    schema.positive("data.ptx_length", data.ptx_length)
    if data.ptx_length > config.model.max_length:
        raise UserError(
            f"data.ptx_length={data.ptx_length}: longer than the context, "
            f"model.max_length={config.model.max_length}"
        )
    documents = corpus.stored([specs["ptx"]], {}, tokenizer, cache)
    packed = corpus.text_rows(documents, data.ptx_length, prefix="ptx_")
    report["ptx_rows"] = len(packed)
    return [(packed, rows)]


def _padded(arrays, kept, held, report, stage, config):
    """Datasets of padded rows, as long as the longest needs.

    Args:
        arrays: (rows, length, number of the first) -> {name: array [N, ...]}.
        kept, held: `_Row`s to learn from and to evaluate on.

    Returns:
        {"dataset", "heldout", "samples"}.
    """
    length = min(packing.rounded(_longest(kept)), stage.data.length)
    seed = order_seed(stage, config)
    mixed, told = _mixed(stage, kept, stage.batch_size, seed)
    dataset = Dataset(
        [(arrays(kept, length, 0), stage.batch_size)],
        seed=seed,
        mixture=mixed,
        buckets=stage.data.buckets,
        workers=stage.data.workers,
        report=report | told,
    )
    heldout = None
    if held:
        # Numbered on from the others, so that an index means one row.
        longest = packing.rounded(max(length, _longest(held)))
        length = min(longest, stage.data.length)
        found = arrays(held, length, len(kept))
        heldout = Dataset([(found, stage.batch_size)], seed=config.seed)
    return dict(dataset=dataset, heldout=heldout, samples=[])
