"""Our own tokenizers as tokenizer.json: the same ids, turns and masks."""

import json

import numpy as np
import pytest
import tokenizers as library

from stagecraft.text import byte_tokenizer, chat, tokenizer_export
from stagecraft.text import tokenizer as tokenizers

WORDS = ["capital", "of", "France", "is", "Paris", "1969", "+", "12", "=", "ünïcode"]
WORDS += ["日本", "\U0001f600", "\t\n", "", "▂", "<s", "end|>"]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is the capital of France?\n"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Yes  \U0001f600 "},
]


@pytest.fixture(scope="module", params=["sentencepiece", "bytes"])
def pair(request, tmp_path_factory):
    """A tokenizer of ours, and the same read back from the files it leaves as."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bytes":
        ours = byte_tokenizer.ByteTokenizer()
    else:
        rng = np.random.default_rng(0)
        texts = [" ".join(rng.choice(WORDS[:9], 12)) for _ in range(300)]
        ours = tokenizers.SentencePiece.train(texts, 300, folder / "tokenizer.model")
    found, notes = tokenizer_export.files(ours)
    assert len(notes) == 1
    out = folder / "out"
    out.mkdir()
    for name, data in found.items():
        (out / name).write_bytes(data)
    return ours, tokenizers.load(out), out


def test_the_same_ids(pair):
    ours, theirs, out = pair
    plain = library.Tokenizer.from_file(str(out / "tokenizer.json"))
    rng = np.random.default_rng(1)
    for _ in range(200):
        text = "".join(
            rng.choice(WORDS) + rng.choice([" ", "", "  "])
            for _ in range(rng.integers(0, 9))
        )
        ids = ours.encode(text)
        assert plain.encode(text, add_special_tokens=False).ids == ids, text
        assert plain.encode(text).ids == [ours.bos, *ids]
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.vocab_size == ours.vocab_size
    assert (theirs.bos, theirs.eos, theirs.pad) == (ours.bos, ours.eos, ours.pad)
    assert theirs.stops[0] == ours.end


def test_the_same_turns_and_masks(pair):
    ours, theirs, _ = pair
    assert chat.render(TALK, theirs) == chat.render(TALK, ours)
    assert chat.generation_prompt(TALK[:2], theirs) == chat.generation_prompt(
        TALK[:2], ours
    )


def test_what_came_goes_back_as_it_came(pair):
    _, theirs, out = pair
    found, notes = tokenizer_export.files(theirs)
    assert notes == []
    assert found == {path.name: path.read_bytes() for path in out.iterdir()}
    assert json.loads(found["tokenizer.json"])["model"]["type"] == "BPE"
