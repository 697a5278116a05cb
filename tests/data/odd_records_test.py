"""Records that something is wrong with or odd about: dropped, read, or refused by name.

Bad lines, nulls, maps, control tokens spelled in texts, and files that are splits.
"""

import datetime
import decimal
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from stagecraft.data import containers, files, readers
from stagecraft.errors import UserError
from stagecraft.text.tokenizer import load
from tests.data.first_contact_test import ANSWER, PAIR, USER
from tests.text import families

# -- bad records -----------------------------------------------------------------------


def test_bad_records_are_dropped_and_counted_by_reason(data, tmp_path):
    good = [{"messages": [USER, ANSWER]} for _ in range(9)]
    wrong = {"messages": [USER, USER, ANSWER]}
    later = {"messages": [USER, ANSWER, ANSWER]}
    other = {"prompt": "q", "completion": "a"}
    records = [*good, wrong, later, wrong, other, {"id": 1}]
    with pytest.raises(UserError, match="data.jsonl:10: message 2 is of 'user'"):
        data("language_model", records)
    made, said = data("language_model", records, bad="drop")
    dropped = made.reading["dropped"]
    assert dropped["a message is of 'user', expected 'assistant'"] == 2
    assert dropped["a message is of 'assistant', expected 'user' or 'tool'"] == 1
    assert dropped["of another form (prompt-completion, standard)"] == 1
    assert sum(dropped.values()) == 5 and made.reading["read"] == 14
    assert made.dataset.report["documents"] == 9
    reason = f"2 a message is of 'user', expected 'assistant' (first {tmp_path}"
    assert reason in said[-1]
    with pytest.raises(UserError, match="5 of 14 demonstrations would be lost"):
        data("language_model", records, bad="drop", max_loss=0.3)


def test_lines_that_are_no_json_are_bad_records(data, tmp_path):
    path = tmp_path / "broken.jsonl"
    line = json.dumps({"text": "words"})
    path.write_text(f"{line}\n{{\n[1]\n{line}\n{line}\n")
    keys = dict(files=str(path), format="text")
    with pytest.raises(UserError, match="broken.jsonl:2: not JSON"):
        data("language_model", [], **keys)
    for _ in range(2):  # the second time from the cache
        made, said = data("language_model", [], bad="drop", **keys)
        assert made.dataset.report["documents"] == 3
        assert "5 texts read, 3 used; 2 dropped: 1 not JSON" in said[-1]
    with pytest.raises(UserError, match="broken.jsonl:2: not JSON"):
        data("language_model", [], **keys)


def test_an_empty_answer_of_a_transcript_is_an_answer(data, tmp_path):
    human = "\n\nHuman: Is tea good?\n\nAssistant:"
    made, _ = data("preference", [{"chosen": f"{human} Yes.", "rejected": f"{human} "}])
    assert made.dataset.report["pairs"] == 1
    [read] = readers.comparisons(tmp_path / "data.jsonl")
    assert read.answers[1] == [{"role": "assistant", "content": ""}]
    assert read.prompt == [{"role": "user", "content": "Is tea good?"}]


@pytest.mark.parametrize(
    "pair, why",
    [
        ({"chosen": "", "rejected": "y"}, "has no prompt, and 'chosen' is empty"),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER]},
            "'rejected' is one message, of 'user', without an answer",
        ),
        ({"chosen": "xy", "rejected": "yz"}, "chosen and rejected begin differently"),
    ],
)
def test_a_pair_without_a_prompt_says_what_is_there(data, pair, why):
    with pytest.raises(UserError, match=why):
        data("preference", [pair])


# -- nulls, maps and columns -----------------------------------------------------------


