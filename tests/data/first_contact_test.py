"""Records as people have them: what is learned of each, or the line that says why not.

Each file holds what a public collection or a trainer's user had; the judge is the text
that is learned, read back from the batch.
"""

import json

import pytest

from stagecraft.data import forms
from stagecraft.errors import UserError
from stagecraft.text import chat
from stagecraft.text.tokenizer import load
from tests.text import families


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


def test_what_a_template_leaves_out_of_tools_is_said(data, tmp_path):
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    noon = [{"role": "tool", "content": "12:00"}, {**ANSWER, "content": "Noon."}]
    schema = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    records = [{"messages": [USER, calling, *noon], "tools": [schema]}]
    told = r"data.jsonl:1: has tool_calls that the tokenizer's template leaves out"
    with pytest.raises(UserError, match=told):
        data("language_model", records)
    good = [{"messages": [USER, ANSWER]}] * 9
    made, _ = data("language_model", good + records, bad="drop")
    assert made.reading["read"] == 10 and sum(made.reading["dropped"].values()) == 1
    # Tools that nobody calls are offered in vain.
    offered = [{"messages": [USER, ANSWER], "tools": [schema]}, *good]
    _, said = data("language_model", offered)
    assert "1 offer tools that the tokenizer's template leaves out" in said[-1]
    # A template that writes both is asked for neither.
    writes = load(families.folder(tmp_path / "f", "qwen3"))
    _, said = data("language_model", records, tokenizer=writes, length=256)
    assert "tools" not in said[-1]


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
