"""Batches are a function of (seed, step), and a stage's data comes out as promised."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict

from stagecraft import defaults
from stagecraft.data import feed, packing
from stagecraft.data.pipeline import Dataset
from stagecraft.errors import UserError
from stagecraft.text.tokenizer import Tokenizer


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


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_together_have_the_batch_of_one(count):
    data = Dataset([(rows([3, 9, 5, 2] * 5), 8)], seed=0, buckets=(4, 8, 16))
    iterators = [
        data.iterator(process_index=i, process_count=count) for i in range(count)
    ]
    for step in range(6):
        parts = [next(iterator) for iterator in iterators]
        assert {len(p["ids"]) for p in parts} == {8 // count}
        # All have the same length, even those whose own rows are shorter.
        joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        assert same(joined, data.batch_at(step))


def test_processes_that_would_lose_rows_are_refused():
    data = Dataset([(rows([3] * 10), 6)], seed=0)
    with pytest.raises(UserError, match="batch_size=6.*4 processes"):
        data.iterator(process_index=0, process_count=4)


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
    arrays = packing.pad_pairs([(one, two), (two, one)], 16)
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
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed={seed}"):
            Dataset([(rows([3]), 1)], seed=seed)


# -- from a stage's config -------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = ["The capital of France is Paris. What is 12 + 30? It is 42."] * 20
    return Tokenizer.train(words, 320, tmp_path_factory.mktemp("t") / "t.model")


def build(kind, tokenizer, root, records, *, max_length=64, **settings):
    """The feed of one stage whose file holds `records`."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (root / "data.jsonl").write_text(lines)
    stage = defaults.stage(kind)
    stage.batch_size = settings.pop("batch_size", 4)
    if "max_new_tokens" in settings:
        stage.sampling.max_new_tokens = settings.pop("max_new_tokens")
    stage.data.update(settings | {"files": str(root / "data.jsonl")})
    config = ConfigDict({"seed": 0, "model": {"max_length": max_length}})
    return feed.build(stage, tokenizer, root, config)


def sums(answers):
    return [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in answers]


def learned(dataset):
    """The targets of an epoch, as sorted ids."""
    found = []
    for batch in dataset.epoch(8):
        found += batch["ids"][batch["mask"]].tolist()
    return sorted(found)


def test_text_comes_out_as_packed_documents(tokenizer, tmp_path):
    words = ["Paris.", "France is", "The capital of France is Paris."] * 5
    made = build(
        "language_model",
        tokenizer,
        tmp_path,
        [{"text": w} for w in words],
        format="text",
        length=32,
    )
    want = sum(len(tokenizer.encode(w)) + 2 for w in words)
    report = made.dataset.report
    assert made.dataset.tokens == report["tokens"] == want
    assert report["documents"] == 15
    assert report["supervised_share"] == pytest.approx((want - 15) / want)
    assert report["fill"] == pytest.approx(want / (made.dataset.rows * 32))