def test_null_is_absent_in_every_container(tmp_path):
    properties = {"zone": {"type": "string", "enum": None}, "city": None}
    plain = {"prompt": "q", "completion": "a"}
    record = plain | {"tools": [{"p": properties}], "margin": None}
    want = plain | {"tools": [{"p": {"zone": {"type": "string"}}}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([record]))
    table = pyarrow.Table.from_pylist([record])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        [(_, read)] = containers.records(tmp_path / name)
        assert read == want


def test_columns_are_what_json_has(tmp_path):
    moment = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
    columns = {
        "prompt": ["q"],
        "when": [moment],
        "day": [moment.date()],
        "price": [decimal.Decimal("1.50")],
        "count": [decimal.Decimal("3.00")],
        "raw": [b"\xff\x00"],
        "took": [datetime.timedelta(seconds=90)],
        "map": pyarrow.array([[("a", 1), ("b", 2)]], pyarrow.map_("string", "int32")),
        "deep": [[{"at": moment.date()}]],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    [(_, read)] = containers.records(tmp_path / "a.parquet")
    assert json.loads(json.dumps(read)) == read
    assert read["when"] == "2024-05-01T12:00:00+00:00" and read["day"] == "2024-05-01"
    assert (read["price"], read["count"], read["took"]) == (1.5, 3, 90.0)
    assert (read["raw"], read["map"]) == ("/wA=", {"a": 1, "b": 2})
    assert read["deep"] == [{"at": "2024-05-01"}]


def test_a_null_margin_is_none(data):
    made, _ = data("reward", [PAIR | {"margin": None}, PAIR | {"margin": 1.5}])
    assert next(made.dataset.epoch(2))["margin"].tolist() == [0.0, 1.5]


# -- control tokens, and texts without a template --------------------------------------


RENDERED = "<|im_start|>user\nName it.<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>"


def test_control_tokens_spelled_in_text_are_letters_or_parsed(data, chatml):
    records = [{"text": RENDERED}, {"text": "Plain."}]
    control = {chatml._ids["<|im_start|>"], chatml._ids["<|im_end|>"]}
    for _ in range(2):  # the second time from the cache
        made, said = data("language_model", records, format="text")
        rows = next(made.dataset.epoch(2))["ids"]
        # Only the end of each text is one.
        assert sum(int(i) in control for i in rows.ravel()) == 2
        assert "1 spell control tokens, read as letters (data.contr" in said[-1]
        keys = dict(format="text", control_tokens="parse")
        made, said = data("language_model", records, **keys)
        batch = next(made.dataset.epoch(2))
        pairs = zip(batch["ids"], batch["segments"], strict=True)
        ids = [row[real > 0].tolist() for row, real in pairs]
        want = chatml._inner.encode(RENDERED, add_special_tokens=False).ids
        assert ids[0] == want and want[-1] == chatml.eos  # which is not put twice
        assert ids[1] == [*chatml.encode("Plain."), chatml.eos]
        assert "1 spell control tokens, read as those tokens" in said[-1]


def test_messages_that_spell_control_tokens_are_counted(data, chatml):
    records = [{"prompt": prompt, "completion": "a"} for prompt in (RENDERED, "q")]
    made, said = data("language_model", records)
    assert "1 spell control tokens, read as letters" in said[-1]
    begins = chatml._ids["<|im_start|>"]
    counts = (next(made.dataset.epoch(2))["ids"] == begins).sum(1).tolist()
    assert counts == [2, 2]
    made, said = data("language_model", records, control_tokens="parse")
    counts = (next(made.dataset.epoch(2))["ids"] == begins).sum(1).tolist()
    assert counts == [4, 2]


def test_a_tokenizer_without_spelled_tokens_refuses_to_parse(data, tokenizer):
    with pytest.raises(UserError, match="data.control_tokens='parse': the control"):
        data("preference", [PAIR], tokenizer=tokenizer, control_tokens="parse")


def test_texts_are_continued_where_there_are_no_turns(data, tmp_path):
    bare = load(families.folder(tmp_path / "bare", "chatml", chat_template=None))
    records = [{"prompt": "Say it:", "completion": " Paris."}]
    with pytest.raises(UserError, match="data.render='text'"):
        data("language_model", records, tokenizer=bare)
    made, _ = data("language_model", records, tokenizer=bare, render="text")
    assert made.samples == ["Say it:"]  # what a model of texts is watched on
    batch = made.dataset.batch_at(0)
    ids, mask = batch["ids"][0], batch["mask"][0]
    whole, given = bare.encode("Say it: Paris."), bare.encode("Say it:")
    assert ids[batch["segments"][0] > 0].tolist() == [*whole, bare.eos]
    assert ids[mask].tolist() == [*whole[len(given) :], bare.eos]
    pair = {"prompt": "Say it:", "chosen": " Paris.", "rejected": "No."}
    made, _ = data("preference", [pair], tokenizer=bare, render="text")
    batch = made.dataset.batch_at(0)
    learned = batch["ids"][0, 0][batch["mask"][0, 0]].tolist()
    assert learned == [*whole[len(given) :], bare.eos]
    with pytest.raises(UserError, match="data.render='text' is for a prompt and"):
        data("language_model", [{"messages": [USER, ANSWER] * 2}], render="text")


# -- splits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, read",
    [
        (
            ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
            ["train-00000-of-00001.jsonl"],
        ),
        (("train.jsonl", "test.jsonl", "more.jsonl"), ["more.jsonl", "train.jsonl"]),
        (("train/0.jsonl", "validation/0.jsonl", "dev.jsonl"), ["0.jsonl"]),
        (("sft_train.jsonl", "sft-eval.jsonl"), ["sft_train.jsonl"]),
        (("test.jsonl", "b.jsonl"), ["b.jsonl", "test.jsonl"]),
        (("train.jsonl", "latest.jsonl"), ["latest.jsonl", "train.jsonl"]),
        (
            ("date=2024-05-01/part-0.jsonl", "date=2024-05-02/part-1.jsonl"),
            ["part-0.jsonl", "part-1.jsonl"],
        ),
    ],
)
def test_of_a_folder_with_splits_train_alone_is_read(tmp_path, caplog, names, read):
    root = tmp_path / "test set"  # its own name says nothing
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}) + "\n")
    with caplog.at_level(logging.INFO, logger="stagecraft.data"):
        for spec in (str(root), f"{root}/**/*.jsonl"):
            assert [path.name for path in files.expand(spec)] == read
            files.expand(spec)
    left = len(names) - len(read)
    assert len(caplog.messages) == (2 if left else 0)
    if left:
        told = caplog.messages[0]
        assert told.startswith(f"{root}: the train split is read, ")
        assert "name it in data.heldout to evaluate on it" in told
    # What is named by itself is read.
    both = ",".join(str(root / name) for name in names)
    assert len(files.expand(both)) == len(names)


def test_what_is_both_held_out_and_trained_on_is_warned_about(data, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"set-{name}.jsonl").write_text(json.dumps(PAIR) + "\n")
    keys = dict(files=f"{tmp_path}/set*", heldout=f"{tmp_path}/set*")
    _, said = data("preference", [], **keys)
    assert any(
        "set-train.jsonl is in data.files too, and trained on" in s for s in said
    )
    keys["heldout"] = f"{tmp_path}/set-test.jsonl"
    made, said = data("preference", [], **keys)
    assert made.heldout.rows == 1 == made.dataset.rows
    assert not any("trained on" in line for line in said)
