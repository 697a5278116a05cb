"""A judge's biases: goldens of the field, and planted ones within their intervals."""

import math

import numpy as np
import pytest
import scipy.special

from stagecraft import masked
from stagecraft.anatomy import bias
from stagecraft.anatomy.bias import Figure, Rated
from stagecraft.signals import labels
from stagecraft.stages import reward

PAIRS, RUNS = 150, 100


def sides(logit):
    return (-np.logaddexp(0, -logit), -np.logaddexp(0, logit))


def judged(quality, slot, rng, noise=0.0, **more):
    """Pairs as a judge with a gap in quality and a slot bias says in both orders."""
    for q in quality:
        one, two = (sides(x + noise * rng.normal()) for x in (q + slot, -q + slot))
        yield Rated(("a", "b"), labels.of_pair((one, two)), logps=(one, two), **more)


def test_goldens():
    assert bias.wilson(16, 250) == pytest.approx((0.0398, 0.1014), abs=5e-5)
    three = np.array([120, 50, 10]), np.array([80, 50, 90])
    raw = np.array([bias.style_difference(*p) for p in zip(*three, strict=True)])
    np.testing.assert_allclose(raw, [0.199005, 0, -0.792079], atol=1e-6)
    z = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(z, [0.926697, 0.461814, -1.388511], atol=1e-6)
    # Golden of the equal-opportunity gap: .85 - .60 = .25.
    rows = [Rated(("a", "b"), 1.0 * (i < 85), gold=0, own=0) for i in range(100)]
    rows += [Rated(("a", "b"), 1.0 * (i >= 60), gold=1, own=0) for i in range(100)]
    got = bias.self_preference(rows)
    assert got["self_preference"].value == pytest.approx(0.25)
    error = math.sqrt(0.85 * 0.15 / 100 + 0.6 * 0.4 / 100)
    width = got["self_preference"].high - got["self_preference"].low
    assert width == pytest.approx(2 * 1.959964 * error, rel=1e-5)
    raw, true = got["own_wins"].value, got["own_wins_corrected"].value
    assert raw == pytest.approx(0.625) and true == pytest.approx(0.5)


def test_a_win_rate_is_corrected_by_a_judges_errors():
    fine = Figure(0.6, 0, 1, 400), Figure(0.9, 0, 1, 200), Figure(0.85, 0, 1, 200)
    got = bias.corrected(*fine)
    assert got.value == pytest.approx(0.6) and got.low < 0.6 < got.high
    useless = Figure(0.4, 0, 1, 200)
    assert bias.corrected(fine[0], useless, useless) is None
    rng, hits = np.random.default_rng(0), 0
    for _ in range(RUNS):
        p, q1, q0 = (
            Figure(rng.binomial(n, x) / n, 0, 1, n)
            for n, x in ((400, 0.6), (200, 0.9), (200, 0.85))
        )
        got = bias.corrected(p, q1, q0)
        hits += got.low <= 0.6 <= got.high
    assert hits / RUNS >= 0.88


def test_a_planted_slot_bias_is_within_its_interval():
    rng, hits, iid = np.random.default_rng(1), 0, []
    for _ in range(RUNS):
        rows = list(judged(rng.normal(size=PAIRS), 0.6, rng, noise=1.0))
        figure = bias.position(rows)["slot_bias"]
        hits += figure.low <= 0.6 <= figure.high
        iid.append(figure.high - figure.low)
    assert hits / RUNS >= 0.88
    # From 2n logits as if independent it would be too wide: the gap in quality that
    # the two orders share, with opposite signs, would count as noise.
    assert np.mean(iid) == pytest.approx(2 * 1.97 * math.sqrt(0.5 / PAIRS), rel=0.05)


def test_the_first_slots_share_is_within_its_interval():
    rng, hits = np.random.default_rng(2), 0
    many = list(judged(rng.normal(size=10_000), 0.6, rng, noise=1.0))
    truth = bias.position(many)["first_slot"].value
    for _ in range(RUNS):
        rows = list(judged(rng.normal(size=100), 0.6, rng, noise=1.0))
        figure = bias.position(rows)["first_slot"]
        hits += figure.low <= truth <= figure.high
    assert hits / RUNS >= 0.88


def test_the_labels_mass_is_of_both_orders():
    logps = ((-1.0, -2.0), (-3.0, -1.5))
    got = bias.measure([Rated(("a", "b"), 0.6, logps=logps), Rated(("a", "b"), 0.4)])
    assert got["label_mass"].value == pytest.approx(np.exp(logps).sum() / 2)
    assert got["label_mass"].count == 1


def test_positions_by_hand():
    rows = [
        # First slot twice: a conflict. First answer twice. Second answer twice. A tie.
        Rated(("a", "b"), 0.5, logps=(sides(1.0), sides(1.0))),
        Rated(("a", "b"), 0.9, logps=(sides(2.0), sides(-2.0))),
        Rated(("a", "b"), 0.1, logps=(sides(-2.0), sides(2.0))),
        Rated(("a", "b"), 0.5, logps=(sides(0.0), sides(0.0))),
    ]
    got = bias.position(rows)
    assert got["first_slot"].value == pytest.approx(4 / 6)
    assert got["conflict"].value == pytest.approx(1 / 3) and got["conflict"].count == 3
    assert got["slot_bias"].value == pytest.approx(0.25)
    gap = (2 / (1 + math.exp(-1)) - 1) / 4
    assert got["order_gap"].value == pytest.approx(gap)
    # A person is asked in one order, and a tie says nothing of it.
    person = [Rated(("a", "b"), p) for p in (1.0, 1.0, 0.0, 0.5)]
    assert bias.position(person)["first_slot"].value == pytest.approx(2 / 3)
    assert bias.position(person)["first_slot"][1:3] == bias.wilson(2, 3)


