"""A judge by rule: the biases it was given are the ones that are measured."""

import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.anatomy import bias
from stagecraft.anatomy.bias import Rated
from stagecraft.errors import UserError
from stagecraft.signals import labels, planted, protocol
from stagecraft.signals.planted import Planted
from stagecraft.signals.protocol import Sources


def gold(prompt, text, ended):
    return float(text.split()[0]) - (not ended)


def sycophantic(prompt, text):
    return "3" in text if prompt == "p" else None


def rater(combine="logit", **biases):
    config = defaults.planted()
    config.update(dict(gold=0.0) | biases)
    return Planted(gold, sycophantic, config, combine)


ONE, TWO = ("1 a b c d e f g h i!", True), ("3", False)


@pytest.mark.parametrize(
    ("biases", "first", "second"),
    [
        (dict(gold=2.0), -2.0, 2.0),
        (dict(first=0.7), 0.7, 0.7),
        (dict(length=1.0), 0.9, -0.9),
        (dict(style=1.5), 1.5, -1.5),
        (dict(agreement=2.0), -2.0, 2.0),
        (dict(gold=1.0, first=0.5, style=1.0), 0.5, 0.5),
    ],
)
def test_logits_are_the_formula(biases, first, second):
    (verdict,) = rater(**biases).rate(["p"], [(ONE, TWO)])
    logits = [a - b for a, b in verdict.evidence["logps"]]
    assert logits == pytest.approx([first, second])
    q = (first - second) / 2
    assert verdict.probability == pytest.approx(1 / (1 + np.exp(-q)))
    sums = np.exp(verdict.evidence["logps"]).sum(axis=1)
    np.testing.assert_allclose(sums, 1)


def test_noise_is_the_questions_own():
    noisy = rater(noise=1.0)
    pairs = [((f"{i} x", True), ("0", True)) for i in range(400)]
    once = noisy.rate(["p"] * 400, pairs)
    assert once == noisy.rate(["p"] * 400, pairs)
    turned = noisy.rate(["p"] * 400, [pair[::-1] for pair in pairs])
    for one, two in zip(once, turned, strict=True):
        assert one.evidence["logps"] == two.evidence["logps"][::-1]
        assert one.probability == pytest.approx(1 - two.probability)
    table = np.array([verdict.evidence["logps"] for verdict in once])
    logits = (table[..., 0] - table[..., 1]).ravel()
    assert abs(logits.mean()) < 0.15 and logits.std() == pytest.approx(1, abs=0.1)


def test_what_was_planted_is_what_is_measured():
    rng = np.random.default_rng(0)
    judge = rater(gold=0.5, first=0.8, style=1.0, noise=0.5)
    pairs = [
        tuple(
            (
                f"{rng.normal():.3f} "
                + "x" * rng.integers(1, 9)
                + "!" * rng.integers(2),
                True,
            )
            for _ in range(2)
        )
        for _ in range(300)
    ]
    rows = [
        Rated((a[0], b[0]), v.probability, logps=tuple(v.evidence["logps"]))
        for (a, b), v in zip(pairs, judge.rate(["p"] * 300, pairs), strict=True)
    ]
    figures = bias.measure(rows)
    assert figures["slot_bias"].low < 0.8 < figures["slot_bias"].high
    assert figures["first_slot"].low > 0.5 and figures["conflict"].value > 0.2
    # A mark counts half a unit where one answer has one: (1 - 0) / (1 + 0 + 1).
    effect = figures["effect_of_style_exclamations"]
    assert effect.low < 2 * 1.0 < effect.high


def test_equal_texts_and_the_papers_mean():
    same = (("1 a", True), ("1 a", False))
    (none,) = rater(first=1.0).rate(["p"], [same])
    assert none == protocol.Verdict(reason="identical")
    (verdict,) = rater("probability", gold=1.0, first=3.0).rate(["p"], [(ONE, TWO)])
    logps = verdict.evidence["logps"]
    assert verdict.probability == labels.of_pair(logps, "probability")
    assert verdict.probability != labels.of_pair(logps, "logit")


def test_one_order_keeps_the_bias():
    config = defaults.planted()
    config.update(gold=0.0, first=0.7)
    (verdict,) = Planted(gold, sycophantic, config, orders=1).rate(["p"], [(ONE, TWO)])
    assert verdict.probability == pytest.approx(1 / (1 + np.exp(-0.7)))
    assert len(verdict.evidence["logps"]) == len(verdict.evidence["mass"]) == 1


def test_it_is_made_from_a_stages_config():
    config = defaults.stage("comparisons", rater="planted", planted=dict(length=1.0))
    made = planted.make(config, Sources("countries"), None)
    other = defaults.stage("comparisons", rater="planted")
    assert made.identity != planted.make(other, Sources("countries"), None).identity
    pair = (("The capital of France is Paris.", True), ("It is Rome.", True))
    (verdict,) = made.rate(["What is the capital of France?"], [pair])
    assert verdict.probability > 0.99
    with pytest.raises(UserError, match="rater='planted' needs world.name"):
        planted.check("s.it", config, "")
