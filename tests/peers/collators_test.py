"""Our batches hold what TRL's collators make of the same tokens, also when shifted."""

import numpy as np
import pytest

from stagecraft import losses
from stagecraft.data import packing
from tests.data.packed import pack
from tests.peers import bridge
from tests.peers.bridge import datasets

trl = pytest.importorskip("trl")
sft = pytest.importorskip("trl.trainer.sft_trainer")
dpo = pytest.importorskip("trl.trainer.dpo_trainer")
kto = pytest.importorskip("trl.trainer.kto_trainer")
reward = pytest.importorskip("trl.trainer.reward_trainer")

pytestmark = pytest.mark.peers

IGNORED = -100


def drawn(rng, count, low=2, high=12):
    """Documents whose first token is never learned, as `chat` makes them."""
    documents = [bridge.words(rng, low, high) for _ in range(count)]
    return [
        (ids, [False, *(rng.random(len(ids) - 1) < 0.6).tolist()]) for ids in documents
    ]


def labelled(ids, mask):
    pairs = zip(ids, mask, strict=True)
    return [int(i) if m else IGNORED for i, m in pairs]


def labels_of(arrays):
    """What a position is asked for, as the peer writes it: after the shift."""
    names = ("ids", "mask", "segments")
    targets, mask = map(np.asarray, losses.shift(*(arrays[k] for k in names)))
    return np.where(mask, targets, IGNORED)


def shifted(labels):
    """The peer's labels one place to the left, as its loss reads them."""
    return np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


# -- next token ------------------------------------------------------------------------


def test_padded_rows(parity_rng):
    for _ in range(10):
        documents = drawn(parity_rng, int(parity_rng.integers(1, 9)))
        examples = [
            {"input_ids": ids, "labels": labelled(ids, mask)} for ids, mask in documents
        ]
        collator = sft.DataCollatorForLanguageModeling(
            pad_token_id=0, return_position_ids=True
        )
        want = {k: v.numpy() for k, v in collator(examples).items()}
        got = packing.pad(documents, want["input_ids"].shape[1])
        real = got["segments"] > 0
        np.testing.assert_array_equal(got["ids"], want["input_ids"])
        np.testing.assert_array_equal(real, want["attention_mask"])
        np.testing.assert_array_equal(got["positions"], want["position_ids"])
        np.testing.assert_array_equal(
            np.where(got["mask"], got["ids"], IGNORED), want["labels"]
        )
        np.testing.assert_array_equal(labels_of(got), shifted(want["labels"]))


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_rows_ask_for_the_same_and_never_across_documents(strategy, parity_rng):
    for _ in range(5):
        documents = drawn(parity_rng, 20, high=30)
        # First tokens too: both sides must leave them out by themselves.
        documents = [(ids, [True] * len(ids)) for ids, _ in documents]
        made = datasets.Dataset.from_dict(
            {
                "input_ids": [ids for ids, _ in documents],
                "labels": [labelled(*document) for document in documents],
            }
        )
        packed = trl.pack_dataset(made, 16, strategy)
        collator = sft.DataCollatorForLanguageModeling(
            pad_token_id=0, padding_free=True
        )
        want = collator(list(packed))
        got = pack(documents, 16, strategy=strategy)
        real = got["segments"] > 0
        np.testing.assert_array_equal(got["ids"][real], want["input_ids"][0])
        np.testing.assert_array_equal(got["positions"][real], want["position_ids"][0])
        np.testing.assert_array_equal(
            labels_of(got)[real], shifted(want["labels"].numpy())[0]
        )
        # They number documents through all rows, we anew in each.
        before = np.cumsum(got["segments"].max(1)) - got["segments"].max(1)
        numbers = got["segments"] - 1 + before[:, None]
        np.testing.assert_array_equal(numbers[real], want["seq_idx"][0])


