"""Which of several equal or nearly equal documents stays, and which scores suffice.

Equal is the same words with the same punctuation, whatever the white space and case.
Nearly equal is what MinHash finds (Broder 1997; banded as in datatrove): pairs that
agree on a whole band, joined to groups. Of a group the document with the best score
stays; of equal scores, or without any, the first one read. All is decided here at once
from 28 bytes a document, so that the choice never depends on how the work was split.
"""

import hashlib
from pathlib import Path

import numpy as np
from datatrove.pipeline.base import PipelineStep
from scipy import sparse, special

from stagecraft.errors import UserError

KEPT, EXACT, NEAR, UNCHOSEN = range(4)
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("score", "<f8")])
VERDICT = np.dtype([("code", "u1"), ("task", "<u4"), ("document", "<u4")])


def key(text, score):
    """Returns what a document is compared and chosen by, one KEY."""
    plain = " ".join(text.lower().split())
    digest = hashlib.blake2b(plain.encode("utf-8"), digest_size=16).digest()
    high, low = np.frombuffer(digest, "<u8")
    return high, low, score


def save_keys(work, rank, keys):
    """Writes the keys of a task."""
    _save(Path(work) / "keys" / f"{rank:05d}.npy", np.array(keys, KEY))


def verdicts(work, rank):
    """Returns the VERDICT of each document of a task."""
    return np.load(Path(work) / "verdicts" / f"{rank:05d}.npy")


class Choose(PipelineStep):
    """Decides about every document of every task.

    Args:
        work: the work folder.
        tasks: how many wrote keys.
        exact: whether equal documents are removed.
        pairs: the folder of MinHash's pairs; "" where it was not asked for.
        threshold: scores below it are not chosen.
        share: of the documents left, chosen by score; 1 for all.
        temperature: of that choice: 0 takes the best, more lets chance in.
        seed: of that chance.
    """

    type, name = "stagecraft", "choose"

    def __init__(self, work, tasks, exact, pairs, threshold, share, temperature, seed):
        super().__init__()
        self.work, self.tasks = Path(work), tasks
        self.exact, self.pairs = exact, pairs
        self.chance = threshold, share, temperature, seed

    def run(self, data=None, rank=0, world_size=1):
        keys = [np.load(self.work / "keys" / f"{i:05d}.npy") for i in range(self.tasks)]
        starts = np.cumsum([0] + [len(k) for k in keys])
        keys = np.concatenate(keys)
        everyone = np.arange(len(keys))
        code = np.zeros(len(keys), np.uint8)
        twin = everyone.copy()
        if self.exact:
            names = np.unique(keys[["high", "low"]], return_inverse=True)[1]
            twin = _best(names, keys["score"])
            code[twin != everyone] = EXACT
        if self.pairs:
            pairs = twin[_read_pairs(self.pairs, starts)]
            groups = _groups(pairs, len(keys))[twin]
            best = _best(groups, keys["score"])
            code[(best != twin) & (code == KEPT)] = NEAR
            twin = np.where(code == NEAR, best, twin)
        chosen = choose(keys, np.flatnonzero(code == KEPT), *self.chance)
        unchosen = code == KEPT
        unchosen[chosen] = False
        code[unchosen] = UNCHOSEN
        self._write(code, twin, starts)

    def _write(self, code, twin, starts):
        verdicts = np.zeros(len(code), VERDICT)
        task = np.searchsorted(starts, twin, side="right") - 1
        verdicts["code"], verdicts["task"] = code, task
        verdicts["document"] = twin - starts[task]
        for rank in range(self.tasks):
            part = verdicts[starts[rank] : starts[rank + 1]]
            _save(self.work / "verdicts" / f"{rank:05d}.npy", part)


def choose(keys, candidates, threshold, share, temperature, seed):
    """Returns the documents chosen by score.

    With a temperature the best of logit(score) / temperature + Gumbel noise are taken:
    a sample without replacement, likelier the better (QuRating, 2402.09739).

    Args:
        keys: KEY[N].
        candidates: i64[M], places in keys.

    Returns:
        i64[at most M], in order.
    """
    candidates = candidates[keys["score"][candidates] >= threshold]
    if share >= 1:
        return candidates
    count = int(np.ceil(share * len(candidates)))
    value = special.logit(np.clip(keys["score"][candidates], 1e-6, 1 - 1e-6))
    if temperature:
        salt = np.uint64(0x9E3779B97F4A7C15 * (seed + 1) % 2**64)
        mixed = _mix(keys["low"][candidates] ^ salt)
        uniform = (mixed >> np.uint64(11)).astype(np.float64) / 2**53
        gumbel = -np.log(-np.log(np.clip(uniform, 1e-12, 1 - 1e-12)))
        value = value / temperature + gumbel
    best = np.argsort(-value, kind="stable")[:count]
    return np.sort(candidates[best])


def _best(groups, score):
    """Returns for each document the first of its group's best, i64[N]."""
    order = np.lexsort((np.arange(len(groups)), -score, groups))
    first = np.ones(len(order), bool)
    first[1:] = groups[order][1:] != groups[order][:-1]
    best = np.zeros(len(order), np.int64)
    best[order] = order[
        np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    ]
    return best


def _groups(pairs, count):
    """Returns each document's group, i64[N], from pairs i64[P, 2]."""
    ones = np.ones(len(pairs), np.int8)
    graph = sparse.coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), (count, count))
    return sparse.csgraph.connected_components(graph, directed=False)[1]


def _read_pairs(folder, starts):
    """Returns the documents of each pair, i64[P, 2]."""
    parts = [np.zeros((0, 4), "<u4")]
    for path in sorted(Path(folder).glob("*.dups")):
        parts.append(np.fromfile(path, "<u4").reshape(-1, 4))
    rows = np.concatenate(parts).astype(np.int64)
    return np.stack(
        [starts[rows[:, 0]] + rows[:, 1], starts[rows[:, 2]] + rows[:, 3]], 1
    )


def _mix(value):
    """Bits spread evenly (the finalizer of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _save(path, array):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    except OSError as error:
        raise UserError(f"{path}: cannot write here ({error.strerror})") from error
