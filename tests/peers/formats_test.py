"""Records of every form come out as TRL's own functions have them."""

import copy
import json

import pytest

from stagecraft.data import forms, readers
from stagecraft.text import chat
from stagecraft.text.tokenizer import load
from tests.peers import bridge  # noqa: F401  (torch and the rest, or the test is left out)
from tests.text import families

trl = pytest.importorskip("trl")
utils = pytest.importorskip("trl.data_utils")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.peers

WORDS = ["the", "sky", "is", "blue", "é", "😀", "42", "\n\nHuman", "why", "not", "..."]


def text(rng, least=1):
    return " ".join(rng.choice(WORDS, int(rng.integers(least, 8))).tolist())


def turns(rng, count, first=0):
    roles = ("user", "assistant")
    found = [
        {"role": roles[i % 2], "content": text(rng)}
        for i in range(first, first + count)
    ]
    if first == 0 and rng.random() < 0.3:
        found.insert(0, {"role": "system", "content": text(rng)})
    return found


def jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def parted(rng):
    """Two conversations that begin alike: (chosen, rejected)."""
    common = turns(rng, 2 * int(rng.integers(0, 4)) + 1)
    return [
        [*copy.deepcopy(common), {"role": "assistant", "content": f"{text(rng)} {i}"}]
        for i in range(2)
    ]


def test_prompts_that_are_implicit_in_conversations(parity_rng, tmp_path):
    records = [
        dict(zip(("chosen", "rejected"), parted(parity_rng), strict=True))
        for _ in range(100)
    ]
    found = readers.comparisons(jsonl(tmp_path / "a.jsonl", records))
    for one, record in zip(found, records, strict=True):
        want = utils.maybe_extract_prompt(copy.deepcopy(record))
        assert one.prompt == want["prompt"]
        assert one.answers == (want["chosen"], want["rejected"])
    # Where two are alike to the end, the last turn is the answer.
    for record in ({"chosen": r["chosen"], "rejected": r["chosen"]} for r in records):
        want = utils.maybe_extract_prompt(copy.deepcopy(record))
        sides = want["prompt"], want["chosen"], want["rejected"]
        assert forms.pair(None, **record) == sides


def test_prompts_that_are_implicit_in_texts(parity_rng, tmp_path):
    records = []
    while len(records) < 100:
        opening = f"W{text(parity_rng, 2)} "
        chosen, rejected = (opening + text(parity_rng) for _ in range(2))
        if chosen != rejected:
            records.append({"chosen": chosen, "rejected": rejected})
    found = readers.comparisons(jsonl(tmp_path / "a.jsonl", records))
    for one, record in zip(found, records, strict=True):
        want = utils.maybe_extract_prompt(dict(record))
        assert one.prompt == [{"role": "user", "content": want["prompt"]}]
        for answer, side in zip(one.answers, ("chosen", "rejected"), strict=True):
            assert answer == [{"role": "assistant", "content": want[side]}]


def test_prompts_beside_whole_conversations(parity_rng, tmp_path):
    """What TRL's maybe_extract_prompt does with UltraFeedback's columns."""
    records = []
    for _ in range(50):
        chosen, rejected = parted(parity_rng)
        prompt = chosen[-2]["content"]
        records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    found = readers.comparisons(jsonl(tmp_path / "a.jsonl", records))
    for one, record in zip(found, records, strict=True):
        want = utils.maybe_extract_prompt(copy.deepcopy(record))
        assert one.prompt == want["prompt"]
        assert one.answers == (want["chosen"], want["rejected"])


