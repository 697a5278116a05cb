"""Gao's curves: known alpha and beta are found again, and intervals cover them."""

import itertools

import numpy as np
import pytest

from stagecraft.anatomy import overoptimisation as over
from stagecraft.errors import UserError

ALPHA, BETA = 0.96, 0.727  # of the shape that PPO without a penalty has here
SPREAD = (0.10, 0.08)  # of both over seeds
NOISE = 0.075  # of a point
REPEATS = 600


def curve(form, alpha, beta, d):
    return d * (alpha - beta * (d if form == over.BEST_OF_N else np.log(d)))


def simulated(rng, form, distance, start):
    """One seed's points: its own alpha and beta, and noise at each."""
    alpha, beta = rng.normal((ALPHA, BETA), SPREAD)
    gold = curve(form, alpha, beta, distance)
    return over.fit(distance, gold + rng.normal(0, NOISE, len(distance)), form, start)


RL_PATH = np.linspace(0.4, 4.5, 12)
BEST_OF = np.sqrt([over.best_of_kl(n) for n in (2, 4, 8, 16, 32, 64)])
DESIGNS = {
    "rl, 3 seeds": (over.RL, RL_PATH, 3, 0.0),
    "rl, 8 seeds": (over.RL, RL_PATH, 8, 0.0),
    "rl, its start fitted": (over.RL, RL_PATH, 4, None),
    "rl, before it turns": (over.RL, np.linspace(0.4, 1.5, 12), 4, 0.0),
    "best of n": (over.BEST_OF_N, BEST_OF, 4, 0.0),
}


@pytest.mark.parametrize("design", DESIGNS)
def test_intervals_cover_known_curves_as_often_as_they_say(design):
    form, distance, seeds, start = DESIGNS[design]
    rng, hits = np.random.default_rng(7), np.zeros(2)
    for _ in range(REPEATS):
        fits = [simulated(rng, form, distance, start) for _ in range(seeds)]
        figures = over.over_seeds(fits)
        for i, (name, truth) in enumerate((("alpha", ALPHA), ("beta", BETA))):
            mean, half = figures[name]
            hits[i] += abs(mean - truth) <= half
    # Three standard deviations of a share of 600 at 95%.
    assert abs(hits / REPEATS - 0.95).max() <= 0.027, hits / REPEATS


@pytest.mark.parametrize("form", over.FORMS)
def test_a_curve_without_noise_is_found_exactly(form):
    gold = 0.4 + curve(form, ALPHA, BETA, RL_PATH)
    for start in (0.4, None):
        one = over.fit(RL_PATH, gold, form, start)
        found = (one.alpha, one.beta, one.start)
        assert found == pytest.approx((ALPHA, BETA, 0.4), abs=1e-9)
        assert one.rms < 1e-9 and one.left_out < 1e-9
        np.testing.assert_allclose(one.at(RL_PATH), gold)
        # The peak is the highest point of the curve.
        fine = np.linspace(0.01, 4.5, 10_000)
        height = curve(form, ALPHA, BETA, fine)
        assert one.peak == pytest.approx(fine[height.argmax()], abs=1e-3)
        assert one.best == pytest.approx(height.max(), abs=1e-6)
        assert one.past == sum(d > one.peak for d in RL_PATH)


def test_left_out_is_the_error_at_points_the_fit_has_not_seen():
    rng = np.random.default_rng(3)
    gold = curve(over.RL, ALPHA, BETA, RL_PATH) + rng.normal(0, NOISE, 12)
    errors = []
    for i in range(len(RL_PATH)):
        rest = np.arange(len(RL_PATH)) != i
        one = over.fit(RL_PATH[rest], gold[rest])
        errors.append(gold[i] - one.at(RL_PATH[i]))
    whole = over.fit(RL_PATH, gold)
    assert whole.left_out == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert whole.left_out > whole.rms
    # Far out and from a known start, the parabola does not pass for the other form.
    own, other = (over.fit(RL_PATH, gold, form, 0.0).left_out for form in over.FORMS)
    assert other > 1.5 * own


def test_a_peak_that_no_point_lies_beyond_is_not_published():
    near = np.linspace(0.4, 1.1, 6)
    fits = [over.fit(near, curve(over.RL, a, BETA, near)) for a in (0.9, 1.0, 1.1)]
    assert all(one.peak is not None and one.past < over.PAST for one in fits)
    assert {*over.over_seeds(fits)} == {"alpha", "beta"}
    rising = over.fit(RL_PATH, curve(over.RL, 0.5, -0.2, RL_PATH))
    assert rising.peak is None and rising.past == 0
    turned = [over.fit(RL_PATH, curve(over.RL, a, BETA, RL_PATH)) for a in (0.9, 1.1)]
    peaks = [np.exp(a / BETA - 1) for a in (0.9, 1.1)]
    assert over.over_seeds(turned)["peak"][0] == pytest.approx(np.mean(peaks))


def test_points_too_near_the_start_or_too_few_are_refused():
    with pytest.raises(UserError, match=r"2 points at sqrt\(KL\) of 0.3 or more"):
        over.fit([0.0, 0.1, 0.29, 0.5, 0.6], [0, 0, 0, 1, 1], start=0.0)
    assert over.fit([0.1, 0.5, 1.0, 2.0, 3.0], [99.0, 1, 2, 3, 4]).points == 4


def test_best_of_n_is_the_mean_over_all_choices():
    rng = np.random.default_rng(0)
    proxy, gold = rng.integers(0, 3, (2, 6)).astype(float), rng.normal(size=(2, 6))
    for n in (1, 2, 5, 6):
        means = []
        for likes, own in zip(proxy, gold, strict=True):
            for chosen in itertools.combinations(range(6), n):
                chosen = np.array(chosen)
                top = chosen[likes[chosen] == likes[chosen].max()]
                means.append(own[top].mean())  # a tie is broken at random
        assert over.best_of(proxy, gold, n) == pytest.approx(np.mean(means))
    assert over.best_of_kl(2) == pytest.approx(np.log(2) - 0.5)


def test_a_path_is_read_from_what_a_stage_logged():
    rows = [
        {
            "step": step,
            "objective/kl": (step / 10) ** 2,
            "rewards/reward/mean": float(step),
            "rewards/gold/mean": -float(step),
        }
        for step in range(1, 21)
    ]
    one = over.path([{"step": 0}, *rows], "reward", "gold")
    assert one.steps.tolist() == [*range(1, 21)]
    assert one.gold.tolist() == [-float(step) for step in range(1, 21)]
    assert one.proxy[3] == 4.0
    # Five neighbours, three at an end.
    assert one.distance[9] ** 2 == pytest.approx(np.mean([0.64, 0.81, 1, 1.21, 1.44]))
    assert one.distance[0] ** 2 == pytest.approx(np.mean([0.01, 0.04, 0.09]))
    with pytest.raises(UserError, match="no step logged .* rewards/true/mean"):
        over.path(rows, "reward", "true")
