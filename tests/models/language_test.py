"""Text in, text out: completions and log-probabilities do not depend on batching."""

import jax
import numpy as np
import pytest

from stagecraft.errors import UserError
from stagecraft.models import sampling, scores
from stagecraft.models.language import Language
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.text import tokenizer as tokenizers
from stagecraft.text.tokenizer import SentencePiece
from tests import tiny


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    texts = ["the cat sat on the mat", "what is the capital of France?"] * 20
    tokenizer = SentencePiece.train(texts, 290, path)
    config = tiny.config(vocab_size=tokenizer.vocab_size)
    return Transformer(config, jax.random.key(0)), tokenizer


def test_log_probabilities_are_those_of_whole_logits(parts):
    model, tokenizer = parts
    language = Language(model, tokenizer, batch_size=4)
    prefixes, texts = ["the cat", "what"], [" sat on", " is the capital"]
    found = language.logprob(prefixes, texts)
    for prefix, text, logp in zip(prefixes, texts, found, strict=True):
        start = [tokenizer.bos, *tokenizer.encode(prefix)]
        ids = np.array([start + tokenizer.encode(text)], np.int32)
        args = ids, np.arange(ids.size)[None], np.ones_like(ids)
        logps = np.asarray(jax.nn.log_softmax(model.logits(*args)))[0]
        expected = sum(logps[t - 1, ids[0, t]] for t in range(len(start), ids.size))
        assert logp == pytest.approx(expected, abs=1e-4)


def test_greedy_completions_do_not_depend_on_the_batch(parts):
    model, tokenizer = parts
    prompts = ["the cat", "what is the capital of France?", "a"]
    together = Language(model, tokenizer, batch_size=3).complete(
        prompts, max_new_tokens=6
    )
    alone = Language(model, tokenizer, batch_size=2)
    for prompt, answer in zip(prompts, together, strict=True):
        assert alone.complete([prompt], max_new_tokens=6) == [answer]


def test_sampled_log_probabilities_agree_with_scoring(parts):
    model, tokenizer = parts
    language = Language(model, tokenizer, batch_size=4)
    rows = [language.encode("the cat", chat_format=True)] * 4
    got = language.sample_ids(
        rows, seed=3, max_new_tokens=6, temperature=1.0, stop_ids=tokenizer.stops
    )
    said = [ids for ids, _, _ in got]
    again = language.logprob_ids(list(zip(rows, said, strict=True)))
    np.testing.assert_allclose([logp for _, _, logp in got], again, atol=1e-4)


def test_a_prompt_that_does_not_fit_is_refused(parts):
    language = Language(*parts, batch_size=2)
    with pytest.raises(UserError, match="exceed the context of 64 tokens"):
        language.complete(["the cat " * 40], max_new_tokens=8)


def test_scores_of_rows_are_read_at_their_last_token(parts):
    model = ScalarModel(parts[0], jax.random.key(1))
    rows = [[2, 9, 10, 11], [2, 30]]
    found = scores.of_rows(model, rows, batch_size=2)
    for row, score in zip(rows, found, strict=True):
        ids = np.array([row], np.int32)
        alone = model(ids, np.arange(len(row))[None], np.ones_like(ids))[0, -1]
        assert score == pytest.approx(float(alone), abs=1e-5)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_streamed_is_the_completion(parts, chat, temperature):
    language = Language(*parts, batch_size=2)
    settings = dict(chat=chat, temperature=temperature, max_new_tokens=20, seed=4)
    [want] = language.complete(["the cat"], **settings)
    pieces = list(language.stream("the cat", **settings))
    assert ("".join(text for text, _ in pieces), pieces[-1][1]) == want
    assert len(pieces) > 1 and not any(ended for _, ended in pieces[:-1])


def test_a_character_in_the_making_is_held_back(parts, monkeypatch):
    tokenizer = tokenizers.load("bytes")
    said = list("né\U0001f600".encode()) + [tokenizer.end]

    def stream(*_, **settings):
        assert settings["stop_ids"] == (tokenizer.end,)
        for count in range(1, len(said) + 1):
            tokens = np.array([said[:count]])
            ended = np.array([count == len(said)])
            yield sampling.Sample(tokens, np.ones_like(tokens, bool), tokens, ended)

    monkeypatch.setattr(sampling, "stream", stream)
    language = Language(parts[0], tokenizer, batch_size=1)
    got = [text for text, _ in language.stream("x", max_new_tokens=20)]
    assert got == ["n", "", "é", "", "", "", "\U0001f600", ""]


def test_a_text_may_end_where_a_turn_does(parts):
    model, tokenizer = parts
    language = Language(model, tokenizer, batch_size=2)
    assert language.stop_ids(chat_format=True) == (tokenizer.end,)
    assert language.stop_ids(chat_format=False) == (tokenizer.eos, tokenizer.end)
