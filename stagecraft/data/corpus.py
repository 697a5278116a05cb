"""The data of a language model stage: text and demonstrations as packed rows.

Text is tokenised once and read from memory-mapped shards; demonstrations, of which
there are fewer, are held in memory. Several sources may be mixed in given shares.
"""

import hashlib
import logging
from typing import NamedTuple

import numpy as np

from stagecraft import schema
from stagecraft.data import cache as token_cache
from stagecraft.data import mixture, packing, readers, stage_data
from stagecraft.data.dataset import Dataset, hold_out
from stagecraft.data.documents import InMemory, Stored
from stagecraft.data.stage_data import StageData, order_seed
from stagecraft.errors import UserError
from stagecraft.text import chat

_log = logging.getLogger("stagecraft.data")
# Tokens of a document that its first four words are read from.
_OPENING = 64


def build(stage, sources) -> StageData:
    """Returns the training and held-out rows, and prompts to watch the model on."""
    data = stage.data
    check(data)
    documents, prompt, key, parts = _documents(data, sources)
    train, heldout = _split(documents, key, parts, data, sources.seed)
    weights = None
    if data.weights:
        weights = np.array([*data.weights, 1.0], np.float32)[documents.sources]
    packed = _packed(documents, train, data, weights, apart=mixture.wanted(data))
    report = _report(documents, train, packed.rows, data, weights)
    report["dropped"] = packed.dropped
    replay = _replay(stage, sources, packed.rows.length)
    size = stage.batch_size - sum(count for _, count in replay)
    seed, mixed = order_seed(stage, sources), None
    if mixture.wanted(data):
        members = packed.members[:parts]
        held = _held_by_row(documents, packed.rows, members)
        mixed, shares = mixture.make(data, members, held, stage.steps, size, seed)
        report |= shares
    dataset = Dataset(
        [(documents.rows(packed.rows), size), *replay],
        seed=seed,
        mixture=mixed,
        workers=data.workers,
        buckets=data.buckets,
        report=report,
    )
    samples = [prompt(number) for number in train[:4].tolist()]
    if not len(heldout):
        return StageData(dataset, samples=samples)
    # Weights are for training alone: held-out rows all count the same.
    rows = documents.rows(_packed(documents, heldout, data, None).rows)
    evaluated = Dataset([(rows, stage.batch_size)], seed=sources.seed)
    return StageData(dataset, evaluated, samples)


def check(data):
    """Refuses settings of a language model's data that cannot be meant."""
    schema.choice("data.format", data.format, ("text", "demonstrations"))
    schema.choice("data.packing", data.packing, ("", *packing.STRATEGIES, "none"))
    schema.choice("data.turns", data.turns, chat.TURNS)
    schema.positive("data.workers", data.workers, zero=True)
    if data.weights:
        count = len(schema.listed(data.files))
        mixture.check_shares("data.weights", data.weights, count)
    mixture.check(data)


def rendered(messages, tokenizer, tools, **settings):
    """Returns ids and mask of a conversation; templates without tools get none."""
    if tools:
        settings["tools"] = tools
    return chat.render(messages, tokenizer, **settings)


def stored(parts, mapping, sources) -> Stored:
    """Returns text as memory-mapped documents, each spec a source."""
    tokenizer, cache = sources.tokenizer, sources.cache
    shards = [token_cache.tokens(part, mapping, tokenizer, cache) for part in parts]
    return Stored(shards, tokenizer.bos)


def text_rows(documents, length, *, weights=None, prefix="") -> packing.Rows:
    """Packs all of some text."""
    plan = packing.plan(documents.lengths, length)
    return packing.Rows(documents, plan, length, weights=weights, prefix=prefix)


def _documents(data, sources):
    """Returns the documents, and how many of their sources are learned.

    Between the two: (number) -> prompt to watch the model on, and (number) -> what
    documents that are held out together have in common. Parts of data.files are sources
    of their own where they are weighed or mixed; the held-out files are one source
    more.
    """
    parts = schema.listed(sources.specs["files"])
    if not (data.weights or mixture.wanted(data)):
        parts = [sources.specs["files"]]
    specs = [*parts, *filter(None, [sources.specs.get("heldout")])]
    read = {"text": _text, "demonstrations": _demonstrations}[data.format]
    return *read(specs, readers.fields(data.fields), data, sources), len(parts)


def _text(specs, mapping, data, sources):
    """Returns stored documents, each watched on its first four words.

    Equal documents are held out together.
    """
    tokenizer = sources.tokenizer
    documents = stored(specs, mapping, sources)
    without = {tokenizer.bos, tokenizer.eos}

    def prompt(number):
        ids, _ = documents.piece(number, 0, _OPENING)
        text = tokenizer.decode([i for i in ids.tolist() if i not in without])
        return " ".join(text.split()[:4])

    def key(number):
        ids, _ = documents.piece(number, 0, int(documents.lengths[number]))
        return hashlib.blake2b(np.asarray(ids).tobytes(), digest_size=16).digest()

    return documents, prompt, key


