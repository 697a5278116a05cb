"""Batches are a function of (seed, step), for any number of processes."""

import json
from collections import Counter

import numpy as np
import pytest

from stagecraft.data import packing
from stagecraft.data.dataset import Dataset
from stagecraft.errors import UserError


def rows(sizes, length=16, start=1):
    """One document a row, whose ids are all the row's number."""
    documents = [
        ([start + i] * n, [False] + [True] * (n - 1)) for i, n in enumerate(sizes)
    ]
    return packing.pad(documents, length)


def numbers(batch):
    return batch["ids"][:, 0].tolist()


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


# -- the order -------------------------------------------------------------------------


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    data = Dataset([(rows([3] * 12), 4)], seed=0)
    epochs = [
        [n for step in range(3 * e, 3 * e + 3) for n in numbers(data.batch_at(step))]
        for e in range(4)
    ]
    assert all(sorted(epoch) == list(range(1, 13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != sorted(epochs[0])


def test_every_row_equally_often_when_batches_straddle_epochs():
    data = Dataset([(rows([3] * 7), 4)], seed=3)
    seen = Counter(n for step in range(7) for n in numbers(data.batch_at(step)))
    assert seen == {n: 4 for n in range(1, 8)}
    # More rows in a batch than there are: some occur twice, none is missing.
    small = Dataset([(rows([3] * 3), 8)], seed=3)
    assert set(numbers(small.batch_at(0))) == {1, 2, 3}


def test_the_order_is_a_function_of_seed_and_step():
    arrays = rows([3] * 50)
    data, again = (Dataset([(arrays, 8)], seed=1) for _ in range(2))
    backwards = [data.batch_at(step) for step in reversed(range(20))][::-1]
    assert all(same(backwards[step], again.batch_at(step)) for step in range(20))
    other = Dataset([(arrays, 8)], seed=2)
    assert numbers(other.batch_at(0)) != numbers(data.batch_at(0))


def test_the_iterator_is_batch_at():
    data = Dataset([(rows([3] * 10), 4)], seed=0)
    iterator = data.iterator()
    assert all(same(next(iterator), data.batch_at(step)) for step in range(12))
    later = data.iterator(start_step=5)
    assert same(next(later), data.batch_at(5))


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_resume_is_exact_after_any_step(stop):
    data = Dataset([(rows([3] * 10), 4)], seed=0)
    iterator = data.iterator()
    for _ in range(stop):
        next(iterator)
    # The state counts what was handed out, not what the thread has read ahead, and is
    # saved as JSON beside the weights.
    state = json.loads(json.dumps(iterator.get_state()))
    want = [next(iterator) for _ in range(5)]
    fresh = Dataset([(rows([3] * 10), 4)], seed=0).iterator()
    next(fresh)
    fresh.set_state(state)
    assert all(same(next(fresh), batch) for batch in want)
    assert same(want[0], data.batch_at(stop))


class Apart:
    """Rows that note which of them are read."""

    apart = True

    def __init__(self, arrays):
        self.arrays, self.asked = arrays, []

    def __len__(self):
        return len(self.arrays["ids"])

    def take(self, index):
        self.asked.append(index.tolist())
        return {name: array[index] for name, array in self.arrays.items()}


@pytest.mark.parametrize("own", [[0, 1], [2, 5], [4, 7], [6, 7]])
def test_a_process_reads_its_rows_of_the_batch_of_one(own):
    text, replay = Apart(rows([3, 9, 5, 2] * 5)), Apart(rows([4] * 8, start=50))
    data = Dataset([(text, 5), (replay, 3)], seed=0)
    reads = data.iterator(own={8: np.array(own)}.get)
    for step in range(4):
        batch, whole = next(reads), data.batch_at(step)
        assert {*batch} == {*whole}
        for name, array in batch.items():
            assert array.dtype == whole[name].dtype
            assert np.array_equal(array[own], whole[name][own])
        others = np.setdiff1d(np.arange(8), own)
        read = batch["segments"].any(-1)
        # One row of each part at least.
        assert read[others].sum() <= 1
    reads.close()
    assert max(map(len, text.asked[:1])) <= max(sum(n < 5 for n in own), 1)


def test_rows_that_are_cut_together_are_read_together():
    data = Dataset([(Apart(rows([3, 9, 5, 2] * 5)), 8)], seed=0, buckets=(4, 8, 16))
    reads = data.iterator(own={8: np.array([0, 1])}.get)
    assert all(same(next(reads), data.batch_at(step)) for step in range(4))
    reads.close()


def test_rows_of_others_count_where_nothing_of_its_own_is_learned():
    silent = packing.pad([([1, 2], [False, n == 3]) for n in range(4)], 4)
    data = Dataset([(Apart(silent), 4)], seed=0)
    for own in range(4):
        batch = data.batch_at(0, {4: np.array([own])})
        assert batch["mask"].any() == data.batch_at(0)["mask"].any()


# -- parts, buckets, epochs ------------------------------------------------------------


def test_replay_has_its_rows_in_every_batch():
    parts = [(rows([3] * 10), 6), (rows([3] * 4, start=101), 2)]
    data = Dataset(parts, seed=0)
    assert data.batch_size == 8
    seen = Counter()
    for step in range(10):
        found = numbers(data.batch_at(step))
        assert [n > 100 for n in found] == [False] * 6 + [True] * 2
        seen.update(found)
    assert {seen[n] for n in range(1, 11)} == {6}
    assert {seen[n] for n in range(101, 105)} == {5}
    # The main rows come as they would alone.
    alone = Dataset(parts[:1], seed=0)
    assert numbers(alone.batch_at(7)) == numbers(data.batch_at(7))[:6]


def test_a_batch_has_the_smallest_bucket_that_holds_it():
    sizes = [2, 4, 5, 8, 9, 16] * 3
    data = Dataset([(rows(sizes), 2)], seed=0, buckets=(4, 8, 12))
    whole = Dataset([(rows(sizes), 2)], seed=0)
    lengths = set()
    for step in range(18):
        batch, full = data.batch_at(step), whole.batch_at(step)
        longest = int((full["segments"] > 0).sum(1).max())
        want = next((b for b in (4, 8, 12) if b >= longest), 16)
        assert batch["ids"].shape == (2, want)
        assert all(np.array_equal(batch[k], full[k][:, :want]) for k in full)
        lengths.add(want)
    assert len(lengths) >= 3


def test_buckets_of_pairs_hold_the_longer_side():
    one, two = ([1] * 3, [False, True, True]), ([1] * 7, [False] + [True] * 6)
    arrays = packing.pad_answers([(one, two), (two, one)], 16)
    data = Dataset([(arrays, 2)], seed=0, buckets=(4, 8))
    assert data.batch_at(0)["ids"].shape == (2, 2, 8)


def test_epoch_has_every_row_once_in_order_and_one_shape():
    data = Dataset([(rows([3] * 10), 4)], seed=0)
    batches = list(data.epoch(4))
    assert [b["ids"].shape for b in batches] == [(4, 16)] * 3
    assert [n for b in batches for n in numbers(b)] == [*range(1, 11), 0, 0]
    last = batches[-1]
    assert not last["mask"][2:].any()
    assert not last["segments"][2:].any()
    assert {k: v.dtype for k, v in last.items()} == {
        k: v.dtype for k, v in batches[0].items()
    }
    assert [len(b["ids"]) for b in data.epoch(5)] == [5, 5]
    assert [b["ids"].shape for b in data.epoch(32)] == [(32, 16)]


def test_padding_has_an_index_that_is_no_row():
    arrays = rows([3] * 5) | {"index": np.arange(5, dtype=np.int32)}
    batches = list(Dataset([(arrays, 2)], seed=0).epoch(2))
    assert [i for b in batches for i in b["index"].tolist()] == [0, 1, 2, 3, 4, -1]


def test_only_token_arrays_are_cut_to_a_bucket():
    one = ([1] * 3, [False, True, True])
    arrays = packing.pad_answers([(one,) * 6] * 2, 16)
    arrays["present"] = arrays["segments"].any(-1)  # [N, K] with K above the bucket
    batch = Dataset([(arrays, 2)], seed=0, buckets=(4,)).batch_at(0)
    assert batch["ids"].shape == (2, 6, 4)
    assert batch["present"].shape == (2, 6)


def test_rows_beside_the_others_come_in_an_order_of_their_own():
    prompts = packing.pad_prompts([[i] for i in range(10)], 4)
    beside = {f"more_{k}": v for k, v in rows([3] * 6, start=101).items()}
    data = Dataset([(prompts, 4)], seed=0, beside=[(beside, 2)])
    alone = Dataset([(prompts, 4)], seed=0)
    assert (data.batch_size, data.rows) == (4, 10)
    assert data.digest != alone.digest
    seen = Counter()
    for step in range(3):
        batch = data.batch_at(step)
        assert {*batch} == {*prompts, *beside}
        found = alone.batch_at(step)
        assert same({k: batch[k] for k in found}, found)
        seen.update(batch["more_ids"][:, 0].tolist())
    assert seen == {n: 1 for n in range(101, 107)}


def test_rows_tokens_and_digest():
    data = Dataset([(rows([3, 5]), 1)], seed=0, report={"fill": 0.5})
    assert (data.rows, data.tokens, data.report) == (2, 8, {"fill": 0.5})
    assert data.digest == Dataset([(rows([3, 5]), 2)], seed=9).digest
    others = [rows([5, 3]), rows([3, 5], start=2), rows([3, 5], length=8)]
    found = {Dataset([(other, 1)], seed=0).digest for other in others}
    assert len(found | {data.digest}) == 4
    prompts = Dataset([(packing.pad_prompts([[1, 2], [3]], 4), 1)], seed=0)
    assert (prompts.rows, prompts.tokens) == (2, 3)


def test_nothing_to_learn_is_refused():
    with pytest.raises(UserError, match="no rows"):
        Dataset([(packing.pad([], 4), 2)], seed=0)
    with pytest.raises(UserError, match="no rows"):
        Dataset([], seed=0)
    silent = packing.pad([([1, 2], [False, False])] * 4, 4)
    with pytest.raises(UserError, match="step 3 has no token to learn from"):
        Dataset([(silent, 2)], seed=0).batch_at(3)
    unweighed = packing.pad([([1, 2], [False, True], 0.0)] * 4, 4)
    with pytest.raises(UserError, match="no token to learn from"):
        Dataset([(unweighed, 2)], seed=0).batch_at(0)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed={seed}"):
            Dataset([(rows([3]), 1)], seed=seed)
