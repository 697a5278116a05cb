"""Packing keeps every token once, whole where it can, and never mixes documents."""

import time

import numpy as np
import pytest

from stagecraft import losses
from stagecraft.data import packing
from tests.data.packed import pack

# That keep every token; "bfd" loses what does not fit in a row.
KEEPING = ("bfd_split", "wrapped")


def document(start, size, mask=None):
    ids = list(range(start, start + size))
    return ids, [False] + [True] * (size - 1) if mask is None else mask


def random_documents(count, longest, seed=0):
    """Documents of ids that occur nowhere else, with masks by chance."""
    rng = np.random.default_rng(seed)
    found, start = [], 1
    for size in rng.integers(1, longest + 1, count):
        mask = (rng.random(size) < 0.5).tolist()
        found.append(document(start, int(size), mask))
        start += int(size)
    return found


def unpacked(arrays):
    """(ids, mask) of every segment; checks on the way that each is in one piece."""
    found = []
    for i in range(len(arrays["ids"])):
        segments = arrays["segments"][i]
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all()  # padding only at the end
        assert not arrays["mask"][i, used:].any()
        assert not arrays["ids"][i, used:].any()
        assert not arrays["positions"][i, used:].any()
        number = segments.max(initial=0)
        assert np.array_equal(np.unique(segments[:used]), np.arange(1, number + 1))
        assert (np.diff(segments[:used]) >= 0).all()
        for segment in range(1, number + 1):
            at = segments == segment
            assert np.array_equal(arrays["positions"][i, at], np.arange(at.sum()))
            found.append((arrays["ids"][i, at].tolist(), arrays["mask"][i, at]))
    return found


def targets(arrays):
    """What each token is asked to predict: sorted (token, next token)."""
    found, mask = losses.shift(arrays["ids"], arrays["mask"], arrays["segments"])
    mask = np.asarray(mask)
    return sorted(zip(arrays["ids"][mask], np.asarray(found)[mask], strict=True))


def test_best_fit_by_hand():
    documents = [document(10, 2), document(20, 5), document(30, 3), document(40, 1)]
    # Longest first: 5 opens a row of 6 (1 left); 3 opens another (3 left); 2 goes there
    # (1 left); 1 fits both, and goes where that one place has been left the longest.
    got = pack(documents, 6)
    want = {
        "ids": [
            [20, 21, 22, 23, 24, 40],
            [30, 31, 32, 10, 11, 0],
        ],
        "segments": [[1, 1, 1, 1, 1, 2], [1, 1, 1, 2, 2, 0]],
        "positions": [[0, 1, 2, 3, 4, 0], [0, 1, 2, 0, 1, 0]],
        "mask": [[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 0]],
    }
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_best_fit_takes_the_row_with_the_least_room():
    # Rows of 10 with 7 and 6 taken, then 3: fits both, and belongs to the first.
    got = pack([document(1, 6), document(11, 7), document(21, 3)], 10)
    assert got["ids"][0, 7:].tolist() == [21, 22, 23]
    assert got["segments"][1].tolist() == [1] * 6 + [0] * 4


def test_equal_rooms_are_filled_in_the_order_they_came_about():
    # 8 leaves room for 2, then 6 + 2 does: the two pieces of 2 left go there in turn.
    sizes = [8, 6, 2, 2, 2]
    got = pack([document(10 * i, n) for i, n in enumerate(sizes, 1)], 10)
    assert got["ids"][:, 8:].tolist() == [[30, 31], [50, 51]]
    assert got["ids"][1, 6:8].tolist() == [40, 41]


