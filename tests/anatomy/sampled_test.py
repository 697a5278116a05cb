"""Sampling that takes long says how far it is."""

import logging
from types import SimpleNamespace

from stagecraft.anatomy import sampled


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
