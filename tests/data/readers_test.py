"""Files are read whole or refused by FILE:LINE."""

import gzip
import json
from pathlib import Path

import pytest

from stagecraft.data import containers, files, readers
from stagecraft.errors import UserError


def jsonl(path, *records):
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def names(spec):
    return [path.name for path in files.expand(spec)]


# -- which files -----------------------------------------------------------------------


def test_expand_is_sorted_and_takes_every_kind_of_spec(tmp_path):
    inner = tmp_path / "inner"
    (inner / ".hidden").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl", "c.jsonl.gz", "inner/d.txt", "notes.md"):
        (tmp_path / name).write_text("x")
    for name in (".e.txt", "inner/.hidden/f.txt"):
        (tmp_path / name).write_text("x")
    assert names(str(tmp_path)) == ["a.jsonl", "b.txt", "c.jsonl.gz", "d.txt"]
    assert names(tmp_path) == names(str(tmp_path))
    assert names(f"{tmp_path}/*.txt") == ["b.txt"]
    assert names(f"{tmp_path}/**/*.txt") == ["b.txt", "d.txt"]
    # Parts keep the order they are given in.
    parts = (f"{tmp_path}/inner", f"{tmp_path}/a.jsonl")
    assert names(", ".join(parts)) == names(parts) == ["d.txt", "a.jsonl"]
    assert names(tuple(map(Path, parts))) == names(parts)


def test_expand_takes_a_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert names(str(tmp_path / "a[1].txt")) == ["a[1].txt"]


@pytest.mark.parametrize(
    "spec, told",
    [
        ("none.txt", "no such file"),
        ("*.jsonl", "no such file"),
        ("empty", "holds no .txt, .txt.gz, .txt.zst, .jsonl, .*parquet"),
        ("notes.md", "notes.md: expected a .txt"),
        ("", "names no file"),
        (" , ", "names no file"),
    ],
)
def test_expand_refuses(tmp_path, monkeypatch, spec, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=told):
        files.expand(spec)


def test_digest_is_of_contents_in_order(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", {"text": "x"})
    b = jsonl(tmp_path / "b.jsonl", {"text": "y"})
    same = jsonl(tmp_path / "moved.jsonl.gz", {"text": "x"})
    assert files.digest([a, b]) == files.digest([same, b])
    assert files.digest([a, b]) != files.digest([b, a])
    assert files.digest([a]) != files.digest([b])
    # Where one file ends and the next begins counts.
    both = tmp_path / "both.jsonl"
    both.write_bytes(a.read_bytes() + b.read_bytes())
    assert files.digest([both]) != files.digest([a, b])


# -- text ------------------------------------------------------------------------------


def test_a_short_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    assert list(readers.texts(str(tmp_path))) == ["One.\n\nTwo.\n"]


def test_a_long_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = [f"Paragraph {i}.\n" + "word " * (i % 90) for i in range(200)]
    text = "\n\n".join(paragraphs)
    (tmp_path / "a.txt").write_text(text)
    found = list(readers.texts(str(tmp_path)))
    assert "\n\n".join(found) == text
    assert len(found) > 10
    assert max(map(len, found)) <= containers.DOCUMENT + 200
    # Neighbours would not have fitted in one.
    assert all(
        len(a) + len(b) > containers.DOCUMENT
        for a, b in zip(found, found[1:], strict=False)
    )


def test_line_ends_of_another_system_are_blank_lines_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(("x" * 1500 + "\r\n\r\n" + "y" * 1500).encode())
    assert list(readers.texts(str(tmp_path))) == ["x" * 1500, "y" * 1500]


def test_texts_of_jsonl_plain_and_compressed(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"text": "é \n\n x", "other": 1}, {"text": ""})
    jsonl(tmp_path / "b.jsonl.gz", {"text": "z"})
    assert list(readers.texts(str(tmp_path))) == ["é \n\n x", "", "z"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfHello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "World"}')
    assert list(readers.texts(str(tmp_path))) == ["Hello", "World"]


def test_blank_lines_and_other_line_ends_between_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\r\n\r\n{"text": "b"}')
    assert list(readers.texts(str(tmp_path))) == ["a", "b"]


# -- records ---------------------------------------------------------------------------

PROMPT = [{"role": "user", "content": "p"}]
ANSWER = [{"role": "assistant", "content": "c"}]
WORSE = [{"role": "assistant", "content": "r"}]


def test_demonstrations_in_both_shapes_and_with_other_keys(tmp_path):
    for number, record in enumerate(
        (
            {"prompt": "p", "completion": "c"},
            {"messages": PROMPT + ANSWER},
            {"prompt": PROMPT, "completion": ANSWER},
        )
    ):
        jsonl(tmp_path / f"{number}.jsonl", record)
    assert readers.demonstrations(tmp_path) == [(PROMPT + ANSWER, None)] * 3
    other = jsonl(tmp_path / "b.jsonl", {"question": "p", "answer": "c"})
    mapping = readers.fields("prompt=question+completion=answer")
    assert mapping == {"prompt": "question", "completion": "answer"}
    assert readers.demonstrations(other, mapping) == [(PROMPT + ANSWER, None)]
    third = jsonl(tmp_path / "c.jsonl", {"turns": PROMPT + ANSWER})
    found = readers.demonstrations(third, readers.fields("messages = turns"))
    assert found == [(PROMPT + ANSWER, None)]