def test_from_and_value_become_role_and_content(parity_rng, tmp_path):
    def shared(messages):
        return [{"from": m["role"], "value": m["content"]} for m in messages]

    records = []
    for _ in range(100):
        messages = turns(parity_rng, 2 * int(parity_rng.integers(1, 4)))
        records.append({"conversations": shared(messages)})
    assert all(utils.is_conversational_from_value(r) for r in records)
    found = readers.demonstrations(jsonl(tmp_path / "a.jsonl", records))
    for one, record in zip(found, records, strict=True):
        want = utils.maybe_convert_to_chatml(copy.deepcopy(record))
        assert one.messages == want["messages"]
    pairs = []
    for _ in range(50):
        chosen, rejected = map(shared, parted(parity_rng))
        pairs.append({"chosen": chosen, "rejected": rejected})
    found = readers.comparisons(jsonl(tmp_path / "b.jsonl", pairs))
    for one, record in zip(found, pairs, strict=True):
        want = utils.maybe_convert_to_chatml(copy.deepcopy(record))
        want = utils.maybe_extract_prompt(want)
        assert one.prompt == want["prompt"]
        assert one.answers == (want["chosen"], want["rejected"])


def test_pairs_as_judgements(parity_rng, tmp_path):
    records = [
        {"prompt": text(parity_rng), "chosen": text(parity_rng), "rejected": "no"}
        for _ in range(30)
    ]
    found = readers.judgements(jsonl(tmp_path / "a.jsonl", records))
    want = utils.unpair_preference_dataset(datasets.Dataset.from_list(records))
    ours = sorted(
        (j.prompt[0]["content"], j.completion[0]["content"], j.label)
        for pair in found
        for j in pair
    )
    assert ours == sorted((w["prompt"], w["completion"], w["label"]) for w in want)


def test_standard_and_conversational_are_told_apart(parity_rng):
    for _ in range(50):
        talk = turns(parity_rng, 2)
        for accepted, record in (
            (forms.DEMONSTRATIONS, {"messages": talk}),
            (forms.DEMONSTRATIONS, {"prompt": text(parity_rng), "completion": "x"}),
            (forms.DEMONSTRATIONS, {"prompt": talk[:-1], "completion": talk[-1:]}),
            (forms.PROMPTS, {"prompt": text(parity_rng)}),
            (forms.PROMPTS, {"prompt": talk[:-1]}),
            (forms.COMPARISONS, {"chosen": talk, "rejected": talk}),
            (forms.TEXT, {"text": text(parity_rng)}),
        ):
            style = forms.Census(accepted).see("", record).style
            conversational = utils.is_conversational(record)
            assert style == ("conversational" if conversational else "standard")


@pytest.mark.parametrize("split", [False, True])
def test_what_datasets_saved_is_read_without_it(parity_rng, tmp_path, split):
    records = [
        {"messages": turns(parity_rng, 2), "number": i, "nothing": None}
        for i in range(40)
    ]
    records[3]["messages"][-1]["weight"] = 0  # null in all the other structs
    records[3]["messages"] += turns(parity_rng, 2)[-2:]
    made = datasets.Dataset.from_list(records)
    # Shuffled, so that what is saved is not the order of the table below.
    made = made.shuffle(seed=int(parity_rng.integers(100)))
    whole = datasets.DatasetDict({"train": made}) if split else made
    shards = {"num_shards": {"train": 3}} if split else {"num_shards": 3}
    whole.save_to_disk(tmp_path / "saved", **shards)
    made.to_parquet(tmp_path / "set.parquet")
    made.to_json(tmp_path / "set.jsonl")
    want = [records[row["number"]]["messages"] for row in made]
    for name in ("saved", "set.parquet", "set.jsonl"):
        found = readers.demonstrations(tmp_path / name)
        assert [one.messages for one in found] == want


def test_texts_are_continued_as_by_the_sft_trainer(parity_rng, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = families.folder(tmp_path / "bare", "chatml", chat_template=None)
    records = [
        {"prompt": text(parity_rng), "completion": text(parity_rng)} for _ in range(40)
    ]
    # One whose completion begins in the middle of a token.
    records.append({"prompt": "The capital of F", "completion": "rance."})
    shape = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    trainer = trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(shape),
        args=trl.SFTConfig(
            str(tmp_path / "out"), max_length=None, use_cpu=True, report_to="none"
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    ours = load(folder)
    for record, row in zip(records, trainer.train_dataset, strict=True):
        ids, mask, _ = chat.continuation(*record.values(), ours)
        assert ids == row["input_ids"]
        assert mask == [label != -100 for label in row["labels"]]
