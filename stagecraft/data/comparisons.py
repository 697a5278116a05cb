"""Pairs, rankings and judgements as padded rows: data of reward and preference stages.

Only the last turn is what was compared or judged; earlier answers are context.
"""

import functools
import itertools

import numpy as np

from stagecraft.data import conversations, packing
from stagecraft.data.answers import AnswerRows, Answers
from stagecraft.data.dataset import Dataset
from stagecraft.data.documents import in_memory
from stagecraft.data.stage_data import StageData, mixed_rows, order_seed, records, split
from stagecraft.data.tally import Tally
from stagecraft.errors import UserError
from stagecraft.text import chat


def pairs(stage, sources) -> StageData:
    """Returns pairs of answers, the better one first; a ranking as all its pairs."""
    rendered, *splits = _split("pairs", "comparisons", stage, sources)
    splits = [_as_pairs(rendered, numbers) for numbers in splits]
    return _compared(rendered, *splits, stage, sources)


def rankings(stage, sources) -> StageData:
    """Returns answers in their order, and demonstrations to centre the rewards on."""
    rendered, *splits = _split("pairs", "comparisons", stage, sources)
    splits = [Answers.of(rendered, numbers) for numbers in splits]
    data = _compared(rendered, *splits, stage, sources)
    if "demonstrations" not in sources.specs:
        return data
    return data._replace(reference=_demonstrations(stage, sources))


def judgements(stage, sources) -> StageData:
    """Returns answers, each with whether it is desirable."""
    data, counts = stage.data, sources.tally
    rendered, *splits = _split("answers", "judgements", stage, sources)
    identical = counts.dropped["identical"] // 2  # pairs
    train, heldout = (Answers.of(rendered, numbers) for numbers in splits)
    fit, fit_heldout = (
        rows.fitting(rendered, counts, data.length) for rows in (train, heldout)
    )
    if not fit.pairs and data.too_long == "drop":
        raise _too_long(f"files={data.files}: all {train.pairs} answers", data.length)
    labels = rendered.numbers("label")[rendered.firsts] > 0
    desirable = int(labels[fit.records].sum())
    if desirable in (0, fit.pairs):
        raise UserError(
            f"data.files={data.files}: every label is {bool(desirable)}; expected "
            "desirable and undesirable answers"
        )
    counts.check()
    dropped = train.pairs - fit.pairs + 2 * identical
    report = {"answers": fit.pairs, "desirable": desirable, "dropped": dropped}
    report |= {"identical": identical} if identical else {}

    def beside(rows):
        return {"label": labels[rows.records]}

    rows = functools.partial(AnswerRows, single=True)
    return _padded(rendered, rows, fit, fit_heldout, beside, report, stage, sources)


def _split(what, use, stage, sources):
    """Returns the records, and the numbers of those to train on and held out."""
    counts, data = sources.tally, stage.data
    counts.what, counts.limit = what, f"data.length={data.length}"
    rendered, parts = records(use, sources)
    own = rendered.sources[rendered.firsts]
    return rendered, *split(own, parts, rendered.key, data, sources.seed)


def _compared(rendered, train, heldout, stage, sources):
    data, identical = stage.data, sources.tally.dropped["identical"]
    fit, fit_heldout = (
        rows.fitting(rendered, sources.tally, data.length) for rows in (train, heldout)
    )
    count, total = fit.pairs, train.pairs
    if not count and data.too_long == "drop":
        raise _too_long(f"files={data.files}: all {total} pairs", data.length)
    sources.tally.check()
    # Training and held-out rows have the same arrays, whichever of them need one.
    every = np.concatenate([fit.records, fit_heldout.records])
    ranked = max(rows.sequences.shape[1] for rows in (fit, fit_heldout)) > 2
    numbers = {}
    for name, default in (("preference", 1.0), ("margin", 0.0)):
        values = rendered.numbers(name)[rendered.firsts]
        if not np.isnan(values[every]).all():
            values = np.where(np.isnan(values), default, values)
            numbers[name] = values.astype(np.float32)

    def beside(rows):
        lengths = rendered.lengths[rows.sequences]
        present = {"present": rows.present & (lengths > 0)} if ranked else {}
        return present | {k: values[rows.records] for k, values in numbers.items()}

    report = {"pairs": count, "dropped": total - count + identical}
    report |= {"identical": identical} if identical else {}
    return _padded(
        rendered, AnswerRows, fit, fit_heldout, beside, report, stage, sources
    )


