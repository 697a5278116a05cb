"""Forms are recognised as TRL has them, and what is doubtful is told."""

import json
import logging

import pytest

from stagecraft.data import forms, readers
from stagecraft.errors import UserError


def jsonl(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(*turns):
    return "".join(
        f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}"
        for i, turn in enumerate(turns)
    )


SHARED = [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]
TALK = [user("p"), assistant("c")]


@pytest.mark.parametrize(
    "record, kind",
    [
        ({"messages": TALK}, "messages, conversational"),
        ({"conversations": SHARED}, "messages, from/value"),
        ({"conversations": TALK}, "messages, conversational"),
        ({"messages": SHARED}, "messages, from/value"),
        ({"messages": human("p", "c")}, "messages, transcript"),
        (
            {"messages": [m | {"weight": None, "name": None} for m in TALK]},
            "messages, conversational",
        ),
        ({"prompt": "p", "completion": "c"}, "prompt-completion, standard"),
        (
            {"prompt": TALK[:1], "completion": TALK[1:]},
            "prompt-completion, conversational",
        ),
        (
            {"prompt": human("p", ""), "completion": "c"},
            "prompt-completion, transcript",
        ),
    ],
)
def test_demonstrations_of_every_form(tmp_path, caplog, record, kind):
    path = jsonl(tmp_path / "a.jsonl", *[record | {"id": 7}] * 3)
    with caplog.at_level(logging.INFO, logger="stagecraft.data"):
        assert readers.demonstrations(path) == [(TALK, None)] * 3
    assert caplog.messages == [f"{path}: jsonl, 3 records of {kind}"]


def test_files_of_one_kind_are_said_in_one_line(tmp_path, caplog):
    for name in ("a", "b", "c"):
        jsonl(tmp_path / f"{name}.jsonl", {"text": "x"}, {"text": "y"})
    (tmp_path / "d.txt").write_text("z")
    with caplog.at_level(logging.INFO, logger="stagecraft.data"):
        assert len(list(readers.texts(tmp_path))) == 7
    assert caplog.messages == [
        f"{tmp_path}/a.jsonl and 2 more: jsonl, 6 records of text, standard",
        f"{tmp_path}/d.txt: txt, 1 documents of plain text",
    ]


WORSE = [assistant("r")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": WORSE},
        {"prompt": "p", "chosen": TALK[1:], "rejected": WORSE},
        {"chosen": TALK, "rejected": TALK[:1] + WORSE},
        {"chosen": SHARED, "rejected": [SHARED[0], {"from": "gpt", "value": "r"}]},
        {"chosen": human("p", "c"), "rejected": human("p", "r")},
        # Whole conversations beside the prompt they hold.
        {"prompt": "p", "chosen": TALK, "rejected": TALK[:1] + WORSE},
        {"prompt": human("p", ""), "chosen": "c", "rejected": "r"},
    ],
)
def test_comparisons_of_every_form(tmp_path, record):
    path = jsonl(tmp_path / "a.jsonl", record)
    [found] = readers.comparisons(path)
    assert (found.prompt, found.answers) == (TALK[:1], (TALK[1:], WORSE))


def test_the_prompt_is_the_longest_common_opening(tmp_path):
    long = [*TALK, user("q")]
    path = jsonl(
        tmp_path / "a.jsonl",
        {"chosen": [*long, assistant("x")], "rejected": [*long, assistant("y")]},
        # Alike to the end: dropped, as below.
        {"chosen": TALK, "rejected": TALK},
        # They part at a question: what follows is one answer of several turns.
        {
            "chosen": [*long, assistant("x")],
            "rejected": [*TALK, user("z"), assistant("y")],
        },
    )
    one, three = readers.comparisons(path)
    assert (one.prompt, one.answers) == (long, ([assistant("x")], [assistant("y")]))
    # The last turn is the answer.
    assert forms.pair(None, TALK, TALK) == (TALK[:1], TALK[1:], TALK[1:])
    assert three.prompt == TALK
    assert three.answers[1] == [user("z"), assistant("y")]
    path = jsonl(
        tmp_path / "b.jsonl",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    )
    [plain] = readers.comparisons(path)
    assert plain.prompt == [user("The sky is")]
    assert plain.answers == ([assistant(" blue.")], [assistant(" green.")])


def test_a_transcript_of_many_turns(tmp_path):
    opening = ("Is it? \n\nHuman", "Yes.", "And 42?\n")
    path = jsonl(
        tmp_path / "a.jsonl",
        {"chosen": human(*opening, "It is."), "rejected": human(*opening, "No. ")},
    )
    [found] = readers.comparisons(path)
    want = [user("Is it? \n\nHuman"), assistant("Yes."), user("And 42?")]
    assert found.prompt == want
    assert found.answers == ([assistant("It is.")], [assistant("No.")])


def test_prompts_of_collections_of_harm(tmp_path):
    """Pairs, transcripts of attacks, and requests with their compliance."""
    opening = ("How?", "No.", "Please?")
    turns = [user("How?"), assistant("No."), user("Please?")]
    rows = {
        "pairs": {"chosen": human(*opening, "No."), "rejected": human(*opening, "Ok.")},
        "attacks": {"transcript": human(*opening, "So."), "rating": 4, "tags": ["a"]},
        "ends_with_the_human": {"transcript": human(*opening)},
    }
    for name, row in rows.items():
        [one] = readers.prompts(jsonl(tmp_path / f"{name}.jsonl", row))
        assert one.prompt == turns, name
        assert one.record.items() >= row.items()
    path = tmp_path / "requests.csv"
    path.write_text('goal,target\n"Break in, at night","Sure, here is how"\n')
    [one] = readers.prompts(path)
    assert one.prompt == "Break in, at night"
    assert one.record["target"] == "Sure, here is how"
    # What complies is no demonstration, and a bare text no transcript.
    with pytest.raises(UserError, match="no key 'prompt'; it has 'goal'"):
        readers.demonstrations(path)
    bare = jsonl(tmp_path / "bare.jsonl", {"transcript": "no turns"})
    with pytest.raises(UserError, match="no key 'prompt'"):
        readers.prompts(bare)


