"""Prompts to sample from, as left-padded rows: data of the stages that sample."""

import numpy as np

from stagecraft import schema
from stagecraft.data import corpus, packing, readers
from stagecraft.data.dataset import Dataset
from stagecraft.data.stage_data import (
    StageData,
    mixed_rows,
    order_seed,
    read_rows,
    split_rows,
)
from stagecraft.errors import UserError
from stagecraft.text import chat


def build(stage, sources) -> StageData:
    """Returns prompts and, where wanted, rows of pretraining text (PPO-ptx)."""
    return _batches(stage, sources, stage.batch_size)


def groups(stage, sources) -> StageData:
    """Returns prompts, `oversample` for each one that is trained on.

    The others are dropped once their completions are scored.
    """
    return _batches(stage, sources, stage.batch_size * stage.oversample)


def records(stage, sources) -> StageData:
    """Returns prompts for a stage that writes records, without batches."""
    if stage.data.too_long == "cut":
        raise UserError(
            "data.too_long='cut': a record keeps its prompt whole, and is not sampled "
            "from a part of it; expected 'refuse' or 'drop'"
        )
    rows = read_rows(readers.prompts, sources.specs["files"], sources)
    rows, _ = _encoded(rows, stage, sources)
    return _prompts(rows)


def _prompts(rows):
    prompts, records = [], []
    for one in (row.record for row in rows):
        # Under our names for them, whatever theirs are: verifiers look for them there.
        record = {key: value for key, value in one.record.items() if key != "tools"}
        record["prompt"] = one.prompt
        prompts.append(one.prompt)
        records.append(record | ({"tools": one.tools} if one.tools else {}))
    return StageData(prompts=prompts, records=records)


def _batches(stage, sources, count):
    """Returns the prompts as a dataset, `count` rows a batch, and those held out."""
    splits = split_rows(readers.prompts, stage, sources)
    (train, ids), (heldout, heldout_ids) = (
        _encoded(rows, stage, sources) for rows in splits
    )
    sources.tally.check()
    seed = order_seed(stage, sources)
    mixed, shares = mixed_rows(stage, train, count, seed)
    beside = _pretraining(stage, sources)
    report = {"prompts": len(train)}
    if beside:
        report["ptx_rows"] = len(beside[0][0])
    dataset = Dataset(
        [(_arrays(ids, 0, stage, sources), count)],
        seed=seed,
        mixture=mixed,
        workers=stage.data.workers,
        beside=beside,
        report=report | shares,
    )
    data = _prompts(train + heldout)
    data = data._replace(dataset=dataset, samples=data.prompts[:4])
    if not heldout:
        return data
    # Numbered on from the others, so that an index means one record.
    rows = _arrays(heldout_ids, len(train), stage, sources)
    heldout = Dataset([(rows, stage.batch_size)], seed=sources.seed)
    asked = [one for one in data.records[len(train) :] if not one.get("tools")]
    return data._replace(heldout=heldout, asked=asked)


def _arrays(ids, start, stage, sources):
    """Returns left-padded prompts, their rows numbered from `start` on."""
    if not ids:
        raise UserError(f"data.files={stage.data.files}: no prompt is left to sample")
    length = min(packing.rounded(max(map(len, ids))), _limit(stage, sources))
    arrays = packing.pad_prompts(ids, length)
    arrays["index"] = np.arange(start, start + len(ids), dtype=np.int32)
    return arrays


def _limit(stage, sources):
    """Returns the most tokens of a prompt."""
    room = sources.max_length - stage.sampling.max_new_tokens
    return min(stage.data.prompt_length or room, room)


def _encoded(rows, stage, sources):
    """Returns the rows whose prompts are used, and the ids of each."""
    limit, counts = _limit(stage, sources), sources.tally
    rendering = sources.rendering()
    counts.what, counts.limit = "prompts", f"with room for {limit}"
    used, encoded, refused = [], [], []
    for row in rows:
        one = row.record
        messages = chat.as_messages(one.prompt)
        rendering.count(messages)
        tools = {"tools": one.tools} if one.tools else {}
        try:
            ids = chat.generation_prompt(messages, sources.tokenizer, **tools)
        except UserError as error:
            counts.unwritten(row.where, error)
            continue
        counts.longest = max(counts.longest, len(ids))
        if len(ids) > limit and stage.data.too_long == "drop":
            counts.drop("too long", row.where)
            continue
        if len(ids) > limit and stage.data.too_long == "cut":
            counts.cut += 1
            ids = ids[-limit:]  # what stands last is what is answered
        if len(ids) > limit:
            refused.append((one.where, len(ids)))
        used.append(row)
        encoded.append(ids)
    if refused:
        where, length = refused[0]
        raise UserError(
            f"{where}: a prompt of {length} tokens, but there is room for {limit} "
            f"(context of {sources.max_length}, "
            f"sampling.max_new_tokens={stage.sampling.max_new_tokens}, "
            f"data.prompt_length={stage.data.prompt_length}), and {len(refused)} of "
            f"{len(rows)} prompts are too long; raise the limit, or leave them out by "
            "data.too_long='drop'"
        )
    return used, encoded


def _pretraining(stage, sources):
    """Returns [(rows of text, how many beside a batch)]; [] where none are wanted."""
    data = stage.data
    count = data.get("ptx_rows")
    if bool(count) != ("ptx" in sources.specs):
        raise UserError(
            f"data.ptx={data.ptx!r} with data.ptx_rows={count}: set both to mix "
            "pretraining text in, or neither"
        )
    if not count:
        return []
    schema.positive("data.ptx_rows", count)
    schema.positive("data.ptx_length", data.ptx_length)
    if data.ptx_length > sources.max_length:
        raise UserError(
            f"data.ptx_length={data.ptx_length}: longer than the context of "
            f"{sources.max_length} tokens"
        )
    documents = corpus.stored([sources.specs["ptx"]], {}, sources)
    return [(corpus.text_rows(documents, data.ptx_length, prefix="ptx_"), count)]
