"""Comparisons and judgements come out of their files as padded rows."""

import json

import numpy as np
import pytest

from stagecraft.errors import UserError

PAIR = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}


def answers(tokenizer, batch):
    """The texts a batch's masks mark, as a nested list like its rows."""
    ids, mask = batch["ids"], batch["mask"]
    if ids.ndim > 1:
        return [
            answers(tokenizer, dict(ids=i, mask=m))
            for i, m in zip(ids, mask, strict=True)
        ]
    return tokenizer.decode(ids[mask])


def everything(dataset):
    [batch] = dataset.epoch(dataset.rows)
    return batch


def test_pairs_carry_how_sure_and_by_how_much_only_if_some_record_does(build):
    plain = {"ids", "mask", "segments", "positions", "index"}
    for kind in ("reward", "preference"):
        made = build(kind, [PAIR] * 3, batch_size=2)
        assert {*made.dataset.batch_at(0)} == plain
        records = [PAIR, PAIR | {"preference": 0.75}, PAIR | {"margin": 3}]
        batch = everything(build(kind, records).dataset)
        assert {*batch} == plain | {"preference", "margin"}
        assert batch["preference"].tolist() == [1.0, 0.75, 1.0]
        assert batch["margin"].tolist() == [0.0, 0.0, 3.0]
        assert batch["margin"].dtype == batch["preference"].dtype == np.float32
        assert batch["index"].tolist() == [0, 1, 2]


def test_heldout_rows_have_the_same_arrays_and_other_numbers(build, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps(PAIR | {"preference": 0.5}) + "\n")
    made = build("reward", [PAIR] * 3, heldout=str(tmp_path / "held.jsonl"))
    one, two = everything(made.dataset), everything(made.heldout)
    assert {*one} == {*two}
    assert one["preference"].tolist() == [1.0] * 3
    assert (one["index"].tolist(), two["index"].tolist()) == ([0, 1, 2], [3])


RANKED = [
    {"prompt": "Is it?", "ranked": ["Yes.", "No.", "It is 42."]},
    {"prompt": "Is it 42?", "chosen": "It is.", "rejected": "No."},
    {"prompt": "Is it?", "ranked": ["Yes.", "It is. " * 40, "No."]},
]


def test_rankings_stay_in_one_row_for_a_reward(build, tokenizer):
    made = build("reward", RANKED, length=64)
    # One answer too long, and the whole ranking goes: three pairs.
    assert made.dataset.report == {"pairs": 4, "dropped": 3}
    batch = everything(made.dataset)
    assert answers(tokenizer, batch) == [
        ["Yes.", "No.", "It is 42."],
        ["It is.", "No.", ""],
    ]
    assert batch["present"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["present"].dtype == bool
    assert batch["index"].tolist() == [0, 1]
    assert {batch[k].ndim for k in ("ids", "mask", "segments", "positions")} == {3}
    # Padding is present nowhere.
    *_, last = made.dataset.epoch(3)
    assert last["present"].any(-1).tolist() == [True, True, False]


def test_rankings_become_their_pairs_for_a_preference(build, tokenizer):
    made = build("preference", RANKED, length=64)
    assert made.dataset.report == {"pairs": 5, "dropped": 2}
    batch = everything(made.dataset)
    assert "present" not in batch
    assert answers(tokenizer, batch) == [
        ["Yes.", "No."],
        ["Yes.", "It is 42."],
        ["No.", "It is 42."],
        ["It is.", "No."],
        ["Yes.", "No."],
    ]


def test_judgements_are_rows_of_their_own(build, tokenizer, tmp_path):
    records = [
        {"prompt": "Is it?", "completion": "Yes.", "label": True},
        {"prompt": "Is it 42?", "completion": "It is. " * 40, "label": True},
        {"prompt": "Is it?", "completion": "42.", "label": False},
    ]
    (tmp_path / "pair.jsonl").write_text(json.dumps(PAIR) + "\n")
    both = f"{tmp_path}/data.jsonl,{tmp_path}/pair.jsonl"
    made = build("unpaired_preference", records, length=64, files=both)
    assert made.dataset.report == {"answers": 4, "desirable": 2, "dropped": 1}
    batch = everything(made.dataset)
    assert {*batch} == {"ids", "mask", "segments", "positions", "index", "label"}
    assert batch["label"].tolist() == [True, False, True, False]
    assert batch["label"].dtype == bool
    assert answers(tokenizer, batch) == ["Yes.", "42.", "Yes.", "No."]
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["ids"].shape == batch["mask"].shape == batch["segments"].shape


def test_a_held_out_pair_stays_together(build):
    records = [PAIR | {"prompt": f"Is it {n}?"} for n in range(10)]
    made = build("unpaired_preference", records, heldout_share=0.3)
    assert (made.dataset.rows, made.heldout.rows) == (14, 6)
    assert everything(made.heldout)["label"].tolist() == [True, False] * 3
    assert everything(made.heldout)["index"].tolist() == [*range(14, 20)]


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_alike_are_told(build, label):
    records = [{"prompt": "Is it?", "completion": "Yes.", "label": label}] * 3
    # The only other one is too long to be kept.
    other = {"prompt": "Is it?", "completion": "No. " * 99, "label": not label}
    with pytest.raises(UserError, match=f"every label is {label}; expected") as error:
        build("unpaired_preference", [*records, other])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="all 1 answers are longer"):
        build("unpaired_preference", [other])


