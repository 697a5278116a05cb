"""Packed rows of a list of documents, as training puts them together."""

import numpy as np

from stagecraft.data import packing


class InMemory:
    """Documents that are lists, with what packing asks of `documents`."""

    def __init__(self, documents):
        self.documents = documents
        self.lengths = np.array([len(ids) for ids, _ in documents], np.int64)

    def learned(self, length=None):
        return np.array([sum(mask[:length]) for _, mask in self.documents], np.int64)

    def piece(self, number, start, stop):
        ids, mask = self.documents[number]
        return ids[start:stop], mask[start:stop]


def pack(documents, length, *, strategy="bfd_split"):
    """{name: array [N, T]} of (ids, mask), or of (ids, mask, weight)."""
    plan = packing.plan([len(one[0]) for one in documents], length, strategy)
    weights = None
    if any(len(one) > 2 for one in documents):
        weights = np.array([one[2] for one in documents], np.float32)
    bare = InMemory([one[:2] for one in documents])
    rows = packing.Rows(bare, plan, length, weights=weights)
    return rows.take(np.arange(len(rows)))
