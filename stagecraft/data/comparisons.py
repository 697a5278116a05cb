"""Pairs, rankings and judgements as padded rows: data of reward and preference stages.

Only the last turn is what was compared or judged; earlier answers are context.
"""

import functools
import itertools
import math

import numpy as np

from stagecraft.data import packing, readers
from stagecraft.data.dataset import Dataset
from stagecraft.data.stage_data import StageData, padded, split_rows
from stagecraft.data.tally import Tally
from stagecraft.errors import UserError


def pairs(stage, sources) -> StageData:
    """Returns pairs of answers, the better one first; a ranking as all its pairs."""
    train, heldout = _split("pairs", readers.comparisons, stage, sources)
    return _compared(_as_pairs(train), _as_pairs(heldout), stage, sources)


def rankings(stage, sources) -> StageData:
    """Returns answers in their order, and demonstrations to centre the rewards on."""
    train, heldout = _split("pairs", readers.comparisons, stage, sources)
    data = _compared(train, heldout, stage, sources)
    if "demonstrations" not in sources.specs:
        return data
    return data._replace(reference=_demonstrations(stage, sources))


def judgements(stage, sources) -> StageData:
    """Returns answers, each with whether it is desirable."""
    data = stage.data
    # The two answers of a pair stay on one side of the split.
    train, heldout = (
        [row._replace(record=one) for row in rows for one in row.record]
        for rows in _split("answers", readers.judgements, stage, sources)
    )
    identical = sources.tally.dropped["identical"] // 2  # pairs
    fit, fit_heldout = (_tokenised(rows, stage, sources) for rows in (train, heldout))
    if not fit and data.too_long == "drop":
        raise _too_long(f"files={data.files}: all {len(train)} answers", data.length)
    desirable = sum(row.record.label for row in fit)
    if desirable in (0, len(fit)):
        raise UserError(
            f"data.files={data.files}: every label is {bool(desirable)}; expected "
            "desirable and undesirable answers"
        )
    sources.tally.check()
    dropped = len(train) - len(fit) + 2 * identical
    report = {"answers": len(fit), "desirable": desirable, "dropped": dropped}
    report |= {"identical": identical} if identical else {}
    return padded(_judged_arrays, fit, fit_heldout, report, stage, sources)


def _split(what, read, stage, sources):
    """Returns rows to train on, and held-out rows."""
    counts = sources.tally
    counts.what, counts.limit = what, f"data.length={stage.data.length}"
    return split_rows(read, stage, sources)


def _judged_arrays(rows, length, start):
    arrays = packing.pad([row.documents[0] for row in rows], length)
    arrays["index"] = np.arange(start, start + len(rows), dtype=np.int32)
    arrays["label"] = np.array([row.record.label for row in rows], bool)
    return arrays


def _compared(train, heldout, stage, sources):
    data, identical = stage.data, sources.tally.dropped["identical"]
    fit, fit_heldout = (_tokenised(rows, stage, sources) for rows in (train, heldout))
    count, total = _pairs_in(fit), _pairs_in(train)
    if not fit and data.too_long == "drop":
        raise _too_long(f"files={data.files}: all {total} pairs", data.length)
    sources.tally.check()
    # Training and held-out rows have the same arrays, whichever of them need one.
    every = [row.record for row in fit + fit_heldout]
    optional = {"preference": 1.0, "margin": 0.0}
    arrays = functools.partial(
        _compared_arrays,
        ranked=any(len(one.answers) > 2 for one in every),
        absent={
            name: value
            for name, value in optional.items()
            if any(getattr(one, name) is not None for one in every)
        },
    )
    report = {"pairs": count, "dropped": total - count + identical}
    report |= {"identical": identical} if identical else {}
    return padded(arrays, fit, fit_heldout, report, stage, sources)


def _compared_arrays(rows, length, start, *, ranked, absent):
    """Returns the arrays of rows.

    Args:
        rows: list of Row.
        length: T.
        start: number of the first row.
        ranked: whether rows may have more than two answers, and `present` says which.
        absent: {array of numbers: its value where a record has none}.
    """
    arrays = packing.pad_answers([row.documents for row in rows], length)
    arrays["index"] = np.arange(start, start + len(rows), dtype=np.int32)
    if ranked:
        arrays["present"] = arrays["segments"].any(-1)
    for name, default in absent.items():
        values = [getattr(row.record, name) for row in rows]
        values = [default if value is None else value for value in values]
        arrays[name] = np.array(values, np.float32)
    return arrays


def _tokenised(rows, stage, sources):
    """Returns the rows with their sequences, as `data.too_long` has those too long."""
    tokenised, render, counts = [], sources.rendering(), sources.tally
    for row in rows:
        one = row.record
        answers = one.answers if hasattr(one, "answers") else (one.completion,)
        try:
            documents = tuple(
                render([*one.prompt, *a], one.tools, turns="last") for a in answers
            )
        except UserError as error:
            counts.unwritten(row.where, error, _pairs_in([row]))
            continue
        count = _pairs_in([row])
        documents = counts.fit(documents, stage.data.length, row.where, count)
        if documents:
            tokenised.append(row._replace(documents=documents))
    return tokenised


def _demonstrations(stage, sources):
    """Returns demonstrations as padded rows, their last turn under the mask."""
    spec, length = sources.specs["demonstrations"], stage.data.length
    counts = Tally(stage.data)
    counts.what, counts.limit = "demonstrations", f"data.length={length}"
    render = sources._replace(tally=counts).rendering()
    read = readers.demonstrations(spec, None, counts)
    documents = [(render(one.messages, one.tools, turns="last"),) for one in read]
    fit = [counts.fit(one, length) for one in documents]
    fit = [one[0] for one in fit if one]
    if not fit:
        raise _too_long(f"demonstrations={spec}: all {len(documents)}", length)
    counts.check()
    counts.say(f"data.demonstrations={spec}")
    needed = packing.rounded(max(len(ids) for ids, _ in fit))
    return Dataset([(packing.pad(fit, min(needed, length)), stage.batch_size)], seed=0)


def _too_long(what, length):
    line = f"data.{what} are longer than data.length={length} tokens; raise it"
    return UserError(line)


def _as_pairs(rows):
    """Returns each ranking as its pairs."""
    return [
        row._replace(record=row.record._replace(answers=pair))
        for row in rows
        for pair in itertools.combinations(row.record.answers, 2)
    ]


def _pairs_in(rows):
    """Returns how many pairs rows of comparisons hold, or answers to judge."""
    return sum(
        math.comb(len(row.record.answers), 2) if hasattr(row.record, "answers") else 1
        for row in rows
    )
