"""Rows to batches, in an order that is a function of (seed, step) alone.

A `Dataset` hands out an iterator whose state, the next step, is saved with the
checkpoint; Grain reads ahead, in a thread or in worker processes. The global batch of a
step is the same for any number of processes: each reads the rows its devices hold.
"""

import functools
import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from stagecraft import process
from stagecraft.errors import UserError

# What a row of padding holds where that is not 0.
FILL = {"index": -1}


class Dataset:
    """Rows of one or more parts, each contributing its share of every batch.

    Args:
        parts: list of (rows, how many in a batch); a second part is a replay mixed
            into each batch. Rows are {name: array [N, ...]}, or have a length and
            `take(numbers)`, as `packing.Rows`.
        seed: int.
        beside: more parts, each with arrays of names and a row count of its own, which
            are put beside the others (the pretraining rows of PPO-ptx).
        mixture: a `mixture.Mixture` that orders the rows of the first part; by itself
            each part is gone through in epochs, shuffled.
        workers: processes that put batches together; 0 for a thread of this one.
        buckets: lengths to cut a batch's last axis to, ascending: the smallest that
            holds its longest row. () leaves rows as they are.
        report: figures about the data: {name: number}.
    """

    def __init__(
        self,
        parts,
        *,
        seed,
        beside=(),
        mixture=None,
        workers=0,
        buckets=(),
        report=None,
    ):
        self.mixture, self.workers = mixture, workers
        self.parts = [(rows, count) for rows, count in parts if count]
        self.beside = list(beside)
        self.seed, self.buckets = seed, tuple(buckets)
        self.report = dict(report or {})
        self.batch_size = sum(count for _, count in self.parts)
        every = self.parts + self.beside
        if not self.parts or not all(_length(rows) for rows, _ in every):
            raise UserError("no rows: every document was empty, or was dropped")
        # The sources of a mixture have seeds of their own, from this one on.
        ahead = len(mixture.members) - 1 if mixture else 0
        if not 0 <= seed < 2**32 - len(every) - ahead:
            raise UserError(f"seed={seed}: expected a number from 0 to 2**32 - 3")
        self._orders = [
            grain.MapDataset.range(_length(rows))
            .seed(seed + i + ahead)
            .shuffle()
            .repeat()
            for i, (rows, _) in enumerate(every)
        ]

    @property
    def rows(self) -> int:
        """Returns the rows of the first part: those of an epoch."""
        return _length(self.parts[0][0])

    @functools.cached_property
    def tokens(self) -> int:
        """Returns the tokens of the first part that are no padding, learned or not."""
        rows, _ = self.parts[0]
        if not isinstance(rows, dict):
            return rows.tokens
        real = rows["segments"] > 0 if "segments" in rows else rows["prompt_mask"]
        return int(real.sum())

    @functools.cached_property
    def digest(self) -> str:
        """Returns the SHA-256 of all parts' arrays: the same rows in the same order."""
        total = hashlib.sha256()
        for rows, _ in self.parts + self.beside:
            if not isinstance(rows, dict):
                total.update(bytes.fromhex(rows.digest))
                continue
            for name, value in sorted(rows.items()):
                total.update(f"{name} {value.dtype} {value.shape}".encode())
                total.update(np.ascontiguousarray(value).data)
        return total.hexdigest()

    def batch_at(self, step: int, own: dict | None = None) -> dict[str, np.ndarray]:
        """Returns the global batch of a step: {name: array [B, ...]}.

        Args:
            step: int.
            own: {rows of a batch, or of what is beside it: numbers of those to read}.
                Packed rows with other numbers are left padding; None for all rows.

        Raises UserError where no token of it is a target: its loss would be of nothing.
        """
        batches, first = [], 0
        for number, (rows, count) in enumerate(self.parts + self.beside):
            places = range(step * count, (step + 1) * count)
            if number == 0 and self.mixture:
                index = self.mixture.rows(places)
            else:
                index = np.array([self._orders[number][place] for place in places])
            within = number < len(self.parts)
            size, begin = (self.batch_size, first) if within else (count, 0)
            batches.append(self._read(rows, index, (own or {}).get(size), begin))
            first += count
        batches, beside = batches[: len(self.parts)], batches[len(self.parts) :]
        batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
        learned = batch.get("mask")
        if learned is not None and "weight" in batch:
            learned = learned & (batch["weight"] > 0)
        if learned is not None and not learned.any():
            if own:  # those of other rows count
                return self.batch_at(step)
            raise UserError(
                f"the batch of step {step} has no token to learn from (mask all "
                "zeros): raise batch_size or data.length, or leave out such documents"
            )
        batch = self._cut(batch)
        for more in beside:
            batch |= more
        return batch

    def _read(self, rows, index, own, begin):
        """Reads rows of one part; of `own`, numbers in the batch, where they are apart.

        What else there is depends on all rows: lengths that are cut to a bucket, the
        numbers of prompts.
        """
        if own is None or self.buckets or not getattr(rows, "apart", False):
            return _take(rows, index)
        own = own[(own >= begin) & (own < begin + len(index))] - begin
        # One row at least, for names, shapes and dtypes.
        some = own if len(own) else np.zeros(1, np.int64)
        part = rows.take(index[some])
        whole = {}
        for name, value in part.items():
            whole[name] = np.zeros((len(index), *value.shape[1:]), value.dtype)
            whole[name][some] = value
        return whole

    def iterator(self, start_step=0, *, own=None) -> "Batches":
        """Returns the batches from a step on, with get_state and set_state.

        Args:
            start_step: the first batch's step.
            own: (rows of a batch) -> numbers of those that this process reads, or None
                for all: `sharding.own_rows` of its mesh.
        """
        sizes = {self.batch_size, *(count for _, count in self.beside)}
        numbers = {size: own(size) for size in sizes} if own else {}
        numbers = {size: some for size, some in numbers.items() if some is not None}
        return Batches(self, start_step, numbers)

    def epoch(self, batch_size):
        """Yields every row of the first part once, in order, in batches.

        Rows that fill up are padding: segments 0 and masks False, so they count
        nowhere; their index is -1, which is no row.
        """
        rows, _ = self.parts[0]
        total = _length(rows)
        for start in range(0, total, batch_size):
            part = _take(rows, np.arange(start, min(start + batch_size, total)))
            missing = batch_size - min(batch_size, total - start)
            yield {
                k: np.concatenate(
                    [v, np.full((missing, *v.shape[1:]), FILL.get(k, 0), v.dtype)]
                )
                for k, v in part.items()
            }

    def _cut(self, batch):
        if not self.buckets:
            return batch
        shape = batch["segments"].shape
        used = batch["segments"].reshape(-1, shape[-1]).any(0)
        longest = int(np.flatnonzero(used).max(initial=0)) + 1
        length = next((b for b in self.buckets if b >= longest), used.size)
        return {k: v[..., :length] if v.shape == shape else v for k, v in batch.items()}


