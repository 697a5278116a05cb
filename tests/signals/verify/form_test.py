"""Verifiers of form."""

import json
import math

import pytest

from stagecraft.errors import UserError
from stagecraft.signals.verify import form

TEXT = "the cat was on the mat and it is not what we had asked for in the house you see"


def of(verify, *completions):
    return verify(list(completions))


def test_thinking_ends_and_a_reply_follows():
    verify = form.thinking()
    assert of(verify, "<think>so</think>7", " <think>\n</b></think>\n7") == [1, 1]
    bad = (
        "7",
        "<think>so</tool>7",
        "<think>so",
        "<think></think>7",
        "<think>so</think> ",
        "7<think>so</think>7",
        "<think>so</think>7</think>8",
        "<think>a<think>so</think>7",
    )
    assert of(verify, *bad) == [0] * len(bad)
    opened = form.thinking(opened=True)
    assert of(opened, "so</think>7", "so", "<think>so</think>7") == [1, 0, 0]


def test_sections_come_once_and_in_order():
    verify = form.tags()
    whole = "<think>so</think>\n<answer>7</answer>"
    assert of(verify, whole, f" {whole}\n") == [1, 1]
    bad = (
        "<answer>7</answer><think>so</think>",
        f"{whole} and more",
        f"{whole}<answer>8</answer>",
        "<think>so</think><answer></answer>",
        "<think>so<answer>7</answer></think>",
        "<think>so</think><answer>7",
        whole.replace("/think", "/tool"),
    )
    assert of(verify, *bad) == [0] * len(bad)
    assert of(form.tags(tags="answer"), "<answer>7</answer>", whole) == [1, 0]
    with pytest.raises(UserError, match="tags='<a>'"):
        form.tags(tags="<a>")


def test_length_falls_outside_its_bounds_and_never_below_0():
    verify = form.length(least=4, most=10)
    texts = ("x" * n for n in (0, 1, 4, 10, 15, 20, 1000))
    assert of(verify, *texts) == [0, 0.25, 1, 1, 0.5, 0, 0]
    assert of(verify, "   xx   ") == [0.5]
    assert of(form.length(most=1), "") == [1]
    with pytest.raises(UserError, match="expected 0 <= least <= most"):
        form.length(least=5, most=4)


def test_a_pattern_matches_the_whole_reply():
    verify = form.regex(pattern="[a-z]+")
    assert of(verify, "abc", " abc\n", "abc 1", "<think>1</think>abc") == [1, 1, 0, 1]
    with pytest.raises(UserError, match=r"pattern='\(': no pattern"):
        form.regex(pattern="(")


def test_a_pattern_has_a_second(monkeypatch):
    monkeypatch.setattr(form, "SECONDS", 0.05)
    verify = form.regex(pattern="(a|aa)+c")
    slow, fast = of(verify, "a" * 40, "aac")
    assert math.isnan(slow) and fast == 1


def test_language_abstains():
    verify = form.language(language="en")
    german = "der Hund ist nicht auf der Matte und das war auch nicht zu sehen " * 2
    japanese = "これは日本語の文章です。とても長い文章なので、わかります。"
    assert of(verify, TEXT, german, japanese) == [1, 0, 0]
    assert of(verify, "", "42", "Paris.", "400 error", "x " * 40) == [None] * 5
    assert of(verify, "<think>" + TEXT) == [0]
    assert of(form.language(language="ja"), japanese) == [1]
    with pytest.raises(UserError, match="language='eng': expected one of en"):
        form.language(language="eng")


RULES = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"pattern": "^x+$"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path):
    def write(rules):
        path = tmp_path / "schema.json"
        path.write_text(rules if isinstance(rules, str) else json.dumps(rules))
        return str(path)

    return write


def test_json_by_a_schema(schema):
    verify = form.schema(schema=schema(RULES))
    good = ('{"a": 1}', ' {"a": -2, "b": "xx"}\n', '<think>{</think>{"a": 1}')
    assert of(verify, *good) == [1] * len(good)
    bad = (
        '{"a": "1"}',
        '{"b": "xx"}',
        '{"a": 1, "c": 2}',
        '{"a": 1, "b": "y"}',
        '```json\n{"a": 1}\n```',
        'Here: {"a": 1}',
        '{"a": 1} {"a": 1}',
        "{'a': 1}",
        "",
    )
    assert of(verify, *bad) == [0] * len(bad)
    assert "integer" in verify.reads


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}',
        '{"a": 1e400}',
        '{"a": -Infinity}',
        '{"a": 1, "a": 1}',
        '{"b": {"a": 1, "a": 2}}',
        '{"a": ' + "9" * 5000 + "}",
        "[" * 100_000,
        "[" * 65 + "]" * 65,
        '{"a": "' + "x" * 20_000 + '"}',
    ],
)
def test_json_that_readers_disagree_about(text):
    with pytest.raises(ValueError):  # noqa: PT011
        form.parsed(text)


def test_brackets_in_a_text_are_no_depth():
    assert form.parsed('["' + "[" * 100 + '", "\\"[["]')[0] == "[" * 100
    assert form.parsed("[" * 64 + "]" * 64)


def test_schemas_that_cannot_be(schema):
    for rules, says in (
        ("{", "no JSON"),
        ({"type": "no such"}, "no schema"),
        ({"patternProperties": {"a": {}}}, "patternProperties has no limit"),
    ):
        with pytest.raises(UserError, match=says):
            form.schema(schema=schema(rules))
    with pytest.raises(UserError, match="cannot read it"):
        form.schema(schema="nowhere.json")


def test_nothing_is_fetched_and_patterns_have_a_second(schema, monkeypatch):
    import referencing

    far = schema({"$ref": "http://127.0.0.1:9/never.json"})
    with pytest.raises(referencing.exceptions.Unresolvable):
        of(form.schema(schema=far), '{"a": 1}')
    monkeypatch.setattr(form, "SECONDS", 0.05)
    verify = form.schema(schema=schema({"items": {"pattern": "(a|aa)+c"}}))
    assert math.isnan(*of(verify, json.dumps(["a" * 40])))


@pytest.mark.parametrize("name", ["regex", "schema"])
def test_what_is_not_installed_is_one_line(name, monkeypatch):
    monkeypatch.setattr(form.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"is not installed: .*\[verify\]"):
        getattr(form, name)(**{dict(regex="pattern", schema="schema")[name]: "x"})
