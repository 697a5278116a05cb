"""Verdicts: what may be one, and that a failure is never a number."""

import json
import math

import numpy as np
import pytest

from stagecraft import defaults, worlds
from stagecraft.errors import UserError
from stagecraft.signals import protocol, raters
from stagecraft.signals.protocol import Sources, Verdict
from stagecraft.stages import checks


def test_verdicts_become_json_values():
    given = [
        Verdict(np.float32(0.25), strength=np.float64(2)),
        Verdict(1),
        Verdict(reason="timed_out", both_bad=np.bool_(True)),
    ]
    assert protocol.checked(given, 3, "mine") == given
    lines = json.loads(json.dumps(protocol.checked(given, 3, "mine")))
    assert [Verdict(*line) for line in lines] == given


@pytest.mark.parametrize(
    "bad",
    [
        Verdict(),
        Verdict(0.5, reason="unparsed"),
        Verdict(1.5),
        Verdict(-0.1),
        Verdict(math.nan),
        Verdict(0.5, strength=math.nan),
        0.5,
        None,
        (0.5, "", False, None),
    ],
)
def test_what_is_no_verdict_is_refused_in_one_line(bad):
    with pytest.raises(UserError, match="rater='mine': returned .*; expected") as error:
        protocol.checked([Verdict(0.5), bad], 2, "mine")
    assert "\n" not in str(error.value)


def test_one_verdict_for_each_pair():
    with pytest.raises(UserError, match="returned 1 verdicts for 2 pairs; expected"):
        protocol.checked([Verdict(0.5)], 2, "mine")


def test_an_identity_is_of_values_and_not_of_their_order():
    one = protocol.identity(rater="a", source="b")
    assert one == protocol.identity(source="b", rater="a") and len(one) == 64
    assert one != protocol.identity(rater="a", source="c")


def test_the_source_of_what_is_compiled_or_of_a_notebook():
    assert "def identity" in protocol.source(protocol.identity)
    assert "class Verdict" in protocol.source(protocol.checked)
    assert protocol.source(math.sqrt) == ""
    scope = {"__name__": "nowhere"}
    exec("def f(prompt, pair, rng): return 0", scope)
    assert protocol.source(scope["f"]) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(rater="wrld"), "'wrld': expected 'world', 'reward', .* mean 'world'"),
        (dict(rater="a.b:c"), "rater='a.b:c': cannot import it"),
        (dict(rater="json:nothing"), "rater='json:nothing': cannot import it"),
        (dict(soft_labels=True), "s.it.soft_labels=True: needs rater='reward' or 'ju"),
        (dict(rater="tests.cli_test:first", soft_labels=True), "needs rater='reward'"),
    ],
)
def test_raters_that_cannot_work_are_refused_in_one_line(changes, says):
    with pytest.raises(UserError, match=says) as error:
        raters.check("s.it", defaults.stage("comparisons", **changes), "countries")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rater", ["world", "reward", "tests.cli_test:first"])
def test_every_rater_keeps_the_protocol(rater):
    class Reward:
        identity = "r" * 64

        def rate(self, prompts, pairs):
            return [Verdict(0.5)] * len(pairs)

    named = "scores" if rater == "reward" else ""
    config = defaults.stage("comparisons", rater=rater, reward_from=named)
    raters.check("s.it", config, "countries")
    sources = Sources("countries", Reward())
    one = raters.make(config, sources, np.random.default_rng(0))
    pairs = [(("a", True), ("b", False)), (("a", True), ("a", True))]
    verdicts = one.rate(["Hello!", "Hello!"], pairs)
    assert protocol.checked(verdicts, 2, rater) == verdicts
    assert len(one.identity) == 64


def test_worlds_rate_as_the_protocol_says():
    for name in worlds.WORLDS:
        raters.check("s.it", defaults.stage("comparisons"), name)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(rater="world", planted=dict(length=1.0)), "planted.length=1.0: changes"),
        (dict(rater="judge", judge_from="x", principles=2), "principles=2: changes"),
        (dict(rater="world", reward_from="reward"), "reward_from='reward': changes"),
        (dict(rater="world", judge=dict(orders=1)), "judge.orders=1: changes"),
        (dict(rater="planted", judge=dict(clamp=0.1)), "judge.clamp=0.1: changes"),
        (dict(rater="world", judge_from="sft"), "with a judge .*: set rater='judge'"),
        (dict(rater="rewrd"), "did you mean 'reward'"),
    ],
    ids=str,
)
def test_settings_of_other_raters_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        checks.rater("stages.x", defaults.stage("comparisons", **settings))


@pytest.mark.parametrize(
    "settings",
    [
        dict(rater="planted", planted=dict(length=1.0), judge=dict(orders=1)),
        dict(rater="world", judge=dict(max_failed=0.5)),
        dict(rater="reward", reward_from="reward"),
        dict(rater="judge", judge_from="sft", judge=dict(orders=1)),
        dict(rater="constitution", judge_from="sft", principles=2),
        dict(rater="random.Random:choice", judge=dict(max_failed=0.5)),
    ],
    ids=str,
)
def test_settings_of_the_own_rater_are_read(settings):
    checks.rater("stages.x", defaults.stage("comparisons", **settings))
