"""Evaluation text found again in training text, by runs of words both hold.

A document that shares one run of n words (13, after GPT-3's appendix C) with an item of
the evaluation files is removed. Words are compared in lower case without punctuation.
Items shorter than n words cannot be looked for; runs that many items share are their
common wording, not their content, and are left out.
"""

import itertools
import json
import re
import zlib
from pathlib import Path

import numpy as np

from stagecraft import storage
from stagecraft.curate import inputs, reader
from stagecraft.errors import UserError

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost


def runs(text, n):
    """Returns the hashes of every run of n words, and the words.

    Returns:
        (u64[N], list[str]).
    """
    words = _WORD.findall(text.lower())
    count = len(words) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64), words
    codes = [zlib.crc32(w.encode("utf-8", "replace")) + 1 for w in words]
    codes = np.array(codes, np.uint64) * _BASE
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = total * _BASE + (codes[i : i + count] ^ (codes[i : i + count] >> 29))
    return total, words


def build(spec, folder, n, common):
    """Builds the index of the evaluation files.

    Args:
        spec: files as `inputs.survey` takes; of records every text in them counts.
        folder: where the index goes.
        n: words of a run.
        common: a run in more items than this is left out.

    Returns:
        {"asked", "short", "runs", "common", "bad"}: what was indexed and what not.
    """
    hashes, owners, places = [], [], []
    summary = dict(asked=0, short=0, runs=0, common=0, bad=0)
    for where, text in _items(spec, summary):
        hashed = np.unique(runs(text, n)[0])
        summary["asked"] += 1
        if not len(hashed):
            summary["short"] += 1
            continue
        hashes.append(hashed)
        owners.append(np.full(len(hashed), len(places), np.int64))
        places.append(where)
    if summary["asked"] == summary["short"]:
        raise UserError(
            f"contamination.files={spec!r}: none of its {summary['asked']} items has "
            f"{n} words; lower contamination.n_grams or leave the files out"
        )
    values, owners = np.concatenate(hashes), np.concatenate(owners)
    unique, first, counts = np.unique(values, return_index=True, return_counts=True)
    keep = counts <= common
    summary["runs"], summary["common"] = int(keep.sum()), int((~keep).sum())
    np.save(Path(folder) / "runs.npy", unique[keep])
    np.save(Path(folder) / "owners.npy", owners[first][keep])
    storage.write_json(Path(folder) / "items.json", places)
    return summary


class Rule:
    """Removes documents that hold a run of an evaluation item.

    Args:
        folder: where `build` wrote.
        n: words of a run.
    """

    def __init__(self, folder, n):
        self.folder, self.n, self.index = Path(folder), n, None

    def filter(self, document):
        """Returns True, or (False, reason, the shared words and their item)."""
        if self.index is None:  # in the worker: an index is not sent along
            self.index = np.load(self.folder / "runs.npy")
            self.owners = np.load(self.folder / "owners.npy")
            self.items = json.loads((self.folder / "items.json").read_text("utf-8"))
        hashed, words = runs(document.text, self.n)
        if not len(hashed) or not len(self.index):
            return True
        at = np.minimum(np.searchsorted(self.index, hashed), len(self.index) - 1)
        hits = np.flatnonzero(self.index[at] == hashed)
        if not len(hits):
            return True
        place = self.items[self.owners[at[hits[0]]]]
        shared = " ".join(words[hits[0] : hits[0] + self.n])
        return False, "overlaps evaluation", f"{place}: “{shared}”"


def _items(spec, counts):
    """Yields (FILE:LINE, text) of each record, or of each .txt document."""
    for part in itertools.chain(*inputs.survey(spec, "", 0, 0).tasks):
        for item in reader.texts_of_records(part):
            if isinstance(item, reader.Bad):
                counts["bad"] += 1
            else:
                yield item
