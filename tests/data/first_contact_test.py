"""Records as people have them: what is learned of each, or the line that says why not.

Each file holds what a public collection or a trainer's user had; the judge is the text
that is learned, read back from the batch.
"""

import datetime
import decimal
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from stagecraft import defaults
from stagecraft.data import containers, files, forms, readers, stage_data
from stagecraft.errors import UserError
from stagecraft.stages import kinds
from stagecraft.text import chat
from stagecraft.text.tokenizer import load
from tests.text import families


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return load(families.folder(tmp_path_factory.mktemp("chatml") / "f", "chatml"))


@pytest.fixture
def data(chatml, tmp_path, caplog):
    """(kind, records, **data keys) -> (StageData, [lines that were said])."""

    def read(kind, records, tokenizer=chatml, max_length=256, **keys):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        stage = defaults.stage(kind)
        stage.batch_size = 1
        keys = {"files": str(path)} | keys
        if kind == "language_model":
            keys = {"format": "demonstrations", "packing": "none"} | keys
        stage.data.update(keys)
        config = {"seed": 0, "model": {"max_length": max_length}, "stages": {}}
        builder = kinds.of(stage).data
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="stagecraft.data"):
            readers._log_once.cache_clear()
            made = stage_data.build(
                stage,
                tokenizer,
                tmp_path,
                ConfigDict(config),
                builder,
                "s",
            )
        return made, caplog.messages

    return read


def shown(tokenizer, made):
    """The text of each row, with « » around what is learned."""
    texts = []
    for batch in made.dataset.epoch(made.dataset.rows):
        rows = zip(batch["ids"], batch["mask"], batch["segments"], strict=True)
        for ids, mask, segments in rows:
            text, inside = "", False
            for token, learned, real in zip(ids, mask, segments, strict=True):
                if learned != inside:
                    text += "«" if learned else "»"
                    inside = learned
                if real:
                    text += tokenizer._inner.id_to_token(int(token))
            texts.append(text.replace("Ġ", " ").replace("Ċ", "\n"))
    return texts


def turns(*said):
    """The ChatML text of ("role", "words") pairs, answers learned."""
    text = ""
    for role, words in said:
        end = f"{words}<|im_end|>"
        text += f"<|im_start|>{role}\n" + (f"«{end}»" if role == "assistant" else end)
        text += "\n"
    return text


