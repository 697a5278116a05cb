"""Every container gives the same records, and says what is wrong with a bad one."""

import gzip
import importlib
import io
import json
import sys
import tarfile

import fsspec
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from stagecraft.curate import inputs, reader
from stagecraft.data import containers, files, readers, streams
from stagecraft.errors import UserError

TURNS = [
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "\U0001f600", "weight": 1},
]
RECORDS = [{"messages": TURNS, "n": i} for i in range(3000)]


def lines(records):
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    return text.encode()


def saved(folder, records):
    """As `datasets` writes a set: Arrow streams and a state that names them."""
    folder.mkdir(parents=True)
    half = len(records) // 2
    for name, part in (("b.arrow", records[:half]), ("a.arrow", records[half:])):
        table = pa.Table.from_pylist(part)
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    state = {"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def write(path, records):
    kind = "".join(path.suffixes)
    if kind == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    elif kind == ".arrow":
        table = pa.Table.from_pylist(records)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif kind == ".array_record":
        module = importlib.import_module("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(json.dumps(record).encode())
        writer.close()
    elif kind == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif kind == "":
        saved(path, records)
    elif kind == ".jsonl.gz":
        data = lines(records)  # two members, as `cat a.gz b.gz` has
        path.write_bytes(gzip.compress(data[:999]) + gzip.compress(data[999:]))
    elif kind == ".jsonl.zst":
        data, pack = lines(records), zstandard.ZstdCompressor().compress
        path.write_bytes(pack(data[:999]) + pack(data[999:]))
    else:
        path.write_bytes(lines(records))
    return path


NAMES = (
    *("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "a.arrow"),
    *("a.array_record", "folder"),
)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_records_from_every_container(tmp_path, name):
    write(tmp_path / name, RECORDS)
    found = []
    for path in files.expand(tmp_path / name):
        found += [record for _, record in containers.records(path)]
    # A struct's keys that a row lacks come as null from columns: they are left out.
    assert found == RECORDS
    assert readers.demonstrations(tmp_path / name)[-1].messages == TURNS


def test_csv_is_read_as_it_is_quoted(tmp_path):
    path = tmp_path / "a.csv"
    text = 'id,prompt,,note\r\n1,"Kill, ""then"" restart?",x,\r\n'
    text += '\r\n2,"two\nlines",y,z\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    want = [
        {"id": "1", "prompt": 'Kill, "then" restart?', "note": ""},
        {"id": "2", "prompt": "two\nlines", "note": "z"},
    ]
    records = list(containers.records(path))
    assert [record for _, record in records] == want
    assert [where for where, _ in records] == [f"{path}:2", f"{path}:5"]
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [record for _, record in containers.records(packed)] == want
    prompts = readers.prompts(str(path))
    assert [one.prompt for one in prompts] == [one["prompt"] for one in want]
    assert readers.prompts(str(path), {"prompt": "note"})[1].prompt == "z"
    for bad, says in (
        ("a,b\n1\n", r"a.csv:2: 1 values under 2 names; quote a value"),
        ("a,b\n1,2,3\n", r"a.csv:2: 3 values under 2 names"),
        ("a,a\n1,2\n", r"a.csv: its first line names its columns \(two are 'a'\)"),
        (",\n1,2\n", r"names its columns \(none is\)"),
        ('a,b\n1,"x\n', r"a.csv: damaged, cut off, or not a csv file"),
        ("a,b\n", r"a.csv: empty"),
        ("", r"a.csv: empty"),
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match=says):
            list(containers.records(path))
    path.write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(UserError, match=r"a.csv:3: .*UTF-8"):
        list(containers.records(path))


def test_records_are_told_by_line_or_row(tmp_path):
    for name in ("a.jsonl", "a.parquet", "a.json"):
        path = write(tmp_path / name, RECORDS[:2])
        assert [where for where, _ in containers.records(path)] == [
            f"{path}:1",
            f"{path}:2",
        ]
    # Lines under the name of a list are read as lines.
    path = tmp_path / "lines.json"
    path.write_bytes(b"\xef\xbb\xbf" + lines(RECORDS[:2]))
    assert [r for _, r in containers.records(path)] == RECORDS[:2]


def test_the_digest_is_of_what_is_in_a_compressed_file(tmp_path):
    found = {
        files.digest([write(tmp_path / f"a.jsonl{how}", RECORDS)])
        for how in ("", ".gz", ".zst")
    }
    assert len(found) == 1
    assert files.digest([write(tmp_path / "b.jsonl.zst", RECORDS[1:])]) not in found


def test_text_is_the_same_compressed_and_in_small_pieces(tmp_path, monkeypatch):
    text = "".join(f"line {i}\r\n" + "\n" * (i % 5 == 0) for i in range(900)) + "\n\n\n"
    text = "x\n" * 5 + text + "end\r"
    (tmp_path / "a.txt").write_bytes(text.encode())
    want = list(readers.texts(tmp_path / "a.txt"))
    # As the whole text split at blank lines would have it.
    assert "\n\n".join(want) == text.replace("\r\n", "\n")
    assert len(want) > 3
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt.zst").write_bytes(
        zstandard.ZstdCompressor().compress(text.encode())
    )
    monkeypatch.setattr(streams, "_CHUNK", 7)
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        assert list(readers.texts(tmp_path / name)) == want


def test_a_saved_set_in_a_folder_of_files_and_with_splits(tmp_path):
    saved(tmp_path / "sets" / "one" / "train", RECORDS[:4])
    write(tmp_path / "sets" / "z.jsonl", RECORDS[4:5])
    (tmp_path / "sets" / "dataset_infos.json").write_text("{}")
    splits = tmp_path / "sets" / "one" / "dataset_dict.json"
    splits.write_text(json.dumps({"splits": ["train"]}))
    found = [path.name for path in files.expand(tmp_path / "sets")]
    assert found == ["b.arrow", "a.arrow", "z.jsonl"]
    assert len(files.expand(f"{tmp_path}/sets/*")) == 3
    splits.write_text(json.dumps({"splits": ["train", "test"]}))
    told = "holds the splits train, test; name one, as in .*one/train"
    with pytest.raises(UserError, match=told):
        files.expand(tmp_path / "sets" / "one")
    splits.write_text("[]")
    with pytest.raises(UserError, match="dataset_dict.json: not as `datasets` writes"):
        files.expand(tmp_path / "sets")


@pytest.mark.parametrize("cut", [1, 9, 200])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("a.jsonl", "folder")])
def test_a_cut_off_file_is_one_line(tmp_path, name, cut):
    path = write(tmp_path / name, RECORDS)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=name) as error:
        list(containers.records(path))
    assert "\n" not in str(error.value)
    assert "damaged" in str(error.value) or name == "a.json"


