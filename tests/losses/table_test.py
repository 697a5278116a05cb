"""The tables of losses: what config names mean, and the page that lists them."""

import inspect
from pathlib import Path

import pytest

from stagecraft import losses
from stagecraft.losses import __main__ as page

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
FAMILIES = losses.TABLES.values()
LOSSES = {function: name for family in FAMILIES for name, function in family.items()}


def test_the_page_lists_today_s_losses():
    text = PAGE.read_text(encoding="utf-8")
    assert page.written(text) == text, (
        "run python -m stagecraft.losses docs/objectives.md"
    )


@pytest.mark.parametrize("loss", LOSSES, ids=LOSSES.get)
def test_every_loss_is_offered_by_its_name_and_says_what_it_takes(loss):
    assert getattr(losses, loss.__name__) is loss
    assert loss.__doc__.split("\n")[0].endswith(".")
    for parameter in inspect.signature(inspect.unwrap(loss)).parameters.values():
        assert parameter.annotation is not parameter.empty, parameter


def test_aliases_are_the_same_functions():
    assert losses.PAIRS["sigmoid"] is losses.PAIRS["dpo"] is losses.dpo
    assert losses.POLICY["grpo"] is losses.POLICY["ppo_policy"]


def test_a_page_without_its_markers_is_left_alone():
    with pytest.raises(SystemExit, match="lacks"):
        page.written("no table here")
