"""What the model of a stage is for, also in runs whose kinds are no longer known.

`settings` is a stage's config, a ConfigDict or the plain dict of config.json.
"""

from collections.abc import Mapping
from typing import Any

from stagecraft.stages.kind import Kind
from stagecraft.stages.kinds import KINDS


def _of(kind: str | None, attribute: str, absent: Any) -> Any:
    return getattr(KINDS[kind], attribute) if kind in KINDS else absent


def speaks(kind: str | None) -> bool:
    """Returns whether the model of a stage of this kind writes text."""
    return _of(kind, "speaks", False)


def scores(kind: str | None) -> bool:
    """Returns whether a stage of this kind trains a model that scores."""
    return _of(kind, "model", "") == "scalar"


def trains(kind: str | None) -> bool:
    """Returns whether a stage of this kind trains a model; the others write records."""
    return _of(kind, "trains", True)


def imitates(kind: str | None) -> bool:
    """Returns whether a stage of this kind learns to predict the text it is given."""
    return _of(kind, "supervised", False)


def loss_unit(kind: str | None) -> str:
    """Returns the unit of the training loss, in words."""
    return _of(kind, "unit", Kind._field_defaults["unit"])


def reads_bare_text(settings: Mapping) -> bool:
    """Returns whether a stage learns from running text, without turns of a chat."""
    data = settings.get("data") or {}
    return imitates(settings.get("kind")) and data.get("format") == "text"


def answers_in_turns(settings: Mapping) -> bool:
    """Returns whether the stage's model answers in turns of a chat."""
    return speaks(settings.get("kind")) and not reads_bare_text(settings)
