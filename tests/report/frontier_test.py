"""Gold against KL: what the titles say, where points and lines are, what is data."""

import math

import numpy as np
import pytest

from stagecraft import runs
from stagecraft.anatomy import overoptimisation
from stagecraft.report import frontier, page
from tests.report.fake_run import EVIL, json_file, lines_file


def figures(gold, kl=None, error=0.01, **more):
    own = {"gold_mean": gold, **more, "reward_mean_by": "judge"}
    own |= {} if kl is None else {"kl": kl}
    errors = {key: error for key, value in own.items() if isinstance(value, float)}
    return own | {"draws": {"count": 4, "standard_error": errors}}


def summary(run, **stages):
    json_file(run / "summary.json", stages)
    return runs.read(run)


def test_the_title_says_whether_the_farthest_is_the_best(run):
    """Half an interval is t(3) = 3.182 times .01."""
    tuned = figures(0.5)
    shown = frontier.ends(summary(run, tuned=tuned, policy=figures(1.5, 4.0)))
    assert shown["title"] == (
        "policy went farthest, 4.00 ±0.03 nats, and has the highest gold score, "
        "1.500 ±0.032"
    )
    assert shown["rows"] == [
        ("tuned", "0", "0.500 ±0.032"),
        ("policy", "4.00 ±0.03", "1.500 ±0.032"),
    ]
    shown = frontier.ends(summary(run, tuned=tuned, policy=figures(0.2, 4.0)))
    assert shown["title"].endswith(
        "to a gold score of 0.200 ±0.032; tuned has 0.500 ±0.032 at the start"
    )
    near = figures(0.47, 4.0)
    judge = figures(0.6, 1.0)
    shown = frontier.ends(summary(run, tuned=tuned, policy=near, judge=judge))
    assert shown["title"].endswith("judge has 0.600 ±0.032 at 1.00 ±0.03 nats")
    shown = frontier.ends(summary(run, tuned=tuned, policy=near))
    assert shown["title"].endswith("at the start: no difference")


def test_without_gold_or_without_kl_there_is_no_frontier(run):
    assert frontier.ends(summary(run, tuned=figures(0.5))) is None
    assert frontier.ends(summary(run, policy={"kl": 2.0})) is None
    text = page.write(run).read_text()
    assert "fig-frontier" not in text and "pictured" not in text.split("<header")[1]


def rows_of(kl, reward, gold=None):
    rows = []
    for i, (x, y) in enumerate(zip(kl, reward, strict=True)):
        row = {"step": i + 1, "objective/kl": x, "objective/scores": y}
        if gold is not None:
            row |= {"rewards/gold/mean": gold[i], "rewards/reward_model/mean": y}
        rows.append(row)
    return rows


def test_a_path_names_what_rose_and_what_fell(run):
    """The running mean of 0 to 5 over five goes from 1 to 4."""
    rows = rows_of(np.arange(6.0), np.arange(1.0, 7.0))
    lines_file(run / "policy" / "metrics.jsonl", rows)
    (bare,) = frontier.paths(summary(run, tuned={}))
    assert bare["title"] == "policy: its reward goes from 2.000 to 5.000 over 4 nats"
    assert bare["rows"][0] == ("1", "1.000", "1.000")
    assert [what for _, what in bare["key"]] == ["reward it is trained on"]
    tuned = figures(0.5, reward_mean=0.25)
    policy = figures(0.25, 2.0, reward_mean=2.5)
    (held,) = frontier.paths(summary(run, tuned=tuned, policy=policy))
    assert held["title"] == (
        "policy: its held-out reward rises from 0.250 ±0.032 to 2.500 ±0.032 while "
        "gold falls from 0.500 ±0.032 to 0.250 ±0.032"
    )
    policy = figures(0.52, 2.0, reward_mean=2.5)
    (same,) = frontier.paths(summary(run, tuned=tuned, policy=policy))
    assert same["title"].endswith("gold stays, from 0.500 ±0.032 to 0.520 ±0.032")
    assert 'id="fig-path-policy"' in page.write(run).read_text()


def test_logged_gold_gets_its_curve_and_its_peak(run):
    distance = np.linspace(0.4, 4.5, 400)
    gold = distance * (1.0 - 0.75 * np.log(distance))
    rows = rows_of(distance**2, distance, gold)
    lines_file(run / "policy" / "metrics.jsonl", rows)
    (shown,) = frontier.paths(summary(run, tuned={}))
    peak = math.exp(1.0 / 0.75 - 1.0)  # where the slope of d (1 - .75 log d) is 0
    assert f"gold turns down after {peak**2:.2g} nats" in shown["title"]
    assert [dash for dash, _ in shown["key"]] == [0, 1, 2]
    rising = distance[distance < peak]
    rows = rows_of(rising**2, rising, gold[: len(rising)])
    lines_file(run / "policy" / "metrics.jsonl", rows)
    (shown,) = frontier.paths(summary(run, tuned={}))
    assert "turns down" not in shown["title"]
    assert len(rising) > overoptimisation.PAST


def test_names_are_data(run):
    rows = rows_of([0.0, 1.0], [1.0, 2.0])
    lines_file(run / "policy" / "metrics.jsonl", rows)
    json_file(run / "summary.json", {"tuned": figures(0.5), EVIL: {}})
    files = runs.read(run)
    for stage in files.stages:
        stage.name = stage.name.replace("policy", EVIL)
    files.summary[EVIL] = figures(0.1, 1.0)
    for shown in (frontier.ends(files), *frontier.paths(files)):
        assert EVIL not in shown["svg"] and "&lt;script" in shown["svg"]


@pytest.mark.parametrize("steps", [500, 3])
def test_a_long_path_is_a_short_table(run, steps):
    rows = rows_of(np.linspace(0, 9, steps), np.linspace(0, 1, steps))
    lines_file(run / "policy" / "metrics.jsonl", rows)
    (shown,) = frontier.paths(summary(run, tuned={}))
    assert len(shown["rows"]) <= 25 and shown["rows"][-1][0] == str(steps)
