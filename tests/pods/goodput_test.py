"""Goodput by formula, and by playing failures out."""

import math

import numpy as np
import pytest

from stagecraft import chips
from stagecraft.pods import goodput, plan
from tests.command_line import stagecraft


def played(interval, save, restart, failures, seed=0, intervals=20_000):
    """The share of the time that trains, with failures at random moments.

    Work is saved every `interval` seconds, the save takes `save`; a failure costs what
    is not saved and a restart, in which there may be another one.
    """
    rng = np.random.default_rng(seed)
    clock, left = 0.0, rng.exponential(failures)
    for _ in range(intervals):
        needed = interval + save
        while left < needed:
            clock += left
            left = rng.exponential(failures)
            while left < restart:  # it fails again before it has begun
                clock += left
                left = rng.exponential(failures)
            clock, left = clock + restart, left - restart
        clock, left = clock + needed, left - needed
    return intervals * interval / clock


@pytest.mark.parametrize(
    ("interval", "save", "restart", "failures"),
    [
        (300, 5, 600, 36_000),
        (1800, 20, 600, 10_000),
        (60, 30, 100, 1_000),
        (5000, 1, 50, 3_000),
    ],
)
def test_the_formula_is_what_random_failures_give(interval, save, restart, failures):
    expected = goodput.share(interval, save, restart, failures)
    shares = [
        played(interval, save, restart, failures, seed, 4_000) for seed in range(5)
    ]
    error = np.std(shares, ddof=1) / math.sqrt(len(shares))
    assert np.mean(shares) == pytest.approx(expected, abs=4 * error + 1e-3)


@pytest.mark.parametrize(
    ("save", "failures"), [(0.5, 3600), (20, 7200), (120, 3600), (5, 1e6)]
)
def test_the_best_interval_is_near_the_best_of_all(save, failures):
    best = goodput.best_interval(save, failures)
    tried = np.geomspace(best / 10, best * 10, 2001)
    shares = [goodput.share(t, save, 60.0, failures) for t in tried]
    # Young's square root, with the next terms.
    assert goodput.share(best, save, 60.0, failures) >= max(shares) - 1e-5
    assert best == pytest.approx(tried[int(np.argmax(shares))], rel=0.02)
    assert best == pytest.approx(math.sqrt(2 * save * failures), rel=0.2)


def test_the_longest_interval_just_reaches_the_goal():
    longest = goodput.longest_interval(0.95, 2.0, 300.0, 36_000.0)
    assert goodput.share(longest, 2.0, 300.0, 36_000.0) == pytest.approx(0.95, abs=1e-6)
    assert longest > goodput.best_interval(2.0, 36_000.0)
    assert goodput.longest_interval(0.95, 2.0, 300.0, 1_000.0) == 0
    assert goodput.share(1e9, 1.0, 1.0, 1.0) == 0  # and no overflow


def test_more_chips_fail_more_often():
    few, many = (goodput.saving(1e9, 5.0, chips) for chips in (256, 16384))
    assert few.failures == 64 * many.failures
    # Llama 3's run: a failure every three hours.
    assert many.failures / 3600 == pytest.approx(3.1, abs=0.1)
    assert few.save == many.save == goodput.COPY
    assert few.goodput > few.given > many.given
    assert few.best > many.best


def test_a_plan_says_how_often_to_save(tmp_path):
    command = ("plan", "--config=recipes/pods/llama31_8b", "--topology=h200:64")
    command += ("--stage=pretrain", f"--to={tmp_path}")
    failing = ("--chip_mtbf_hours=6400", "--restart_minutes=30")
    status, printed, error = stagecraft(*command, *failing)
    assert status == 0, error
    assert "a failure every 100 h" in printed
    assert "goodput 99." in printed and "every.save_minutes=" in printed
    assert "goodput" in (tmp_path / "plan.html").read_text()
    status, _, error = stagecraft(*command, "--chip_mtbf_hours=0")
    assert status and "--chip_mtbf_hours=0" in error


def test_a_stage_is_saved_as_its_config_says():
    from tests.pods.plan_test import small

    config = small()
    config.stages.sft.every.save_minutes = 60.0
    stages = plan.plan(config, chips.parse("h200:8"), ["pretrain", "sft"])
    first, second = (stage.saving for stage in stages)
    assert first.best == second.best and first.given > second.given