def test_pairs_have_only_the_compared_answer_as_target(build, tokenizer):
    turns = [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Is it 42?"},
    ]
    long = "It is. " * 40
    records = [
        {"prompt": turns, "chosen": "It is 42.", "rejected": "No."},
        {"prompt": turns[:1], "chosen": "Yes.", "rejected": long},
        {"prompt": turns[:1], "chosen": long, "rejected": "Yes."},
    ]
    for kind in ("reward", "preference"):
        made = build(kind, records, length=64, batch_size=1, max_loss=1.0)
        # A pair too long on either side goes whole, and is counted.
        assert made.dataset.report == {"pairs": 1, "dropped": 2}
        batch = made.dataset.batch_at(0)
        for side, answer in enumerate(("It is 42.", "No.")):
            ids, mask = batch["ids"][0, side], batch["mask"][0, side]
            assert ids[mask].tolist() == [*tokenizer.encode(answer), tokenizer.end]
            last = np.flatnonzero(batch["segments"][0, side]).max()
            assert ids[last] == tokenizer.end and mask[last]
    with pytest.raises(UserError, match="all 2 pairs are longer"):
        build("reward", records[1:], length=64)


SAME = {"prompt": "Say 0.", "chosen": "0", "rejected": "0"}


def turns(pair):
    """A pair with its answers as messages."""
    sides = ("chosen", "rejected")
    said = {k: [{"role": "assistant", "content": pair[k]}] for k in sides}
    return pair | said


@pytest.mark.parametrize(
    "same",
    [
        SAME,
        SAME | {"rejected_ended": False},
        turns(SAME),
        SAME | {"preference": 0.9, "margin": 2.0},
        {"chosen": "Say: 0", "rejected": "Say: 0"},
        {"prompt": "Say 0.", "ranked": ["0", "0"]},
    ],
)
@pytest.mark.parametrize("kind", ["reward", "preference"])
def test_pairs_of_one_text_are_dropped_and_counted(build, tokenizer, kind, same):
    pair = turns(PAIR) if isinstance(same.get("chosen"), list) else PAIR
    made = build(kind, [pair, same, pair, same])
    assert made.dataset.report == {"pairs": 2, "dropped": 2, "identical": 2}
    assert answers(tokenizer, everything(made.dataset)) == [["Yes.", "No."]] * 2


@pytest.mark.parametrize("kind", ["reward", "preference", "unpaired_preference"])
def test_a_file_of_identical_pairs_alone_is_refused_in_one_line(build, kind):
    pairs = [
        {"prompt": f"Say {n}.", "chosen": str(n), "rejected": str(n)} for n in range(4)
    ]
    says = r"data.jsonl: chosen and rejected are the same text in all 4 pairs; expected"
    with pytest.raises(UserError, match=says) as error:
        build(kind, pairs)
    assert "\n" not in str(error.value)


def test_an_identical_pair_judges_nothing(build, tokenizer):
    made = build("unpaired_preference", [PAIR, SAME])
    report = {"answers": 2, "desirable": 1, "dropped": 2, "identical": 1}
    assert made.dataset.report == report
    assert answers(tokenizer, everything(made.dataset)) == ["Yes.", "No."]


def test_a_ranking_keeps_the_best_place_of_a_repeated_answer(build, tokenizer):
    ranked = {"prompt": "Is it?", "ranked": ["Yes.", "No.", "Yes.", "It is."]}
    made = build("reward", [ranked])
    assert made.dataset.report == {"pairs": 3, "dropped": 3, "identical": 3}
    [texts] = answers(tokenizer, everything(made.dataset))
    assert texts == ["Yes.", "No.", "It is."]
    assert build("preference", [ranked]).dataset.report == made.dataset.report
