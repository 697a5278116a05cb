"""The end of a turn and its beginning, from the template to what is learned."""

import json
import re
import time

import pytest
from ml_collections import ConfigDict

from stagecraft import defaults
from stagecraft.data import stage_data
from stagecraft.errors import UserError
from stagecraft.stages import kinds
from stagecraft.text import chat, tokenizer_export
from stagecraft.text import tokenizer as tokenizers
from tests.text import families

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why"},
    {"role": "assistant", "content": "So."},
]
TURN = "<|im_start|>{{ m.role }}\n"
BLOCK = "{% generation %}{{ m.content }}{% endgeneration %}"


def template(answer, other="{{ m.content }}<|im_end|>\n", first="", last=""):
    """A template: what stands before each turn, in an answer, in others, at the end."""
    return (
        "{% for m in messages %}" + first + TURN + "{% if m.role == 'assistant' %}"
        f"{answer}{{% else %}}{other}{{% endif %}}{{% endfor %}}{last}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.fixture
def load(tmp_path):
    def made(source, **files):
        folder = families.folder(tmp_path, "chatml", chat_template=source)
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        return tokenizers.load(folder)

    return made


def learned(tokenizer, messages, **settings):
    """The text under the mask, control tokens too."""
    ids, mask = chat.render(messages, tokenizer, **settings)
    picked = [i for i, m in zip(ids, mask, strict=True) if m]
    return tokenizer._inner.decode(picked, skip_special_tokens=False)


# What follows an answer

INSIDE = template("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}")
OUTSIDE = template(BLOCK + "<|im_end|>\n")
BEHIND_A_LINE = template(BLOCK + "{{ '\n<|im_end|>' }}")
BY_THE_NEXT = template(
    BLOCK, "{{ m.content }}", first="{% if not loop.first %}<|im_end|>\n{% endif %}"
)


def test_an_end_that_a_block_leaves_out_is_learned(load, caplog):
    chat._say_once.cache_clear()
    ours = load(OUTSIDE)
    assert learned(ours, TALK) == "Yes?<|im_end|>So.<|im_end|>"
    assert learned(ours, TALK, turns="last") == "So.<|im_end|>"
    assert (
        learned(ours, [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]) == "So.<|im_end|>"
    )
    cut = [*TALK[:3], TALK[3] | {"ended": False}]
    assert learned(ours, cut) == "Yes?<|im_end|>So."
    (record,) = caplog.records
    assert "it is learned with the answer" in record.getMessage()
    inside = load(
        template("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}")
    )
    assert learned(inside, TALK) == "Yes?<|im_end|>So.<|im_end|>"


def test_an_end_behind_a_line_end(load):
    assert learned(load(BEHIND_A_LINE), TALK) == "Yes?\n<|im_end|>So.\n<|im_end|>"


def test_an_end_that_the_next_turn_writes(load, caplog):
    """Answers that are followed by a turn learn to end; the last one cannot."""
    ours = load(BY_THE_NEXT)
    assert learned(ours, TALK) == "Yes?<|im_end|>So."
    one, two = (chat.render(messages, ours) for messages in (TALK[:2], TALK))
    caplog.clear()
    check([one, two], ours, required=True)
    (record,) = caplog.records
    assert "data.files=x: 1 of 2 conversations hold an end" in record.getMessage()
    with pytest.raises(UserError, match="x: 0 of 1 conv.*would never stop.*template"):
        check([one], ours, required=True)
    caplog.clear()
    check([one], ours, required=False)
    assert "0 of 1" in caplog.records[0].getMessage()
    caplog.clear()
    check([one, two], ours, required=False)
    assert not caplog.records


def check(documents, ours, *, required):
    ends = sum(chat.ends(*one, ours) for one in documents)
    total = sum(any(mask) for _, mask in documents)
    chat.check_ends(ends, total, "data.files=x", required=required)


def data_of(kind, tokenizer, records, root):
    path = root / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    stage = defaults.stage(kind, batch_size=1)
    stage.data.update(files=str(path), length=64)
    if kind == "language_model":
        stage.data.format = "demonstrations"
    config = ConfigDict({"seed": 0, "model": {"max_length": 64}, "stages": {}})
    return stage_data.build(stage, tokenizer, root, config, kinds.of(stage).data)


def test_data_in_which_nothing_ends(load, tmp_path, caplog):
    ours, one = load(BY_THE_NEXT), {"messages": TALK[:2]}
    with pytest.raises(UserError, match="data.jsonl: 0 of 2 conversations.*never stop"):
        data_of("language_model", ours, [one, one], tmp_path)
    data_of("language_model", ours, [one, {"messages": TALK}], tmp_path)
    assert "data.jsonl: 1 of 2 conversations hold an end" in caplog.text
    pair = {"prompt": "Hi", "chosen": "Yes?", "rejected": "So."}
    caplog.clear()
    data_of("preference", ours, [pair], tmp_path)
    assert "data.jsonl: 0 of 2 conversations hold an end" in caplog.text
    caplog.clear()
    for kind, record in [("language_model", one), ("preference", pair)]:
        data_of(kind, load(OUTSIDE), [record], tmp_path)
    assert "conversations hold an end" not in caplog.text
    # What a length limit cut off has no end, and may be learned.
    cut = {"messages": [TALK[0], TALK[1] | {"ended": False}]}
    data_of("language_model", load(OUTSIDE), [cut], tmp_path)


def test_ends_are_counted_where_something_is_learned(load, caplog):
    ours = load(OUTSIDE)
    whole = chat.render(TALK, ours)
    nothing = [whole[0], [False] * len(whole[0])]
    # A stop that is given and not learned is no end to learn.
    check([whole, nothing], ours, required=True)
    assert not [r for r in caplog.records if "data.files" in r.getMessage()]
    given = [whole[0], [True] + [False] * (len(whole[0]) - 1)]
    with pytest.raises(UserError, match="0 of 1"):
        check([given], ours, required=True)


# Where an answer begins

ANSWERS = ["\nOld pond", "\n\nPond", " Pond", "Pond", "", "\n"]
PLAIN = template("{{ m.content }}<|im_end|>\n")
# The block begins before the prompt for an answer ends.
WHOLE_TURN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    + TURN
    + "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    + TURN
    + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("source", [INSIDE, PLAIN, OUTSIDE, WHOLE_TURN])
def test_the_prompt_begins_what_is_learned(source, answer, load):
    ours = load(source)
    for before in ([], TALK[:2]):
        messages = [*before, TALK[2], {"role": "assistant", "content": answer}]
        ids, mask = chat.render(messages, ours)
        prompt = chat.generation_prompt(messages[:-1], ours)
        assert ids[: len(prompt)] == prompt
        rest = ours._inner.decode(ids[len(prompt) :], skip_special_tokens=False)
        assert rest.startswith(f"{answer}<|im_end|>")
        assert all(mask[len(prompt) : ids.index(ours.stops[0], len(prompt)) + 1])


def test_every_answer_of_a_conversation_stands_apart(load, caplog):
    chat._say_once.cache_clear()
    ours = load(INSIDE)
    messages = [m | {"content": f"\n{m['content']}"} for m in TALK]
    ids, _ = chat.render(messages, ours)
    text = ours.template.text(messages)
    cuts = [m.end() for m in re.finditer(r"assistant\n", text)]
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    encode = ours._inner.encode
    assert ids == [i for p in parts for i in encode(p, add_special_tokens=False).ids]
    assert "tokenised apart, as when the model answers" in caplog.text


# The clock

CLOCK = "{{ strftime_now('%H:%M:%S') }}" + INSIDE


def test_a_template_reads_one_moment_for_a_whole_run(load, tmp_path):
    first = load(CLOCK)
    before = first.template.text(TALK)
    tokenizers.keep(first, tmp_path / "kept")
    time.sleep(1.1)
    again = tokenizers.load(tmp_path / "kept")
    assert again.template.text(TALK) == before == first.template.text(TALK)
    assert load(CLOCK).template.text(TALK) != before
    assert (again.digest, again.files) == (first.digest, first.files)
    files, notes = tokenizer_export.files(again)
    assert "reads the clock" in notes[0] and files.keys() < again.files.keys()
    assert not [name for name in load(INSIDE).files if "moment" in name]
    (tmp_path / "kept" / "chat_moment.txt").write_text("noon")
    with pytest.raises(UserError, match="chat_moment.txt: expected a time.*'noon'"):
        tokenizers.load(tmp_path / "kept")


# Export


def test_generation_ends_where_training_did(load):
    ours = load(OUTSIDE)
    (turn,) = ours.stops
    for ends, expected in [(turn + 1, [turn, turn + 1]), (turn, turn), (None, [turn])]:
        settings = {"temperature": 0.6, "eos_token_id": ends, "do_sample": True}
        found = load(OUTSIDE, generation_config=settings)
        files, notes = tokenizer_export.files(found)
        written = json.loads(files["generation_config.json"])
        assert written == settings | {"eos_token_id": expected}
        assert len(notes) == (ends != expected)
        if ends != turn:
            assert str(expected) in notes[0]
        else:
            assert files == found.files
