"""Verifiers: what they are given, and rows on which they fail or cannot say."""

import logging
import math
import sys
import types

import numpy as np
import pytest

from stagecraft.errors import UserError
from stagecraft.signals import verifiers

RECORDS = [
    {"prompt": "1 + 1", "answer": 2},
    {"prompt": "2 + 2", "answer": 4, "unit": "m"},
    {"prompt": "3 + 3", "answer": 6},
]
WORDS = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def scores(function, texts=("2", "5", "6"), name="mine"):
    ended = [True] * len(texts)
    (found,) = verifiers.scores_of([(name, function)], RECORDS, list(texts), ended)
    return found


def exact(prompts, completions, answer):
    return [float(int(c) == a) for c, a in zip(completions, answer, strict=True)]


def test_a_verifier_gets_lists_and_the_keys_that_it_names():
    assert scores(exact) == [1.0, 0.0, 1.0]

    def everything(prompts, completions, **columns):
        assert prompts == ["1 + 1", "2 + 2", "3 + 3"]
        assert columns["unit"] == [None, "m", None]
        assert columns["ended"] == [True] * 3
        assert columns.keys() == {"answer", "unit", "ended"}
        return [0, True, np.float32(0.5)]

    assert scores(everything) == [0.0, 1.0, 0.5]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, "1,5", [1]])
def test_what_is_no_finite_number_cannot_say(bad):
    found = scores(lambda prompts, completions: [1.0, bad, 0])
    assert found[0] == 1 and math.isnan(found[1]) and found[2] == 0


def test_a_verifier_that_raises_is_asked_row_by_row(caplog):
    def fragile(prompts, completions, answer):
        return [1 / (int(c) - 5) for c in completions]

    with caplog.at_level(logging.WARNING):
        found = scores(fragile, name="fragile")
    assert found[0] == pytest.approx(-1 / 3) and found[2] == 1
    assert math.isnan(found[1])
    (line,) = [r.getMessage() for r in caplog.records]
    for part in ("fragile", "ZeroDivisionError", "'2 + 2'", "'5'", "1 of 3 rows"):
        assert part in line


def test_a_verifier_that_always_raises_scores_nobody_and_the_log_stays_short(caplog):
    def broken(prompts, completions):
        raise KeyError("x")

    with caplog.at_level(logging.WARNING):
        (found,) = verifiers.scores_of(
            [("broken", broken)], RECORDS * 5, ["a"] * 15, [True] * 15
        )
    assert np.isnan(found).all() and len(found) == 15
    assert len(caplog.records) == verifiers.SHOWN


@pytest.mark.parametrize("count", [0, 2, 4])
def test_too_few_or_too_many_numbers_are_not_matched_up_by_chance(count):
    """The right number for one row alone, the wrong one for a batch."""

    def wrong(prompts, completions):
        return [7.0] if len(prompts) == 1 else [1.0] * count

    assert scores(wrong) == [7.0] * 3


def test_several_verifiers_are_columns_in_their_order():
    def size(prompts, completions):
        return [len(c) for c in completions]

    made = verifiers.Verifiers([("exact", exact), ("size", size)], RECORDS, WORDS)
    assert made.names == ["exact", "size"]
    tokens = np.array([[4, 9, 0], [6, 0, 0], [3, 3, 3], [2, 9, 0]])
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], bool)
    ended = np.array([True, False, False, True])
    found = made(np.array([1, 2, 0, 0]), tokens, mask, ended)
    assert found.shape == (4, 2)
    # The stop token (9) is no text; "3 3 3" is no number: it cannot be judged.
    np.testing.assert_array_equal(found, [[1, 1], [1, 1], [np.nan, 5], [1, 1]])


def test_finding_them(monkeypatch):
    module = types.ModuleType("my_checks")
    module.exact, module.other = exact, lambda prompts, completions: [0] * len(prompts)
    monkeypatch.setitem(sys.modules, "my_checks", module)
    assert verifiers.find("") == []
    assert verifiers.find("my_checks:exact") == [("exact", exact)]
    names = [n for n, _ in verifiers.find("my_checks:exact, my_checks:other,")]
    assert names == ["exact", "other"]
    assert verifiers.find(exact) == [("exact", exact)]
    twice = [n for n, _ in verifiers.find("my_checks:exact,my_checks:exact")]
    assert twice == ["exact", "my_checks:exact"]


@pytest.mark.parametrize("spec", ["nowhere_at_all:f", "json:nothing", "json"])
def test_what_cannot_be_imported_is_refused(spec):
    with pytest.raises(UserError, match=f"verifiers='{spec}': cannot import it"):
        verifiers.find(spec)


def test_verifiers_are_told_apart_by_name_and_source():
    assert verifiers.identity([]) == []
    [[name, source]] = verifiers.identity([("mine", exact)])
    assert name == "mine" and "def exact(" in source
