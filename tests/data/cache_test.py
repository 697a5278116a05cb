"""Text is tokenised once, for whoever needs it, and again when anything changed."""

import json
import logging
import multiprocessing
import os
import time

import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.data import cache, corpus, shards
from stagecraft.errors import UserError
from stagecraft.text import chat

WORDS = ["Paris.", "France is.", "The capital of France is Paris."] * 5


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": w}) + "\n" for w in WORDS))
    return path


class Counting:
    """A tokenizer that counts what it is asked for, and says so in a file."""

    def __init__(self, tokenizer, log=None, pause=0.0):
        self.digest, self.vocab_size = tokenizer.digest, tokenizer.vocab_size
        self.bos, self.eos = tokenizer.bos, tokenizer.eos
        self.tokenizer, self.log, self.pause, self.count = tokenizer, log, pause, 0

    def encode(self, words):
        self.count += 1
        time.sleep(self.pause)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()}\n")
        return self.tokenizer.encode(words)

    def spells(self, words):
        return self.tokenizer.spells(words)

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def folders(root):
    return sorted(p.name for p in root.iterdir() if p.is_dir())


def test_built_once_then_read(tokenizer, text, tmp_path, caplog):
    counting = Counting(tokenizer)
    [made] = cache.tokens(str(text), {}, counting, tmp_path / "c")
    assert [d.tolist() for d in made] == [chat.document(w, tokenizer)[0] for w in WORDS]
    assert counting.count == len(WORDS)
    caplog.clear()  # where an earlier test has the command line speak up
    with caplog.at_level(logging.INFO, logger="stagecraft.data"):
        [again] = cache.tokens(str(text), {}, counting, tmp_path / "c")
    assert counting.count == len(WORDS)
    assert again.digest == made.digest
    want = f"{text}: tokens from the cache, 15 documents, {made.tokens} tokens"
    assert caplog.messages == [want]
    # The content counts, not the name.
    moved = text.rename(tmp_path / "moved.jsonl")
    cache.tokens(str(moved), {}, counting, tmp_path / "c")
    assert counting.count == len(WORDS)
    assert len(folders(tmp_path / "c")) == 1


def test_whatever_changes_the_ids_is_another_entry(tokenizer, text, tmp_path):
    counting = Counting(tokenizer)
    keep = tmp_path / "c"
    cache.tokens(str(text), {}, counting, keep)
    counting.digest = "0" * 64
    cache.tokens(str(text), {}, counting, keep)
    assert len(folders(keep)) == 2
    text.write_text(json.dumps({"text": "a", "body": "b"}))
    [plain] = cache.tokens(str(text), {}, counting, keep)
    [body] = cache.tokens(str(text), {"text": "body"}, counting, keep)
    assert plain[0].tolist() != body[0].tolist()
    # The same bytes as plain text are one document of another kind.
    (tmp_path / "same.txt").write_bytes(text.read_bytes())
    cache.tokens(str(tmp_path / "same.txt"), {}, counting, keep)
    assert len(folders(keep)) == 5


@pytest.mark.parametrize("how", ["flip", "cut", "manifest"])
def test_a_damaged_entry_is_made_again(tokenizer, text, tmp_path, how, caplog):
    counting = Counting(tokenizer)
    [made] = cache.tokens(str(text), {}, counting, tmp_path / "c")
    tokens = made.path / "tokens-00000.bin"
    data = bytearray(tokens.read_bytes())
    if how == "flip":
        data[3] ^= 1
        tokens.write_bytes(data)
    elif how == "cut":
        tokens.write_bytes(data[:-2])
    else:
        (made.path / "manifest.json").write_text("{")
    digest = made.digest
    [again] = cache.tokens(str(text), {}, counting, tmp_path / "c")
    assert again.verify().digest == digest
    assert counting.count == 2 * len(WORDS)
    assert "made again" in caplog.text


def test_bad_text_leaves_no_entry(tokenizer, text, tmp_path):
    text.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"text.jsonl:2: 'text' is int"):
        cache.tokens(str(text), {}, tokenizer, tmp_path / "c")
    assert folders(tmp_path / "c") == []
    with pytest.raises(UserError, match="cannot write here .*name another folder"):
        cache.tokens(str(text), {}, tokenizer, text / "c")


