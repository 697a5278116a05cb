"""Rows to batches, in an order that is a function of (seed, step) alone.

A `Dataset` holds its rows as arrays and hands out a Grain iterator, whose state is
saved with the checkpoint. The global batch of a step is the same for any number of
processes: each takes its own part of its rows.
"""

import functools
import hashlib

import grain
import numpy as np

from stagecraft.errors import UserError

# What a row of padding holds where that is not 0.
FILL = {"index": -1}


class Dataset:
    """Rows of one or more parts, each contributing its share of every batch.

    Args:
        parts: list of ({name: array [N, ...]}, rows of a batch); a second part is a
            replay mixed into each batch.
        seed: int.
        beside: more parts, each with arrays of names and a row count of its own, which
            are put beside the others (the pretraining rows of PPO-ptx).
        buckets: lengths to cut a batch's last axis to, ascending: the smallest that
            holds its longest row. () leaves rows as they are.
        report: what is told about the data: {name: number}.
    """

    def __init__(self, parts, *, seed, beside=(), buckets=(), report=None):
        self.parts = [(rows, count) for rows, count in parts if count]
        self.beside = list(beside)
        self.seed, self.buckets = seed, tuple(buckets)
        self.report = dict(report or {})
        self.batch_size = sum(count for _, count in self.parts)
        every = self.parts + self.beside
        if not self.parts or not all(_length(rows) for rows, _ in every):
            raise UserError("no rows: every document was empty, or was dropped")
        if not 0 <= seed < 2**32 - len(every):
            raise UserError(f"seed={seed}: expected a number from 0 to 2**32 - 3")
        self._orders = [
            grain.MapDataset.range(_length(rows)).seed(seed + i).shuffle().repeat()
            for i, (rows, _) in enumerate(every)
        ]

    @property
    def rows(self):
        """Rows of the first part: those of an epoch."""
        return _length(self.parts[0][0])

    @functools.cached_property
    def tokens(self):
        """Tokens of the first part that are no padding, learned or not."""
        rows, _ = self.parts[0]
        real = rows["segments"] > 0 if "segments" in rows else rows["prompt_mask"]
        return int(real.sum())

    @functools.cached_property
    def digest(self):
        """SHA-256 of all parts' arrays: the same rows in the same order."""
        total = hashlib.sha256()
        for rows, _ in self.parts + self.beside:
            for name, value in sorted(rows.items()):
                total.update(f"{name} {value.dtype} {value.shape}".encode())
                total.update(np.ascontiguousarray(value).data)
        return total.hexdigest()

    def batch_at(self, step):
        """The global batch of a step: {name: array [B, ...]}.

        Raises UserError where no token of it is a target: its loss would be of nothing.
        """
        batches = []
        for (rows, count), order in zip(
            self.parts + self.beside, self._orders, strict=True
        ):
            index = np.array([order[step * count + i] for i in range(count)])
            batches.append({k: v[index] for k, v in rows.items()})
        batches, beside = batches[: len(self.parts)], batches[len(self.parts) :]
        batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
        learned = batch.get("mask")
        if "weight" in batch:
            learned = learned & (batch["weight"] > 0)
        if learned is not None and not learned.any():
            raise UserError(
                f"the batch of step {step} has no token to learn from (mask all "
                "zeros): raise batch_size or data.length, or leave out such documents"
            )
        batch = self._cut(batch)
        for more in beside:
            batch |= more
        return batch

    def iterator(self, start_step=0, *, process_index=0, process_count=1):
        """Batches from a step on: a Grain iterator with get_state and set_state.

        Args:
            start_step: the first batch's step.
            process_index, process_count: this process takes its contiguous part of the
                rows of every global batch, whose size they must divide.
        """
        sizes = [("batch_size", self.batch_size)]
        sizes += [("rows beside the batch", count) for _, count in self.beside]
        for name, rows in sizes:
            if rows % process_count:
                raise UserError(
                    f"{name}={rows}: does not divide over {process_count} "
                    "processes; choose a multiple"
                )

        def mine(array):
            size = len(array) // process_count
            return array[process_index * size : (process_index + 1) * size]

        def batch(step):
            return {k: mine(v) for k, v in self.batch_at(step).items()}

        steps = grain.MapDataset.range(np.iinfo(np.int32).max)
        found = iter(
            steps.map(batch).to_iter_dataset(
                grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
            )
        )
        if start_step:
            found.set_state({"next_index": start_step})
        return found

    def epoch(self, batch_size):
        """Every row of the first part once, in order; the last batch filled up.

        Rows that fill up are padding: segments 0 and masks False, so they count
        nowhere; their index is -1, which is no row.
        """
        rows, _ = self.parts[0]
        total = _length(rows)
        for start in range(0, total, batch_size):
            part = {k: v[start : start + batch_size] for k, v in rows.items()}
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


def _length(rows):
    return len(next(iter(rows.values())))
