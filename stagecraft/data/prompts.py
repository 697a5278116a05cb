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
    rows = read_rows(readers.prompts, sources.specs["files"], stage.data)
    _encoded(rows, stage, sources)
    return _prompts(rows)


def _prompts(rows):
    prompts = [row.record.prompt for row in rows]
    # Under our name for it, whatever theirs is: verifiers look for it there.
    records = [row.record.record | {"prompt": row.record.prompt} for row in rows]
    return StageData(prompts=prompts, records=records)


def _batches(stage, sources, count):
    """Returns the prompts as a dataset, `count` rows a batch, and those held out."""
    train, heldout = split_rows(readers.prompts, stage, sources)
    seed = order_seed(stage, sources)
    mixed, shares = mixed_rows(stage, train, count, seed)
    beside = _pretraining(stage, sources)
    report = {"prompts": len(train)}
    if beside:
        report["ptx_rows"] = len(beside[0][0])
    dataset = Dataset(
        [(_arrays(train, 0, stage, sources), count)],
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
    rows = _arrays(heldout, len(train), stage, sources)
    heldout = Dataset([(rows, stage.batch_size)], seed=sources.seed)
    asked = [one for one in data.records[len(train) :] if not one.get("tools")]
    return data._replace(heldout=heldout, asked=asked)


def _arrays(rows, start, stage, sources):
    """Returns left-padded prompts, their rows numbered from `start` on."""
    ids = _encoded(rows, stage, sources)
    length = min(packing.rounded(max(map(len, ids))), _limit(stage, sources))
    arrays = packing.pad_prompts(ids, length)
    arrays["index"] = np.arange(start, start + len(ids), dtype=np.int32)
    return arrays


def _limit(stage, sources):
    """Returns the most tokens of a prompt."""
    room = sources.max_length - stage.sampling.max_new_tokens
    return min(stage.data.prompt_length or room, room)


def _encoded(rows, stage, sources):
    """Returns the ids of each prompt; refuses one that is too long."""
    limit, ids = _limit(stage, sources), []
    for one in (row.record for row in rows):
        tools = {"tools": one.tools} if one.tools else {}
        messages = chat.as_messages(one.prompt)
        ids.append(chat.generation_prompt(messages, sources.tokenizer, **tools))
        if len(ids[-1]) > limit:
            raise UserError(
                f"{one.where}: a prompt of {len(ids[-1])} tokens, but there is room "
                f"for {limit} (context of {sources.max_length}, "
                f"sampling.max_new_tokens={stage.sampling.max_new_tokens}, "
                f"data.prompt_length={stage.data.prompt_length}); shorten it, or raise "
                "the limit"
            )
    return ids


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
