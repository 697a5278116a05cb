"""Documents to pack, as ids and a mask: in memory, or memory-mapped on disk."""

import bisect
import functools
import hashlib

import numpy as np


class Held:
    """Documents in memory.

    Args:
        parts: for each source, a list of (ids, mask).
    """

    def __init__(self, parts):
        self.rows = [row for part in parts for row in part]
        self.sources = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    @functools.cached_property
    def lengths(self):
        return np.array([len(ids) for ids, _ in self.rows], np.int64)

    def learned(self, length=None):
        """Targets among the first `length` tokens of each document, i64[N]."""
        return np.array([sum(mask[:length]) for _, mask in self.rows], np.int64)

    def piece(self, number, start, stop):
        ids, mask = self.rows[number]
        return ids[start:stop], mask[start:stop]


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
        """The identities of what `stagecraft curate` made, each once, in order."""
        made = [one.manifest["settings"].get("curation") for one in self.shards]
        return list(dict.fromkeys(filter(None, made)))

    @functools.cached_property
    def lengths(self):
        return np.concatenate([one.lengths for one in self.shards])

    @functools.cached_property
    def digest(self):
        every = "".join(one.digest for one in self.shards)
        return hashlib.sha256(every.encode()).hexdigest()

    def learned(self, length=None):
        """Targets among the first `length` tokens of each document, i64[N]."""
        lengths = self.lengths if length is None else np.minimum(self.lengths, length)
        return lengths - self._begins_with_bos

    @functools.cached_property
    def _begins_with_bos(self):
        """bool[N]; the same for all documents that one writer made."""
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
