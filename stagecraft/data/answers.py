"""Rows of answers to prompts, and rows of prompts, put together when they are needed.

Both are given to a `Dataset` as they are, or as arrays where they are few: see
`documents.in_memory`.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stagecraft.data import packing


class Answers(NamedTuple):
    """Rows of rendered answers.

    Attributes:
        records: the record each row is of, i64[N].
        sequences: the documents of its answers, the best first, i64[N, K]; -1 where it
            has fewer.
    """

    records: np.ndarray
    sequences: np.ndarray

    @classmethod
    def of(cls, rendered, numbers):
        """Returns some records, each a row."""
        counts = rendered.counts[numbers]
        ranks = np.arange(counts.max(initial=1))
        sequences = rendered.firsts[numbers][:, None] + ranks
        return cls(numbers, np.where(ranks < counts[:, None], sequences, -1))

    @property
    def present(self):
        return self.sequences >= 0

    @property
    def pairs(self) -> int:
        """Returns how many pairs of answers there are; of single answers, how many."""
        counts = self.present.sum(1)
        return int(np.maximum(counts * (counts - 1) // 2, 1).sum())

    def where(self, rows):
        """Returns some of the rows, no wider than these need."""
        sequences = self.sequences[rows]
        most = (sequences >= 0).sum(1).max(initial=1)
        return Answers(self.records[rows], sequences[:, :most])

    def fitting(self, rendered, counts, length):
        """Returns the rows that `data.too_long` leaves; `counts` is a `Tally`."""
        sizes, learned = (
            np.where(self.present, one[self.sequences], 0)
            for one in (rendered.lengths, rendered.learned())
        )
        fit = sizes.max(1, initial=0) <= length
        counts.short(sizes[fit].max(initial=0), learned[fit].sum())
        for row in np.flatnonzero(~fit).tolist():
            sequences = self.sequences[row][self.present[row]].tolist()
            pieces = [rendered.piece(one) for one in sequences]
            documents = [tuple(part.tolist() for part in piece) for piece in pieces]
            where = rendered.where(sequences[0])
            units = max(math.comb(len(sequences), 2), 1)
            fit[row] = counts.fit(documents, length, where, units) is not None
        return self.where(fit)


class AnswerRows:
    """Rows of answers: right-padded, those to one prompt beside each other.

    Args:
        rendered: a `documents.Rendered`.
        answers: an `Answers`.
        length: T; what is longer is cut.
        beside: {name: array [N, ...]} of more arrays.
        single: whether rows have one answer, and their arrays no axis for several.
    """

    def __init__(self, rendered, answers, length, beside, *, single=False):
        self.rendered, self.answers, self.length = rendered, answers, length
        self.beside, self.single = beside, single

    def __len__(self):
        return len(self.answers.records)

    @property
    def places(self):
        return self.answers.sequences.size * self.length

    @property
    def lengths(self):
        """Returns the tokens of each sequence, i64[sequences]."""
        sequences = self.answers.sequences[self.answers.present]
        return np.minimum(self.rendered.lengths[sequences], self.length)

    @property
    def tokens(self):
        return int(self.lengths.sum())

    @functools.cached_property
    def digest(self):
        """Returns the SHA-256 of the sequences, and of what is beside them."""
        return _digest(self.rendered, self.length, self.answers, self.beside)

    def take(self, index):
        """Returns {name: array [n, K, T]} of the rows with these numbers, or [n, T]."""
        piece, nothing = self.rendered.piece, _nothing(self.rendered)
        rows = [
            [piece(one, 0, self.length) if one >= 0 else nothing for one in row]
            for row in self.answers.sequences[index].tolist()
        ]
        arrays = packing.pad_answers(rows, self.length)
        if self.single:
            arrays = {name: value[:, 0] for name, value in arrays.items()}
        return arrays | {name: value[index] for name, value in self.beside.items()}


class PromptRows:
    """Left-padded prompts.

    Args:
        rendered: a `documents.Rendered`.
        records: their numbers, i64[N].
        length: P; a longer prompt loses its beginning.
        start: the number of the first row, which `index` counts on from.
    """

    def __init__(self, rendered, records, length, start):
        self.rendered, self.records, self.length = rendered, records, length
        self.start = start

    def __len__(self):
        return len(self.records)

    @property
    def places(self):
        return len(self) * self.length

    @property
    def lengths(self):
        """Returns the tokens of each prompt, i64[N]."""
        return np.minimum(self.rendered.lengths[self.records], self.length)

    @property
    def tokens(self):
        return int(self.lengths.sum())

    @functools.cached_property
    def digest(self):
        """Returns the SHA-256 of the prompts."""
        return _digest(self.rendered, self.length, [self.records], {})

    def take(self, index):
        """Returns {name: array [n, P]} of the rows with these numbers, and `index`."""
        ids = [self.rendered.piece(n)[0] for n in self.records[index].tolist()]
        arrays = packing.pad_prompts([one[-self.length :] for one in ids], self.length)
        numbers = np.asarray(index, np.int32) + np.int32(self.start)
        return arrays | {"index": numbers}


class Lazily(Sequence):
    """Values that are read when they are asked for, as a sequence.

    Args:
        numbers: i64[N].
        read: (number) -> the value.
    """

    def __init__(self, numbers: np.ndarray, read: Callable):
        self._numbers, self._read = numbers, read

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self._read(n) for n in self._numbers[place].tolist()]
        return self._read(int(self._numbers[place]))


def _nothing(rendered):
    """Returns an answer that is not there."""
    return np.zeros(0, rendered.shards[0].dtype), np.zeros(0, bool)


def _digest(rendered, length, arrays, beside):
    total = hashlib.sha256(f"{rendered.digest} {length} {sorted(beside)}".encode())
    for array in (*arrays, *(beside[name] for name in sorted(beside))):
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