def build(path, keep, tokenizer, log, gate, found):
    gate.wait(30)
    [made] = cache.tokens(str(path), {}, Counting(tokenizer, log, 0.02), keep)
    found.put((made.digest, len(made), os.getpid()))


def started(count, *args):
    context = multiprocessing.get_context("fork")
    gate, found = context.Barrier(count), context.Queue()
    every = [
        context.Process(target=build, args=(*args, gate, found)) for _ in range(count)
    ]
    for process in every:
        process.start()
    return every, found


def test_two_processes_build_it_once(tokenizer, text, tmp_path):
    log = tmp_path / "log"
    every, found = started(2, text, tmp_path / "c", tokenizer, log)
    results = [found.get(timeout=60) for _ in every]
    for process in every:
        process.join(30)
        assert process.exitcode == 0
    assert len({digest for digest, *_ in results}) == 1
    assert len({pid for *_, pid in results}) == 2
    # One of them asked the tokenizer, the other waited.
    asked = log.read_text().split()
    assert len(asked) == len(WORDS)
    assert len(set(asked)) == 1


def test_a_killed_process_is_in_nobodys_way(tokenizer, text, tmp_path):
    log, keep = tmp_path / "log", tmp_path / "c"
    [process], _ = started(1, text, keep, tokenizer, log)
    while not log.exists():
        time.sleep(0.01)
    process.kill()
    process.join(30)
    left = [p for p in keep.iterdir() if p.is_dir()]
    assert left and not any(map(shards.is_folder, left))
    [made] = cache.tokens(str(text), {}, tokenizer, keep)
    assert len(made.verify()) == len(WORDS)
    assert folders(keep) == [made.path.name]  # what was left is cleared away


def test_without_locks_in_the_system_two_are_still_right(
    tokenizer, text, tmp_path, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "fcntl", None)
    log = tmp_path / "log"
    every, found = started(2, text, tmp_path / "c", tokenizer, log)
    results = [found.get(timeout=60) for _ in every]
    assert len({digest for digest, *_ in results}) == 1
    assert [p.join(30) or p.exitcode for p in every] == [0, 0]


# -- shards named by a stage -----------------------------------------------------------


def test_a_stage_reads_shards_like_the_text_they_were_made_of(
    build, tokenizer, tmp_path
):
    texts = [{"text": w} for w in WORDS]
    documents = (chat.document(w, tokenizer)[0] for w in WORDS)
    told = dict(tokenizer_digest=tokenizer.digest, vocab_size=tokenizer.vocab_size)
    shards.write(tmp_path / "shards", documents, **told)
    settings = dict(format="text", length=32, heldout_share=0.2)
    plain = build("language_model", texts, **settings)
    ready = build("language_model", texts, files=str(tmp_path / "shards"), **settings)
    assert ready.dataset.report == plain.dataset.report
    assert ready.samples == plain.samples
    for step in range(5):
        one, two = plain.dataset.batch_at(step), ready.dataset.batch_at(step)
        assert all(np.array_equal(one[k], two[k]) for k in one)
    # Beside text, and in a folder above.
    both = f"{tmp_path}/data.jsonl,{tmp_path}/shards"
    double = build("language_model", texts, files=both, length=32)
    assert double.dataset.report["documents"] == 2 * len(WORDS)
    with pytest.raises(UserError, match="holds ids, not text|records, not ids"):
        build("reward", texts, files=str(tmp_path / "shards"))


def test_another_tokenizers_shards_stop_a_stage(build, tmp_path):
    shards.write(tmp_path / "s", [[1, 2]], tokenizer_digest="f" * 64, vocab_size=9)
    told = "tokenised by another tokenizer .digest ffffffffffff, 9 ids"
    with pytest.raises(UserError, match=told):
        build("language_model", [], files=str(tmp_path / "s"))


