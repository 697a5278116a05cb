"""Conversations become ids and masks as written by hand."""

import numpy as np
import pytest

from stagecraft.errors import UserError
from stagecraft.text import chat


class Letters:
    """A tokenizer of single letters, so that ids can be written by hand."""

    bos, eos, system, user, assistant, end = "^", "$", "S", "U", "A", "."
    template = None

    def encode(self, text):
        return list(text)


def said(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[t[0]], "content": t[1:]} for t in turns]


def test_multi_turn_mask_by_hand():
    ids, mask = chat.render(said("sx", "uab", "acd", "ue", "af"), Letters())
    assert "".join(ids) == "^SxUabAcd.UeAf."
    learned = "".join(i for i, m in zip(ids, mask, strict=True) if m)
    assert learned == "cd.f."  # every assistant turn with its end, nothing else
    assert [int(m) for m in mask] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]


def test_an_empty_answer_still_learns_to_end():
    ids, mask = chat.render(said("uab", "a"), Letters())
    assert "".join(ids) == "^UabA."
    assert mask == [False] * 5 + [True]


def test_an_answer_that_was_cut_off_gets_no_end():
    messages = said("uab", "acd")
    messages[-1]["ended"] = False
    ids, mask = chat.render(messages, Letters())
    assert "".join(ids) == "^UabAcd"
    assert mask == [False] * 5 + [True] * 2


def test_a_turn_of_weight_0_is_context():
    messages = said("ua", "abc", "ud", "aef", "ug", "ah")
    messages[1]["weight"], messages[3]["weight"], messages[5]["weight"] = 0, 1, 0
    ids, mask = chat.render(messages, Letters())
    assert "".join(ids) == "^UaAbc.UdAef.UgAh."
    assert "".join(i for i, m in zip(ids, mask, strict=True) if m) == "ef."
    # The words are the same, whatever is learned of them.
    assert ids == chat.render(said("ua", "abc", "ud", "aef", "ug", "ah"), Letters())[0]


def test_the_last_turn_alone():
    messages = said("sx", "uab", "acd", "ue", "af")
    ids, mask = chat.render(messages, Letters(), turns="last")
    assert "".join(ids) == "^SxUabAcd.UeAf."
    assert "".join(i for i, m in zip(ids, mask, strict=True) if m) == "f."
    # It is the assistant's last, also where the user has the last word.
    ids, mask = chat.render(said("ua", "ab", "uc"), Letters(), turns="last")
    assert "".join(i for i, m in zip(ids, mask, strict=True) if m) == "b."
    messages[-1]["weight"] = 0
    assert not any(chat.render(messages, Letters(), turns="last")[1])


@pytest.mark.parametrize(
    "role, weight, told",
    [
        ("a", 2, "weight is 2, expected 0"),
        ("a", 0.5, "weight is 0.5"),
        ("a", True, "weight is True"),
        ("a", None, "weight is None"),
        ("a", [], "weight is \\[\\]"),
        ("u", 0, "a message of 'user' has a weight"),
        ("a", 0, "at least one assistant"),
    ],
)
def test_a_weight_that_means_nothing_is_refused(role, weight, told):
    messages = said("ua", "ab")
    messages["ua".index(role)]["weight"] = weight
    with pytest.raises(UserError, match=told) as error:
        chat.conversation({"messages": messages})
    assert "\n" not in str(error.value)


def test_generation_prompt_is_the_rendering_up_to_the_answer():
    messages = said("sx", "uab", "acd", "ue", "af")
    prompt = chat.generation_prompt(messages[:-1], Letters())
    assert "".join(prompt) == "^SxUabAcd.UeA"
    assert chat.render(messages, Letters())[0][: len(prompt)] == prompt


def test_document_learns_all_but_bos():
    ids, mask = chat.document("abc", Letters())
    assert "".join(ids) == "^abc$"
    assert mask == [False, True, True, True, True]


@pytest.mark.parametrize("prompt", ["ab", said("uab")])
@pytest.mark.parametrize("completion", ["cd", said("acd")])
def test_prompt_and_completion_as_text_or_messages(prompt, completion):
    record = {"prompt": prompt, "completion": completion}
    assert chat.conversation(record) == said("uab", "acd")


