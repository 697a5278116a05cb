"""Shards give back what was written, are whole or absent, and say what is wrong."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from stagecraft.data import shards
from stagecraft.errors import UserError

TOLD = dict(tokenizer_digest="d" * 64, vocab_size=1000)


def documents(count=50, most=1000, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, most, rng.integers(0, 40)).tolist() for _ in range(count)]


@pytest.mark.parametrize("most, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_documents_come_back_from_one_shard_and_from_many(tmp_path, most, dtype):
    made = documents(most=most)
    made[3] = [most - 1, 0]
    made[7] = np.array([], np.int32)
    told = dict(tokenizer_digest="x", vocab_size=most)
    shards.write(tmp_path / "one", iter(made), **told)
    manifest = shards.write(tmp_path / "many", iter(made), shard_tokens=100, **told)
    assert len(manifest["shards"]) > 5
    assert manifest["dtype"] == dtype
    for name in ("one", "many"):
        found = shards.Shards(tmp_path / name).verify()
        assert len(found) == len(made)
        assert [d.tolist() for d in found] == [list(d) for d in made]
        assert found[-1].tolist() == list(made[-1])
        assert found.lengths.tolist() == [len(d) for d in made]
        assert found.tokens == sum(map(len, made))
        assert found.read(3, 1).tolist() == [0]
        assert found.read(3, 0, 1).tolist() == [most - 1]
        assert found.read(3, 1, 99).tolist() == [0]
        with pytest.raises(IndexError):
            found[len(made)]
    assert {p.name for p in tmp_path.iterdir()} == {"one", "many"}


def test_a_last_shard_that_is_just_full_leaves_no_empty_one(tmp_path):
    made = shards.write(tmp_path / "s", [[1, 2], [3, 4]], shard_tokens=2, **TOLD)
    assert [s["documents"] for s in made["shards"]] == [1, 1]
    assert len(list((tmp_path / "s").iterdir())) == 5
    shards.write(tmp_path / "e", [[], []], **TOLD)
    assert [d.tolist() for d in shards.Shards(tmp_path / "e").verify()] == [[], []]


def test_columns_beside_the_documents(tmp_path):
    values = [{"score": i / 2, "source": "ab"[i % 2]} for i in range(9)]
    pairs = [([i], v) for i, v in enumerate(values)]
    columns = ("score", "source")
    shards.write(tmp_path / "s", iter(pairs), columns=columns, shard_tokens=4, **TOLD)
    found = shards.Shards(tmp_path / "s").verify()
    assert found.column("score").tolist() == [v["score"] for v in values]
    assert found.column("source").tolist() == [v["source"] for v in values]
    with pytest.raises(UserError, match="no column 'length'; it has 'score', 'source'"):
        found.column("length")
    told = "document 1: expected a value for each column score, source"
    bad = [pairs[0], ([1], {"score": 1})]
    with pytest.raises(UserError, match=told):
        shards.write(tmp_path / "t", bad, columns=columns, **TOLD)
    bad = [pairs[0], ([1], {"score": 1, "source": 3})]
    with pytest.raises(UserError, match="document 1: column 'source' is 3"):
        shards.write(tmp_path / "t", bad, columns=columns, **TOLD)


def test_the_digest_is_of_the_content(tmp_path):
    for name in ("a", "b"):
        shards.write(tmp_path / name, documents(), **TOLD)
    shards.write(tmp_path / "c", documents(seed=1), **TOLD)
    a, b, c = (shards.Shards(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_pickled_it_is_its_path_and_another_process_reads_the_same(tmp_path):
    made = [np.arange(1000)] * 300
    shards.write(tmp_path / "s", made, **TOLD)
    found = shards.Shards(tmp_path / "s")
    assert found[5].tolist() == list(range(1000))
    data = pickle.dumps(found)
    assert (
        len(data)
        < 1000
        < 600_000
        < sum(f.stat().st_size for f in (tmp_path / "s").iterdir())
    )
    assert repr(pickle.loads(data)) == repr(found)
    (tmp_path / "pickle").write_bytes(data)
    code = (
        "import pickle, sys; s = pickle.load(open(sys.argv[1], 'rb'));"
        "print(len(s), s[7].sum())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pickle")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["300", str(999 * 500)]


def failing():
    yield [1, 2]
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "made, told",
    [
        ([], "no document to write"),
        ([[1], [1000]], "has id 1000, outside the tokenizer's 1000 ids"),
        ([[1], [-1]], "has id -1"),
        ([[0.5]], "document 0: its ids are float64"),
        (failing(), "cannot be written .No space left"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, made, told):
    with pytest.raises(UserError, match=told) as error:
        shards.write(tmp_path / "s", made, **TOLD)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_and_a_full_folder_stays(tmp_path):
    def stopped():
        yield [1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path / "s", stopped(), **TOLD)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s").mkdir()
    shards.write(tmp_path / "s", [[1]], **TOLD)
    with pytest.raises(UserError, match="exists already"):
        shards.write(tmp_path / "s", [[2]], **TOLD)
    assert shards.Shards(tmp_path / "s")[0].tolist() == [1]


def damaged(folder, what):
    tokens = folder / "tokens-00000.bin"
    manifest = json.loads((folder / "manifest.json").read_text())
    if what == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif what == "flipped":
        data = bytearray(tokens.read_bytes())
        data[5] ^= 1
        tokens.write_bytes(data)
    elif what == "missing":
        (folder / "offsets-00000.npy").unlink()
    elif what == "json":
        (folder / "manifest.json").write_text("{")
    elif what == "none":
        (folder / "manifest.json").unlink()
    else:
        manifest |= what
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "what, told",
    [
        ("cut", r"tokens-00000.bin: has \d+ bytes, expected \d+: it was cut off"),
        ("flipped", "tokens-00000.bin: its content is not what manifest.json says"),
        ("missing", "offsets-00000.npy: missing, but manifest.json names it"),
        ("json", "manifest.json: not a usable manifest"),
        ("none", "no shards here"),
        ({"format": "other"}, "format is 'other'"),
        ({"version": 9}, "version 9, this reads 1"),
        ({"documents": 3}, "documents=3, but its shards have 50"),
        ({"dtype": "float32"}, "dtype 'float32'"),
        ({"columns": None}, "not a usable manifest"),
    ],
)
def test_damage_is_one_line(tmp_path, what, told):
    shards.write(tmp_path / "s", documents(), **TOLD)
    shards.Shards(tmp_path / "s").verify()
    damaged(tmp_path / "s", what)
    with pytest.raises(UserError, match=told) as error:
        shards.Shards(tmp_path / "s").verify()
    assert "\n" not in str(error.value)
    assert str(tmp_path / "s") in str(error.value)


def test_another_tokenizers_shards_are_refused(tmp_path):
    shards.write(tmp_path / "s", documents(), **TOLD)
    found = shards.Shards(tmp_path / "s")
    assert found.check_tokenizer("d" * 64, 1000) is found
    told = r"another tokenizer \(digest dddddddddddd, 1000 ids\) than this run's \(eee"
    with pytest.raises(UserError, match=told):
        found.check_tokenizer("e" * 64, 32)
