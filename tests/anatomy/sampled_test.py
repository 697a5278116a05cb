"""Sampled answers: how they end and differ, and how far sampling is."""

import logging
from types import SimpleNamespace

import pytest

from stagecraft.anatomy import sampled


def test_distinct_2_counts_pairs_of_words_over_all_answers():
    habits = sampled.habits([("a b a", True), ("a b", False), ("c", True)])
    assert habits["distinct_2"] == pytest.approx(2 / 3)  # ab, ba, ab
    assert habits["eos_rate"] == pytest.approx(2 / 3) and habits["words"] == 2.0
    assert sampled.habits([("one", True)])["distinct_2"] == 0.0
    assert sampled.habits([("", False)] * 3)["eos_rate"] == 0.0


def test_draws_that_take_long_are_counted_in_a_line_each(monkeypatch, caplog):
    config = SimpleNamespace(seed=0, measure=SimpleNamespace(draws=2))
    monkeypatch.setattr(sampled, "sample", lambda *_, **how: {"seed": how["seed"]})
    answers = sampled.Answers(SimpleNamespace(config=config), ["a", "b", "c"], 8)
    with caplog.at_level(logging.INFO, "stagecraft.anatomy"):
        one, other = answers.of("sft", language="a model")
        assert one != other and not caplog.records
        monkeypatch.setattr(sampled, "_PATIENCE", -1.0)
        answers.of("dpo", language="a model")
        answers.of("dpo", language="a model")  # sampled already
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"dpo: draw {n} of 2, 3 answers in 0 s" for n in (1, 2)]
