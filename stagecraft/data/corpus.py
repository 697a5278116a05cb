"""The data of a language model stage: text and demonstrations as packed rows.

Text is tokenised once and read from memory-mapped shards; demonstrations, of which
there are fewer, are held in memory. Several sources may be mixed in given shares.
"""

import logging

import numpy as np

from stagecraft import schema
from stagecraft.data import cache as token_cache
from stagecraft.data import mixture, packing, readers
from stagecraft.data.dataset import Dataset, hold_out, order_seed
from stagecraft.data.documents import Held, Stored
from stagecraft.errors import UserError
from stagecraft.text import chat

_log = logging.getLogger("stagecraft.data")
# Tokens of a document that its first four words are read from.
_OPENING = 64


def build(stage, specs, tokenizer, config, cache):
    """The training and held-out rows of a stage, and prompts to watch it on."""
    data = stage.data
    check(data)
    parts = mixture.split(specs["files"])
    if not (data.weights or mixture.wanted(data)):
        parts = [specs["files"]]
    count = len(parts)
    if "heldout" in specs:  # one source more, of which nothing is learned
        parts = [*parts, specs["heldout"]]
    documents, opening = _read(parts, data, tokenizer, cache)
    own = np.flatnonzero(documents.sources < count)
    kept, held = hold_out(own, data.heldout_share, config.seed)
    held = np.concatenate([held, np.flatnonzero(documents.sources >= count)])
    kept, held = np.array(kept, np.int64), held.astype(np.int64)
    weights = None
    if data.weights:
        weights = np.array([*data.weights, 1.0], np.float32)[documents.sources]
    rows, members, dropped = _packed(documents, kept, data, weights)
    report = _report(documents, kept, rows, data, weights)
    report["dropped"] = dropped
    size, first = stage.batch_size, rows
    if isinstance(documents, Held):  # few enough to be put together once
        first = rows.take(np.arange(len(rows)))
    others = []
    if "replay" in specs:
        replayed = _replayed(stage)
        size -= replayed
        stored_ = stored([specs["replay"]], {}, tokenizer, cache)
        ones = np.ones(len(stored_.lengths), np.float32) if data.weights else None
        replay = text_rows(stored_, rows.length, weights=ones)
        others = [(replay, replayed)]
    seed, mixed = order_seed(stage, config), None
    if mixture.wanted(data):
        members = members[: len(mixture.split(data.files))]
        held_by_row = _per_row(documents, rows, members)
        mixed, told = mixture.make(data, members, held_by_row, stage.steps, size, seed)
        report |= told
    dataset = Dataset(
        [(first, size), *others],
        seed=seed,
        mixture=mixed,
        workers=data.workers,
        buckets=data.buckets,
        report=report,
    )
    heldout = None
    if len(held):
        # Weights are for learning: what is held out counts as it comes.
        found, _, _ = _packed(documents, held, data, None, apart=False)
        if isinstance(documents, Held):
            found = found.take(np.arange(len(found)))
        heldout = Dataset([(found, stage.batch_size)], seed=config.seed)
    samples = [opening(number) for number in kept[:4].tolist()]
    return dict(dataset=dataset, heldout=heldout, samples=samples)


def check(data):
    """Refuses settings of a language model's data that cannot be meant."""
    schema.choice("data.format", data.format, ("text", "demonstrations"))
    schema.choice("data.packing", data.packing, ("", *packing.STRATEGIES, "none"))
    schema.choice("data.turns", data.turns, chat.TURNS)
    schema.positive("data.workers", data.workers, zero=True)
    if data.weights:
        count = len(mixture.split(data.files))
        mixture.check_shares("data.weights", data.weights, count)
    mixture.check(data)


def rendered(messages, tokenizer, tools, **settings):
    """Ids and mask of a conversation; only templates that know tools are given any."""
    if tools:
        settings["tools"] = tools
    return chat.render(messages, tokenizer, **settings)


def stored(parts, mapping, tokenizer, cache):
    """Text as memory-mapped documents, each spec a source."""
    found = [token_cache.tokens(part, mapping, tokenizer, cache) for part in parts]
    return Stored(found, tokenizer.bos)


def text_rows(documents, length, *, weights=None, prefix=""):
    """All of some text as packed rows."""
    made = packing.plan(documents.lengths, length)
    return packing.Rows(documents, made, length, weights=weights, prefix=prefix)


