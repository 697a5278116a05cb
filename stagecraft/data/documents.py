"""Documents to pack, as ids and a mask: in memory, or memory-mapped on disk.

Both kinds have

    lengths              tokens of each document, i64[N]
    sources              the source each is of, i64[N]
    learned(length)      targets among the first `length` tokens of each, i64[N]
    piece(n, a, b)       ids and mask of document n from a to before b
    targets(plan)        targets of each piece of a `packing.Plan`, i64[P]
    rows(rows)           `packing.Rows` of them as a `Dataset` takes them
    curations            identities of the curations they come from
"""

import bisect
import functools
import hashlib

import numpy as np


class InMemory:
    """Documents in memory.

    Args:
        parts: for each source, a list of (ids, mask).
        places: FILE:LINE of each document, in their order; () where they have none.
    """

    curations = ()

    def __init__(self, parts, places=()):
        self.places = places
        self.documents = [document for part in parts for document in part]
        self.sources = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    @functools.cached_property
    def lengths(self):
        return np.array([len(ids) for ids, _ in self.documents], np.int64)

    def learned(self, length=None):
        return np.array([sum(mask[:length]) for _, mask in self.documents], np.int64)

    def piece(self, number, start, stop):
        ids, mask = self.documents[number]
        return ids[start:stop], mask[start:stop]

    def targets(self, plan):
        numbers, starts, sizes = (array.tolist() for array in plan[:3])
        masks = (
            self.documents[number][1][start : start + size]
            for number, start, size in zip(numbers, starts, sizes, strict=True)
        )
        return np.array([sum(mask) for mask in masks], np.int64)

    def rows(self, rows):
        """Returns arrays: the rows are few enough to be put together once."""
        return rows.take(np.arange(len(rows)))


class Stored:
    """Documents of shards, one folder or more for each source.

    All of a document is learned but bos. None has a place in a file.

    Args:
        parts: for each source, a list of `Shards`.
        bos: the tokenizer's id, or None.
    """

    places = ()

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
        every = "".join(one.digest for one in self.shards)
        return hashlib.sha256(every.encode()).hexdigest()

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