def _demonstrations(specs, mapping, data, sources):
    """Returns conversations, each watched on its messages before the first answer.

    Those that are alike before the last answer are held out together.
    """
    parts = [readers.demonstrations(spec, mapping) for spec in specs]

    def ids_and_mask(one):
        return rendered(one.messages, sources.tokenizer, one.tools, turns=data.turns)

    documents = InMemory([[ids_and_mask(one) for one in part] for part in parts])
    conversations = [one.messages for part in parts for one in part]
    both = zip(documents.documents, conversations, strict=True)
    # An answer that a length limit cut off has no end.
    ended = [one for one, turns in both if turns[-1].get("ended", True)]
    where = f"data.files={data.files}"
    chat.check_ends(ended, sources.tokenizer, where, required=True)

    def prompt(number):
        messages = conversations[number]
        answer = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        return messages[:answer]

    def key(number):
        messages = conversations[number]
        roles = [message["role"] for message in messages]
        last = len(roles) - 1 - roles[::-1].index("assistant")
        return stage_data.prompt_key(messages[:last])

    return documents, prompt, key


def _split(documents, key, parts, data, seed):
    """Returns the numbers of the documents to train on and of those held out, i64."""
    learned = np.flatnonzero(documents.sources < parts)
    train, heldout = hold_out(learned, data.heldout_share, seed, key)
    others = np.flatnonzero(documents.sources >= parts)
    heldout = np.concatenate([heldout, others]).astype(np.int64)
    return np.array(train, np.int64), heldout


class _Packed(NamedTuple):
    """Documents as rows.

    Attributes:
        rows: the `packing.Rows`.
        members: the numbers of each source's rows, i64[S][rows]; all in one where
            sources share rows.
        dropped: documents without a target.
    """

    rows: packing.Rows
    members: list
    dropped: int


def _packed(documents, numbers, data, weights, *, apart=False) -> _Packed:
    """Packs some documents.

    Args:
        documents: all of them.
        numbers: i64[n], those to pack.
        data: the stage's data config.
        weights: f32 of each document, or None.
        apart: whether each source has rows of its own.
    """
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
        count = int(documents.sources.max()) + 1
        groups = [use[documents.sources[use] == source] for source in range(count)]
    plans, members, row = [], [], 0
    for group in groups:
        plan = packing.plan(lengths[group], length, strategy)
        members.append(np.arange(row, row + len(plan.ends) - 1))
        row += len(plan.ends) - 1
        plans.append(plan._replace(documents=group[plan.documents]))
    rows = packing.Rows(documents, packing.joined(plans), length, weights=weights)
    return _Packed(rows, members, len(numbers) - len(use))


def _report(documents, train, rows, data, weights):
    """Returns figures about the rows; refuses those without a target."""
    plan = rows.plan
    targets = documents.targets(plan)
    if weights is not None:
        targets = targets[weights[plan.documents] > 0]
    if not targets.any():
        raise UserError(
            f"data.files={data.files}: no token is left to learn from in rows of "
            f"length={data.length} (mask all zeros); are the answers empty, or the "
            "prompts longer than data.length?"
        )
    lengths = documents.lengths[train]
    given = int((lengths - documents.learned()[train]).sum())
    if data.format != "text" and given <= 3 * len(train):
        # Nothing but bos and the two turn pieces is given: there are no prompts.
        _log.warning("data.files=%s: every token is supervised", data.files)
    report = {
        "documents": len(train),
        "tokens": int(lengths.sum()),
        "supervised_share": float(targets.sum() / rows.tokens),
        "fill": rows.tokens / (len(rows) * rows.length),
    }
    return report | ({"curations": c} if (c := documents.curations) else {})


def _replay(stage, sources, length):
    """Returns [(rows of text, how many in a batch)]; [] where none are replayed."""
    if "replay" not in sources.specs:
        return []
    count = round(stage.batch_size * stage.data.replay_share)
    if not 0 < count < stage.batch_size:
        raise UserError(
            f"data.replay_share={stage.data.replay_share}: that is {count} of the "
            f"{stage.batch_size} rows of a batch; expected some and not all"
        )
    documents = stored([sources.specs["replay"]], {}, sources)
    ones = np.ones(len(documents.lengths), np.float32) if stage.data.weights else None
    return [(text_rows(documents, length, weights=ones), count)]


def _held_by_row(documents, rows, members):
    """Returns {"tokens", "examples"}: what a row of each source holds, f64[S]."""
    plan = rows.plan
    # A document cut into pieces is an example that lies in several rows.
    part = plan.sizes / documents.lengths[plan.documents]
    sums = {"tokens": plan.sizes, "examples": part}
    counts = np.array([max(len(member), 1) for member in members])
    at = documents.sources[plan.documents]
    return {
        name: np.bincount(at, values, minlength=len(members))[: len(members)] / counts
        for name, values in sums.items()
    }