def test_the_three_strategies_of_the_peer_by_hand():
    """The example of TRL's documentation; rows of 4."""
    documents = [document(1, 5), document(6, 2), document(8, 3), document(11, 1)]
    want = {
        "bfd": [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]],
        "bfd_split": [[1, 2, 3, 4], [8, 9, 10, 5], [6, 7, 11]],
        "wrapped": [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]],
    }
    segments = {
        "bfd": [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1]],
        "bfd_split": [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 2]],
        "wrapped": [[1, 1, 1, 1], [1, 2, 2, 3], [1, 1, 2]],
    }
    assert {*want} == {*packing.STRATEGIES}
    for strategy, rows in want.items():
        got = pack(documents, 4, strategy=strategy)
        real = got["segments"] > 0
        found = [got["ids"][i, real[i]].tolist() for i in range(len(real))]
        assert found == rows, strategy
        found = [got["segments"][i, real[i]].tolist() for i in range(len(real))]
        assert found == segments[strategy], strategy


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="'best_fit': expected one of"):
        pack([document(1, 2)], 4, strategy="best_fit")


def test_wrapped_by_hand():
    got = pack([document(10, 3), document(20, 6)], 4, strategy="wrapped")
    want = {
        "ids": [[10, 11, 12, 20], [21, 22, 23, 24], [25, 0, 0, 0]],
        "segments": [[1, 1, 1, 2], [1, 1, 1, 1], [1, 0, 0, 0]],
        "positions": [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]],
        "mask": [[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
    }
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_kinds_of_arrays():
    for arrays in (
        pack([document(1, 3)], 4),
        packing.pad([document(1, 3)], 4),
        packing.pad_answers([(document(1, 3), document(4, 2))], 4),
    ):
        kinds = {name: value.dtype for name, value in arrays.items()}
        assert kinds == {
            "ids": np.int32,
            "segments": np.int32,
            "positions": np.int32,
            "mask": np.bool_,
        }


@pytest.mark.parametrize("strategy", KEEPING)
@pytest.mark.parametrize("length", [7, 32])
def test_every_token_is_kept_once_with_its_mask(strategy, length):
    documents = random_documents(150, 50)
    found = unpacked(pack(documents, length, strategy=strategy))
    kept = {i: m for ids, mask in found for i, m in zip(ids, mask, strict=True)}
    want = {i: m for ids, mask in documents for i, m in zip(ids, mask, strict=True)}
    assert kept == want
    assert sum(len(ids) for ids, _ in found) == len(want)
    # Each segment is a stretch of one document.
    home = {i: number for number, (ids, _) in enumerate(documents) for i in ids}
    for ids, _ in found:
        assert len({home[i] for i in ids}) == 1
        assert ids == list(range(ids[0], ids[0] + len(ids)))


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_and_padded_ask_for_the_same_predictions(strategy):
    documents = random_documents(200, 24)
    packed = targets(pack(documents, 24, strategy=strategy))
    assert packed == targets(packing.pad(documents, 24))
    by_hand = [
        (ids[t], ids[t + 1])
        for ids, mask in documents
        for t in range(len(ids) - 1)
        if mask[t + 1]
    ]
    assert packed == sorted(by_hand)


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_no_prediction_crosses_documents(strategy):
    # All is a target, first tokens too: only the segments keep documents apart.
    documents = [document(1000 * i, 9, [True] * 9) for i in range(1, 30)]
    asked = targets(pack(documents, 32, strategy=strategy))
    assert asked
    assert all(b == a + 1 for a, b in asked)


def test_split_cuts_only_what_is_longer_than_a_row():
    documents = [document(1, 4), document(11, 10), document(31, 3)]
    found = sorted(ids for ids, _ in unpacked(pack(documents, 4)))
    assert found == [
        [1, 2, 3, 4],
        [11, 12, 13, 14],
        [15, 16, 17, 18],
        [19, 20],
        [31, 32, 33],
    ]


def test_bfd_keeps_the_start_of_what_is_longer_than_a_row():
    documents = [document(1, 4), document(11, 10), document(31, 3)]
    found = unpacked(pack(documents, 4, strategy="bfd"))
    assert sorted(ids for ids, _ in found) == [
        [1, 2, 3, 4],
        [11, 12, 13, 14],
        [31, 32, 33],
    ]


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_a_document_takes_its_weight_along(strategy):
    documents = random_documents(60, 20)
    weights = {i: n / 8 for n, (ids, _) in enumerate(documents) for i in ids}
    weighed = [(*d, n / 8) for n, d in enumerate(documents)]
    plain = pack(documents, 16, strategy=strategy)
    got = pack(weighed, 16, strategy=strategy)
    weight = got.pop("weight")
    assert all(np.array_equal(plain[k], got[k]) for k in {*plain, *got})
    assert weight.dtype == np.float32
    want = [weights.get(i, 0.0) for i in got["ids"].ravel()]  # 0 where there is none
    np.testing.assert_array_equal(weight.ravel(), want)
    padded = packing.pad(weighed, 16)
    want = [weights.get(i, 0.0) for i in padded["ids"].ravel()]
    np.testing.assert_array_equal(padded["weight"].ravel(), want)


def test_wrapped_fills_every_row_but_the_last():
    arrays = pack(random_documents(100, 40), 16, strategy="wrapped")
    assert (arrays["segments"][:-1] > 0).all()


def test_best_fit_fills_well():
    arrays = pack(random_documents(2000, 60), 64)
    assert (arrays["segments"] > 0).mean() > 0.98


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_packing_is_a_function_of_its_input(strategy):
    documents = random_documents(300, 40)
    one = pack(documents, 32, strategy=strategy)
    two = pack(list(documents), 32, strategy=strategy)
    assert all(np.array_equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_nothing_and_empty_documents_make_no_row(strategy):
    for documents in ([], [([], [])]):
        assert pack(documents, 8, strategy=strategy)["ids"].shape == (0, 8)
    got = pack([([], []), document(1, 2), ([], [])], 8, strategy=strategy)
    assert got["ids"].shape == (1, 8)
    assert got["segments"].max() == 1


def test_many_documents_take_seconds():
    rng = np.random.default_rng(0)
    tokens, learned = list(range(700)), [True] * 700
    for low, high, count in ((5, 40, 200_000), (300, 700, 20_000)):
        sizes = rng.integers(low, high, count)
        documents = [(tokens[:n], learned[:n]) for n in sizes]
        start = time.process_time()  # of this process alone: others may be busy
        pack(documents, 512)
        assert time.process_time() - start < 10


def test_pad_keeps_the_order_and_the_start():
    arrays = packing.pad([document(1, 2), document(11, 9), document(31, 4)], 4)
    assert arrays["ids"].tolist() == [[1, 2, 0, 0], [11, 12, 13, 14], [31, 32, 33, 34]]
    assert arrays["segments"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert arrays["mask"].tolist()[0] == [False, True, False, False]
    assert arrays["positions"].tolist()[0] == [0, 1, 0, 0]


def test_pairs_by_hand():
    longer, shorter = ([1, 2, 3], [False, True, True]), ([1, 9], [False, True])
    got = packing.pad_answers([(longer, shorter), (longer, longer)], 4)
    assert got["ids"].tolist() == [
        [[1, 2, 3, 0], [1, 9, 0, 0]],
        [[1, 2, 3, 0], [1, 2, 3, 0]],
    ]
    assert got["mask"][0].astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 0, 0]]
    assert got["segments"][0].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert got["positions"][0].tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]


def test_rankings_of_unequal_length_are_filled_up_with_nothing():
    one, two = ([1, 2, 3], [False, True, True]), ([1, 9], [False, True])
    got = packing.pad_answers([(one, two, one), (two, one)], 4)
    assert {v.shape for v in got.values()} == {(2, 3, 4)}
    assert got["segments"].any(-1).tolist() == [[True] * 3, [True, True, False]]
    assert got["ids"][1].tolist() == [[1, 9, 0, 0], [1, 2, 3, 0], [0] * 4]
    assert not got["mask"][1, 2].any()


def test_prompts_end_in_the_last_column():
    got = packing.pad_prompts([[1, 2], [3, 4, 5, 6]], 4)
    assert got["prompt_ids"].tolist() == [[0, 0, 1, 2], [3, 4, 5, 6]]
    assert got["prompt_mask"].astype(int).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert got["prompt_ids"].dtype == np.int32
    assert got["prompt_mask"].dtype == np.bool_