def _padded(rendered, rows, train, heldout, beside, report, stage, sources):
    """Makes datasets of padded rows, as long as the longest row needs.

    Args:
        rendered: a `Rendered`.
        rows: `AnswerRows`.
        train, heldout: `Answers`.
        beside: (Answers) -> {name: array [N, ...]}.
        report: {name: number} about the rows.
        stage: its config.
        sources: a Sources.
    """
    _check_ends(rendered, train, stage.data, sources)
    length = min(_needed(rendered, train), stage.data.length)
    seed = order_seed(stage, sources)
    own = rendered.sources[rendered.firsts]
    mixed, shares = mixed_rows(stage, own[train.records], stage.batch_size, seed)

    def numbered(answers, length, start):
        count = len(answers.records)
        index = {"index": np.arange(start, start + count, dtype=np.int32)}
        return in_memory(rows(rendered, answers, length, index | beside(answers)))

    dataset = Dataset(
        [(numbered(train, length, 0), stage.batch_size)],
        seed=seed,
        mixture=mixed,
        buckets=stage.data.buckets,
        workers=stage.data.workers,
        report=report | shares,
    )
    if not len(heldout.records):
        return StageData(dataset)
    length = min(max(length, _needed(rendered, heldout)), stage.data.length)
    # Numbered on from the others, so that an index means one row.
    arrays = numbered(heldout, length, len(train.records))
    evaluated = Dataset([(arrays, stage.batch_size)], seed=sources.seed)
    asked = (rendered.record(number) for number in heldout.records.tolist())
    asked = [{"prompt": one.prompt} for one in asked if not one.tools]
    return StageData(dataset, evaluated, asked=asked)


def _needed(rendered, answers):
    """Returns the length that rows need."""
    sequences = answers.sequences[answers.present]
    return packing.rounded(int(rendered.lengths[sequences].max(initial=0)))


def _check_ends(rendered, answers, data, sources):
    """Says where no answer, as far as it is read, has an end of turn to learn."""
    sequences = answers.sequences[answers.present]
    ends, learned = rendered.numbers("ends") > 0, rendered.learned() > 0
    for number in sequences[rendered.lengths[sequences] > data.length].tolist():
        ids, mask = (part.tolist() for part in rendered.piece(number, 0, data.length))
        ends[number] = chat.ends(ids, mask, sources.tokenizer)
    total = int(learned[sequences].sum())
    where = f"data.files={data.files}"
    chat.check_ends(int(ends[sequences].sum()), total, where, required=False)


def _demonstrations(stage, sources):
    """Returns demonstrations as padded rows, their last turn under the mask."""
    spec, length = sources.specs["demonstrations"], stage.data.length
    counts = Tally(stage.data)
    counts.what, counts.limit = "demonstrations", f"data.length={length}"
    sources = sources._replace(tally=counts)
    rendered = conversations.rendered("demonstrations", [spec], sources)
    every = Answers.of(rendered, np.arange(len(rendered)))
    fit = every.fitting(rendered, counts, length)
    if not len(fit.records):
        raise _too_long(f"demonstrations={spec}: all {len(rendered)}", length)
    counts.check()
    counts.say(f"data.demonstrations={spec}")
    needed = min(_needed(rendered, fit), length)
    rows = in_memory(AnswerRows(rendered, fit, needed, {}, single=True))
    return Dataset([(rows, stage.batch_size)], seed=0)


def _too_long(what, length):
    line = f"data.{what} are longer than data.length={length} tokens; raise it"
    return UserError(line)


def _as_pairs(rendered, numbers):
    """Returns each ranking as its pairs."""
    own, sequences = [], []
    firsts, counts = rendered.firsts[numbers], rendered.counts[numbers]
    for number, first, count in zip(numbers, firsts, counts, strict=True):
        every = list(itertools.combinations(range(first, first + count), 2))
        own += [number] * len(every)
        sequences += every
    return Answers(
        np.array(own, np.int64), np.array(sequences, np.int64).reshape(-1, 2)
    )
