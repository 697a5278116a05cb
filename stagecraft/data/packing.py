"""Token sequences of any length as rows of one length, with explicit masks.

Every row set is a dict of numpy arrays [N, T]: ids i32, mask bool (targets, unshifted),
segments i32 (documents from 1, 0 is padding) and positions i32 (from 0 per document).
"""

import bisect
import heapq
import itertools

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
            segment of its own with positions from 0, so its first token, having
            nothing before it, is no target; the mask itself stays as it was given.

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
        if 0 < len(ids) <= length:
            yield ids, mask
            continue
        for start in range(0, len(ids), length):
            yield ids[start : start + length], mask[start : start + length]


def _best_fit(pieces, length):
    """Longest first, each into the row with the least room that still holds it."""
    order = sorted(pieces, key=lambda piece: -len(piece[0]))
    rows = []
    # There are at most T different rooms, however many rows: each piece costs log T.
    by_room = {}  # room: heap of row numbers
    rooms = []  # the keys of by_room, sorted
    for piece in order:
        size = len(piece[0])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            rows.append([piece])
            room, number = length - size, len(rows) - 1
        else:
            room = rooms[at]
            number = heapq.heappop(by_room[room])
            if not by_room[room]:
                del by_room[room], rooms[at]
            rows[number].append(piece)
            room -= size
        if room > 1:  # a single token has nothing to predict
            if room not in by_room:
                by_room[room] = []
                bisect.insort(rooms, room)
            heapq.heappush(by_room[room], number)
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
    pieces = [piece for row in rows for piece in row]
    sizes = np.array([len(ids) for ids, _ in pieces], np.int64)
    counts = np.array([len(row) for row in rows], np.int64)  # pieces in each row
    numbers = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    used = np.array([sum(len(ids) for ids, _ in row) for row in rows], np.int64)
    # Rows are filled from the left, so that their real places, read row by row, are
    # the stream of all pieces.
    real = np.arange(length) < used[:, None]
    stream = np.arange(sizes.sum())
    out = {name: np.zeros(real.shape, np.int32) for name in ("segments", "positions")}
    out["segments"][real] = np.repeat(numbers + 1, sizes)
    out["positions"][real] = stream - np.repeat(np.cumsum(sizes) - sizes, sizes)
    for name, kind, part in (("ids", np.int32, 0), ("mask", np.bool_, 1)):
        values = itertools.chain.from_iterable(piece[part] for piece in pieces)
        out[name] = np.zeros(real.shape, kind)
        out[name][real] = np.fromiter(values, kind, stream.size)
    return out
