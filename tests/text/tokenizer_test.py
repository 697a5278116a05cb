"""The tokenizer gives every text back, and no text can spell a control piece."""

import hashlib
import random
import time

import pytest
import sentencepiece as spm

from stagecraft.errors import UserError
from stagecraft.text import chat
from stagecraft.text import tokenizer as module
from stagecraft.text.tokenizer import (
    CHAT_PIECES,
    LINE,
    SentencePiece,
    keep,
    load,
    with_template,
)
from tests.text import families

TEXT = [
    "The capital of France is Paris.\n\tThe  euro is its currency.\n\nIn 1999.",
    "345. What is the capital of Spain? Madrid is the capital of Spain, not Barcelona.",
    "Twelve times twelve is 144; the sum of 17 and 25 is 42.",
] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return SentencePiece.train(TEXT, 400, tmp_path_factory.mktemp("t") / "t.model")


def test_special_ids_are_the_promised_ones_and_all_differ(tokenizer):
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 2, 3)
    chat = (tokenizer.system, tokenizer.user, tokenizer.assistant, tokenizer.end)
    assert tokenizer.control_ids == chat
    assert len({0, 1, 2, 3, *chat}) == 8
    assert tokenizer.vocab_size == 400


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a  b   c",
        "  leading and trailing  ",
        "\n\n\tx\r\n \n",
        "😀👩‍👩‍👧 é e\u0301 ﬁ ① Ａ",  # NFKC would change these
        "한국어 العربية 日本語",
        "\x00\x01\u3000\u00a0\u200b\ufeff\U0010ffff",
        "\u2581 a\u2581b \u2581\u2581",  # how SentencePiece writes a space
        " \u2047 \u2585",  # how it writes what it does not know
    ],
)
def test_encode_and_decode_give_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_round_trip_of_random_characters_never_makes_a_special_id(tokenizer):
    rng = random.Random(0)
    special = {0, 1, 2, 3, *tokenizer.control_ids}
    for _ in range(500):
        text = "".join(
            chr(
                rng.choice(
                    [
                        rng.randrange(128),
                        rng.randrange(0xD800),
                        rng.randrange(0xE000, 0x110000),
                    ]
                )
            )
            for _ in range(rng.randrange(12))
        )
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not special & set(ids)


@pytest.mark.parametrize("piece", [*CHAT_PIECES, "<pad>", "<s>", "</s>", "<unk>"])
def test_text_cannot_forge_a_control_piece(tokenizer, piece):
    for text in (piece, f"Stop.{piece}{piece} Go", f"\u2581{piece}"):
        ids = tokenizer.encode(text)
        assert not set(ids) & {0, 1, 2, 3, *tokenizer.control_ids}
        assert tokenizer.decode(ids) == text


def test_text_cannot_forge_a_byte_piece(tokenizer):
    assert len(tokenizer.encode("<0x0A>")) > 1
    assert tokenizer.decode(tokenizer.encode("<0x0A>")) == "<0x0A>"


def test_decode_leaves_control_pieces_out(tokenizer):
    ids = [tokenizer.bos, tokenizer.user, *tokenizer.encode("Paris"), tokenizer.end]
    assert tokenizer.decode([*ids, tokenizer.eos, tokenizer.pad]) == "Paris"


def test_digits_are_pieces_of_their_own(tokenizer):
    assert len(tokenizer.encode("1999")) == 4
    assert len(tokenizer.encode("345")) == 3


def test_the_same_texts_give_the_same_bytes_and_no_other_files(tmp_path):
    paths = [tmp_path / name for name in ("a.model", "b.model")]
    made = [SentencePiece.train(iter(TEXT), 400, path) for path in paths]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert made[0].digest == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b.model"]
    assert SentencePiece.train(TEXT[:2], 320, tmp_path / "c").digest != made[0].digest


def test_load_gives_the_trained_one_back(tokenizer, tmp_path):
    made = SentencePiece.train(TEXT, 400, tmp_path / "t.model")
    found = SentencePiece.load(tmp_path / "t.model")
    assert found.digest == made.digest == tokenizer.digest
    assert found.encode(TEXT[0]) == tokenizer.encode(TEXT[0])


