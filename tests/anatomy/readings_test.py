"""The single prompt token by token: ranks, KL and alternatives by plain numpy."""

import types

import jax
import numpy as np
import pytest

from stagecraft.anatomy import behaviour, lens, readings
from stagecraft.errors import UserError
from stagecraft.models.language import Language
from stagecraft.models.transformer import Transformer
from stagecraft.text import tokenizer as tokenizers
from stagecraft.text.tokenizer import SentencePiece
from tests import tiny

OUTSIDE = "hf:models/base"
PROMPT = "the cat"


class Run:
    """Three stages in a row on a model from outside, and a reward model beside them."""

    config = types.SimpleNamespace(
        stages={
            "sft": types.SimpleNamespace(kind="language_model", start_from=OUTSIDE),
            "reward": types.SimpleNamespace(kind="reward", start_from="sft"),
            "dpo": types.SimpleNamespace(kind="preference", start_from="sft"),
            "more": types.SimpleNamespace(kind="preference", start_from="dpo"),
        }
    )
    stages = tuple(config.stages)
    mesh = None

    def __init__(self, models, tokenizer, rows=1):
        self.models, self.tokenizer, self.rows = models, tokenizer, rows
        self.loaded = []

    def finished(self, name):
        return True

    def chat_format(self, name):
        return name != OUTSIDE

    def source(self, name):
        where = "folder" if name == OUTSIDE else "here"
        info = {"module": "transformer"}
        return types.SimpleNamespace(where=where, info=lambda: info)

    def language(self, name, rows):
        assert rows == 1
        self.loaded.append(name)
        if name not in self.models:
            raise UserError(f"{name}: no such folder")
        return Language(self.models[name], self.tokenizer, batch_size=self.rows)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    texts = ["the cat sat on the mat", "what is the capital of France?"] * 20
    return SentencePiece.train(texts, 290, path)


@pytest.fixture(scope="module")
def models(tokenizer):
    config = tiny.config(vocab_size=tokenizer.vocab_size)
    make = jax.jit(lambda key: Transformer(config, key))
    names = (OUTSIDE, "sft", "dpo", "more")
    return {name: make(jax.random.key(i)) for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def run(models, tokenizer):
    return Run(models, tokenizer)


@pytest.fixture(scope="module")
def answers(run):
    return readings.through_stages(run, PROMPT)


def table(model, asked, ids):
    """The logits that predict each token of an answer: f64[tokens, V]."""
    row = np.asarray([[*asked, *ids]], np.int32)
    positions = np.arange(row.shape[1], dtype=np.int32)[None]
    every = np.asarray(model.logits(row, positions, np.ones_like(row)), np.float64)
    return every[0, len(asked) - 1 : -1]


def greedy(run, name):
    language = run.language(name, 1)
    asked = language.encode(PROMPT, chat_format=True)
    how = dict(max_new_tokens=behaviour.NEW_TOKENS, temperature=0.0)
    stops = run.tokenizer.stops
    [(ids, ended, _)] = language.sample_ids([asked], stop_ids=stops, **how)
    return asked, ids, ended


@pytest.mark.parametrize(
    ("name", "readers"),
    [("sft", [OUTSIDE]), ("dpo", ["sft", OUTSIDE]), ("more", ["dpo", OUTSIDE])],
)
def test_each_token_is_read_as_numpy_reads_it(run, models, answers, name, readers):
    asked, ids, ended = greedy(run, name)
    [answer] = answers[name]
    decode = run.tokenizer.decode
    assert answer["text"] == decode(ids[:-1] if ended else ids)
    assert answer["ended"] is ended
    assert list(answer["readings"]) == readers
    p = table(models[name], asked, ids)
    for reader in readers:
        q = table(models[reader], asked, ids)
        rows, kl = answer["readings"][reader], lens.kl(p, q)
        assert len(rows) == len(ids)
        for place, (row, token) in enumerate(zip(rows, ids, strict=True)):
            logits = q[place]
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            order = [i for i in np.argsort(-logits) if i != token]
            assert row["rank"] == 1 + (logits > logits[token]).sum()
            assert row["probability"] == pytest.approx(
                chances[token], rel=1e-3, abs=1e-6
            )
            assert row["divergence"] == pytest.approx(kl[place], rel=1e-3)
            texts, shares = zip(*row["alternatives"], strict=True)
            assert shares == pytest.approx(tuple(chances[order[:3]]), abs=1e-5)
            spelled = [
                readings.spelled(run.tokenizer, ids[:place], int(i)) for i in order[:3]
            ]
            assert list(texts) == spelled


def test_each_model_is_loaded_once_and_children_come_first(models, tokenizer):
    run = Run(models, tokenizer)
    assert list(readings.through_stages(run, PROMPT)) == ["sft", "dpo", "more"]
    assert run.loaded == ["more", "dpo", "sft", OUTSIDE]


def test_rows_that_fill_a_batch_change_nothing(models, tokenizer, answers):
    again = readings.through_stages(Run(models, tokenizer, rows=2), PROMPT)
    for name, [answer] in answers.items():
        for reader, rows in answer["readings"].items():
            others = again[name][0]["readings"][reader]
            for key in ("token", "rank"):
                assert [r[key] for r in rows] == [r[key] for r in others]


def test_a_model_that_is_gone_reads_nothing(models, tokenizer, caplog):
    left = {name: model for name, model in models.items() if name != OUTSIDE}
    answers = readings.through_stages(Run(left, tokenizer), PROMPT)
    assert answers["sft"][0]["readings"] == {}
    assert list(answers["dpo"][0]["readings"]) == ["sft"]
    assert "are not read by hf:models/base: hf:models/base: no such" in caplog.text


def test_tokens_without_text_are_shown_by_name(tokenizer):
    controls = readings.controls(tokenizer)
    ids = [*tokenizer.encode("the"), tokenizer.end]
    assert readings.spelled(tokenizer, ids[:-1], ids[-1]) == "<|end|>"
    assert tokenizer.end in controls and not controls & {*ids[:-1]}
    assert readings.spelled(tokenizer, [], tokenizer.vocab_size + 3) == "<293>"


def test_the_token_that_completes_a_character_has_it():
    tokenizer = tokenizers.load("bytes")
    ids = [*"né".encode(), 0xC3, ord("a"), tokenizer.end]
    texts = [readings.spelled(tokenizer, ids[:i], one) for i, one in enumerate(ids)]
    assert texts == ["n", "<0xC3>", "é", "<0xC3>", "a", "<|end|>"]


def test_a_token_that_ends_in_half_a_character_has_its_name():
    texts = {(): "", (1,): "a\ufffd"}
    tokenizer = types.SimpleNamespace(
        vocab_size=2, decode=lambda ids: texts[tuple(ids)], name=lambda _: "a<0xC3>"
    )
    assert readings.spelled(tokenizer, [], 1) == "a<0xC3>"


def test_spelled_tokens_are_the_text(tokenizer):
    text = "  the cat\n\tsat😀 <|end|>"
    ids = tokenizer.encode(text)
    texts = [readings.spelled(tokenizer, ids[:i], one) for i, one in enumerate(ids)]
    assert "".join(one for one in texts if "<0x" not in one) == text
    assert not {*ids} & readings.controls(tokenizer)
