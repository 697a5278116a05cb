"""Verifiers: what they are given, and rows on which they fail or cannot say."""

import logging
import math
import sys
import types

import jax.numpy as jnp
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


def scores(*functions, texts=("2", "5", "6"), records=RECORDS, **extra):
    ended = [True] * len(texts)
    each = [verifiers.Verifier(f.__name__, f) for f in functions]
    columns = verifiers.scores_of(each, records, list(texts), ended, **extra)
    return columns[0] if len(functions) == 1 else columns


def exact(prompts, completions, answer):
    return [float(int(c) == a) for c, a in zip(completions, answer, strict=True)]


def test_a_verifier_gets_by_name_what_its_signature_names():
    assert scores(exact) == [1.0, 0.0, 1.0]

    def swapped(answer, completions, prompts, unused=None):
        assert prompts == ["1 + 1", "2 + 2", "3 + 3"] and unused is None
        return exact(prompts, completions, answer)

    assert scores(swapped) == [1.0, 0.0, 1.0]

    def completions_alone(completions, **others):
        assert others["prompts"][0] == "1 + 1"
        return [len(c) for c in completions]

    assert scores(completions_alone) == [1.0] * 3

    def no_completions(answer):
        return answer

    assert scores(no_completions) == [2.0, 4.0, 6.0]

    def everything(prompts, completions, **columns):
        assert columns["unit"] == [None, "m", None]
        assert columns["ended"] == [True] * 3
        assert columns["completion_ids"] == [[7], [8], [9, 9]]
        assert columns["trainer_state"].global_step == 12
        names = {"answer", "unit", "ended", "completion_ids", "trainer_state"}
        assert columns.keys() == names
        return [0, True, np.float32(0.5)]

    assert scores(everything, ids=[[7], [8], [9, 9]], step=12) == [0.0, 1.0, 0.5]


def test_a_conversation_is_scored_as_messages():
    turns = [[{"role": "user", "content": r["prompt"]}] for r in RECORDS]
    records = [r | {"prompt": turn} for r, turn in zip(RECORDS, turns, strict=True)]

    def contains(completions, prompts, answer, **columns):
        assert prompts == turns
        assert all(c[0]["role"] == "assistant" for c in completions)
        pairs = zip(completions, answer, strict=True)
        return [float(str(a) in c[0]["content"]) for c, a in pairs]

    assert scores(contains, records=records) == [1.0, 0.0, 1.0]


def test_an_argument_that_there_is_none_of_is_refused():
    def asks(prompts, completions, anwser):
        return [0.0] * len(prompts)

    each = [verifiers.Verifier("asks", asks)]
    says = "asks needs 'anwser'; did you mean 'answer'"
    with pytest.raises(UserError, match=says):
        verifiers.Verifiers(each, RECORDS, WORDS)
    with pytest.raises(UserError, match=says):
        scores(asks)
    with pytest.raises(UserError, match="completion_ids"):  # nobody has them here
        scores(lambda completion_ids: [0.0] * 3)

    def by_position(prompts, completions, /):
        return [0.0] * len(prompts)

    with pytest.raises(UserError, match="'prompts' by position only"):
        scores(by_position)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1,5", [1]])
def test_what_is_no_finite_number_has_failed(bad, caplog):
    with caplog.at_level(logging.WARNING):
        rewards = scores(lambda prompts, completions: [1.0, bad, 0])
    assert rewards == [1, verifiers.FAILED, 0]
    assert "1 of 3 rows" in caplog.text


def test_none_is_no_failure(caplog):
    rewards = scores(lambda prompts, completions: [1.0, None, 0])
    assert rewards[0] == 1 and math.isnan(rewards[1]) and rewards[2] == 0
    assert not caplog.records


def test_what_one_verifier_has_nothing_to_say_of_the_others_pay():
    nan, inf = math.nan, math.inf
    rewards = np.array(
        [[1.0, nan], [nan, 2.0], [nan, nan], [1.0, 2.0], [inf, 2.0], [nan, inf]]
    )
    for array in (rewards, jnp.asarray(rewards, jnp.float32)):
        total, scored = verifiers.total(array, (1.0, 10.0))
        assert total.tolist() == [1.0, 20.0, 0.0, 21.0, 0.0, 0.0]
        assert scored.tolist() == [True, True, False, True, False, False]
    total, scored = verifiers.total(rewards, (0.0, 1.0))
    assert total.tolist() == [0.0, 2.0, 0.0, 2.0, 0.0, 0.0]