def test_demonstrations_learn_the_same_packed_and_padded(tokenizer, tmp_path):
    records = sums(range(30))
    settings = dict(format="demonstrations", length=48)
    packed, padded = (
        build("language_model", tokenizer, tmp_path, records, packing=p, **settings)
        for p in ("best_fit", "none")
    )
    want = sorted(
        i
        for record in records
        for i in [*tokenizer.encode(record["completion"]), tokenizer.end]
    )
    assert learned(packed.dataset) == learned(padded.dataset) == want
    assert padded.dataset.rows == 30 > packed.dataset.rows
    # Padded rows are as long as the longest, rounded up to a multiple of 8.
    batch = next(padded.dataset.epoch(30))
    longest = int((batch["segments"] > 0).sum(1).max())
    assert batch["ids"].shape == (30, -(-longest // 8) * 8)


def test_demonstrations_keep_their_start_and_drop_what_has_no_answer_left(
    tokenizer, tmp_path
):
    records = [
        *sums([1, 2]),
        {"prompt": "Is it? " * 30, "completion": "Yes."},  # no answer fits
        {"prompt": "Is it?", "completion": "Yes. " * 30},  # its start does
    ]
    settings = dict(format="demonstrations", length=40, batch_size=1)
    for strategy in ("best_fit", "none"):
        made = build(
            "language_model",
            tokenizer,
            tmp_path,
            records,
            packing=strategy,
            **settings,
        )
        assert made.dataset.report["dropped"] == 1
        assert learned(made.dataset).count(tokenizer.end) == 2  # the cut one has none


def test_a_share_is_held_out_and_replay_mixed_in(tokenizer, tmp_path):
    (tmp_path / "replay.txt").write_text("The capital of France is Paris.")
    made = build(
        "language_model",
        tokenizer,
        tmp_path,
        sums(range(20)),
        format="demonstrations",
        packing="none",
        heldout_share=0.25,
        replay=str(tmp_path / "replay.txt"),
        replay_share=0.5,
        batch_size=4,
    )
    assert (made.dataset.rows, made.heldout.rows) == (15, 5)
    firsts = [
        {tuple(row) for b in d.epoch(5) for row in b["ids"].tolist()}
        for d in (made.dataset, made.heldout)
    ]
    assert not firsts[0] & firsts[1]
    batch = made.dataset.batch_at(0)
    starts = batch["ids"][:, 1].tolist()
    assert [s == tokenizer.user for s in starts] == [True, True, False, False]


def test_all_supervised_demonstrations_are_warned_about(tokenizer, tmp_path, caplog):
    records = [{"prompt": "", "completion": "It is 42. " * 800}]
    with caplog.at_level(logging.WARNING):
        build(
            "language_model",
            tokenizer,
            tmp_path,
            records,
            format="demonstrations",
            length=8000,
            batch_size=1,
        )
    assert "every token is supervised" in caplog.text


def test_pairs_have_only_the_compared_answer_as_target(tokenizer, tmp_path):
    turns = [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Is it 42?"},
    ]
    long = "It is. " * 40
    records = [
        {"prompt": turns, "chosen": "It is 42.", "rejected": "No."},
        {"prompt": "Is it?", "chosen": "Yes.", "rejected": long},
        {"prompt": "Is it?", "chosen": long, "rejected": "Yes."},
    ]
    for kind in ("reward", "preference"):
        made = build(kind, tokenizer, tmp_path, records, length=64, batch_size=1)
        # A pair too long on either side goes whole, and is counted.
        assert made.dataset.report == {"pairs": 1, "dropped": 2}
        batch = made.dataset.batch_at(0)
        for side, answer in enumerate(("It is 42.", "No.")):
            ids, mask = batch["ids"][0, side], batch["mask"][0, side]
            assert ids[mask].tolist() == [*tokenizer.encode(answer), tokenizer.end]
            last = np.flatnonzero(batch["segments"][0, side]).max()
            assert ids[last] == tokenizer.end and mask[last]
    with pytest.raises(UserError, match="all 2 pairs are longer"):
        build("reward", tokenizer, tmp_path, records[1:], length=64)


def test_prompts_end_where_the_answer_begins(tokenizer, tmp_path):
    records = [{"prompt": "Is it?"}, {"prompt": "What is the capital of France?"}]
    made = build(
        "policy", tokenizer, tmp_path, records, max_new_tokens=16, batch_size=2
    )
    batch = made.dataset.batch_at(0)
    assert batch["prompt_ids"].shape[1] % 8 == 0
    assert (batch["prompt_ids"][:, -1] == tokenizer.assistant).all()
    assert batch["prompt_mask"][:, -1].all()
    found = {
        tokenizer.decode(ids[mask])
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert found == {record["prompt"] for record in records}


def test_a_prompt_that_leaves_no_room_is_told_by_file_and_line(tokenizer, tmp_path):
    records = [{"prompt": "Is it?"}, {"prompt": "Is it? " * 30}]
    told = r"data\.jsonl:2: a prompt of \d+ tokens, but there is room for 48 .*raise"
    with pytest.raises(UserError, match=told):
        build("policy", tokenizer, tmp_path, records, max_new_tokens=16)
