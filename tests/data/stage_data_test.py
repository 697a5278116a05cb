"""A stage's data comes out of its files as promised, array by array."""

import json
import logging

import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.data import stage_data
from stagecraft.errors import UserError


def sums(answers):
    return [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in answers]


def learned(dataset):
    """The targets of an epoch, as sorted ids."""
    found = []
    for batch in dataset.epoch(8):
        found += batch["ids"][batch["mask"]].tolist()
    return sorted(found)


def test_text_comes_out_as_packed_documents(build, tokenizer):
    words = ["Paris.", "France is", "The capital of France is Paris."] * 5
    made = build(
        "language_model",
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


def test_demonstrations_learn_the_same_packed_and_padded(build, tokenizer):
    records = sums(range(30))
    settings = dict(format="demonstrations", length=48)
    packed, padded = (
        build("language_model", records, packing=p, **settings) for p in ("bfd", "none")
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
    build, tokenizer
):
    records = [
        *sums([1, 2]),
        {"prompt": "Is it? " * 30, "completion": "Yes."},  # no answer fits
        {"prompt": "Is it?", "completion": "Yes. " * 30},  # its start does
    ]
    settings = dict(format="demonstrations", length=40, batch_size=1)
    for strategy in ("bfd", "none"):
        made = build(
            "language_model",
            records,
            packing=strategy,
            too_long="cut",
            max_loss=1.0,
            **settings,
        )
        assert made.dataset.report["dropped"] == 1
        assert learned(made.dataset).count(tokenizer.end) == 2  # the cut one has none


def test_a_share_is_held_out_and_replay_mixed_in(build, tokenizer, tmp_path):
    (tmp_path / "replay.txt").write_text("The capital of France is Paris.")
    made = build(
        "language_model",
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


def test_all_supervised_demonstrations_are_warned_about(build, caplog):
    records = [{"prompt": "", "completion": "It is 42. " * 800}]
    with caplog.at_level(logging.WARNING):
        build(
            "language_model",
            records,
            format="demonstrations",
            length=8000,
            batch_size=1,
        )
    assert "every token is supervised" in caplog.text


def test_prompts_end_where_the_answer_begins(build, tokenizer):
    records = [{"prompt": "Is it?"}, {"prompt": "What is the capital of France?"}]
    made = build("policy", records, max_new_tokens=16, batch_size=2)
    batch = made.dataset.batch_at(0)
    assert batch["prompt_ids"].shape[1] % 8 == 0
    assert (batch["prompt_ids"][:, -1] == tokenizer.assistant).all()
    assert batch["prompt_mask"][:, -1].all()
    found = {
        tokenizer.decode(ids[mask])
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert found == {record["prompt"] for record in records}


def test_a_prompt_that_leaves_no_room_is_told_by_file_and_line(build):
    records = [{"prompt": "Is it?"}, {"prompt": "Is it? " * 30}]
    told = r"data\.jsonl:2: a prompt of \d+ tokens, but there is room for 48 .*raise"
    with pytest.raises(UserError, match=told):
        build("policy", records, max_new_tokens=16)


def test_prompts_carry_their_row_and_keep_their_record(build, tokenizer):
    records = [
        {"prompt": f"What is {n}?", "answer": n, "tags": ["sum"]} for n in range(9)
    ]
    for kind in ("policy", "group_policy", "online_preference"):
        made = build(kind, records, max_new_tokens=16)
        assert list(made.records) == records
        assert list(made.prompts) == [record["prompt"] for record in records]
        for step in range(3):
            batch = made.dataset.batch_at(step)
            assert {*batch} == {"prompt_ids", "prompt_mask", "index"}
            assert batch["index"].dtype == np.int32
            for i, row in enumerate(batch["index"]):
                ids = batch["prompt_ids"][i][batch["prompt_mask"][i]]
                assert tokenizer.decode(ids) == records[row]["prompt"]


def test_pretraining_rows_go_beside_the_prompts(build, tokenizer, tmp_path):
    text = "The capital of France is Paris."
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": text}) + "\n") * 40)
    settings = dict(ptx=str(tmp_path / "text.jsonl"), ptx_rows=2, ptx_length=24)
    records = [{"prompt": f"What is {n}?"} for n in range(9)]
    ask = dict(max_new_tokens=16, batch_size=4)
    made = build("policy", records, **ask, **settings)
    plain = build("policy", records, **ask)
    assert settings["ptx"] in made.digests
    size = len(tokenizer.encode(text)) + 2
    rows = -(-40 // (24 // size))
    assert made.dataset.report == {"prompts": 9, "ptx_rows": rows}
    batch = made.dataset.batch_at(0)
    assert all(
        np.array_equal(batch[k], v) for k, v in plain.dataset.batch_at(0).items()
    )
    names = {"ptx_ids", "ptx_mask", "ptx_segments", "ptx_positions"}
    assert {*batch} == {*plain.dataset.batch_at(0), *names}
    assert all(batch[name].shape == (2, 24) for name in names)
    assert tokenizer.decode(batch["ptx_ids"][0][batch["ptx_segments"][0] == 1]) == text
    data = defaults.stage("policy", data=dict(ptx="stage:other")).data
    assert stage_data.stages_named(data) == ["other"]


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(ptx_rows=2), "ptx='' with data.ptx_rows=2: set both"),
        (dict(ptx="FILE"), "ptx_rows=0: set both"),
        (dict(ptx="FILE", ptx_rows=-1), "data.ptx_rows=-1: expected more than 0"),
        (dict(ptx="FILE", ptx_rows=1, ptx_length=0), "data.ptx_length=0"),
        (dict(ptx="FILE", ptx_rows=1, ptx_length=65), "ptx_length=65: longer than"),
    ],
)
def test_pretraining_rows_half_asked_for_are_told(build, tmp_path, settings, told):
    (tmp_path / "text.txt").write_text("It is.")
    if "ptx" in settings:
        settings = settings | {"ptx": str(tmp_path / "text.txt")}
    records = [{"prompt": "Is it?"}]
    with pytest.raises(UserError, match=told) as error:
        build("policy", records, max_new_tokens=16, **settings)
    assert "\n" not in str(error.value)


# -- turns and weights of sources ------------------------------------------------------


def said(*turns):
    roles = {"u": "user", "a": "assistant"}
    return [{"role": roles[t[0]], "content": t[1:]} for t in turns]


def test_turns_and_weights_of_turns(build, tokenizer):
    messages = said("uIs it?", "aYes.", "uIs it 42?", "aIt is 42.")
    other = said("uIs it?", "aNo.", "uIs it?", "aYes.")
    other[3]["weight"] = 0
    records = [{"messages": messages}, {"messages": other}]
    settings = dict(format="demonstrations", length=64, packing="none", batch_size=2)
    for turns, answers, dropped in (
        ("all", ["Yes.", "It is 42.", "No."], 0),
        ("last", ["It is 42."], 1),
    ):
        made = build("language_model", records, turns=turns, **settings)
        want = [i for a in answers for i in [*tokenizer.encode(a), tokenizer.end]]
        assert learned(made.dataset) == sorted(want)
        assert made.dataset.report["dropped"] == dropped


@pytest.mark.parametrize("packed", ["", "none", "wrapped"])
def test_sources_are_weighed_token_by_token(build, tokenizer, tmp_path, packed):
    parts = []
    for number in range(3):
        parts.append(str(tmp_path / f"{number}.jsonl"))
        with open(parts[-1], "w") as file:
            for record in sums(range(100 * number, 100 * number + 6)):
                file.write(json.dumps(record) + "\n")
    settings = dict(format="demonstrations", length=64, batch_size=4, packing=packed)
    settings |= dict(files=",".join(parts))
    made = build(
        "language_model",
        [],
        weights=(1.0, 0.5, 0),
        heldout_share=0.25,
        **settings,
    )
    [batch] = made.dataset.epoch(made.dataset.rows)
    assert batch["weight"].shape == batch["ids"].shape
    assert batch["weight"].dtype == np.float32
    assert not batch["weight"][batch["segments"] == 0].any()
    seen = set()
    for row in range(len(batch["ids"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            at = batch["segments"][row] == segment
            [weight] = {*batch["weight"][row, at].tolist()}
            words = tokenizer.decode(batch["ids"][row, at])
            if packed != "wrapped":  # which cuts numbers in two
                number = int(words.split("What is ")[1].split("?")[0])
                assert weight == (1.0, 0.5, 0.0)[number // 100]
            seen.add(weight)
    assert seen == {1.0, 0.5, 0.0}
    assert "weight" not in made.heldout.batch_at(0)
    plain = build("language_model", [], **settings)
    assert "weight" not in plain.dataset.batch_at(0)


def test_weights_with_replay_whose_rows_count_whole(build, tmp_path):
    (tmp_path / "replay.txt").write_text("The capital of France is Paris.")
    made = build(
        "language_model",
        sums(range(20)),
        format="demonstrations",
        weights=(0.5,),
        replay=str(tmp_path / "replay.txt"),
        replay_share=0.25,
    )
    batch = made.dataset.batch_at(0)
    found = [
        {*w[s > 0]} for w, s in zip(batch["weight"], batch["segments"], strict=True)
    ]
    assert found == [{0.5}, {0.5}, {0.5}, {1.0}]


@pytest.mark.parametrize("weights", [(1.0, 2.0), (-1.0,), (0.0,), ("1",), (True,)])
def test_weights_that_do_not_match_the_files_are_told(build, weights):
    told = r"data.weights=\(.*each of the 1 parts of data.files"
    with pytest.raises(UserError, match=told) as error:
        build("language_model", [{"text": "a"}], weights=weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, told",
    [
        (
            dict(packing="best_fit"),
            "data.packing='best_fit': expected one of '', 'bfd'",
        ),
        (dict(packing="wraped"), "did you mean 'wrapped'"),
        (dict(turns="first"), "data.turns='first': expected one of 'all', 'last'"),
        (dict(format="texts"), "data.format='texts'.*did you mean 'text'"),
    ],
)
def test_unknown_ways_are_told(build, settings, told):
    with pytest.raises(UserError, match=told):
        build("language_model", [{"text": "a"}], **settings)


def test_strategies_keep_and_lose_what_their_names_say(build, tokenizer):
    words = ["The capital of France is Paris. " * 4, "Paris.", "It is 42. " * 9]
    sizes = [len(tokenizer.encode(w)) + 2 for w in words]
    assert max(sizes) > 16

    def tokens(**settings):
        records = [{"text": w} for w in words]
        made = build("language_model", records, length=16, **settings)
        return made.dataset.tokens

    assert tokens() == tokens(packing="bfd_split") == sum(sizes)
    assert tokens(packing="wrapped") == sum(sizes)
    assert tokens(packing="bfd") == sum(min(n, 16) for n in sizes)
    assert tokens(packing="none") == sum(min(n, 16) for n in sizes)


def test_labels_are_of_this_run_or_of_another(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    path = there / "labels" / "sft" / "records.jsonl"
    assert stage_data.locate(f"labels:{there}/sft", here) == str(path)
    spec = f"labels:sft,labels:{there}/sft"
    data = defaults.stage("preference", data=dict(files=spec)).data
    assert stage_data.unlabelled(data, here) == spec.split(",")
    path.parent.mkdir(parents=True)
    path.write_text("")
    assert stage_data.unlabelled(data, here) == ["labels:sft"]
    assert stage_data.unlabelled(data, there) == []