def test_prompts_of_every_form(tmp_path):
    for number, prompt in enumerate(
        ("p", [user("p")], SHARED[:1], human("p", ""), human("p"))
    ):
        path = jsonl(tmp_path / f"{number}.jsonl", {"prompt": prompt})
        [found] = readers.prompts(path)
        assert found.prompt == ("p" if number == 0 else [user("p")])
        assert found.record == {"prompt": prompt}


SCHEMA = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA])])
def test_tools_are_carried(tmp_path, tools):
    more = {"tools": tools, "chat_template_kwargs": {}}
    path = jsonl(tmp_path / "a.jsonl", {"messages": TALK} | more)
    assert readers.demonstrations(path)[0].tools == [SCHEMA]
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = jsonl(tmp_path / "b.jsonl", pair | more)
    assert readers.comparisons(path)[0].tools == [SCHEMA]
    assert {j.tools[0]["type"] for j in readers.judgements(path)[0]} == {"function"}
    assert readers.prompts(path)[0].tools == [SCHEMA]


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_no_tools(tmp_path, nothing):
    path = jsonl(tmp_path / "a.jsonl", {"messages": TALK, "tools": nothing})
    assert readers.demonstrations(path)[0].tools is None


# -- doubt -----------------------------------------------------------------------------


def told(path, read=readers.demonstrations):
    with pytest.raises(UserError) as error:
        list(read(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mixed_forms_are_listed_with_counts_keys_and_first_lines(tmp_path):
    two = {"prompt": "p", "completion": "c"}
    path = jsonl(tmp_path / "a.jsonl", two, two, {"messages": TALK}, two)
    assert told(path) == (
        f"{path}: mixed forms: 3 of prompt-completion, standard (first {path}:1, with "
        f"keys 'prompt', 'completion'); 1 of messages, conversational (first {path}:3, "
        "with keys 'messages'); put each form in a file of its own"
    )
    path = jsonl(tmp_path / "b.jsonl", two, two | {"completion": TALK[1:]})
    assert "1 of prompt-completion, conversational (first" in told(path)
    pair = {"chosen": human("p", "c"), "rejected": human("p", "r")}
    path = jsonl(
        tmp_path / "c.jsonl", pair, {"chosen": "not one", "rejected": "not two"}
    )
    assert "mixed forms: 1 of preference, transcript" in told(path, readers.comparisons)


@pytest.mark.parametrize(
    "record, why",
    [
        (
            {"messages": TALK, "completion": "c", "prompt": "p"},
            "has 'messages' and 'completion', any of which may be meant; say which",
        ),
        (
            {"messages": TALK, "conversations": SHARED},
            "has 'messages' and 'conversations'",
        ),
        ({"text": "x"}, "no key 'prompt'; it has 'text'"),
        ({"conversations": [{"from": "bird", "value": ""}]}, "role 'bird'"),
        ({"conversations": [{"from": "human"}]}, "expected messages like"),
        ({"messages": TALK, "tools": "[{"}, "'tools' is no JSON"),
        ({"messages": TALK, "tools": {"a": 1}}, "'tools' is no list of JSON schemas"),
        (
            {"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}},
            "'chat_template_kwargs' is {'enable_thinking': False}, which is not",
        ),
        ({"messages": human("p", "c", "q") + "\n\nHuman: z"}, "message 4 is of"),
    ],
)
def test_a_doubtful_record_is_told_by_line(tmp_path, record, why):
    path = jsonl(tmp_path / "a.jsonl", record)
    assert told(path).startswith(f"{path}:1: ")
    assert why in told(path)


def test_fields_settle_a_doubt(tmp_path):
    record = {"messages": TALK, "completion": "x", "prompt": "y"}
    path = jsonl(tmp_path / "a.jsonl", record)
    mapping = readers.fields("messages=messages")
    assert readers.demonstrations(path, mapping)[0].messages == TALK
    mapping = readers.fields("completion=completion")
    assert readers.demonstrations(path, mapping)[0].messages == [
        user("y"),
        assistant("x"),
    ]


@pytest.mark.parametrize(
    "record, why",
    [
        ({"chosen": "x", "rejected": "y"}, "has no prompt, and chosen and rejected"),
        ({"chosen": "", "rejected": "y"}, "has no prompt"),
        ({"chosen": TALK, "rejected": "y"}, "one is a text, the other messages"),
        (
            {"prompt": "q", "chosen": TALK, "rejected": TALK[:1] + WORSE},
            "has a prompt, and another one in 'chosen'",
        ),
        (
            {"chosen": TALK, "rejected": [user("q"), assistant("c")]},
            "has no prompt, and chosen and rejected begin differently",
        ),
    ],
)
def test_a_doubtful_pair_is_told_by_line(tmp_path, record, why):
    path = jsonl(tmp_path / "a.jsonl", record)
    assert told(path, readers.comparisons).startswith(f"{path}:1: ")
    assert why in told(path, readers.comparisons)


def test_a_census_counts_what_it_sees():
    census = forms.Census(forms.TEXT)
    census.see("f:1", {"text": "\n\nHuman: x"})
    assert str(census.one("f")) == "text, standard"
