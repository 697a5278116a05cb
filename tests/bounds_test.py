"""Bounds: what is read, what holds, what cannot be judged."""

import pytest

from stagecraft import bounds, runs
from stagecraft.errors import UserError

SUMMARY = {"sft": {"kl": 2.0, "gold_mean": 1.0}, "ppo": {"gold_mean": 1.5}}


@pytest.mark.parametrize(
    ("text", "holds", "short"),
    [
        ("sft.kl <= 2", True, "≤ 2"),
        ("sft.kl < 2", False, "< 2"),
        ("ppo.gold_mean > sft.gold_mean + 0.4", True, "> 1.4"),
        ("ppo.gold_mean >= 2 * sft.gold_mean", False, "≥ 2"),
        ("ppo.gold_mean > sft.kl - 1", True, "> 1"),
    ],
)
def test_a_bound_is_checked(text, holds, short):
    [bound] = bounds.check(SUMMARY, [text]).values()
    assert (bound["holds"], bound["short"]) == (holds, short)


def test_two_bounds_on_one_figure_must_both_hold():
    checked = bounds.check(SUMMARY, ["sft.kl > 1", "sft.kl < 1.5"])
    assert checked == {
        "sft.kl": {"must": "> 1, < 1.5", "short": "> 1, < 1.5", "holds": False}
    }


def test_a_figure_that_is_not_there_fails_and_a_stage_that_is_not_is_left_out():
    checked = bounds.check(SUMMARY, ["sft.gold_meen > 1", "dpo.kl < 1"])
    assert list(checked) == ["sft.gold_meen"]
    assert checked["sft.gold_meen"]["holds"] is False
    assert "did you mean sft.gold_mean?" in checked["sft.gold_meen"]["short"]


@pytest.mark.parametrize("text", ["sft.kl", "sft.kl = 2", "sft.kl < 2 / 3", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match="expected 'KEY SIGN VALUE'"):
        bounds.parse(text)


def test_a_config_of_an_older_version_has_them_under_their_old_name(tmp_path):
    runs.write_config(tmp_path, {"measure": {"claims": ["sft.kl <= 2"], "draws": 4}})
    read = runs.read_config(tmp_path)
    assert read["measure"] == {"draws": 4, "bounds": ["sft.kl <= 2"]}
