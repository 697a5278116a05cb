"""Packed rows of a list of documents, as training puts them together."""

import numpy as np

from stagecraft.data import packing
from stagecraft.data.documents import InMemory


def pack(documents, length, *, strategy="bfd_split"):
    """{name: array [N, T]} of (ids, mask), or of (ids, mask, weight)."""
    plan = packing.plan([len(one[0]) for one in documents], length, strategy)
    weights = None
    if any(len(one) > 2 for one in documents):
        weights = np.array([one[2] for one in documents], np.float32)
    bare = InMemory([[one[:2] for one in documents]])
    rows = packing.Rows(bare, plan, length, weights=weights)
    return rows.take(np.arange(len(rows)))
