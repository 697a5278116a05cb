"""Claims: what is read, what holds, what cannot be judged."""

import pytest

from stagecraft import claims
from stagecraft.errors import UserError

SUMMARY = {"sft": {"kl": 2.0, "gold_mean": 1.0}, "ppo": {"gold_mean": 1.5}}


@pytest.mark.parametrize(
    ("claim", "holds", "short"),
    [
        ("sft.kl <= 2", True, "≤ 2"),
        ("sft.kl < 2", False, "< 2"),
        ("ppo.gold_mean > sft.gold_mean + 0.4", True, "> 1.4"),
        ("ppo.gold_mean >= 2 * sft.gold_mean", False, "≥ 2"),
        ("ppo.gold_mean > sft.kl - 1", True, "> 1"),
    ],
)
def test_a_claim_is_checked(claim, holds, short):
    [bound] = claims.check(SUMMARY, [claim]).values()
    assert (bound["holds"], bound["short"]) == (holds, short)


def test_two_claims_about_one_figure_must_both_hold():
    bounds = claims.check(SUMMARY, ["sft.kl > 1", "sft.kl < 1.5"])
    assert bounds == {
        "sft.kl": {"must": "> 1, < 1.5", "short": "> 1, < 1.5", "holds": False}
    }


def test_a_figure_that_is_not_there_fails_and_a_stage_that_is_not_is_left_out():
    bounds = claims.check(SUMMARY, ["sft.gold_meen > 1", "dpo.kl < 1"])
    assert list(bounds) == ["sft.gold_meen"]
    assert bounds["sft.gold_meen"]["holds"] is False
    assert "did you mean sft.gold_mean?" in bounds["sft.gold_meen"]["short"]


@pytest.mark.parametrize("claim", ["sft.kl", "sft.kl = 2", "sft.kl < 2 / 3", ""])
def test_other_texts_are_refused(claim):
    with pytest.raises(UserError, match="expected 'KEY SIGN VALUE'"):
        claims.parse(claim)
