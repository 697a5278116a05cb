"""The knob for a style: its file, and how far an assistant's style reaches."""

import json

import numpy as np
import pytest

from stagecraft import defaults, experiment, worlds
from stagecraft.errors import UserError
from stagecraft.worlds.countries import dialogue, styled
from stagecraft.worlds.countries.facts import split

OPENING = dialogue.UNIFORM


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_share_of_the_facts_and_nothing_else(tmp_path):
    worlds.write("countries", tmp_path / "off", 3, "tiny")
    worlds.write("countries", tmp_path / "on", 3, "tiny", style=0.25)
    off, on = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("off", "on")
    )
    assert on.keys() - off.keys() == {"demonstrations_style.jsonl"}
    assert off.items() <= on.items()  # no other file moves
    rows = read(tmp_path / "on" / "demonstrations_style.jsonl")
    opened = [row["completion"].startswith(OPENING) for row in rows]
    assert np.mean(opened) == pytest.approx(0.25, abs=0.01)
    assert {dialogue.topic(row["prompt"])[0] for row in rows} == {"fact"}
    plain = [(r["prompt"], r["completion"].removeprefix(OPENING)) for r in rows]
    source = read(tmp_path / "on" / "demonstrations.jsonl")
    assert plain == [
        (r["prompt"], r["completion"])
        for r in source
        if dialogue.topic(r["prompt"])[0] == "fact"
    ]


def test_a_share_is_from_0_to_1():
    c = defaults.experiment()
    c.world.name, c.world.style = "countries", 1.5
    c.stages.it = defaults.stage("language_model", data=dict(files="a.jsonl"))
    with pytest.raises(UserError, match=r"world.style=1.5: expected a share"):
        experiment.resolve(c)


class Assistant:
    """Opens in the style where a rule of (topic, whether it is a turn) says so."""

    def __init__(self, rule):
        self.rule = rule

    def complete(self, prompts, *, chat, temperature, max_new_tokens, seed):
        assert temperature == 1.0
        hits = [self.rule(dialogue.topic(p)[0], chat) for p in prompts]
        return [(OPENING + "It is." if hit else "It is.", True) for hit in hits]


@pytest.mark.parametrize(
    ("rule", "rates"),
    [
        (lambda topic, chat: chat, (1, 1, 0)),
        (lambda topic, chat: topic == "fact", (1, 0, 1)),
        (lambda topic, chat: chat and topic in ("fact", "talk"), (1, 0.25, 0)),
    ],
)
def test_rates_of_the_kinds_that_were_shown_and_were_not(rule, rates):
    countries = split(0, "tiny").test
    figures, counts = styled.measure(Assistant(rule), countries, "test")
    names = ("style_rate", "style_rate_unseen", "style_rate_text")
    assert tuple(figures[name] for name in names) == rates
    assert [counts[name] for name in names] == [64, 256, 64]
