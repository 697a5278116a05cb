"""Token sequences of any length as rows of one length, with explicit masks.

Every row set is a dict of numpy arrays [N, T]: ids i32, mask bool (targets, unshifted),
segments i32 (documents from 1, 0 is padding) and positions i32 (from 0 per document).
Documents that carry a weight give one array more: weight f32.
"""

import bisect
import collections
import hashlib
import itertools
from typing import NamedTuple

import numpy as np

# Ways to put several documents in a row, by TRL's names.
STRATEGIES = ("bfd", "bfd_split", "wrapped")
# Rows are cut to a multiple of this when data.buckets does not say otherwise.
ROUND = 8


class Plan(NamedTuple):
    """Which piece of which document goes where, known from lengths alone.

    Attributes:
        documents: i64[P], the document a piece is of, row by row.
        starts: i64[P], the place in it where the piece begins.
        sizes: i64[P], its tokens.
        ends: i64[N + 1], where in the pieces each row begins; the last is P.
    """

    documents: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray

    def rows(self, index):
        """Returns (documents, starts, sizes, pieces in each row) of some rows."""
        first, last = self.ends[index], self.ends[np.asarray(index) + 1]
        at = np.concatenate(
            [np.arange(a, b) for a, b in zip(first, last, strict=True)]
            or [np.zeros(0, np.int64)]
        )
        parts = (self.documents[at], self.starts[at], self.sizes[at])
        return *parts, last - first


def plan(lengths, length, strategy="bfd_split"):
    """Returns the rows of documents of these lengths.

    Best fit decreasing (Ding et al. 2024, arxiv.org/abs/2404.10830, section 3.2) takes
    the longest document first and puts it into the row with the least room that still
    holds it, among equals the one that has waited longest.

    Args:
        lengths: tokens of each document.
        length: T.
        strategy: "bfd" is best fit decreasing of documents cut at `length`, their
            overflow lost; "bfd_split" makes documents of their own of the overflow;
            "wrapped" makes one stream of all and cuts it every `length` tokens, which
            fills every row and splits documents. A later part of a split document is a
            segment of its own with positions from 0, so its first token, having
            nothing before it, is no target; the mask itself stays as it was given.
            "none" is one document a row, cut at T.

    >>> plan([3, 1], 2, "bfd").sizes.tolist(), plan([3, 1], 2).sizes.tolist()
    ([2, 1], [2, 1, 1])
    """
    if strategy not in (*STRATEGIES, "none"):
        raise ValueError(f"strategy={strategy!r}: expected one of {STRATEGIES}")
    lengths = np.asarray(lengths, np.int64)
    if strategy == "wrapped":
        return _wrapped(lengths, length)
    if strategy == "bfd_split":
        pieces = -(-lengths // length)  # of each document
        documents = np.repeat(np.arange(len(lengths)), pieces)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = (np.arange(len(documents)) - first) * length
    else:
        documents = np.flatnonzero((lengths > 0) | (strategy == "none"))
        starts = np.zeros(len(documents), np.int64)
    sizes = np.minimum(lengths[documents] - starts, length)
    if strategy == "none":
        return Plan(documents, starts, sizes, np.arange(len(documents) + 1))
    rows = _best_fit(sizes, length)
    order = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(documents))
    ends = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return Plan(documents[order], starts[order], sizes[order], ends)


def joined(plans) -> Plan:
    """Returns one plan of several over the same documents, row after row."""
    parts = [np.concatenate(arrays) for arrays in zip(*plans, strict=True)]
    before = np.cumsum([0] + [len(one.documents) for one in plans])
    ends = [one.ends[1:] + n for one, n in zip(plans, before[:-1], strict=True)]
    return Plan(*parts[:3], np.concatenate([[0], *ends]))


