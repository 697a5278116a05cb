"""Files of every form, cut anywhere, whole or spoilt: each line read or told."""

import gzip
import importlib
import json

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from stagecraft.curate import inputs, reader
from stagecraft.data import shards
from stagecraft.errors import UserError


def everything(spec, task_bytes=0, document=2000, key="text"):
    """(documents, bad lines) of all tasks in order."""
    found = inputs.survey(str(spec), key, document, task_bytes)
    items = [
        item
        for parts in found.tasks
        for part in parts
        for item in reader.read(part, key, "source", document)
    ]
    bad = [i for i in items if isinstance(i, reader.Bad)]
    return [i for i in items if not isinstance(i, reader.Bad)], bad


def rows(count):
    return [{"text": f"Zeile {i} ü " + "x" * (i % 50), "n": i} for i in range(count)]


def jsonl(path, found):
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found).encode()
    if path.suffix == ".gz":
        half = len(data) // 2  # two members, as `cat a.gz b.gz` makes
        data = gzip.compress(data[:half]) + gzip.compress(data[half:])
    elif path.suffix == ".zst":
        half = len(data) // 2
        squeeze = zstandard.ZstdCompressor().compress
        data = squeeze(data[:half]) + squeeze(data[half:])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("task_bytes", [1, 100, 1000, 10**6])
def test_a_file_is_cut_and_nothing_lost(tmp_path, name, task_bytes):
    path = jsonl(tmp_path / name, rows(300))
    texts, bad = everything(path, task_bytes)
    assert not bad
    assert [t.record["n"] for t in texts] == list(range(300))
    assert [t.where for t in texts] == [f"{path}:{i}" for i in range(1, 301)]
    assert all(t.source == str(path) for t in texts)
    tasks = inputs.survey(str(path), "text", 2000, task_bytes).tasks
    assert (len(tasks) > 2) == (task_bytes <= 1000)


def test_small_files_share_a_task(tmp_path):
    for i in range(30):
        jsonl(tmp_path / f"{i:02d}.jsonl", rows(2))
    tasks = inputs.survey(str(tmp_path), "text", 2000, 300).tasks
    assert 3 < len(tasks) < 12
    assert sum(map(len, tasks)) == 30
    digest = inputs.survey(str(tmp_path), "text", 2000, 300).digest
    assert digest == inputs.survey(str(tmp_path), "text", 2000, 300).digest
    jsonl(tmp_path / "07.jsonl", rows(3))
    assert digest != inputs.survey(str(tmp_path), "text", 2000, 300).digest


@pytest.mark.parametrize("task_bytes", [200, 10**6])
def test_text_is_cut_at_blank_lines(tmp_path, task_bytes):
    paragraphs = [f"Absatz {i}\r\n" + "wort wort\r\n" * 9 + "ende" for i in range(40)]
    path = tmp_path / "a.txt"
    path.write_bytes("\r\n\r\n".join(paragraphs).encode())
    texts, bad = everything(path, task_bytes, document=150)
    assert not bad and len(texts) > 10
    joined = "\n\n".join(t.text for t in texts)
    assert joined == "\n\n".join(p.replace("\r\n", "\n") for p in paragraphs)
    lines = path.read_bytes().split(b"\n")
    for t in texts:
        line = int(t.where.rpartition(":")[2])
        assert lines[line - 1].decode().strip() == t.text.split("\n")[0]
    [whole], _ = everything(path, task_bytes, document=0)
    assert whole.text == joined


def test_a_bad_line_is_told_and_the_rest_read(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "one"}',
        b'{"text": "t\xffwo"}',
        b'{"text": "three"',
        b"[1, 2]",
        b'{"txt": "five"}',
        b'{"text": 6}',
        b'{"text": null}',
        b"",
        b'{"text": "\\ud800"}',
        b'{"text": "ten", "source": "web"}',
        b"[" * 100_000,
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    for task_bytes in (1, 10**6):
        texts, bad = everything(path, task_bytes)
        assert [t.text for t in texts] == ["one", "ten", "last"]
        assert [t.source for t in texts] == [str(path), "web", str(path)]
        assert [int(b.where.rpartition(":")[2]) for b in bad] == [
            2,
            3,
            4,
            5,
            6,
            7,
            9,
            11,
            12,
        ]
        reasons = [b.reason for b in bad]
        assert reasons[:3] == ["not UTF-8", "not JSON", "no JSON object"]
        assert reasons[3:6] == ["no text", "text is no text", "text is no text"]
        assert reasons[6:] == ["half a surrogate pair", "not JSON", "not JSON"]
        assert bad[0].detail == "byte 12 of the line" and "\\xff" in bad[0].data
        assert "no key 'text'; it has 'txt'" in bad[3].detail
        json.dumps([b._asdict() for b in bad]).encode()


