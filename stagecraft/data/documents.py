"""Documents to pack, as ids and a mask, memory-mapped on disk: text and conversations.

Both kinds have

    lengths              tokens of each document, i64[N]
    sources              the source each is of, i64[N]
    learned(length)      targets among the first `length` tokens of each, i64[N]
    piece(n, a, b)       ids and mask of document n from a to before b
    targets(plan)        targets of each piece of a `packing.Plan`, i64[P]
    rows(rows)           `packing.Rows` of them as a `Dataset` takes them
    where(n)             FILE:LINE of document n; "" where it has none
    curations            identities of the curations they come from
"""

import bisect
import functools
import hashlib
import json

import numpy as np

from stagecraft.data import containers

# Rows of up to so many places are put together once, and held in memory.
_FEW = 2**22


class Rendered:
    """Conversations that were rendered: every sequence of a record is a document.

    A record is a demonstration, a prompt, a judged answer, or several compared answers;
    its sequences follow one another. `conversations` writes them.

    Args:
        parts: for each source, its `Shards` and the files that they were made of.
        kind: the type of the records, of `records`.
    """

    curations = ()

    def __init__(self, parts, kind):
        self.shards = [one for one, _ in parts]
        self.files, self.kind = [paths for _, paths in parts], kind
        sizes = [len(one) for one in self.shards]
        self.ends = np.cumsum(sizes).tolist()
        self.sources = np.repeat(np.arange(len(parts)), sizes)
        self.firsts = np.flatnonzero(self.numbers("rank") == 0)
        self.counts = np.diff([*self.firsts, len(self.sources)])

    def __len__(self):
        return len(self.firsts)

    def numbers(self, name):
        """Returns a number of each document, f64[N]: "rank", "ended", "label"."""
        return np.concatenate([one.column(name) for one in self.shards])

    @functools.cached_property
    def lengths(self):
        return np.concatenate([one.lengths for one in self.shards])

    @functools.cached_property
    def _learned(self):
        return self.numbers("learned").astype(np.int64)

    @functools.cached_property
    def digest(self):
        return _digest(self.shards)

    def learned(self, length=None):
        if length is None:
            return self._learned
        learned = self._learned.copy()
        for number in np.flatnonzero(self.lengths > length).tolist():
            learned[number] = self.piece(number, 0, length)[1].sum()
        return learned

    def piece(self, number, start=0, stop=None):
        shard, number = self._at(number)
        ids = shard.read(number, start, stop)
        first, last = start // 8, -(-(start + len(ids)) // 8)
        bits = np.unpackbits(shard.bytes_of("mask", number, first, last))
        return ids, bits[start % 8 :][: len(ids)].view(bool)

    def targets(self, plan):
        targets = self._learned[plan.documents]
        for at in np.flatnonzero(plan.sizes < self.lengths[plan.documents]).tolist():
            start = int(plan.starts[at])
            stop = start + int(plan.sizes[at])
            targets[at] = self.piece(int(plan.documents[at]), start, stop)[1].sum()
        return targets

    def rows(self, rows):
        """Returns the rows; as arrays where they are few."""
        return in_memory(rows)

    def record(self, number):
        """Returns a record by its own number."""
        shard, first = self._at(int(self.firsts[number]))
        fields = json.loads(shard.bytes_of("record", first).tobytes())
        return self.kind(**fields)

    def key(self, number):
        """Returns what records of one prompt have in common, bytes."""
        shard, first = self._at(int(self.firsts[number]))
        return shard.bytes_of("key", first).tobytes()

    def where(self, number):
        """Returns FILE:LINE of a document."""
        file, line = (int(self._places[i][number]) for i in (0, 1))
        return containers.where(self.files[self.sources[number]][file], line)

    @functools.cached_property
    def _places(self):
        return self.numbers("file"), self.numbers("line")

    def _at(self, number):
        part = bisect.bisect_right(self.ends, number)
        return self.shards[part], number - (self.ends[part - 1] if part else 0)


def in_memory(rows):
    """Returns rows as arrays, {name: array [N, ...]}, where they are few."""
    return rows.take(np.arange(len(rows))) if rows.places <= _FEW else rows


def _digest(shards):
    every = "".join(one.digest for one in shards)
    return hashlib.sha256(every.encode()).hexdigest()


class Stored:
    """Documents of shards, one folder or more for each source.

    All of a document is learned but bos.

    Args:
        parts: for each source, a list of `Shards`.
        bos: the tokenizer's id, or None.
    """

    def __init__(self, parts, bos):
        self.shards = [one for part in parts for one in part]
        sizes = [sum(map(len, part)) for part in parts]
        self.sources = np.repeat(np.arange(len(parts)), sizes)
        self.ends = np.cumsum([len(one) for one in self.shards]).tolist()
        self.bos = bos

    @property
    def curations(self):
        names = [one.manifest["settings"].get("curation") for one in self.shards]
        return list(dict.fromkeys(filter(None, names)))

    @functools.cached_property
    def lengths(self):
        return np.concatenate([one.lengths for one in self.shards])

    @functools.cached_property
    def digest(self):
        return _digest(self.shards)

    def learned(self, length=None):
        lengths = self.lengths if length is None else np.minimum(self.lengths, length)
        return lengths - self._begins_with_bos

    @functools.cached_property
    def _begins_with_bos(self):
        """Returns bool[N]; the same for all documents of one writer."""
        if self.bos is None:
            return np.zeros(len(self.lengths), bool)
        return np.concatenate([one.begins_with(self.bos) for one in self.shards])

    def piece(self, number, start, stop):
        at = bisect.bisect_right(self.ends, number)
        number -= self.ends[at - 1] if at else 0
        ids = self.shards[at].read(number, start, stop)
        mask = np.ones(len(ids), bool)
        if start == 0 and len(ids):
            mask[0] = ids[0] != self.bos
        return ids, mask

    def targets(self, plan):
        unlearned = self.lengths - self.learned()
        return plan.sizes - unlearned[plan.documents] * (plan.starts == 0)

    def rows(self, rows):
        """Returns the rows as they are: each is read from disk when it is needed."""
        return rows

    def where(self, number):
        """Returns "": text goes on over the borders of its documents."""
        return ""