def test_training_prints_nothing(tmp_path, capfd):
    SentencePiece.train(TEXT, 400, tmp_path / "t.model")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_words_of_a_long_line_are_learned(tmp_path):
    # One line of 50 000 characters: SentencePiece would drop it without a word.
    found = SentencePiece.train(
        ["zyzzyva " * (50 * LINE // 8)], 280, tmp_path / "t.model"
    )
    assert len(found.encode("zyzzyva zyzzyva zyzzyva")) <= 5


def test_much_text_takes_little_time(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(3000)]
    documents = [" ".join(rng.choices(words, k=42)) for _ in range(20_000)]
    assert sum(map(len, documents)) > 5e6
    start = time.process_time()  # of this process alone: others may be busy
    SentencePiece.train(documents, 1024, tmp_path / "t.model")
    assert time.process_time() - start < 6


def test_a_sample_of_much_text_is_even(monkeypatch):
    monkeypatch.setattr(module, "ENOUGH", 20_000)
    lines = ["ordinary words of the start"] * 4000 + ["other words of the end"] * 4000
    kept = module._training_lines(["\n".join(lines)])
    assert 0.9 * 20_000 < sum(map(len, kept)) <= 1.1 * 20_000
    assert 0.4 < sum(line.startswith("other") for line in kept) / len(kept) < 0.6
    assert module._training_lines(lines[:100]) == lines[:100]  # little: all of it


def test_too_little_text_is_told_with_the_largest_size(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(UserError, match=r"vocab_size=5000.*too small") as error:
        SentencePiece.train(["hello world"], 5000, path)
    most = int(str(error.value).rsplit(" ", 1)[1])
    assert not path.exists()
    assert SentencePiece.train(["hello world"], most, path).vocab_size == most


def test_too_small_a_vocabulary_and_no_text_are_told(tmp_path):
    with pytest.raises(UserError, match="vocab_size=100: too small") as error:
        SentencePiece.train(TEXT, 100, tmp_path / "t.model")
    least = int(str(error.value).split("use ")[1].split()[0])
    assert SentencePiece.train(TEXT, least, tmp_path / "t.model").vocab_size == least
    with pytest.raises(UserError, match="no text"):
        SentencePiece.train(["", "\n"], 400, tmp_path / "t.model")


def _other(path, **changes):
    """A SentencePiece model that is not quite one of ours."""
    settings = dict(
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        control_symbols=list(CHAT_PIECES),
        minloglevel=2,
    )
    with path.open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(TEXT).split("\n")),
            model_writer=file,
            **(settings | changes),
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"byte_fallback": False, "vocab_size": 120},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_load_refuses_what_would_break_silently(tmp_path, changes):
    path = tmp_path / "other.model"
    _other(path, **changes)
    with pytest.raises(UserError, match="byte fallback"):
        SentencePiece.load(path)
    _other(path)
    assert SentencePiece.load(path).vocab_size == 400


@pytest.mark.parametrize(
    "changes, bos, pad",
    [
        # Llama 2's: no padding, spaces before words.
        ({"control_symbols": [], "pad_id": -1, "add_dummy_prefix": True}, 2, 1),
        ({"control_symbols": list(CHAT_PIECES[:3])}, 2, 0),
        ({"control_symbols": [], "user_defined_symbols": list(CHAT_PIECES)}, 2, 0),
        ({"control_symbols": [], "bos_id": -1, "eos_id": 2}, None, 0),
        ({"control_symbols": [], "normalization_rule_name": "nmt_nfkc"}, 2, 0),
    ],
    ids=str,
)
def test_a_model_of_others_is_for_plain_text(tmp_path, changes, bos, pad):
    path = tmp_path / "other.model"
    _other(path, **changes)
    found = load(path)
    assert (found.bos, found.pad, found.stops) == (bos, pad, (found.eos,))
    assert found.pad not in (found.bos, found.eos)
    text = "The capital of France"
    assert found.decode(found.encode(text)) == text
    ids, mask = chat.document(text, found)
    assert ids == [*([bos] if bos else []), *found.encode(text), found.eos]
    assert mask.count(False) == (bos is not None)
    for call in (chat.render, chat.generation_prompt):
        with pytest.raises(UserError, match="for plain text"):
            call([{"role": "user", "content": "x"}], found)


def test_a_model_of_others_must_say_how_a_text_ends(tmp_path):
    _other(tmp_path / "other.model", eos_id=-1, control_symbols=[])
    with pytest.raises(UserError, match="other.model: has no piece that ends a text"):
        load(tmp_path / "other.model")


@pytest.mark.parametrize("text", ["", "a  b\n", "naïve \U0001f600 \x00", "\ufffd"])
def test_bytes(text):
    found = load("bytes")
    ids = found.encode(text)
    assert ids == list(text.encode()) and found.decode(ids) == text
    assert found.decode([found.bos, *ids, found.end, found.eos, found.pad]) == text
    assert found.vocab_size == 263
    kinds = {found.pad, found.bos, found.eos, *found.control_ids}
    assert kinds == set(range(256, 263)) and found.stops == (found.end,)
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "b"},
    ]
    got, mask = chat.render(messages, found)
    assert got == [found.bos, found.user, *ids, found.assistant, 98, found.end]
    assert sum(mask) == 2


def test_half_a_character_is_no_error():
    assert load("bytes").decode([0xF0, 0x9F]) == "\ufffd"


def test_what_is_kept_is_loaded_again(tokenizer, tmp_path):
    for number, one in enumerate((tokenizer, load("bytes"))):
        keep(one, tmp_path / f"{number}")
        found = load(tmp_path / f"{number}")
        assert type(found) is type(one) and found.digest == one.digest
        assert found.encode("Paris") == one.encode("Paris")
        assert found.files == one.files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


def test_load_names_what_it_looked_for(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match=r"no tokenizer here \(tokenizer.json or"):
        load(tmp_path)


def test_load_refuses_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match="no such"):
        SentencePiece.load(tmp_path / "none.model")
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="x.model"):
        SentencePiece.load(tmp_path / "x.model")


def test_a_template_of_a_file_replaces_the_folder_s(tmp_path):
    bare = load(families.folder(tmp_path / "bare", "chatml", chat_template=None))
    assert bare.template is None
    path = tmp_path / "mine.jinja"
    path.write_text(families.source("chatml"), encoding="utf-8")
    other = with_template(bare, path)
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert other.template.text(said) == load(
        families.folder(tmp_path / "whole", "chatml")
    ).template.text(said)
    # It is kept with the tokenizer.
    keep(other, tmp_path / "kept")
    assert load(tmp_path / "kept").template.text(said) == other.template.text(said)
    with pytest.raises(
        UserError, match="tokenizer.template=.*none.jinja: no such file"
    ):
        with_template(bare, tmp_path / "none.jinja")
    with pytest.raises(UserError, match="for the tokenizer of a Hugging Face folder"):
        with_template(load("bytes"), path)
