"""Prompts to sample from, as left-padded rows: data of the stages that sample."""

import numpy as np

from stagecraft import schema
from stagecraft.data import corpus, packing, stage_data
from stagecraft.data.answers import Lazily, PromptRows
from stagecraft.data.dataset import Dataset
from stagecraft.data.documents import in_memory
from stagecraft.data.stage_data import StageData, mixed_rows, order_seed
from stagecraft.errors import UserError


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
    rendered, _ = stage_data.records("prompts", sources)
    every = _fitting(rendered, np.arange(len(rendered)), stage, sources)
    return _prompts(rendered, every)


def _prompts(rendered, numbers):
    def record(number):
        one = rendered.record(number)
        # Under our names for them, whatever theirs are: verifiers look for them there.
        whole = {key: value for key, value in one.record.items() if key != "tools"}
        whole["prompt"] = one.prompt
        return whole | ({"tools": one.tools} if one.tools else {})

    prompts = Lazily(numbers, lambda number: rendered.record(number).prompt)
    return StageData(prompts=prompts, records=Lazily(numbers, record))


def _batches(stage, sources, count):
    """Returns the prompts as a dataset, `count` rows a batch, and those held out."""
    rendered, parts = stage_data.records("prompts", sources)
    splits = stage_data.split(
        rendered.sources, parts, rendered.key, stage.data, sources.seed
    )
    train, heldout = (_fitting(rendered, n, stage, sources) for n in splits)
    sources.tally.check()
    seed = order_seed(stage, sources)
    mixed, shares = mixed_rows(stage, rendered.sources[train], count, seed)
    beside = _pretraining(stage, sources)
    report = {"prompts": len(train)}
    if beside:
        report["ptx_rows"] = len(beside[0][0])
    dataset = Dataset(
        [(_rows(rendered, train, 0, stage, sources), count)],
        seed=seed,
        mixture=mixed,
        workers=stage.data.workers,
        beside=beside,
        report=report | shares,
    )
    data = _prompts(rendered, np.concatenate([train, heldout]))
    data = data._replace(dataset=dataset, samples=data.prompts[:4])
    if not len(heldout):
        return data
    # Numbered on from the others, so that an index means one record.
    rows = _rows(rendered, heldout, len(train), stage, sources)
    evaluated = Dataset([(rows, stage.batch_size)], seed=sources.seed)
    asked = [one for one in data.records[len(train) :] if not one.get("tools")]
    return data._replace(heldout=evaluated, asked=asked)


def _rows(rendered, numbers, start, stage, sources):
    """Returns left-padded prompts, their rows numbered from `start` on."""
    if not len(numbers):
        raise UserError(f"data.files={stage.data.files}: no prompt is left to sample")
    longest = int(rendered.lengths[numbers].max())
    length = min(packing.rounded(longest), limit(stage, sources.max_length))
    return in_memory(PromptRows(rendered, numbers, length, start))


def limit(stage, max_length: int) -> int:
    """Returns the most tokens of a prompt, in a context of max_length tokens."""
    room = max_length - stage.sampling.max_new_tokens
    return min(stage.data.prompt_length or room, room)


def _fitting(rendered, numbers, stage, sources):
    """Returns the numbers of the prompts that `data.too_long` leaves, i64."""
    most, counts = limit(stage, sources.max_length), sources.tally
    counts.what, counts.limit = "prompts", f"with room for {most}"
    lengths = rendered.lengths[numbers]
    counts.longest = max(counts.longest, int(lengths.max(initial=0)))
    long = lengths > most
    if not long.any():
        return numbers
    where = rendered.where(numbers[long][0])
    if stage.data.too_long == "cut":  # what stands last is what is answered
        counts.cut += int(long.sum())
        return numbers
    if stage.data.too_long == "drop":
        counts.drop("too long", where, int(long.sum()))
        return numbers[~long]
    raise UserError(
        f"{where}: a prompt of {lengths[long][0]} tokens, but there is room for "
        f"{most} (context of {sources.max_length}, "
        f"sampling.max_new_tokens={stage.sampling.max_new_tokens}, "
        f"data.prompt_length={stage.data.prompt_length}), and {long.sum()} of "
        f"{len(long)} prompts are too long; raise the limit, or leave them out by "
        "data.too_long='drop'"
    )


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