def _read(parts, data, tokenizer, cache):
    """The documents of each part, and (number) -> what to watch the model on."""
    mapping = readers.fields(data.fields)
    if data.format == "text":
        documents = stored(parts, mapping, tokenizer, cache)
        without = {tokenizer.bos, tokenizer.eos}

        def words(number):
            ids, _ = documents.piece(number, 0, _OPENING)
            text = tokenizer.decode([i for i in ids.tolist() if i not in without])
            return " ".join(text.split()[:4])

        return documents, words

    read = [readers.demonstrations(part, mapping) for part in parts]
    documents = Held(
        [
            [
                rendered(one.messages, tokenizer, one.tools, turns=data.turns)
                for one in part
            ]
            for part in read
        ]
    )
    every = [one.messages for part in read for one in part]

    def question(number):
        messages = every[number]
        last = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        return messages[:last]

    return documents, question


def _packed(documents, numbers, data, weights, *, apart=None):
    """Rows of some documents, the rows of each source, and how many were dropped.

    Args:
        documents: all of them.
        numbers: i64[n], those to pack.
        data: the stage's data config.
        weights: f32 of each document, or None.
        apart: whether each source has rows of its own; None where they are mixed.
    """
    apart = mixture.wanted(data) if apart is None else apart
    # Text goes on in the next row; a conversation's later part would be an answer to
    # nothing, but its start is worth learning: unless asked otherwise, its end is cut.
    strategy = data.packing or ("bfd_split" if data.format == "text" else "bfd")
    cut = data.format != "text" and strategy in ("bfd", "none")
    learned = documents.learned(data.length if cut else None)
    use = numbers[learned[numbers] > 0]
    lengths, length = documents.lengths, data.length
    if strategy == "none":
        length = min(packing.rounded(int(lengths[use].max(initial=1))), length)
    groups = [use]
    if apart:
        groups = [
            use[documents.sources[use] == source]
            for source in range(int(documents.sources.max()) + 1)
        ]
    plans, members, before, pieces = [], [], 0, 0
    for group in groups:
        made = packing.plan(lengths[group], length, strategy)
        rows = len(made.ends) - 1
        members.append(np.arange(before, before + rows))
        made = made._replace(documents=group[made.documents], ends=made.ends + pieces)
        plans.append(made)
        before, pieces = before + rows, pieces + len(made.documents)
    joined = packing.Plan(
        *(
            np.concatenate([getattr(p, name) for p in plans])
            for name in plans[0]._fields[:3]
        ),
        np.concatenate([plans[0].ends, *(p.ends[1:] for p in plans[1:])]),
    )
    rows = packing.Rows(documents, joined, length, weights=weights)
    return rows, members, len(numbers) - len(use)


def _report(documents, kept, rows, data, weights):
    """What is told about the rows; refuses those without a target."""
    made = rows.plan
    real = rows.tokens
    if isinstance(documents, Held):
        masks = (
            documents.piece(n, start, start + size)[1]
            for n, start, size in zip(*(a.tolist() for a in made[:3]), strict=True)
        )
        targets = np.array([sum(mask) for mask in masks], np.int64)
    else:
        unlearned = documents.lengths - documents.learned()
        targets = made.sizes - unlearned[made.documents] * (made.starts == 0)
    if weights is not None:
        targets = targets[weights[made.documents] > 0]
    if not targets.any():
        raise UserError(
            f"data.files={data.files}: no token is left to learn from in rows of "
            f"length={data.length} (mask all zeros); are the answers empty, or the "
            "prompts longer than data.length?"
        )
    lengths = documents.lengths[kept]
    asked = int((lengths - documents.learned()[kept]).sum())
    if data.format != "text" and asked <= 3 * len(kept):
        # Nothing but bos and the two turn pieces is given: there are no prompts.
        _log.warning("data.files=%s: every token is supervised", data.files)
    found = {
        "documents": len(kept),
        "tokens": int(lengths.sum()),
        "supervised_share": float(targets.sum() / real),
        "fill": real / (len(rows) * rows.length),
    }
    if isinstance(documents, Stored) and documents.curations:
        found["curations"] = documents.curations
    return found


def _replayed(stage):
    """Rows of a batch that are replay."""
    count = round(stage.batch_size * stage.data.replay_share)
    if not 0 < count < stage.batch_size:
        raise UserError(
            f"data.replay_share={stage.data.replay_share}: that is {count} of the "
            f"{stage.batch_size} rows of a batch; expected some and not all"
        )
    return count


def _per_row(documents, rows, members):
    """{"tokens", "examples"}: what a row of each source holds, f64[S]."""
    made = rows.plan
    # A document cut into pieces is an example that lies in several rows.
    part = made.sizes / documents.lengths[made.documents]
    sums = {"tokens": made.sizes, "examples": part}
    counts = np.array([max(len(member), 1) for member in members])
    at = documents.sources[made.documents]
    return {
        name: np.bincount(at, values, minlength=len(members))[: len(members)] / counts
        for name, values in sums.items()
    }