def test_comparisons_as_text_and_messages(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    jsonl(tmp_path / "a.jsonl", pair)
    jsonl(tmp_path / "b.jsonl", dict(prompt=PROMPT, chosen=ANSWER, rejected=WORSE))
    want = readers.Comparison(PROMPT, (ANSWER, WORSE))
    assert readers.comparisons(tmp_path) == [want] * 2
    assert want.preference is want.margin is want.tools is None


def test_comparisons_with_how_sure_and_by_how_much(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = jsonl(
        tmp_path / "a.jsonl",
        pair | {"preference": 0.75, "margin": -2},
        pair | {"preference": 1},
        pair | {"p_chosen": 0.5},
    )
    found = readers.comparisons(str(path))
    assert [c[2:4] for c in found] == [(0.75, -2.0), (1.0, None), (None, None)]
    assert isinstance(found[1].preference, float)
    renamed = readers.comparisons(str(path), readers.fields("preference=p_chosen"))
    assert [c.preference for c in renamed] == [None, None, 0.5]


def test_rankings(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "p", "ranked": ["c", WORSE, "x"]},
        {"prompt": "p", "ranked": ["c", "r"], "ranked_ended": [True, False]},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    )
    third = [{"role": "assistant", "content": "x"}]
    cut = [WORSE[0] | {"ended": False}]
    assert readers.comparisons(str(path)) == [
        (PROMPT, (ANSWER, WORSE, third), None, None, None),
        (PROMPT, (ANSWER, cut), None, None, None),
        (PROMPT, (ANSWER, WORSE), None, None, None),
    ]


def test_judgements_and_pairs_as_judgements(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    one = {"prompt": "p", "completion": "c", "label": True}
    cut = [ANSWER[0] | {"ended": False}]
    path = jsonl(
        tmp_path / "a.jsonl",
        one,
        one | {"label": False, "completion_ended": False},
    )
    want = [[(PROMPT, ANSWER, True, None)], [(PROMPT, cut, False, None)]]
    assert readers.judgements(path) == want
    renamed = readers.fields("label=label+completion=completion")
    assert readers.judgements(path, renamed) == want
    path = jsonl(
        tmp_path / "b.jsonl", pair | {"rejected_ended": False}, pair | {"preference": 0}
    )
    cut = [WORSE[0] | {"ended": False}]
    assert readers.judgements(path) == [
        [(PROMPT, ANSWER, True, None), (PROMPT, cut, False, None)],
        [(PROMPT, ANSWER, False, None), (PROMPT, WORSE, True, None)],
    ]


@pytest.mark.parametrize("prompt", ["p", PROMPT])
def test_prompts_know_where_they_came_from(tmp_path, prompt):
    records = [{"prompt": prompt, "answer": [4, 2]}, {"prompt": prompt}]
    path = jsonl(tmp_path / "a.jsonl", *records)
    assert readers.prompts(str(path)) == [
        (prompt, f"{path}:1", records[0], None),
        (prompt, f"{path}:2", records[1], None),
    ]


def test_fields_refuses_what_would_be_ignored():
    assert readers.fields("") == {}
    assert readers.fields("prompt=a+b") == {"prompt": "a+b"}
    for text in ("prompt", "prompt=", "prompt= ", "=x"):
        with pytest.raises(UserError, match="our=theirs"):
            readers.fields(text)
    with pytest.raises(UserError, match="mean 'prompt'"):
        readers.fields("promt=question")


GOOD = {"prompt": "p", "completion": "c"}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    "line, told",
    [
        (b'{"prompt": "p", "completion": ', "not JSON"),
        (b"prompt: p", "not JSON .*character 1"),
        (b'["p", "c"]', "a JSON object, got list"),
        (b'"p"', "a JSON object, got str"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "p", "answer": "c"}', "no key 'completion'.*'prompt', 'answer'"),
        (b"{}", "no key 'prompt'; it has none"),
        (b'{"prompt": "p", "completion": 3}', "'completion' is int"),
        (b'{"prompt": null, "completion": "c"}', "no key 'prompt'"),
        (b'{"messages": "p"}', "at least one assistant"),
        (b'{"messages": [{"role": "bot", "content": ""}]}', "'bot'"),
        (
            b'{"messages": [{"role": "user", "content": ""},'
            b' {"role": "assistant", "content": "", "weight": 3}]}',
            "weight is 3",
        ),
        (b'{"prompt": "\\ud83d", "completion": "c"}', "surrogate"),
        (b"[" * 200_000, "JSON"),
    ],
)
def test_a_bad_line_is_told_by_file_and_line(tmp_path, line, told):
    good = json.dumps(GOOD).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, b"", good, line, good]))
    with pytest.raises(UserError, match=told) as error:
        readers.demonstrations(str(path))
    assert str(error.value).startswith(f"{path}:4: ")
    assert "\n" not in str(error.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}')
    assert list(readers.texts(str(path))) == ["\U0001f600"]