SYSTEM = {"role": "system", "content": "s"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "record, want",
    [
        (
            {"instruction": "Count.", "input": "banana", "output": "3"},
            [("user", "Count.\n\nbanana"), ("assistant", "3")],
        ),
        (
            {"instruction": "Name it.", "input": "", "output": "Iron."},
            [("user", "Name it."), ("assistant", "Iron.")],
        ),
        (
            {"instruction": "When?", "context": "In 1987.", "response": "1987"},
            [("user", "When?\n\nIn 1987."), ("assistant", "1987")],
        ),
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"query": "q", "response": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "response": "a"}, [("user", "q"), ("assistant", "a")]),
        (
            {"system": "s", "instruction": "q", "output": "a"},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {
                "system": "s",
                "messages": [SYSTEM, USER, ANSWER],
            },
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": [{"text": "a"}, {"text": "b"}]},
                ]
            },
            [("user", "q"), ("assistant", "ab")],
        ),
        ({"messages": json.dumps([USER, ANSWER])}, [("user", "q"), ("assistant", "a")]),
        (
            {"prompt": "q", "completion": "a", "messages": None},
            [("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_what_is_learned_of_records_of_others(data, chatml, record, want):
    made, _ = data("language_model", [record])
    learned = turns(*want)
    [text] = shown(chatml, made)
    assert text.replace("»\n", "»").strip() == learned.replace("»\n", "»").strip()


def test_a_turn_that_is_not_to_be_trained_on_is_context(data, chatml):
    wrong = {"role": "assistant", "content": "5", "train": False}
    right = {"role": "assistant", "content": "4", "train": True}
    made, said = data("language_model", [{"messages": [USER, wrong, USER, right]}])
    [text] = shown(chatml, made)
    assert "\n5<|im_end|>" in text and "«4<|im_end|>" in text and text.count("«") == 1
    with pytest.raises(UserError, match="train is 'no', expected true or false"):
        data("language_model", [{"messages": [USER, wrong | {"train": "no"}]}])


def test_an_assistant_that_begins_is_context_and_said(data, chatml):
    talk = [{"from": "gpt", "value": "Welcome!"}, {"from": "human", "value": "Hi"}]
    talk.append({"from": "gpt", "value": "Hello."})
    made, said = data("language_model", [{"conversations": talk}])
    [text] = shown(chatml, made)
    assert "\nWelcome!<|im_end|>" in text and "«Hello.<|im_end|>" in text
    assert [turn["content"] for turn in made.samples[0]] == ["Welcome!", "Hi"]
    assert text.count("«") == 1
    assert "1 begin with the assistant, whose first turn is context" in said[-1]


def test_calls_and_observations_of_sharegpt():
    call = '{"name": "clock", "arguments": {"zone": "Oslo"}}'
    said = [
        {"from": "human", "value": "Time?"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "Noon."},
    ]
    calling, answer = forms.messages(said)[1:3]
    assert calling["role"] == "assistant" and calling["content"] == ""
    assert calling["tool_calls"] == [{"type": "function", "function": json.loads(call)}]
    assert answer == {"role": "tool", "content": "12:00"}
    older = {"role": "assistant", "content": None, "function_call": json.loads(call)}
    [read] = forms.messages([older])
    assert read["tool_calls"] == calling["tool_calls"] and "function_call" not in read
    [read] = forms.messages([{"role": "function", "name": "clock", "content": "12:00"}])
    assert read == {"role": "tool", "name": "clock", "content": "12:00"}
    with pytest.raises(UserError, match="what 'function_call' says is no JSON"):
        forms.messages([said[0], {"from": "function_call", "value": "clock()"}])


def test_arguments_that_are_json_text_are_objects():
    function = {"name": "clock", "arguments": '{"zone": "Oslo", "day": null}'}
    for call in ({"type": "function", "function": function}, function):
        [message] = forms.messages([{"role": "assistant", "tool_calls": [call]}])
        [read] = message["tool_calls"]
        assert read.get("function", read)["arguments"] == {"zone": "Oslo"}
    assert function["arguments"].startswith("{")  # the file's own is left alone


def test_parts_that_are_no_text_are_refused_by_name(data):
    part = {"type": "image_url", "image_url": {"url": "cat.png"}}
    message = {"role": "user", "content": [{"type": "text", "text": "q"}, part]}
    told = r"data.jsonl:1: .*a part of type 'image_url'; text alone is read"
    with pytest.raises(UserError, match=told):
        data("language_model", [{"messages": [message, ANSWER]}])


def test_two_systems_are_refused(data):
    record = {"messages": [{"role": "system", "content": "t"}, USER, ANSWER]}
    with pytest.raises(UserError, match="data.jsonl:1: has a system message, and"):
        data("language_model", [record | {"system": "s"}])


# -- what is not read, and what is lost ------------------------------------------------


def test_keys_that_hold_something_and_are_not_read_are_named(data):
    records = [
        {"messages": [USER, ANSWER], "images": ["cat.png"], "history": []},
        {"messages": [USER, ANSWER], "images": [], "history": [["p", "a"]], "id": 0},
        {"messages": [USER, ANSWER], "images": ["dog.png"], "context": ""},
    ]
    made, said = data("language_model", records)
    assert said[-1] == (
        "s: not read, though they hold something: images (2), history (1), id (1)"
    )
    assert made.reading["unread"] == {"images": 2, "history": 1, "id": 1}
    # Other keys of a prompt are for verifiers.
    records = [{"prompt": "q", "answer": "4", "context": "c"}]
    made, said = data("policy", records)
    assert said[-1] == "s: not read, though they hold something: context (1)"


def test_one_line_says_what_became_of_the_records(data, chatml):
    long = {"prompt": "q", "completion": "word " * 90}
    short = {"prompt": "q", "completion": "a"}
    made, said = data("language_model", [short, short, long], length=64)
    where = made.reading["said"][0].split("first ")[1].split(")")[0]
    assert where.endswith("data.jsonl:3")
    longest, share = made.reading["longest"], made.reading["targets_lost"]
    assert said[-1] == (
        f"s: 3 demonstrations read, 2 used; 1 dropped: 1 too long (first {where}); the "
        f"longest has {longest} tokens, data.length=64; {share:.1%} of the target "
        "tokens lost"
    )
    assert longest > 64 and made.reading["dropped"] == {"too long": 1}
    targets = [
        sum(chat.render(forms.messages(one["prompt"]) + answer(one), chatml)[1])
        for one in (short, long)
    ]
    assert share == pytest.approx(targets[1] / (2 * targets[0] + targets[1]))


def answer(record):
    return forms.messages(record["completion"], "assistant")


@pytest.mark.parametrize("packing", ["none", "bfd"])
def test_no_demonstration_loses_its_end_unless_asked(data, chatml, packing):
    long = {"prompt": "q", "completion": "word " * 90}
    records = [{"prompt": "q", "completion": "a"}, long]
    made, _ = data("language_model", records, length=64, packing=packing)
    assert [text.count("«") for text in shown(chatml, made)] == [1]
    assert made.dataset.report["documents"] == 1 == made.dataset.report["dropped"]
    keys = dict(length=64, packing=packing, max_loss=0.9)
    made, said = data("language_model", records, too_long="cut", **keys)
    assert len(shown(chatml, made)) == 2 and "2 used (1 of them cut)" in said[-1]
    assert 0.25 < made.reading["targets_lost"] < 0.9
    with pytest.raises(UserError, match=r"data.jsonl:2: 1 of 2 .*data.too_long='drop'"):
        data("language_model", records, too_long="refuse", **keys)
    # Split, nothing of it is lost.
    keys["packing"] = "bfd_split"
    made, said = data("language_model", records, **keys)
    assert "2 demonstrations read, all used" in said[-1]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("kind", ["reward", "preference", "unpaired_preference"])
def test_a_stage_that_would_lose_most_of_its_records_is_refused(data, kind):
    long = [
        {"prompt": f"q{n}", "chosen": "word " * 90, "rejected": "text " * 90}
        for n in range(9)
    ]
    told = r"data.files=.*would be lost: .* too long \(first .*data.jsonl:1\); data.len"
    with pytest.raises(UserError, match=told) as error:
        data(kind, [*long, PAIR], length=64)
    assert "raise data.length" in str(error.value)
    assert "data.max_loss=1" in str(error.value) and "\n" not in str(error.value)
    made, said = data(kind, [*long, PAIR], length=64, max_loss=1.0)
    assert made.reading["used"] == (2 if kind == "unpaired_preference" else 1)


def test_pairs_that_are_cut_lose_their_ends(data, chatml):
    long = {"prompt": "q", "chosen": "word " * 90, "rejected": "text " * 90}
    empty = {"prompt": "word " * 90, "chosen": "a", "rejected": "b"}
    alike = {"prompt": "q", "chosen": "word " * 90 + "a", "rejected": "word " * 90}
    records = [PAIR, long, empty, alike]
    keys = dict(too_long="cut", length=64, max_loss=1.0)
    made, said = data("preference", records, **keys)
    assert made.dataset.report == {"pairs": 2, "dropped": 2}
    assert made.dataset.batch_at(0)["ids"].shape[-1] == 64
    assert made.reading["cut"] == 1
    assert made.reading["dropped"] == {"alike once cut": 2}


def test_prompts_too_long_are_refused_together_dropped_or_cut(data, chatml):
    long = {"prompt": "word " * 90}
    records = [{"prompt": "q"}, long, {"prompt": "r"}, long]
    room = dict(max_length=96)
    with pytest.raises(UserError, match="data.jsonl:2: .* 2 of 4 prompts are too long"):
        data("policy", records, **room)
    made, said = data("policy", records, too_long="drop", **room)
    assert list(made.prompts) == ["q", "r"] and made.dataset.rows == 2
    assert [record["prompt"] for record in made.records] == ["q", "r"]
    assert "4 prompts read, 2 used; 2 dropped: 2 too long (first" in said[-1]
    made, said = data("policy", records, too_long="cut", **room)
    assert "4 used (2 of them cut)" in said[-1] and len(made.prompts) == 4
    batch = next(made.dataset.epoch(4))
    # Its end is what is answered.
    ids = chatml.encode("\n")
    assert batch["prompt_ids"][1, -len(ids) :].tolist() == ids
    assert batch["prompt_mask"][1].all()


def test_values_of_the_new_keys_are_checked(data):
    for key, value in (("bad", "skip"), ("too_long", "trim"), ("render", "html")):
        with pytest.raises(UserError, match=f"data.{key}='{value}': expected one of"):
            data("preference", [PAIR], **{key: value})
    with pytest.raises(UserError, match="data.max_loss=1.5: expected a share"):
        data("preference", [PAIR], max_loss=1.5)


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


# -- more of the same ------------------------------------------------------------------


def test_two_keys_are_joined_by_fields(data, chatml):
    record = {"task": "Count.", "given": "banana", "gold": "3"}
    fields = "prompt=task+given+completion=gold"
    made, said = data(
        "language_model", [record, record | {"given": " "}], fields=fields
    )
    whole, alone = shown(chatml, made)
    assert "Count.\n\nbanana<|im_end|>" in whole and "user\nCount.<|im_end|>" in alone
    assert not any("not read" in line for line in said)
    made, _ = data("policy", [record], fields="prompt=task+given")
    assert list(made.records) == [record | {"prompt": "Count.\n\nbanana"}]
    with pytest.raises(UserError, match="expected a text under each key to join"):
        data("language_model", [record | {"given": 3}], fields=fields)


@pytest.mark.parametrize("kind", ["preference", "unpaired_preference", "policy"])
def test_a_system_text_is_the_first_turn_everywhere(data, chatml, kind):
    record = {"system": "Be brief.", "question": "q", "chosen": "a", "rejected": "b"}
    if kind == "policy":
        record = {"system": "Be brief.", "question": "q", "answer": "a"}
    made, said = data(kind, [record])
    batch = made.dataset.batch_at(0)
    ids = batch.get("ids", batch.get("prompt_ids")).reshape(-1)
    text = chatml._inner.decode(ids.tolist(), skip_special_tokens=False)
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>"
    assert head in text
    assert not any("not read" in line for line in said)


def test_a_record_keeps_its_prompt_whole(data):
    with pytest.raises(UserError, match="data.too_long='cut': a record keeps its prom"):
        data("comparisons", [{"prompt": "q"}], too_long="cut")
    made, _ = data(
        "comparisons", [{"prompt": "q"}, {"prompt": "w " * 300}], too_long="drop"
    )
    assert list(made.prompts) == ["q"] and made.reading["dropped"] == {"too long": 1}
