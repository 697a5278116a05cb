"""The data of a language model stage: text and demonstrations as packed rows.

Both are tokenised once and read from memory-mapped shards. Several sources may be mixed
in given shares.
"""

import hashlib
import logging
from typing import NamedTuple

import numpy as np

from stagecraft import schema
from stagecraft.data import cache as token_cache
from stagecraft.data import conversations, mixture, packing, readers
from stagecraft.data.dataset import Dataset
from stagecraft.data.documents import Stored
from stagecraft.data.stage_data import StageData, order_seed, split
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
    learned, heldout = split(documents.sources, parts, key, data, sources.seed)
    train, heldout = (_fitting(documents, n, sources) for n in (learned, heldout))
    sources.tally.check()
    weights = None
    if data.weights:
        weights = np.array([*data.weights, 1.0], np.float32)[documents.sources]
    packed = _packed(documents, train, data, weights, apart=mixture.wanted(data))
    report = _report(documents, train, packed.rows, data, weights)
    report["documents"] -= packed.dropped
    report["dropped"] = packed.dropped + len(learned) - len(train)
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
    asked = []
    if data.format == "demonstrations":
        asked = [conversations.asked(documents.record(n)) for n in heldout.tolist()]
    return StageData(dataset, evaluated, samples, asked=asked)


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


def unread(data) -> dict[str, str]:
    """Returns {key of a data config: the setting with which it changes nothing}."""
    keys = {} if data.replay else {"replay_share": "data.replay=''"}
    if not mixture.wanted(data):
        keys["share_by"] = "data.shares=() and data.curriculum=''"
    if data.format == "text":
        keys |= dict.fromkeys(("too_long", "render", "turns"), "data.format='text'")
    return keys


def stored(parts, mapping, sources, counts=None) -> Stored:
    """Returns text as memory-mapped documents, each spec a source.

    Args:
        parts: files specs.
        mapping: {"our key": "the file's key"}.
        sources: a `stage_data.Sources`.
        counts: the `Tally` of these documents, or None.
    """
    tokenizer, cache = sources.tokenizer, sources.cache
    shards = [
        token_cache.tokens(part, mapping, tokenizer, cache, counts) for part in parts
    ]
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
    counts = sources.tally
    documents = stored(specs, mapping, sources, counts)
    counts.what, counts.limit = "texts", f"in rows of data.length={data.length}"
    counts.longest = int(documents.lengths.max(initial=0))
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
    counts = sources.tally
    counts.what, counts.limit = "demonstrations", f"data.length={data.length}"
    documents = conversations.rendered(
        "demonstrations", specs, sources, turns=data.turns, mapping=mapping
    )
    # An answer that a length limit cut off has no end.
    ended = (documents.numbers("ended") > 0) & (documents.learned() > 0)
    ends = int((ended & (documents.numbers("ends") > 0)).sum())
    where = f"data.files={data.files}"
    chat.check_ends(ends, int(ended.sum()), where, required=True)

    def prompt(number):
        messages = documents.record(number).messages
        roles = [message["role"] for message in messages]
        # An assistant that begins answers nothing.
        asked = messages[: roles.index("assistant", roles.index("user"))]
        # A model of texts goes on from one.
        return asked[0]["content"] if data.render == "text" else asked

    return documents, prompt, documents.key


def _fitting(documents, numbers, sources):
    """Returns the numbers of the documents that `data.too_long` leaves, i64.

    What is cut is cut by the packing. Text goes on in the next row, unless the packing
    that was asked for loses it; its overflow is said, and dropped is none of it.
    """
    data, counts = sources.tally.data, sources.tally
    if data.format != "text":
        numbers = _with_targets(documents, numbers, counts)
    length, lengths = data.length, documents.lengths[numbers]
    whole = documents.learned()[numbers]
    cuts = _strategy(data) in ("bfd", "none")
    counts.longest = max(counts.longest, int(lengths.max(initial=0)))
    counts.targets += int(whole.sum())
    long = (lengths > length) & cuts
    if not long.any():
        return numbers
    first = documents.where(numbers[long][0])
    left = documents.learned(length)[numbers]
    if data.format == "text" or data.too_long == "cut":
        empty = long & (left == 0) & (whole > 0)
        counts.cut += int((long & ~empty).sum())
        counts.lost += int((whole - left)[long].sum())
        counts.drop("no target left once cut", first, int(empty.sum()))
        return numbers[~empty]
    if data.too_long == "refuse":
        raise UserError(
            f"{first}: {long.sum()} of {len(long)} demonstrations are "
            f"longer than data.length={length} (the longest has {lengths.max()}); "
            "raise it, or say what to do with them by data.too_long='drop' or 'cut'"
        )
    counts.drop("too long", first, int(long.sum()))
    counts.lost += int(whole[long].sum())
    return numbers[~long]


def _with_targets(documents, numbers, counts):
    """Returns the numbers of the documents of which anything is learned, i64."""
    empty = documents.learned()[numbers] == 0
    if empty.any():
        first = documents.where(numbers[empty][0])
        counts.drop("without a turn to learn", first, int(empty.sum()))
    return numbers[~empty]


def _strategy(data):
    """Returns the packing.

    Text goes on in the next row; a conversation's later part would be an answer to
    nothing, so that its end is lost, if it is not dropped.
    """
    return data.packing or ("bfd_split" if data.format == "text" else "bfd")


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
    strategy = _strategy(data)
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