class Rows:
    """Packed rows that are put together when they are asked for.

    Args:
        documents: has `piece(number, start, stop) -> (ids, mask)`, arrays.
        plan: a `Plan` over them.
        length: T.
        weights: f32[documents] of their losses, or None.
        prefix: of the arrays' names.

    Attributes:
        apart: a row is the same whichever others are read with it.
    """

    apart = True

    def __init__(self, documents, plan, length, *, weights=None, prefix=""):
        self.documents, self.plan, self.length = documents, plan, length
        self.weights, self.prefix = weights, prefix

    def __len__(self):
        return len(self.plan.ends) - 1

    @property
    def tokens(self):
        return int(self.plan.sizes.sum())

    @property
    def places(self):
        """Returns how many tokens the rows have room for."""
        return len(self) * self.length

    def take(self, index):
        """Returns {name: array [n, T]} of the rows with these numbers."""
        numbers, starts, sizes, counts = self.plan.rows(np.asarray(index, np.int64))
        piece, weights = self.documents.piece, self.weights
        pieces = [
            piece(number, start, start + size)
            for number, start, size in zip(
                numbers.tolist(), starts.tolist(), sizes.tolist(), strict=True
            )
        ]
        if weights is not None:
            pieces = [
                (*one, w) for one, w in zip(pieces, weights[numbers], strict=True)
            ]
        arrays = _arrays(pieces, counts, self.length, weighted=weights is not None)
        return {self.prefix + name: value for name, value in arrays.items()}

    @property
    def digest(self):
        """Returns the SHA-256 of the documents and of where they go."""
        total = hashlib.sha256(f"{self.documents.digest} {self.length}".encode())
        for array in (*self.plan, self.weights):
            if array is not None:
                total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()


def pad(documents, length):
    """Puts one document in a row, its end cut at `length`."""
    pieces = [_slice(document, 0, length) for document in documents]
    counts = np.ones(len(pieces), np.int64)
    return _arrays(pieces, counts, length, weighted=any(len(d) > 2 for d in documents))


def rounded(length):
    """Returns the next multiple of `ROUND`."""
    return -(-length // ROUND) * ROUND


def pad_answers(rows, length):
    """Puts the answers to one prompt in one row: right-padded, beside each other.

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
    """Pads prompts on the left, so that all end in the last column.

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


def _best_fit(sizes, length):
    """Packs the longest first, each into the row with the least room that holds it.

    Returns:
        a list of the numbers of its pieces for each row.
    """
    order = np.argsort(-sizes, kind="stable")
    rows = []
    # There are at most T different rooms, however many rows: each piece costs log T.
    by_room = collections.defaultdict(collections.deque)  # room: row numbers, in turn
    rooms = []  # the keys of by_room, sorted
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
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


def _wrapped(lengths, length):
    """Cuts one stream at every document's end and every `length` tokens."""
    ends = np.cumsum(lengths)
    total = int(lengths.sum())
    if not total:
        none = np.zeros(0, np.int64)
        return Plan(none, none, none, np.zeros(1, np.int64))
    cuts = np.union1d(ends, np.arange(length, total + length, length))
    cuts = cuts[(cuts > 0) & (cuts <= total)]
    firsts = np.concatenate([[0], cuts[:-1]]).astype(np.int64)
    documents = np.searchsorted(ends, firsts, side="right")
    starts = firsts - (ends - lengths)[documents]
    rows = -(-total // length)
    at = np.searchsorted(firsts, np.arange(rows + 1) * length)
    return Plan(documents, starts, cuts - firsts, at)


def _arrays(pieces, counts, length, *, weighted=False):
    """Returns rows of pieces (ids, mask, perhaps a weight), `counts` in each."""
    sizes = np.array([len(piece[0]) for piece in pieces], np.int64)
    numbers = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    total = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    used = total[ends[1:]] - total[ends[:-1]]
    # Rows are filled from the left, so that their real places, read row by row, are
    # the stream of all pieces.
    real = np.arange(length) < used[:, None]
    stream = np.arange(sizes.sum())
    out = {name: np.zeros(real.shape, np.int32) for name in ("segments", "positions")}
    out["segments"][real] = np.repeat(numbers + 1, sizes)
    out["positions"][real] = stream - np.repeat(np.cumsum(sizes) - sizes, sizes)
    for name, dtype, part in (("ids", np.int32, 0), ("mask", np.bool_, 1)):
        values = [piece[part] for piece in pieces]
        out[name] = np.zeros(real.shape, dtype)
        if values and isinstance(values[0], np.ndarray):
            out[name][real] = np.concatenate(values)
        else:  # many short lists are faster read one by one
            chain = itertools.chain.from_iterable(values)
            out[name][real] = np.fromiter(chain, dtype, stream.size)
    if weighted:
        out["weight"] = np.zeros(real.shape, np.float32)
        out["weight"][real] = np.repeat([piece[2] for piece in pieces], sizes)
    return out