def texts(rng, size):
    """Pairs of texts that differ in length and, half of them, in a mark of style."""
    for _ in range(size):
        lengths, marks = rng.integers(1, 200, 2), rng.integers(0, 2, 2)
        yield tuple("x" * n + "!" * m for n, m in zip(lengths, marks, strict=True))


def test_planted_effects_are_within_their_intervals():
    rng, hits = np.random.default_rng(3), np.zeros(3)
    for _ in range(RUNS):
        pairs = list(texts(rng, PAIRS))
        gold = rng.integers(0, 2, PAIRS)
        gaps = np.array([len(a) - len(b) for a, b in pairs], float)
        marks = np.array([("!" in a) - ("!" in b) for a, b in pairs])
        logit = (
            1.0 * np.tanh(gaps / gaps.std()) + 1.2 * marks / 2 + 0.8 * (1 - 2 * gold)
        )
        says = rng.random(PAIRS) < 1 / (1 + np.exp(-logit))
        rows = [
            Rated(pair, float(p), gold=int(g))
            for pair, p, g in zip(pairs, says, gold, strict=True)
        ]
        got = bias.effects(rows)
        for i, (name, truth) in enumerate(
            (("length", 1.0), ("style_exclamations", 1.2), ("gold", 0.8))
        ):
            hits[i] += got[name].low <= truth <= got[name].high
    assert (hits / RUNS >= 0.87).all(), hits / RUNS


def test_a_length_controlled_win_rate_is_found():
    """signals.md: theta -.4, phi 1.5 of AlpacaEval's form, raw .49, truth .4013."""
    rng = np.random.default_rng(4)
    gaps = rng.normal(40, 100, 4000)
    x = np.stack([np.ones(4000), np.tanh(gaps / gaps.std())], axis=1)
    says = rng.random(4000) < 1 / (1 + np.exp(-(x @ [-0.4, 1.5])))
    (theta, phi), errors = bias.logistic(x, says.astype(float))
    assert abs(theta + 0.4) < 3 * errors[0] and abs(phi - 1.5) < 3 * errors[1]
    assert 1 / (1 + np.exp(-theta)) == pytest.approx(0.4013, abs=0.03)
    assert says.mean() > 0.47


def test_regressions_that_have_no_answer():
    x = np.linspace(-1, 1, 20)[:, None]
    assert bias.logistic(x, (x[:, 0] > 0).astype(float)) is None  # parted perfectly
    assert bias.logistic(np.hstack([x, x]), np.full(20, 0.4)) is None
    assert bias.effects([Rated(("a", "bb"), 1.0)] * 3) == {}
    assert bias.effects([]) == {}


def test_length_gold_and_calibration_by_hand():
    long, short = "x" * 100, "y" * 10
    rows = [
        Rated((long, short), 0.8, gold=0),
        Rated((short, long), 0.4, gold=0),
        Rated((short, long), 0.9, gold=0),
        Rated((short, short + "z"), 0.5, gold=1),
        Rated((long, short), None, reason="timed_out", gold=0),
    ]
    got = bias.measure(rows)
    assert got["abstained"].value == pytest.approx(0.2)
    assert got["ties"].value == pytest.approx(0.25)
    assert got["longer_wins"].value == pytest.approx(2 / 3)
    assert got["gold_longer_wins"].value == pytest.approx(1 / 3)
    assert got["accuracy"].value == pytest.approx(2.5 / 4)
    assert got["longer_accuracy"].value == pytest.approx(0.5)
    errors = [0.2**2, 0.6**2, 0.1**2, 0.5**2]
    assert got["brier"].value == pytest.approx(np.mean(errors))
    gaps = [0.2, 0.6, 0.1, 0.0]  # each in a bucket of its own, the tie half right
    assert got["calibration_error"].value == pytest.approx(sum(gaps) / 4)
    assert "self_preference" not in got and "slot_bias" not in got


EACH = 20  # verdicts of one certainty


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ({0.55: 11, 0.65: 13, 0.75: 15, 0.85: 17, 0.95: 19}, 0.0),
        ({0.55: 11, 0.95: 19}, 0.0),  # what lies between is empty
        ({0.9: 12}, 0.3),  # always as sure, and right less often
        ({0.9: 20}, 0.1),
        ({0.65: 3, 0.95: 19}, 0.25),  # too sure in one bucket of two
    ],
    ids=["perfect", "perfect with empty buckets", "always .9", "modest", "one bucket"],
)
def test_planted_certainty_has_its_calibration_error(right, expected):
    """Of a judge and of a reward model, which answer to one definition."""
    sure = np.repeat([*right], EACH)
    hits = np.concatenate([np.arange(EACH) < count for count in right.values()])
    verdicts = np.where(hits, sure, 1 - sure)
    rows = [Rated(("a", "b"), float(p), gold=0) for p in verdicts]
    judge = bias.against_gold(rows)["calibration_error"]
    assert judge.value == pytest.approx(expected, abs=1e-6)
    assert judge.count == len(sure)
    difference = scipy.special.logit(verdicts).astype(np.float32)
    got = masked.compute(reward.calibration(difference, np.ones(len(sure), bool)))
    assert got["calibration_error"] == pytest.approx(expected, abs=1e-6)
    # A bucket without rows reads 0 and is no part of the error.
    empty = masked.compute(reward.calibration(difference, np.zeros(len(sure), bool)))
    assert empty["calibration_error"] == 0 == empty["accuracy/0.6-0.7"]
