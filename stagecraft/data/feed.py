"""From a stage's `data` config to its batches: read, checked, tokenised, split.

A files spec names user's files, or "world:NAME" (what the embedded world wrote), or
"stage:NAME" (records another stage made); several are separated by commas.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stagecraft.data import packing, sources
from stagecraft.data.pipeline import Dataset
from stagecraft.errors import UserError
from stagecraft.text import chat

# Rows are cut to a multiple of this when data.buckets does not say otherwise.
ROUND = 8


class Feed(NamedTuple):
    """What a stage is fed.

    Attributes:
        dataset: a `Dataset`; None for a comparisons stage.
        heldout: a `Dataset` to evaluate on, or None.
        digests: {spec: SHA-256 of the files}.
        samples: a few prompts to watch the model on.
        prompts: all prompts, for a comparisons stage.
    """

    dataset: Dataset | None
    heldout: Dataset | None
    digests: dict
    samples: list
    prompts: list


def stages_named(data):
    """Names of the stages whose records a data config reads."""
    specs = [data[k] for k in ("files", "heldout", "replay") if k in data]
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
    return sources.texts(locate(spec, root))


def build(stage, tokenizer, root, config):
    """The feed of one stage.

    Args:
        stage: its resolved config.
        tokenizer: a `Tokenizer`.
        root: the work directory.
        config: the experiment's config: seed, model.max_length.
    """
    data = stage.data
    specs = {k: data[k] for k in ("files", "heldout", "replay") if data.get(k)}
    digests = {
        spec: sources.digest(sources.expand(locate(spec, root)))
        for spec in specs.values()
    }
    make = {
        "language_model": _language_model,
        "reward": _pairs,
        "preference": _pairs,
        "policy": _prompts,
        "comparisons": _prompts,
    }[stage.kind]
    located = {k: locate(spec, root) for k, spec in specs.items()}
    dataset, heldout, samples, prompts = make(stage, located, tokenizer, config)
    return Feed(dataset, heldout, digests, samples, prompts)


# -- text and demonstrations -----------------------------------------------------------


def _language_model(stage, specs, tokenizer, config):
    data, mapping = stage.data, sources.fields(stage.data.fields)

    def read(spec):
        if data.format == "text":
            found = [(t, None) for t in sources.texts(spec, mapping)]
            return [(chat.document(t, tokenizer), t) for t, _ in found]
        found = sources.demonstrations(spec, mapping)
        return [(chat.render(m, tokenizer), m) for m in found]

    rows = read(specs["files"])
    kept, held = _hold_out(rows, data.heldout_share, config.seed)
    if "heldout" in specs:
        held += read(specs["heldout"])
    report = {"documents": len(kept), "tokens": sum(len(r[0][0]) for r in kept)}
    arrays, report["dropped"] = _rows([r for r, _ in kept], data)
    targets = arrays["mask"] & (arrays["segments"] > 0)
    real = int((arrays["segments"] > 0).sum())
    if not targets.any():
        raise UserError(
            f"data.files={data.files}: no token is left to learn from in rows of "
            f"length={data.length} (mask all zeros); are the answers empty, or the "
            "prompts longer than data.length?"
        )
    report["supervised_share"] = float(targets.sum() / real)
    report["fill"] = real / arrays["ids"].size
    asked = sum(1 for r, _ in kept for learned in r[1] if not learned)
    if data.format != "text" and asked <= 3 * len(kept):
        # Nothing but bos and the two turn pieces is given: there are no prompts.
        logging.warning("data.files=%s: every token is supervised", data.files)
    parts = [(arrays, stage.batch_size)]
    if "replay" in specs:
        count = round(stage.batch_size * data.replay_share)
        if not 0 < count < stage.batch_size:
            raise UserError(
                f"data.replay_share={data.replay_share}: that is {count} of the "
                f"{stage.batch_size} rows of a batch; expected some and not all"
            )
        replay = [chat.document(t, tokenizer) for t in sources.texts(specs["replay"])]
        parts = [
            (arrays, stage.batch_size - count),
            (packing.pack(replay, arrays["ids"].shape[-1]), count),
        ]
    dataset = Dataset(parts, seed=config.seed, buckets=data.buckets, report=report)
    heldout = None
    if held:
        found, _ = _rows([r for r, _ in held], data)
        heldout = Dataset([(found, stage.batch_size)], seed=config.seed)
    return dataset, heldout, [_opening(source) for _, source in kept[:4]], []


def _rows(documents, data):
    """Arrays of packed or padded rows, and how many documents had nothing to learn."""
    if data.format == "text" and data.packing != "none":
        return packing.pack(documents, data.length, strategy=data.packing), 0
    # An answer cut off in the middle would be learned as one that goes on for ever,
    # but its start is worth learning: the end is cut, and what has no target goes.
    cut = [(ids[: data.length], mask[: data.length]) for ids, mask in documents]
    kept = [(ids, mask) for ids, mask in cut if any(mask)]
    dropped = len(documents) - len(kept)
    if data.packing == "none":
        longest = max((len(ids) for ids, _ in kept), default=1)
        return packing.pad(kept, min(_rounded(longest), data.length)), dropped
    return packing.pack(kept, data.length, strategy=data.packing), dropped


def _opening(source):
    """What to watch the model on: a question, or the first words of a document."""
    if isinstance(source, str):
        return " ".join(source.split()[:4])
    last = next(i for i, m in enumerate(source) if m["role"] == "assistant")
    return source[:last]


# -- comparisons and prompts -----------------------------------------------------------


def _pairs(stage, specs, tokenizer, config):
    data, mapping = stage.data, sources.fields(stage.data.fields)

    def read(spec):
        return [
            tuple(
                chat.render([*prompt, *answer], tokenizer)
                for answer in (chosen, rejected)
            )
            for prompt, chosen, rejected in sources.comparisons(spec, mapping)
        ]

    def fitting(rows):
        return [r for r in rows if max(len(one[0]) for one in r) <= data.length]

    rows = [tuple(_answer_only(*one) for one in pair) for pair in read(specs["files"])]
    kept, held = _hold_out(rows, data.heldout_share, config.seed)
    if "heldout" in specs:
        held += [tuple(_answer_only(*o) for o in p) for p in read(specs["heldout"])]
    fit = fitting(kept)
    report = {"pairs": len(fit), "dropped": len(kept) - len(fit)}
    if not fit:
        raise UserError(
            f"data.files={data.files}: all {len(kept)} pairs are longer than "
            f"data.length={data.length} tokens; raise it"
        )
    length = max(len(ids) for pair in fit for ids, _ in pair)
    length = min(_rounded(length), data.length)
    dataset = Dataset(
        [(packing.pad_pairs(fit, length), stage.batch_size)],
        seed=config.seed,
        buckets=data.buckets,
        report=report,
    )
    heldout = None
    if held := fitting(held):
        longest = _rounded(max(len(ids) for pair in held for ids, _ in pair))
        arrays = packing.pad_pairs(held, min(max(length, longest), data.length))
        heldout = Dataset([(arrays, stage.batch_size)], seed=config.seed)
    return dataset, heldout, [], []


def _answer_only(ids, mask):
    """Only the last turn is what was compared; earlier answers are context."""
    mask = np.asarray(mask)
    given = np.flatnonzero(~mask)
    return ids, (np.arange(mask.size) > given.max()) & mask


def _prompts(stage, specs, tokenizer, config):
    data, mapping = stage.data, sources.fields(stage.data.fields)
    found = sources.prompts(specs["files"], mapping)
    room = config.model.max_length - stage.sampling.max_new_tokens
    limit = min(data.prompt_length or room, room)
    rows = []
    for value, where in found:
        ids = chat.generation_prompt(chat.as_messages(value), tokenizer)
        if len(ids) > limit:
            raise UserError(
                f"{where}: a prompt of {len(ids)} tokens, but there is room for "
                f"{limit} (model.max_length={config.model.max_length}, "
                f"sampling.max_new_tokens={stage.sampling.max_new_tokens}, "
                f"data.prompt_length={data.prompt_length}); shorten it or raise "
                "model.max_length"
            )
        rows.append(ids)
    prompts = [value for value, _ in found]
    if stage.kind == "comparisons":
        return None, None, [], prompts
    length = min(_rounded(max(map(len, rows))), limit)
    dataset = Dataset(
        [(packing.pad_prompts(rows, length), stage.batch_size)],
        seed=config.seed,
        report={"prompts": len(rows)},
    )
    return dataset, None, prompts[:4], prompts


def _rounded(length):
    return -(-length // ROUND) * ROUND


def _hold_out(rows, share, seed):
    """Splits rows by chance: (kept, held out), a function of the seed."""
    count = round(len(rows) * share)
    if share and (count == 0 or count == len(rows)):
        raise UserError(
            f"data.heldout_share={share}: of {len(rows)} rows this keeps "
            f"{count} back; choose a share that leaves some on both sides"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(rows))
    held = set(order[:count].tolist())
    kept = [row for i, row in enumerate(rows) if i not in held]
    return kept, [rows[i] for i in sorted(held)]
