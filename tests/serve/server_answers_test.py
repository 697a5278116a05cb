"""A served model's answers: their form, and their numbers by a direct forward pass."""

import concurrent.futures

import numpy as np
import pytest

from stagecraft.serve.writing import Speller, Writer
from stagecraft.text import tokenizer as tokenizers
from tests.models import numpy_decoder
from tests.serve.live import CONTEXT, Live, language

PROMPT = "Grüße an 🦊, the fox"
MESSAGES = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def live():
    server = Live(language())
    yield server
    server.close()


def table(live, ids):
    """f64[T, V] log-probabilities of what follows each id, by the decoder in numpy."""
    out = numpy_decoder.logits(live.language.model, ids).astype(np.float64)
    return out - np.logaddexp.reduce(out, axis=-1, keepdims=True)


def assert_near(one, other):
    """Both are the same but for rounding: texts are read together or alone."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), [other[key] for key in one]
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_near(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-4)
    else:
        assert one == other


def ids_of(live, text):
    tokenizer = live.language.tokenizer
    return [tokenizer.bos, *tokenizer.encode(text)]


def test_an_echo_is_scored_as_a_forward_pass_scores_it(live):
    got = live.ask(
        prompt=PROMPT, echo=True, logprobs=3, max_tokens=4, temperature=0, model="tiny"
    )
    (choice,), ids = got["choices"], ids_of(live, PROMPT)
    assert (got["object"], got["model"]) == ("text_completion", "tiny")
    counts = {"prompt_tokens": len(ids), "completion_tokens": 4}
    assert got["usage"] == counts | {"total_tokens": len(ids) + 4}
    assert choice["index"] == 0 and choice["finish_reason"] == "length"
    logprobs, drawn = choice["logprobs"], []
    for _ in range(4):
        drawn.append(int(table(live, [*ids, *drawn])[-1].argmax()))
    whole = [*ids, *drawn]
    expected = table(live, whole)[:-1]
    chosen = expected[np.arange(len(whole) - 1), whole[1:]]
    assert logprobs["token_logprobs"][0] is None is logprobs["top_logprobs"][0]
    np.testing.assert_allclose(logprobs["token_logprobs"][1:], chosen, atol=1e-4)
    for row, said, logp in zip(
        expected,
        logprobs["top_logprobs"][1:],
        logprobs["token_logprobs"][1:],
        strict=True,
    ):
        best = np.sort(row)[::-1][:3]
        values = sorted(said.values(), reverse=True)
        np.testing.assert_allclose(values[: len(best)], best, atol=1e-4)
        assert logp in values and len(values) <= 4
    assert choice["text"].startswith(PROMPT) and len(logprobs["tokens"]) == len(whole)
    # Offsets count characters, and a character belongs to its last byte.
    offsets, plain = logprobs["text_offset"], PROMPT.encode()
    for place in range(len(plain)):
        done = plain[:place].decode("utf-8", errors="ignore")
        assert offsets[1 + place] == len(done)
    assert offsets[len(ids)] == len(PROMPT)


def test_a_prompt_is_a_text_or_ids_one_or_several(live):
    asked = dict(max_tokens=6, temperature=0, logprobs=0)
    texts = ["one", "another one"]
    alone = [live.ask(prompt=text, **asked)["choices"][0] for text in texts]
    ids = [ids_of(live, text) for text in texts]
    assert_near(live.ask(prompt=ids[0], **asked)["choices"], alone[:1])
    for prompts in (texts, ids):
        got = live.ask(prompt=prompts, n=2, **asked)
        assert [one["index"] for one in got["choices"]] == [0, 1, 2, 3]
        for number, one in enumerate(got["choices"]):
            assert one["text"] == alone[number // 2]["text"]
        assert got["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert got["usage"]["completion_tokens"] == 24
    scored = live.ask(prompt=ids[1], max_tokens=0, echo=True, logprobs=1)
    (choice,) = scored["choices"]
    assert choice["text"] == texts[1] and scored["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == len(ids[1])
    assert live.ask(prompt="", max_tokens=2)["usage"]["prompt_tokens"] == 1


def test_a_chat_is_written_by_the_template(live):
    t = live.language.tokenizer
    asked = dict(messages=MESSAGES, max_tokens=5, temperature=0)
    got = live.ask("chat/completions", **asked, logprobs=True, top_logprobs=20)
    ids = [t.bos, t.user, *t.encode(MESSAGES[0]["content"]), t.assistant]
    assert got["object"] == "chat.completion"
    assert got["usage"]["prompt_tokens"] == len(ids)
    (choice,) = got["choices"]
    assert choice["message"]["role"] == "assistant"
    content, drawn = choice["logprobs"]["content"], []
    for said in content:
        row = table(live, [*ids, *drawn])[-1]
        drawn.append(int(row.argmax()))
        best = np.sort(row)[::-1][:20]
        np.testing.assert_allclose(
            [one["logprob"] for one in said["top_logprobs"]], best, atol=1e-4
        )
        assert said["logprob"] == said["top_logprobs"][0]["logprob"]
        assert bytes(said["bytes"]).decode() == said["token"]
    assert choice["message"]["content"] == t.decode(drawn)
    plain = live.ask("chat/completions", **asked)["choices"][0]
    assert plain["logprobs"] is None and plain["message"] == choice["message"]
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    again = live.ask(
        "chat/completions", **asked | {"messages": [{"role": "user", "content": parts}]}
    )
    assert again["choices"][0]["message"] == choice["message"]


def test_a_control_token_ends_a_turn_and_is_none_of_its_text(live):
    t, ended, names = live.language.tokenizer, None, []
    for seed in range(200):
        asked = dict(messages=MESSAGES, seed=seed, max_tokens=60, logprobs=True)
        ended = live.ask("chat/completions", **asked)
        said = ended["choices"][0]["logprobs"]["content"]
        names = [one["token"] for one in said]
        if t.name(t.end) in names:
            break
    assert names.index(t.name(t.end)) == len(names) - 1 < 59
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert len(names) == ended["usage"]["completion_tokens"]
    assert t.name(t.end) not in ended["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stops", [[], ["e", "zz", "\ufffd\ufffd"]])
def test_pieces_are_the_whole(live, path, stops):
    chat = path != "completions"
    asked = dict(messages=MESSAGES, logprobs=True, top_logprobs=2)
    if not chat:
        asked = dict(prompt=["Grüße 🦊", "b"], logprobs=2, echo=True)
    asked |= dict(seed=5, n=3, max_tokens=40, stop=stops)
    whole = live.ask(path, **asked)
    chunks = live.stream(path, **asked, stream_options={"include_usage": True})
    counts = chunks.pop()
    assert counts["choices"] == [] and counts["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks]
        own = [one for one in own if one["index"] == choice["index"]]
        assert len(own) > 3 or choice["finish_reason"] == "stop"
        assert [one["finish_reason"] for one in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        if chat:
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(one["delta"].get("content", "") for one in own)
            assert text == choice["message"]["content"]
        else:
            assert "".join(one["text"] for one in own) == choice["text"]
        said = [one["logprobs"] for one in own if one["logprobs"]]
        for key, values in choice["logprobs"].items():
            assert_near(sum((part[key] for part in said), []), values)


def test_a_stop_ends_a_text_before_it(live):
    asked = dict(prompt="stop", temperature=0, max_tokens=48, logprobs=0)
    whole = live.ask(**asked)
    text = whole["choices"][0]["text"]
    offsets = whole["choices"][0]["logprobs"]["text_offset"]
    # Over tokens, over the engine's blocks of steps, and new, as is its end.
    place = next(
        i
        for i in range(15, 40)
        if text.index(text[i : i + 3]) == i and text.index(text[i + 1 : i + 3]) == i + 1
    )
    stop = text[place : place + 3]
    for stops in (stop, ["never there", stop + "x", stop[1:], stop]):
        got = live.ask(**asked, stop=stops)
        (choice,) = got["choices"]
        assert choice["text"] == text[:place] and choice["finish_reason"] == "stop"
        needed = sum(offset < place + len(stop) for offset in offsets)
        assert got["usage"]["completion_tokens"] == needed
    assert live.ask(**asked, stop="never there")["choices"][0]["text"] == text


def test_a_stop_that_comes_in_pieces_is_held_back():
    tokenizer = tokenizers.load("bytes")
    writer = Writer(tokenizer, ["abc", "bd"])
    assert [writer.add(i) for i in b"xabab"] == ["x", "", "", "ab", ""]
    assert writer.add(ord("c")) == "" and writer.stopped and writer.text == "xab"
    writer = Writer(tokenizer, ["abc", "bd"])
    assert [writer.add(i) for i in b"xab"] == ["x", "", ""]
    assert writer.finish() == "ab" and not writer.stopped


def test_a_seed_says_what_is_drawn(live):
    asked = dict(prompt="seed", max_tokens=24, n=2)
    one, again, other = (live.ask(**asked, seed=s) for s in (7, 7, 8))
    texts = [[c["text"] for c in got["choices"]] for got in (one, again, other)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    assert live.ask(**asked)["choices"] != live.ask(**asked)["choices"]
    assert live.ask(**asked, seed=-(2**63))["choices"]


def test_the_likeliest_are_what_little_heat_and_few_tokens_leave(live):
    asked = dict(prompt="heat", max_tokens=16, seed=1)
    greedy = live.ask(**asked, temperature=0)["choices"]
    assert live.ask(**asked, temperature=1e-4)["choices"] == greedy
    assert live.ask(**asked, top_p=1e-6)["choices"] == greedy
    assert live.ask(**asked, top_p=0.9)["choices"] != greedy


def test_tokens_are_drawn_as_often_as_they_are_likely(live):
    ids = ids_of(live, "often")
    logits = table(live, ids)[-1] / 1.5
    expected = np.exp(logits - np.logaddexp.reduce(logits))
    order = np.argsort(-expected)
    before = np.cumsum(expected[order]) - expected[order]
    kept = order[before < 0.5]
    want = expected[kept] / expected[kept].sum()
    spell, counts = live.language.tokenizer, dict.fromkeys(kept.tolist(), 0)
    for seed in range(8):
        asked = dict(prompt=ids, n=128, max_tokens=1, temperature=1.5, top_p=0.5)
        got = live.ask(**asked, seed=seed, logprobs=0)
        for choice in got["choices"]:
            (said,) = choice["logprobs"]["tokens"]
            token = next(
                i for i in counts if said in (spell.decode([i]), spell.name(i))
            )
            counts[token] += 1
    seen, total = np.array(list(counts.values())), 8 * 128
    error = np.sqrt(want * (1 - want) / total)
    assert (abs(seen / total - want) < 4.5 * error).all()


def test_tokens_of_one_text_are_drawn_apart(live):
    ids, spell = ids_of(live, "apart"), Speller(live.language.tokenizer).spell
    names = {spell(i): i for i in range(live.language.tokenizer.vocab_size)}
    got = live.ask(prompt=ids, n=128, max_tokens=3, logprobs=0, seed=2)
    drawn = [
        [names[text] for text in one["logprobs"]["tokens"]]
        for one in got["choices"]
        if len(one["logprobs"]["tokens"]) == 3
    ]
    places = []  # of each token in the distribution it was drawn from
    for tokens in drawn:
        rows = np.exp(table(live, [*ids, *tokens[:2]])[len(ids) - 1 :])
        before = np.cumsum(rows, axis=-1) - rows / 2
        places.append([before[step, token] for step, token in enumerate(tokens)])
    correlated = np.corrcoef(np.array(places).T)
    assert len(drawn) > 100 and (abs(correlated[~np.eye(3, dtype=bool)]) < 0.4).all()


def test_32_clients_at_once_get_what_each_gets_alone(live):
    def asked(number):
        body = dict(prompt=f"{number}" * (1 + number % 7), logprobs=2, seed=number)
        body |= dict(max_tokens=1 + 3 * number % 50, echo=number % 3 == 0)
        body["temperature"] = (0, 0.7, 1.3)[number % 3]
        return body | {"top_p": (1.0, 0.8)[number % 2]}

    alone = [live.ask(**asked(number))["choices"] for number in range(32)]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        jobs = [pool.submit(live.ask, **asked(number)) for number in range(32)]
        together = [job.result()["choices"] for job in jobs]
    for (one,), (other,) in zip(alone, together, strict=True):
        for key in ("text", "finish_reason"):
            assert one[key] == other[key]
        said = [choice["logprobs"]["token_logprobs"] for choice in (one, other)]
        start = int(said[0][0] is None)
        np.testing.assert_allclose(said[0][start:], said[1][start:], atol=1e-4)
    assert live.idle()


def test_a_context_is_filled_to_its_end(live):
    ids, spell = ids_of(live, "a"), Speller(live.language.tokenizer).spell
    room = CONTEXT - len(ids)
    got = live.ask(prompt="a", max_tokens=room, logprobs=0, seed=1)
    assert got["usage"]["total_tokens"] == CONTEXT
    said = got["choices"][0]["logprobs"]
    names = {spell(i): i for i in range(live.language.tokenizer.vocab_size)}
    whole = [*ids, *(names[text] for text in said["tokens"])]
    expected = table(live, whole)[np.arange(len(whole) - 1), whole[1:]]
    np.testing.assert_allclose(said["token_logprobs"], expected[1:], atol=1e-4)
    full = ids_of(live, "b" * (CONTEXT - 2))
    got = live.ask(prompt=full, max_tokens=1, echo=True, logprobs=0, temperature=0)
    said = got["choices"][0]["logprobs"]["token_logprobs"]
    np.testing.assert_allclose(said[-1], table(live, full)[-1].max(), atol=1e-4)
