"""Token sequences of any length as rows of one length, with explicit masks.

Every row set is a dict of numpy arrays [N, T]: ids i32, mask bool (targets, unshifted),
segments i32 (documents from 1, 0 is padding) and positions i32 (from 0 per document).
"""

import bisect

import numpy as np


def pack(documents, length, *, strategy="best_fit"):
    """Puts several documents in a row.

    Args:
        documents: list of (ids, mask).
        length: T.
        strategy: "best_fit" puts each document whole into the row it fits best
            (longest first), cutting only what is longer than a row; "concatenate"
            makes one stream of all and cuts it every `length` tokens, which fills
            every row and splits documents. A later part of a cut document is a
            segment of its own with positions from 0.

    Returns:
        dict of arrays [N, T].
    """
    if strategy == "concatenate":
        rows = _concatenated(documents, length)
    else:
        rows = _best_fit(_pieces(documents, length), length)
    return _arrays(rows, length)


def pad(documents, length):
    """One document a row, its end cut at `length`."""
    rows = [[(ids[:length], mask[:length])] for ids, mask in documents]
    return _arrays(rows, length)


def pad_pairs(pairs, length):
    """Pairs of sequences, right-padded.

    Args:
        pairs: list of ((ids, mask), (ids, mask)), chosen first; none longer than T.
        length: T.

    Returns:
        dict of arrays [N, 2, T].
    """
    flat = pad([one for pair in pairs for one in pair], length)
    return {k: v.reshape(-1, 2, length) for k, v in flat.items()}


def pad_prompts(rows, length):
    """Prompts, left-padded so that all end in the last column.

    Args:
        rows: list of ids, none longer than P.
        length: P.

    Returns:
        {"prompt_ids" i32[N, P], "prompt_mask" bool[N, P]}.
    """
    ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return {"prompt_ids": ids, "prompt_mask": mask}


def _pieces(documents, length):
    for ids, mask in documents:
        for start in range(0, len(ids), length):
            yield ids[start : start + length], mask[start : start + length]


def _best_fit(pieces, length):
    """Longest first, each into the row with the least room that still holds it."""
    order = sorted(pieces, key=lambda piece: -len(piece[0]))
    rows, open_rows = [], []  # open_rows: sorted (room, row number)
    for piece in order:
        size = len(piece[0])
        at = bisect.bisect_left(open_rows, (size, -1))
        if at == len(open_rows):
            rows.append([piece])
            room, number = length - size, len(rows) - 1
        else:
            room, number = open_rows.pop(at)
            rows[number].append(piece)
            room -= size
        if room > 1:  # a single token has nothing to predict
            bisect.insort(open_rows, (room, number))
    return rows


def _concatenated(documents, length):
    rows, row, room = [], [], length
    for ids, mask in documents:
        while len(ids):
            row.append((ids[:room], mask[:room]))
            taken = len(row[-1][0])
            ids, mask, room = ids[taken:], mask[taken:], room - taken
            if room == 0:
                rows.append(row)
                row, room = [], length
    if row:
        rows.append(row)
    return rows


def _arrays(rows, length):
    shape = (len(rows), length)
    out = {k: np.zeros(shape, np.int32) for k in ("ids", "segments", "positions")}
    out["mask"] = np.zeros(shape, bool)
    for i, row in enumerate(rows):
        start = 0
        for number, (ids, mask) in enumerate(row, 1):
            end = start + len(ids)
            out["ids"][i, start:end] = ids
            out["mask"][i, start:end] = mask
            out["segments"][i, start:end] = number
            out["positions"][i, start:end] = np.arange(len(ids))
            start = end
    return out
