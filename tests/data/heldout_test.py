"""What is held out is split by prompt: none of them is in training as well."""

from collections import Counter

import numpy as np
import pytest

from stagecraft.data import conversations
from stagecraft.data.dataset import hold_out
from stagecraft.errors import UserError

NUMBERS = range(12)


def prompts_in(data, tokenizer):
    """{text before what is learned, or the whole prompt: how many rows have it}."""
    counts = Counter()
    for batch in data.epoch(1):
        if "prompt_ids" in batch:
            counts[tokenizer.decode(batch["prompt_ids"][batch["prompt_mask"]])] += 1
            continue
        ids, mask = (
            batch[k].reshape(-1, batch[k].shape[-1])[0] for k in ("ids", "mask")
        )
        first = int(np.flatnonzero(mask)[0]) if mask.any() else len(ids)
        counts[tokenizer.decode(ids[:first])] += 1
    return counts


def pair(n, k):
    prompt = f"What is {n}?"
    return {"prompt": prompt, "chosen": f"It is {k}.", "rejected": f"It is not {k}."}


def asked(n, k):
    return {"prompt": f"What is {n}?", "answer": k}


RECORDS = {
    "preference": pair,
    "reward": pair,
    "unpaired_preference": pair,
    "policy": asked,
    "group_policy": asked,
    "online_preference": asked,
    "language_model": lambda n, k: {
        "prompt": f"What is {n}?",
        "completion": f"It is {k}.",
    },
}


def test_a_text_and_its_message_are_one_prompt():
    message = {"role": "user", "content": "Is it?"}
    alike = conversations.prompt_key("Is it?"), conversations.prompt_key([message])
    assert alike[0] == alike[1] != conversations.prompt_key("Is it")
    # What is learned of an earlier answer is no part of the prompt.
    answer = {"role": "assistant", "content": "No."}
    keys = {
        conversations.prompt_key([message, answer | weight, message])
        for weight in ({}, {"weight": 0}, {"weight": 1})
    }
    assert len(keys) == 1 and alike[0] not in keys


@pytest.mark.parametrize("kind", RECORDS)
def test_no_held_out_prompt_is_trained_on(build, tokenizer, kind):
    """12 prompts, 3 rows of each: a quarter is 3 prompts, 9 rows."""
    settings = dict(heldout_share=0.25)
    if kind == "language_model":
        settings |= dict(format="demonstrations", packing="none")
    if "polic" in kind or kind == "online_preference":
        settings |= dict(max_new_tokens=8)
    made = build(
        kind, [RECORDS[kind](n, k) for k in range(3) for n in NUMBERS], **settings
    )
    train, heldout = (
        prompts_in(data, tokenizer) for data in (made.dataset, made.heldout)
    )
    assert len(train) == 9 and len(heldout) == 3
    assert not train.keys() & heldout.keys()
    each = 6 if kind == "unpaired_preference" else 3  # both answers of a pair
    assert {*train.values(), *heldout.values()} == {each}


def test_conversations_that_differ_in_the_last_answer_alone(build, tokenizer):
    def conversation(n, k):
        turns = [("user", f"What is {n}?"), ("assistant", "42."), ("user", "Is it?")]
        turns.append(("assistant", f"It is {k}."))
        return {"messages": [{"role": r, "content": c} for r, c in turns]}

    made = build(
        "language_model",
        [conversation(n, k) for k in range(2) for n in NUMBERS],
        format="demonstrations",
        packing="none",
        turns="last",
        length=64,
        heldout_share=0.25,
    )
    train, heldout = (
        prompts_in(data, tokenizer) for data in (made.dataset, made.heldout)
    )
    assert (len(train), len(heldout)) == (9, 3) and not train.keys() & heldout.keys()


def test_equal_documents_are_on_one_side(build, tokenizer):
    records = [{"text": f"The capital of France is {n}."} for n in NUMBERS] * 3
    made = build(
        "language_model", records, format="text", packing="none", heldout_share=0.25
    )
    train, heldout = (
        Counter(
            tokenizer.decode(b["ids"][0][b["segments"][0] > 0]) for b in data.epoch(1)
        )
        for data in (made.dataset, made.heldout)
    )
    assert (len(train), len(heldout)) == (9, 3) and not train.keys() & heldout.keys()


def test_the_split_is_a_function_of_the_seed():
    rows = [(n % 10, n) for n in range(40)]
    splits = [hold_out(rows, 0.3, seed, lambda row: row[0]) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    for train, heldout in splits:
        assert sorted(train + heldout) == sorted(rows)
        assert len({row[0] for row in heldout}) == 3


def test_unlike_prompts_are_split_as_rows():
    """The same permutation as of rows, so that such a split stays what it was."""
    train, heldout = hold_out(range(20), 0.25, 3, lambda row: row)
    order = np.random.default_rng([3, 1]).permutation(20)
    assert heldout == sorted(order[:5].tolist()) and len(train) == 15
    assert hold_out(range(3), 0, 3, None) == ([0, 1, 2], [])


def test_one_prompt_cannot_be_split(build):
    records = [pair(1, k) for k in range(8)]
    with pytest.raises(UserError, match="of 1 prompts this keeps 0 back") as error:
        build("preference", records, heldout_share=0.25)
    assert "\n" not in str(error.value)