def test_messages_are_taken_as_they_are():
    messages = said("sx", "uab", "acd", "ue", "af")
    assert chat.conversation({"messages": messages}) == messages


@pytest.mark.parametrize(
    "messages, told",
    [
        ([], "a text or a list"),
        (None, "a text or a list"),
        (["hello"], "role"),
        ([{"role": "user"}], "role"),
        ([{"role": "human", "content": "x"}], "'human'"),
        ([{"role": "user", "content": None}], "content"),
        (said("ua"), "at least one assistant"),
        (said("aa"), "message 1 is of 'assistant'"),
        (said("ua", "ub", "ac"), "message 2 is of 'user', expected 'assistant'"),
        (said("ua", "ab", "ac"), "message 3 is of 'assistant', expected 'user'"),
        (said("ua", "sb", "ac"), "message 2 is of 'system'"),
        (said("sx", "sy", "ua", "ab"), "message 2 is of 'system', expected 'user'"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, told):
    with pytest.raises(UserError, match=told):
        chat.conversation({"messages": messages})


def test_a_conversation_must_end_with_whom_it_should():
    assert chat.check_turns(said("sx", "ua"), ("user",)) == said("sx", "ua")
    with pytest.raises(UserError, match="last message is of 'assistant'"):
        chat.check_turns(said("ua", "ab"), ("user",))
    with pytest.raises(UserError, match="last message is of 'user'"):
        chat.check_turns(said("ua", "ab", "uc"), ("assistant",))


CALL = {"function": {"name": "f", "arguments": {}}}


def test_tools_take_turns_with_the_assistant():
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "y"},
    ]
    assert chat.conversation({"messages": messages}) == messages
    calling = [messages[0], {"role": "assistant", "tool_calls": [CALL]}]
    assert chat.as_messages(calling) == calling
    # A user who speaks up before the assistant has read what a tool says.
    assert chat.check_turns(messages[:3] + messages[:1])
    with pytest.raises(UserError, match="message 2 is of 'tool'"):
        chat.check_turns(messages[:1] + messages[2:])
    with pytest.raises(UserError, match="message 2 is of a tool or calls one"):
        chat.render(messages, Letters())
    with pytest.raises(UserError, match="message 3 is of a tool"):
        chat.render([*said("ua", "ab"), messages[2]], Letters())
    with pytest.raises(UserError, match="tools need a tokenizer with a chat template"):
        chat.render(said("ua", "ab"), Letters(), tools=[{}])


@pytest.mark.parametrize(
    "message, told",
    [
        (
            {"role": "user", "content": "x", "tool_calls": [CALL]},
            "'user' has tool_calls",
        ),
        ({"role": "assistant", "tool_calls": "f"}, "expected tool_calls like"),
        ({"role": "assistant", "tool_calls": [{"id": 1}]}, "expected tool_calls like"),
        ({"role": "assistant", "tool_calls": []}, "expected messages like"),
        ({"role": "assistant", "content": [], "tool_calls": [CALL]}, "to be a text"),
        ({"role": "tool", "content": None}, "to be a text"),
    ],
)
def test_messages_that_call_tools_wrongly_are_refused(message, told):
    with pytest.raises(UserError, match=told):
        chat.as_messages([message])


def test_tokens_that_touch_a_span_are_the_loop():
    """Also tokens without characters, and several of one character."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges = np.sort(rng.integers(0, 30, (rng.integers(0, 12), 2)), axis=0)
        offsets = [(int(a), int(max(a, b))) for a, b in edges]
        cuts = np.unique(rng.integers(0, 30, 2 * rng.integers(0, 4)))
        spans = [(int(a), int(b)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        by_loop = [
            any(max(start, low) < min(end, high) for low, high in spans)
            for start, end in offsets
        ]
        assert chat._touched(offsets, spans) == by_loop


def test_a_document_of_a_tokenizer_without_bos():
    class Bare(Letters):
        bos = None

    ids, mask = chat.document("ab", Bare())
    assert "".join(ids) == "ab$" and mask == [True] * 3
