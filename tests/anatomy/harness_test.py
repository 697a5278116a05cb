"""What a model answers the harness, against whole logits, without the harness."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft.anatomy import harness
from stagecraft.anatomy.harness import Answers
from stagecraft.errors import UserError
from stagecraft.models.language import Language
from stagecraft.models.transformer import Transformer
from stagecraft.text import tokenizer as tokenizers
from tests import tiny

CONTEXT = 40


@pytest.fixture(scope="module")
def answers():
    tokenizer = tokenizers.load("bytes")
    config = tiny.config(
        vocab_size=tokenizer.vocab_size, max_length=CONTEXT, init_std=0.4
    )
    model = Transformer(config, jax.random.key(0))
    return Answers(Language(model, tokenizer, batch_size=2))


def asked(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


@jax.jit
def whole_logits(model, ids):
    return model.logits(ids, jnp.arange(CONTEXT)[None], jnp.ones_like(ids))[0]


def logps(answers, ids):
    """f32[T - 1, V] log-probabilities of what follows each id but the last."""
    ids = np.array(ids[:-1], np.int32)
    # Of one length, for one program: what comes later changes nothing before it.
    padded = np.pad(ids, (0, CONTEXT - len(ids)))[None]
    logits = whole_logits(answers.language.model, padded)[: len(ids)]
    return np.asarray(jax.nn.log_softmax(logits))


def judged(answers, before, ids):
    """The definition: sum of log-probabilities of ids, and are they all the likeliest.

    What does not fit in the context is dropped from the left.
    """
    row = [*before, *ids][-CONTEXT - 1 :]
    table = logps(answers, row)[-len(ids) :]
    chosen = table[np.arange(len(ids)), ids]
    return float(chosen.sum()), bool((table.argmax(-1) == ids).all())


def greedy(answers, before, count):
    ids = list(before)
    for _ in range(count):
        ids.append(int(logps(answers, [*ids, 0])[-1].argmax()))
    return ids[len(before) :]


def test_log_likelihoods_are_those_of_whole_logits(answers):
    tokenizer = answers.language.tokenizer
    pairs = [
        ("the cat", " sat"),
        ("Q: who?\nA:", " me"),
        ("a space goes over ", "to the word"),
        ("x" * 60, " too long by far"),
        ("", "nothing before"),
        ("b", "c" * 33),
    ]
    found = answers.loglikelihood(asked(*pairs))
    for (context, text), (logp, best) in zip(pairs, found, strict=True):
        if context:
            text = context[len(context.rstrip()) :] + text
            before = [tokenizer.bos, *tokenizer.encode(context.rstrip())]
        else:
            before = [tokenizer.bos]
        want, likeliest = judged(answers, before, tokenizer.encode(text))
        assert logp == pytest.approx(want, abs=1e-3)
        assert best is likeliest


def test_the_likeliest_continuation_is_greedy(answers):
    tokenizer = answers.language.tokenizer
    before = [tokenizer.bos, *tokenizer.encode("abc")]
    best = greedy(answers, before, 3)
    second = [*best[:2], (best[2] + 1) % 256]
    (_, yes), (_, no) = answers._scored([(before, best), (before, second)])
    assert yes and not no


def test_an_answer_longer_than_the_context_is_refused(answers):
    with pytest.raises(UserError, match="41 tokens exceeds the context of 40"):
        answers.loglikelihood(asked(("a", "b" * 41)))


def test_rolling_predicts_every_token_once(answers):
    tokenizer = answers.language.tokenizer
    texts = ["short", "long " * 21]
    found = answers.loglikelihood_rolling(asked(*((text,) for text in texts)))
    for text, logp in zip(texts, found, strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        want = 0.0
        for start in range(0, len(ids), CONTEXT):
            end = min(start + CONTEXT, len(ids))
            before = [tokenizer.bos, *ids][max(end - CONTEXT, 0) : start + 1]
            want += judged(answers, before, ids[start:end])[0]
        assert logp == pytest.approx(want, abs=1e-3)


def test_windows_are_those_of_the_harness():
    # The example of its documentation: context 4, prefix -1.
    assert harness.windows(list(range(10)), -1, 4) == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert harness.windows([], -1, 4) == []


def written(answers, context, count):
    tokenizer = answers.language.tokenizer
    before = [tokenizer.bos, *tokenizer.encode(context)]
    ids = greedy(answers, before[-(CONTEXT - count) :], count)
    ends = [i for i in (tokenizer.eos, *tokenizer.stops) if i in ids]
    ids = ids[: min(ids.index(i) for i in ends)] if ends else ids
    return tokenizer.decode(ids)


def test_generations_are_greedy_and_cut_at_until(answers):
    contexts = ["a", "the cat", "so long that it does not fit " * 2, "b"]
    whole = [written(answers, context, 20) for context in contexts]
    limit = {"until": [], "max_gen_toks": 20}
    assert answers.generate_until(asked(*((c, limit) for c in contexts))) == whole
    # The third character of the first answer ends answers, in its group alone.
    until = next(c for c in whole[0][2:] if c.isprintable())
    ends = {"until": [until, ""], "max_gen_toks": 20, "do_sample": False}
    groups = [(contexts[0], ends), (contexts[1], limit), (contexts[3], ends)]
    assert answers.generate_until(asked(*groups)) == [
        whole[0].split(until)[0],
        whole[1],
        whole[3].split(until)[0],
    ]


def test_work_stops_once_every_answer_has_its_end(answers, monkeypatch):
    monkeypatch.setattr(harness, "LOOK", 1)
    seen = []
    said = answers._said
    monkeypatch.setattr(answers, "_said", lambda *a: seen.append(1) or said(*a))
    whole = written(answers, "the cat", 20)
    ends = {"until": whole[1], "max_gen_toks": 20}
    assert answers.generate_until(asked(("the cat", ends))) == [
        whole.split(whole[1])[0]
    ]
    assert len(seen) <= 4


def test_sampling_is_seeded_and_not_greedy(answers):
    draw = {"do_sample": True, "temperature": 1.5, "top_k": 50, "max_new_tokens": 12}
    first = answers.generate_until(asked(*[("a", draw)] * 2))
    assert first == answers.generate_until(asked(*[("a", draw)] * 2))
    assert first[0] != first[1]
    off = draw | {"do_sample": False}
    assert answers.generate_until(asked(("a", off))) == [written(answers, "a", 12)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_gen_toks": 40}, "leaves no room"),
        ({"num_beams": 4}, "num_beams=4 is not known here"),
    ],
)
def test_what_cannot_be_generated_is_refused(answers, arguments, message):
    with pytest.raises(UserError, match=message):
        answers.generate_until(asked(("a", arguments)))


def test_a_conversation_is_asked_by_its_own_ids(answers):
    tokenizer = answers.language.tokenizer
    turn = [{"role": "user", "content": "<|end|>?"}]
    text = answers.apply_chat_template(turn)
    ids = [tokenizer.bos, tokenizer.user, *b"<|end|>?", tokenizer.assistant]
    ((logp, _),) = answers.loglikelihood(asked((text, "yes")))
    assert logp == pytest.approx(judged(answers, ids, list(b"yes"))[0], abs=1e-3)
    # An answer that is begun already goes on where it stands.
    begun = [*turn, {"role": "assistant", "content": "it"}]
    text = answers.apply_chat_template(begun, add_generation_prompt=False)
    ((logp, _),) = answers.loglikelihood(asked((text, "!")))
    assert logp == pytest.approx(judged(answers, [*ids, *b"it"], [33])[0], abs=1e-3)