@pytest.mark.parametrize(
    "record, told",
    [
        ({"prompt": "p", "chosen": "c"}, "no key 'rejected'"),
        ({"prompt": "p", "chosen": "c", "rejected": ["x"]}, "role"),
        # A whole conversation where only the answer belongs.
        ({"prompt": "p", "chosen": PROMPT + ANSWER, "rejected": "r"}, "message 2"),
        ({"prompt": "p", "chosen": ANSWER + PROMPT, "rejected": "r"}, "last message"),
        ({"prompt": PROMPT + ANSWER, "chosen": "c", "rejected": "r"}, "message 3"),
        (PAIR | {"preference": 1.5}, "'preference' is 1.5, expected .* from 0 to 1"),
        (PAIR | {"preference": "0.5"}, "'preference' is '0.5'"),
        (PAIR | {"preference": True}, "'preference' is True"),
        (PAIR | {"preference": float("nan")}, "'preference' is nan"),
        (PAIR | {"margin": float("inf")}, "'margin' is inf"),
        (PAIR | {"ranked": ["c", "r"]}, "both 'ranked' and 'chosen'"),
        (PAIR | {"chosen": [ANSWER[0] | {"weight": 0}]}, "weight 0"),
        ({"prompt": "p", "ranked": ["c", "r"], "margin": 1}, "'ranked' and 'margin'"),
        ({"prompt": "p", "ranked": "c"}, "'ranked' is str, expected a list"),
        ({"prompt": "p", "ranked": ["c"]}, "has 1 answers, expected two or more"),
        ({"prompt": "p", "ranked": ["c", 3]}, "a text or a list of messages"),
        ({"prompt": "p", "ranked": ["c", PROMPT]}, "message 2"),
        ({"prompt": "p", "ranked": ["c", "r"], "ranked_ended": [True]}, "ranked_ended"),
        ({"prompt": "p", "ranked": ["c", "r"], "ranked_ended": 1}, "'ranked_ended' is"),
    ],
)
def test_a_bad_comparison_is_told(tmp_path, record, told):
    path = jsonl(tmp_path / "a.jsonl", record)
    with pytest.raises(UserError, match=told) as error:
        readers.comparisons(str(path))
    assert str(error.value).startswith(f"{path}:1: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "record, told",
    [
        ({"prompt": "p", "completion": "c"}, "no key 'label'.*'completion'"),
        ({"prompt": "p", "completion": "c", "label": 1}, "'label' is int, .*true or"),
        ({"prompt": "p", "completion": "c", "label": "yes"}, "'label' is str"),
        ({"prompt": "p", "completion": PROMPT, "label": True}, "message 2"),
        ({"prompt": "p", "ranked": ["c", "r"]}, "'ranked' does not say"),
        ({"prompt": "p", "chosen": "c"}, "no key 'rejected'"),
        ({"prompt": "p", "label": True}, "no key 'completion'"),
    ],
)
def test_a_bad_judgement_is_told(tmp_path, record, told):
    good = {"prompt": "p", "completion": "c", "label": True}
    path = jsonl(tmp_path / "a.jsonl", good, record)
    with pytest.raises(UserError, match=told) as error:
        readers.judgements(str(path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


def test_a_prompt_must_leave_the_answer_to_the_model(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p"}, {"prompt": PROMPT + ANSWER})
    with pytest.raises(UserError, match=r"a\.jsonl:2: the last message"):
        readers.prompts(str(path))


def test_text_that_is_not_utf8_is_told_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(UserError, match=r"a\.txt:3: not UTF-8"):
        list(readers.texts(str(path)))


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.txt", b""),
        ("a.txt", b" \n\n"),
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_an_empty_file_is_told(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: empty"):
        list(readers.texts(str(tmp_path)))


def test_a_damaged_gzip_file_is_told(tmp_path):
    data = gzip.compress(json.dumps({"text": "x" * 1000}).encode())
    path = tmp_path / "a.jsonl.gz"
    for broken in (
        data[:-9],
        data[:5],
        b"plain text",
        data[:14] + b"\0\0\0" + data[17:],
    ):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged or cut-off"):
            list(readers.texts(str(path)))
        with pytest.raises(UserError, match="damaged or cut-off"):
            files.digest([path])


def test_records_where_text_is_are_told(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hello")
    for read in (
        readers.demonstrations,
        readers.comparisons,
        readers.judgements,
        readers.prompts,
    ):
        with pytest.raises(UserError, match=r"a\.txt: .* expected \.jsonl"):
            read(str(path))


def test_an_answer_that_was_cut_off_is_marked(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "a", "chosen": "b", "rejected": "c d", "rejected_ended": False}
    path.write_text(json.dumps(row) + "\n")
    [(_, (chosen, rejected), *_)] = readers.comparisons(str(path))
    assert "ended" not in chosen[0]
    assert rejected == [{"role": "assistant", "content": "c d", "ended": False}]