def test_bytes_that_are_no_file_of_their_name(tmp_path):
    for name in NAMES[1:-1]:
        (tmp_path / name).write_bytes(b"plain text")
        with pytest.raises(UserError, match=name) as error:
            list(containers.records(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_column_is_told(tmp_path):
    path = write(tmp_path / "a.parquet", [{"body": "x", "id": 3}])
    told = r"a.parquet:1: no key 'text'; it has 'body', 'id'; rename keys with fields"
    with pytest.raises(UserError, match=told):
        list(readers.texts(path))
    assert list(readers.texts(path, {"text": "body"})) == ["x"]
    none = pa.Table.from_pylist([], pa.schema([("text", pa.string())]))
    parquet.write_table(none, path)
    with pytest.raises(UserError, match="empty"):
        list(readers.texts(path))


def test_zeros_after_a_gzip_member_are_no_damage(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", RECORDS[:9])
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    assert [record for _, record in containers.records(path)] == RECORDS[:9]
    path.write_bytes(b"\0" * 512)
    with pytest.raises(UserError, match="damaged or cut-off"):
        list(containers.records(path))


def test_a_text_of_columns_that_is_not_utf8_is_one_line(tmp_path):
    raw = pa.array([b"one", b"t\xffwo", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet:2: .* row is not UTF-8"):
        list(readers.texts(tmp_path / "a.parquet"))


def test_a_list_with_something_else_in_it(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, "b"]')
    with pytest.raises(UserError, match=r"a\.json:2: expected a JSON object, got str"):
        list(readers.texts(tmp_path / "a.json"))


# -- remote storage --------------------------------------------------------------------


def test_remote_files_are_read_like_local_ones(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("a.jsonl.zst", "b.parquet", "c.jsonl.gz", "d.arrow"):
        data = write(tmp_path / name, RECORDS[:5]).read_bytes()
        memory.pipe_file(f"/set/{name}", data)
    memory.pipe_file("/set/.hidden.jsonl", b"x")
    memory.pipe_file("/set/notes.md", b"x")
    memory.pipe_file("/other/text.txt", b"Hello.")
    found = files.expand("memory://set")
    assert [p.name for p in found] == [
        "a.jsonl.zst",
        "b.parquet",
        "c.jsonl.gz",
        "d.arrow",
    ]
    assert str(found[0]).startswith("memory://")
    assert len(readers.demonstrations("memory://set")) == 20
    assert [p.name for p in files.expand("memory://set/*.gz")] == ["c.jsonl.gz"]
    assert list(readers.texts("memory://other/text.txt")) == ["Hello."]
    # The content counts, not the place.
    assert files.digest(found[:1]) == files.digest([tmp_path / "a.jsonl.zst"])
    memory.pipe_file("/bad/a.jsonl", b"{}\n[]\n")
    with pytest.raises(UserError, match=r"memory:///?bad/a.jsonl:2: expected a JSON"):
        list(containers.records(files.expand("memory://bad")[0]))
    for spec, told in (
        ("memory://none.txt", "no such file, folder or glob"),
        ("memory://other/*.gz", "no such file"),
        ("memory://set/notes.md", "expected a .txt"),
        ("nowhere://a/b.txt", "not a known storage"),
    ):
        with pytest.raises(UserError, match=told) as error:
            files.expand(spec)
        assert str(error.value).startswith(spec[:9])


def test_a_missing_package_is_told_by_its_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", RECORDS[:1])
    for name in ("pyarrow", "pyarrow.parquet", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    told = r"needs the package pyarrow: .* -m pip install -e '.*\[data\]'"
    with pytest.raises(UserError, match=told):
        list(containers.records(path))
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(UserError, match="needs the package zstandard"):
        list(containers.records(tmp_path / "a.jsonl.zst"))
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserError, match="az://bucket/a.txt: .*adlfs to access .*"):
        files.expand("az://bucket/a.txt")


# -- a container is one function and one line, for training and for curation -----------


def test_a_new_container_is_one_function_and_its_line(tmp_path, monkeypatch):
    """A .tar of texts, read whole here; the same files by curation."""

    def read(path, stretch):
        data = b"".join(streams.chunks(path))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for number, member in enumerate(archive, 1):
                text = archive.extractfile(member).read().decode()
                yield number, {"text": text, "name": member.name}, b""

    table = containers.CONTAINERS | {".tar": containers.Container(read)}
    monkeypatch.setattr(containers, "CONTAINERS", table)
    monkeypatch.setattr(files, "SUFFIXES", (*files.SUFFIXES, ".tar"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("one", "two"):
            (tmp_path / name).write_text(f"text {name}")
            archive.add(tmp_path / name, name)
    assert [*readers.texts(tmp_path)] == ["text one", "text two"]
    [[part]] = inputs.survey(str(tmp_path), "text", 2000, 0).tasks
    items = list(reader.read(part, "text", "name", 2000))
    assert [(i.text, i.source) for i in items] == [
        ("text one", "one"),
        ("text two", "two"),
    ]
