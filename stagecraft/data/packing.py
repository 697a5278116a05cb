"""Token sequences of any length as rows of one length, with explicit masks.

Every row set is a dict of numpy arrays [N, T]: ids i32, mask bool (targets, unshifted),
segments i32 (documents from 1, 0 is padding) and positions i32 (from 0 per document).
Documents that carry a weight give one array more: weight f32.
"""

import bisect
import collections
import itertools

import numpy as np

# Ways to put several documents in a row, by TRL's names.
STRATEGIES = ("bfd", "bfd_split", "wrapped")


def pack(documents, length, *, strategy="bfd_split"):
    """Puts several documents in a row.

    Best fit decreasing (Ding et al. 2024, arxiv.org/abs/2404.10830, section 3.2) takes
    the longest document first and puts it into the row with the least room that still
    holds it, among equals the one that has waited longest.

    Args:
        documents: list of (ids, mask), or of (ids, mask, weight), a number each.
        length: T.
        strategy: "bfd" is best fit decreasing of documents cut at `length`, their
            overflow lost; "bfd_split" makes documents of their own of the overflow;
            "wrapped" makes one stream of all and cuts it every `length` tokens, which
            fills every row and splits documents. A later part of a split document is a
            segment of its own with positions from 0, so its first token, having
            nothing before it, is no target; the mask itself stays as it was given.

    Returns:
        dict of arrays [N, T].

    >>> pack([([5, 6, 7], [0, 1, 1]), ([8], [1])], 2, strategy="bfd")["ids"].tolist()
    [[5, 6], [8, 0]]
    >>> pack([([5, 6, 7], [0, 1, 1]), ([8], [1])], 2)["ids"].tolist()
    [[5, 6], [7, 8]]
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: expected one of {STRATEGIES}")
    if strategy == "wrapped":
        rows = _wrapped(documents, length)
    else:
        cut = _pieces if strategy == "bfd_split" else _starts
        rows = _best_fit(cut(documents, length), length)
    return _arrays(rows, length, weighted=any(len(d) > 2 for d in documents))


def pad(documents, length):
    """One document a row, its end cut at `length`."""
    rows = [[_slice(document, 0, length)] for document in documents]
    return _arrays(rows, length, weighted=any(len(d) > 2 for d in documents))


def pad_answers(rows, length):
    """The answers to one prompt as one row: sequences beside each other, right-padded.

    Args:
        rows: list of tuples of (ids, mask), best first; none longer than T. K is the
            longest tuple's length; shorter ones are filled up with empty sequences.
        length: T.

    Returns:
        dict of arrays [N, K, T].
    """
    most = max((len(row) for row in rows), default=2)
    flat = pad(
        [d for row in rows for d in [*row, *[([], [])] * (most - len(row))]], length
    )
    return {k: v.reshape(-1, most, length) for k, v in flat.items()}


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


def _slice(document, start, stop):
    ids, mask, *rest = document
    return ids[start:stop], mask[start:stop], *rest


def _starts(documents, length):
    return [_slice(d, 0, length) for d in documents if len(d[0])]


def _pieces(documents, length):
    return [
        _slice(document, start, start + length)
        for document in documents
        for start in range(0, len(document[0]), length)
    ]


def _best_fit(pieces, length):
    """Longest first, each into the row with the least room that still holds it."""
    order = sorted(pieces, key=lambda piece: -len(piece[0]))
    rows = []
    # There are at most T different rooms, however many rows: each piece costs log T.
    by_room = collections.defaultdict(collections.deque)  # room: row numbers, in turn
    rooms = []  # the keys of by_room, sorted
    for piece in order:
        size = len(piece[0])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            rows.append([piece])
            room, number = length - size, len(rows) - 1
        else:
            room = rooms[at]
            number = by_room[room].popleft()
            if not by_room[room]:
                del by_room[room], rooms[at]
            rows[number].append(piece)
            room -= size
        if room:
            if room not in by_room:
                bisect.insort(rooms, room)
            by_room[room].append(number)
    return rows


def _wrapped(documents, length):
    rows, row, room = [], [], length
    for document in documents:
        start = 0
        while start < len(document[0]):
            row.append(_slice(document, start, start + room))
            taken = len(row[-1][0])
            start, room = start + taken, room - taken
            if room == 0:
                rows.append(row)
                row, room = [], length
    if row:
        rows.append(row)
    return rows


def _arrays(rows, length, *, weighted=False):
    pieces = [piece for row in rows for piece in row]
    sizes = np.array([len(piece[0]) for piece in pieces], np.int64)
    counts = np.array([len(row) for row in rows], np.int64)  # pieces in each row
    numbers = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    used = np.array([sum(len(p[0]) for p in row) for row in rows], np.int64)
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
    if weighted:
        out["weight"] = np.zeros(real.shape, np.float32)
        out["weight"][real] = np.repeat([piece[2] for piece in pieces], sizes)
    return out