def test_damaged_shards_stop_a_stage(build, tokenizer, tmp_path):
    told = dict(tokenizer_digest=tokenizer.digest, vocab_size=tokenizer.vocab_size)
    shards.write(tmp_path / "s", [[2, 9, 3]] * 9, **told)
    data = bytearray((tmp_path / "s" / "tokens-00000.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "s" / "tokens-00000.bin").write_bytes(data)
    with pytest.raises(UserError, match="its content is not what manifest.json says"):
        build("language_model", [], files=str(tmp_path / "s"))


# -- mixtures of a stage ---------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    """Three files of text, each about its own word, of different lengths."""
    found = []
    for number, (word, count, long) in enumerate(
        (("Paris", 60, 3), ("France", 40, 12), ("capital", 10, 30))
    ):
        path = tmp_path / f"{number}.jsonl"
        lines = [json.dumps({"text": f"{word} " * long}) + "\n" for _ in range(count)]
        path.write_text("".join(lines))
        found.append(str(path))
    return found


@pytest.mark.parametrize("packing", ["", "wrapped", "none"])
@pytest.mark.parametrize("by", ["tokens", "examples"])
def test_shares_by_tokens_and_by_examples(build, tokenizer, parts, by, packing):
    want = np.array([0.5, 0.3, 0.2])
    made = build(
        "language_model",
        [],
        files=",".join(parts),
        shares=(5, 3, 2),
        share_by=by,
        length=64,
        batch_size=8,
        packing=packing,
    )
    words = [set(tokenizer.encode(f"{w} {w}")) for w in ("Paris", "France", "capital")]
    only = [w - set().union(*(o for o in words if o is not w)) for w in words]
    tokens, examples = np.zeros(3), np.zeros(3)
    for step in range(100):
        batch = made.dataset.batch_at(step)
        for ids, segments in zip(batch["ids"], batch["segments"], strict=True):
            [source] = [i for i, w in enumerate(only) if set(ids.tolist()) & w]
            tokens[source] += (segments > 0).sum()
            examples[source] += (ids[segments > 0] == tokenizer.bos).sum()
    found = {"tokens": tokens, "examples": examples}[by]
    assert np.abs(found / found.sum() - want).max() < 0.03
    told = made.dataset.report
    assert told["share_by"] == by
    for one, share in zip(told["sources"], want, strict=True):
        assert one[f"share_of_{by}"] == pytest.approx(share, abs=0.02)
    assert [one["files"] for one in told["sources"]] == parts
    total = sum(one["epochs"] * one["rows"] for one in told["sources"])
    assert total == pytest.approx(100 * 8)


def test_demonstrations_are_mixed_with_weights_and_a_heldout_set(build, tmp_path):
    def said(word):
        return {"prompt": f"Is it {word}?", "completion": f"It is {word}."}

    for name, count in (("a", 30), ("b", 10), ("held", 3)):
        lines = [json.dumps(said(f"{name} {i}")) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    made = build(
        "language_model",
        [],
        format="demonstrations",
        files=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl",
        heldout=f"{tmp_path}/held.jsonl",
        heldout_share=0.2,
        shares=(0.5, 0.5),
        weights=(1.0, 0.25),
        curriculum="",
        packing="none",
        length=64,
        batch_size=4,
    )
    weights = np.concatenate(
        [made.dataset.batch_at(s)["weight"][:, 0] for s in range(100)]
    )
    assert abs((weights == 0.25).mean() - 0.5) < 0.05
    assert made.heldout.rows == 8 + 3
    assert "weight" not in made.heldout.batch_at(0)


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(shares=(1.0,)), r"data.shares=\(1.0,\): expected a number of 0 or more"),
        (dict(shares=(0, 0, 0)), "not all 0"),
        (dict(shares=(1, 1, 1), share_by="token"), "did you mean 'tokens'"),
        (dict(shares=(1, 1, 1), curriculum="0: 1,1,1"), "shares of step 0 there"),
        (dict(curriculum="0: 1,1"), "for each of the 3 parts"),
        (dict(epochs=(1, 1, 1)), "caps sources that are mixed; give data.shares"),
        (dict(shares=(1, 1, 1), epochs=(1, -1, 1)), "how often it may be seen"),
        (dict(shares=(1, 1, 1), epochs=(1, 1, 1)), "used up after .* of 100 steps"),
        (dict(workers=-1), "data.workers=-1"),
    ],
)
def test_mixtures_that_cannot_be_are_told(build, parts, settings, told):
    with pytest.raises(UserError, match=told) as error:
        build("language_model", [], files=",".join(parts), length=64, **settings)
    assert "\n" not in str(error.value)


def test_the_config_is_refused_before_anything_is_read():
    stage = defaults.stage("language_model", data=dict(files="a,b", shares=(1.0,)))
    with pytest.raises(UserError, match="data.shares=.*each of the 2 parts"):
        corpus.check(stage.data)
