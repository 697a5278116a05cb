"""What the model of a stage is for: every question about a stage's kind is asked here.

`settings` is a stage's config, a ConfigDict or the plain dict of config.json.
"""

from collections.abc import Mapping

from stagecraft import defaults

_LOSS_UNITS = {"language_model": "nats a token", "reward": "nats a pair"}


def speaks(kind: str) -> bool:
    """Whether the model of a stage of this kind writes text."""
    return kind in defaults.KINDS and trains(kind) and not scores(kind)


def scores(kind: str) -> bool:
    """Whether the model of a stage of this kind gives a completion a number."""
    return kind == "reward"


def trains(kind: str) -> bool:
    """Whether a stage of this kind trains a model; the others write records."""
    return kind not in defaults.RECORDS


def imitates(kind: str) -> bool:
    """Whether a stage of this kind learns to predict the text it is given."""
    return kind == "language_model"


def loss_unit(kind: str) -> str:
    """The unit of the training loss, in words."""
    return _LOSS_UNITS.get(kind, "the objective, as trained on")


def reads_bare_text(settings: Mapping) -> bool:
    """Whether a stage learns from running text, without turns of a chat."""
    data = settings.get("data") or {}
    return imitates(settings.get("kind")) and data.get("format") == "text"


def answers_in_turns(settings: Mapping) -> bool:
    """Whether the stage's model answers in turns of a chat."""
    return speaks(settings.get("kind")) and not reads_bare_text(settings)