def test_the_documented_examples_of_the_language_model_collator():
    documents = [([1, 2, 3], [False, True, True]), ([4, 5], [False, True])]
    examples = [
        {"input_ids": ids, "labels": labelled(ids, mask)} for ids, mask in documents
    ]
    padded = sft.DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    got = packing.pad(documents, 3)
    assert padded["input_ids"].tolist() == got["ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert padded["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    free = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    got = pack(documents, 5, strategy="bfd")
    want = free(examples)
    assert (
        want["position_ids"].tolist() == got["positions"].tolist() == [[0, 1, 2, 0, 1]]
    )
    assert labels_of(got).tolist() == [[2, 3, -100, 5, -100]]
    assert shifted(want["labels"].numpy()).tolist() == labels_of(got).tolist()


# -- pairs and single answers ----------------------------------------------------------


def answered(prompt, answer):
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def halves(x):
    """The peer's [all chosen; all rejected] as [B, 2, T]."""
    x = x.numpy()
    return np.stack([x[: len(x) // 2], x[len(x) // 2 :]], 1)


def assert_pairs(examples, limit=None):
    collator = dpo.DataCollatorForPreference(pad_token_id=0, max_length=limit)
    want = {k: halves(v) for k, v in collator(examples).items()}
    rows = [
        tuple(
            answered(e["prompt_ids"], e[side])
            for side in ("chosen_ids", "rejected_ids")
        )
        for e in examples
    ]
    got = packing.pad_answers(rows, want["input_ids"].shape[-1])
    np.testing.assert_array_equal(got["ids"], want["input_ids"])
    np.testing.assert_array_equal(got["segments"] > 0, want["attention_mask"])
    np.testing.assert_array_equal(got["mask"], want["completion_mask"])
    positions = np.cumsum(want["attention_mask"], -1) - want["attention_mask"]
    np.testing.assert_array_equal(got["positions"], positions * want["attention_mask"])
    return got


def test_pairs():
    examples = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
    ]
    got = assert_pairs(examples)
    assert got["ids"].tolist() == [
        [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]],
        [[7, 8, 9, 0, 0], [7, 8, 10, 11, 0]],
    ]
    assert got["mask"].astype(int).tolist() == [
        [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]],
        [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0]],
    ]


@pytest.mark.parametrize("limit", [None, 9])
def test_random_pairs_whole_and_cut_at_their_end(limit, parity_rng):
    for _ in range(10):
        count = int(parity_rng.integers(1, 6))
        examples = [
            {
                name: bridge.words(parity_rng, 1, 8)
                for name in ("prompt_ids", "chosen_ids", "rejected_ids")
            }
            for _ in range(count)
        ]
        assert_pairs(examples, limit)


def test_pairs_for_a_reward_with_margins(parity_rng):
    prompts, chosen, rejected = (
        [bridge.words(parity_rng, 1, 8) for _ in range(5)] for _ in range(3)
    )
    examples = [
        {"chosen_ids": p + c, "rejected_ids": p + r, "margin": m}
        for p, c, r, m in zip(
            prompts, chosen, rejected, parity_rng.normal(size=5), strict=True
        )
    ]
    want = reward.DataCollatorForPreference(pad_token_id=0)(examples)
    rows = [
        (answered(p, c), answered(p, r))
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]
    ids = halves(want["input_ids"])
    got = packing.pad_answers(rows, ids.shape[-1])
    np.testing.assert_array_equal(got["ids"], ids)
    np.testing.assert_array_equal(got["segments"] > 0, halves(want["attention_mask"]))
    np.testing.assert_allclose(want["margin"], [e["margin"] for e in examples], 1e-6)


def test_single_answers(parity_rng):
    examples = [
        {
            "prompt_ids": bridge.words(parity_rng, 1, 8),
            "completion_ids": bridge.words(parity_rng, 1, 8),
            "label": bool(parity_rng.integers(2)),
        }
        for _ in range(7)
    ]
    want = kto.DataCollatorForUnpairedPreference(pad_token_id=0)(examples)
    rows = [answered(e["prompt_ids"], e["completion_ids"]) for e in examples]
    got = packing.pad(rows, want["input_ids"].shape[1])
    np.testing.assert_array_equal(got["ids"], want["input_ids"])
    np.testing.assert_array_equal(got["segments"] > 0, want["attention_mask"])
    np.testing.assert_array_equal(got["mask"], want["completion_mask"])
