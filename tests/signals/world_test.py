"""The world's rules as a rater: their draws, and what tells one world from another."""

import types

import numpy as np
import pytest

from stagecraft import defaults, worlds
from stagecraft.errors import UserError
from stagecraft.signals import world
from stagecraft.signals.protocol import Sources, Verdict

CONFIG = defaults.stage("comparisons")
COUNTRIES = Sources(world="countries")
ANSWERS = ["The capital of France is Paris.", "Rome.", "I do not know.", "Look it up."]


def test_verdicts_are_the_worlds_own_draw_for_draw():
    rng, own = np.random.default_rng(3), np.random.default_rng(3)
    rater = world.make(CONFIG, COUNTRIES, rng)
    choose = np.random.default_rng(0)
    pairs = [
        tuple((ANSWERS[i], bool(choose.integers(2))) for i in two)
        for two in choose.integers(4, size=(300, 2))
    ]
    prompts = ["What is the capital of France?"] * len(pairs)
    verdicts = rater.rate(prompts[:100], pairs[:100])
    verdicts += rater.rate(prompts[100:], pairs[100:])
    chosen = []
    for prompt, pair, verdict in zip(prompts, pairs, verdicts, strict=True):
        better = worlds.get("countries").rate(prompt, pair, own)
        chosen.append(better)
        if better is None:
            assert verdict == Verdict(reason="identical")
        else:
            assert verdict == Verdict(1.0 - better)
    assert {*chosen} == {0, 1, None}
    assert rng.bit_generator.state == own.bit_generator.state


def test_the_identity_is_of_the_worlds_files(monkeypatch, tmp_path):
    def identity(name="countries"):
        return world.make(CONFIG, Sources(world=name), None).identity

    assert identity() == identity()
    one = identity()
    for path, value in (("a.py", 0), ("b.py", 1)):
        (tmp_path / path).write_text(f"def rate(p, two, rng): return {value}")
    ids = {one}
    for name in ("a", "b"):
        module = types.SimpleNamespace(
            __file__=str(tmp_path / f"{name}.py"), rate=lambda p, two, rng: 0
        )
        monkeypatch.setitem(worlds.WORLDS, name, module)
        ids.add(identity(name))
    monkeypatch.setitem(worlds.WORLDS, "a", worlds.WORLDS["b"])
    ids.add(identity("a"))
    assert len(ids) == 4


def test_without_a_world_there_are_no_rules():
    says = "rater='world' needs world.name"
    with pytest.raises(UserError, match=says):
        world.check("s.it", CONFIG, "")
    with pytest.raises(UserError, match=says):
        world.make(CONFIG, Sources(), None)
    with pytest.raises(UserError, match="world.name='cities': there are countries"):
        world.check("s.it", CONFIG, "cities")