def fragile(prompts, completions, answer):
    return [1 / (int(c) - 5) for c in completions]


def test_a_verifier_that_raises_is_asked_row_by_row(caplog):
    with caplog.at_level(logging.WARNING):
        rewards = scores(fragile)
    assert rewards[0] == pytest.approx(-1 / 3) and rewards[2] == 1
    assert rewards[1] == verifiers.FAILED
    (line,) = [r.getMessage() for r in caplog.records]
    for part in ("fragile", "ZeroDivisionError", "'2 + 2'", "'5'", "1 of 3 rows"):
        assert part in line


def test_a_verifier_that_fails_from_the_first_batch_on_stops_the_run():
    def broken(prompts, completions):
        raise KeyError("x")

    with pytest.raises(UserError, match="broken failed on all 3 .*: KeyError: 'x'"):
        scores(broken)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("1 + 1", "are texts here"), ([{"role": "user", "content": "a"}], "are messages")],
)
def test_what_completions_are_is_said_to_one_that_expects_the_other(prompt, says):
    def other(completions):
        return [len(c.content) for c in completions]

    verifier = verifiers.Verifier("other", other)
    with pytest.raises(UserError, match=says) as error:
        verifiers.scores_of(
            [verifier], [{"prompt": prompt}] * 2, ["a", "b"], [True] * 2
        )
    assert "\n" not in str(error.value)


def test_a_later_batch_that_fails_whole_is_left_out_and_the_log_stays_short(caplog):
    verifier = verifiers.Verifier("fragile", fragile)
    verifiers.scores_of([verifier], RECORDS, ["2", "5", "6"], [True] * 3)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        (rewards,) = verifiers.scores_of(
            [verifier], RECORDS * 5, ["5"] * 15, [True] * 15
        )
    assert rewards == [verifiers.FAILED] * 15
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

    each = [verifiers.Verifier("exact", exact), verifiers.Verifier("size", size)]
    made = verifiers.Verifiers(each, RECORDS, WORDS)
    assert made.names == ["exact", "size"]
    tokens = np.array([[4, 9, 0], [6, 0, 0], [3, 3, 3], [2, 9, 0]])
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], bool)
    ended = np.array([True, False, False, True])
    found = made(np.array([1, 2, 0, 0]), tokens, mask, ended)
    assert found.shape == (4, 2)
    # The stop token (9) is no text; "3 3 3" is no number: it cannot be judged.
    np.testing.assert_array_equal(found, [[1, 1], [1, 1], [np.inf, 5], [1, 1]])


def test_finding_them(monkeypatch):
    module = types.ModuleType("my_checks")
    module.exact, module.other = exact, lambda prompts, completions: [0] * len(prompts)
    monkeypatch.setitem(sys.modules, "my_checks", module)
    assert verifiers.find("", {}) == []

    def names(spec):
        return [verifier.name for verifier in verifiers.find(spec, {})]

    assert names("my_checks:exact, my_checks:other,") == ["exact", "other"]
    assert names("my_checks:exact,my_checks:exact") == ["exact", "my_checks:exact"]
    assert names("number,my_checks:exact") == ["number", "exact"]
    for spec in ("my_checks:exact", exact):
        (verifier,) = verifiers.find(spec, {})
        assert (verifier.name, verifier.function) == ("exact", exact)


def test_shipped_ones_take_their_settings():
    settings = {"most": 4, "marker": "="}
    one, two, three = verifiers.find("number,length,choice", settings)
    assert one.settings == three.settings == {"marker": "="}
    assert two.settings == {"most": 4}
    assert scores(two.function, texts=("2", "123456", "12345678")) == [1.0, 0.5, 0.0]
    ((_, _, own, _),) = verifiers.identity([two])
    assert own == {"most": 4}
    with pytest.raises(UserError, match="verifier_args.most: no verifier of <func"):
        verifiers.find(exact, {"most": 4})


@pytest.mark.parametrize("spec", ["nowhere_at_all:f", "json:nothing"])
def test_what_cannot_be_imported_is_refused(spec):
    with pytest.raises(UserError, match=f"verifiers='{spec}': cannot import it"):
        verifiers.find(spec, {})


def test_verifiers_are_told_apart_by_name_and_source():
    assert verifiers.identity([]) == []
    [[name, source]] = verifiers.identity([verifiers.Verifier("mine", exact)])
    assert name == "mine" and "def exact(" in source