class Batches:
    """An iterator over a `Dataset`'s batches, of which a process reads its own rows.

    Its state is the next step alone, so that a run goes on with another number of
    processes or workers. Workers and threads start with the first batch.
    """

    def __init__(self, dataset, step, own):
        self.dataset, self.step, self.own = dataset, step, own
        self._running = None

    def __iter__(self):
        return self

    def __next__(self):
        if self._running is None:
            self._running = self._start()
        batch = next(self._running)
        self.step += 1
        return batch

    def get_state(self):
        return {"next_index": self.step}

    def set_state(self, state):
        self.close()
        self.step, self._running = state["next_index"], None

    def close(self):
        """Stops the threads or workers; the next batch would start them again."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _start(self):
        steps = grain.MapDataset.range(self.step, np.iinfo(np.int32).max)
        workers = self.dataset.workers
        make = _workers_batch if workers else _batch
        batches = steps.map(functools.partial(make, self.dataset, self.own))
        if not workers:
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
            return iter(batches.to_iter_dataset(read))
        if not flags.FLAGS.is_parsed():  # in a notebook; Grain reads its own there
            flags.FLAGS.mark_as_parsed()
        # Each worker makes its own steps, one after the other.
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        several = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=2
        )
        return iter(batches.to_iter_dataset(read).mp_prefetch(several))


def _batch(dataset, own, step):
    return dataset.batch_at(step, own)


def _workers_batch(*arguments):
    process.end_with_parent()
    return _batch(*arguments)


def _take(rows, index):
    if isinstance(rows, dict):
        return {k: v[index] for k, v in rows.items()}
    return rows.take(index)


def _length(rows):
    return len(next(iter(rows.values()))) if isinstance(rows, dict) else len(rows)


def hold_out(
    rows: Sequence, share: float, seed: int, prompt_of: Callable[[Any], Hashable]
) -> tuple[list, list]:
    """Splits rows at random by their prompts: (train, held out).

    All rows of one prompt are on one side, so that no held-out prompt is trained on.

    Args:
        rows: what to split.
        share: of the prompts, to hold out.
        seed: the split is a function of it and of the prompts' order.
        prompt_of: (row) -> what rows of one prompt have in common.
    """
    if not share:
        return list(rows), []
    places = {}  # of the rows of each prompt
    for place, row in enumerate(rows):
        places.setdefault(prompt_of(row), []).append(place)
    count = round(len(places) * share)
    if not 0 < count < len(places):
        raise UserError(
            f"data.heldout_share={share}: of {len(places)} prompts this keeps "
            f"{count} back; choose a share that leaves some on both sides"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(places))
    by_prompt = list(places.values())
    heldout = {place for number in order[:count] for place in by_prompt[number]}
    train = [row for place, row in enumerate(rows) if place not in heldout]
    return train, [rows[place] for place in sorted(heldout)]