def test_text_that_is_not_utf8_loses_that_line_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntw\xe9o\nthree\n")
    [text], [bad] = everything(path)
    assert text.text == "one\nthree" and bad.where == f"{path}:2"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_cut_off_file_is_read_up_to_there(tmp_path, name):
    rng = np.random.default_rng(0)
    found = [{"text": "".join(rng.choice(list("abcdefgh"), 300))} for _ in range(3000)]
    path = jsonl(tmp_path / name, found)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    texts, bad = everything(path, 50_000)
    assert 1500 < len(texts) < 3000
    assert [t.text for t in texts] == [r["text"] for r in found[: len(texts)]]
    assert bad[-1].reason == "damaged file" and bad[-1].where == f"{path}:end"
    assert "cut off" in bad[-1].detail
    assert len(bad) == 1
    path.write_bytes(data[:2000] + b"\0" * 500 + data[2500:])
    texts, bad = everything(path)
    assert bad[-1].reason == "damaged file" and "damaged" in bad[-1].detail
    path.write_bytes(b"this is no such file")
    texts, bad = everything(path)
    assert not texts and [b.reason for b in bad] == ["damaged file"]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table(
        {"body": ["one", None, "three", "four"], "day": np.arange(4).astype("M8[D]")}
    )
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    texts, bad = everything(path, 1, key="body")
    assert [t.text for t in texts] == ["one", "three", "four"]
    assert [t.where for t in texts] == [f"{path}:{i}" for i in (1, 3, 4)]
    assert texts[0].record == {"day": "1970-01-01"}
    assert [(b.where, b.reason) for b in bad] == [(f"{path}:2", "text is no text")]
    with pytest.raises(UserError, match="no column 'text'; it has 'body', 'day'"):
        everything(path)
    path.write_bytes(path.read_bytes()[:100])
    texts, bad = everything(path, key="body")
    assert not texts and bad[0].reason == "damaged file"


def test_a_text_of_parquet_that_is_not_utf8(tmp_path):
    raw = pyarrow.array([b"one", b"t\xffwo", b"three"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    texts, bad = everything(path)
    assert [t.text for t in texts] == ["one", "three"]
    assert [(b.where, b.reason) for b in bad] == [(f"{path}:2", "not UTF-8")]


def test_what_is_not_there_or_not_known_is_refused(tmp_path):
    (tmp_path / "a.xls").write_text("a,b\n")
    for spec, says in (
        (tmp_path / "b.jsonl", "no such file"),
        (tmp_path, "holds no"),
        (tmp_path / "a.xls", "expected a .txt"),
        ("", "names no file"),
    ):
        with pytest.raises(UserError, match=says):
            inputs.survey(str(spec), "text", 2000, 0)


@pytest.mark.parametrize("suffix", [".json", ".arrow", ".array_record", ".json.zst"])
def test_every_container_of_training_is_read(tmp_path, suffix):
    path, found = tmp_path / f"a{suffix}", rows(30)
    if suffix == ".arrow":
        table = pyarrow.Table.from_pylist(found)
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    elif suffix == ".array_record":
        module = importlib.import_module("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for row in found:
            writer.write(json.dumps(row).encode())
        writer.close()
    else:
        data = json.dumps(found).encode()
        data = zstandard.ZstdCompressor().compress(data) if "zst" in suffix else data
        path.write_bytes(data)
    texts, bad = everything(path, 100)
    assert not bad and [t.record["n"] for t in texts] == list(range(30))
    assert [t.where for t in texts] == [f"{path}:{i}" for i in range(1, 31)]
    digest = inputs.survey(str(path), "text", 2000, 100).digest
    path.write_bytes(path.read_bytes()[:-30])
    assert digest != inputs.survey(str(path), "text", 2000, 100).digest
    texts, bad = everything(path)
    assert bad[-1].reason == ("not JSON" if suffix == ".json" else "damaged file")


@pytest.mark.parametrize("task_bytes", [100, 10**6])
def test_remote_files_are_read_like_local_ones(tmp_path, task_bytes):
    memory = fsspec.filesystem("memory")
    names = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
    for name in names:
        path = jsonl(tmp_path / name, rows(200))
        memory.pipe_file(f"/raw/{name}", path.read_bytes())
    texts, bad = everything("memory://raw", task_bytes)
    here, _ = everything(tmp_path, task_bytes)
    assert not bad and len(texts) == 600
    assert [t.text for t in texts] == [t.text for t in here]
    assert texts[0].where == "memory:///raw/a.jsonl:1"
    assert texts[0].source == "memory://raw"
    with pytest.raises(UserError, match="memory://none.txt: no such file"):
        everything("memory://none.txt")


def test_shards_are_no_text(tmp_path):
    settings = dict(tokenizer_digest="x", vocab_size=300)
    shards.write(tmp_path / "s", [[1, 2]], **settings)
    with pytest.raises(UserError, match="holds ids, not text"):
        everything(tmp_path / "s")


def test_a_file_that_shrinks_is_noticed(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", rows(100))
    [[part]] = inputs.survey(str(path), "text", 2000, 0).tasks
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="became shorter"):
        list(reader.read(part, "text", "source", 2000))
