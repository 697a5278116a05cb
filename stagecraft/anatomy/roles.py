"""What the model of a stage is for, also in runs whose kinds are no longer known.

`settings` is a stage's config, a ConfigDict or the plain dict of config.json.
"""

from collections.abc import Mapping

from stagecraft.stages.kind import Kind
from stagecraft.stages.kinds import KINDS

# What a kind of another version is taken for: it trains a model, which writes no text.
_OTHER = Kind("", check=None, data=None, roles={}, make=lambda *_: None)


def of(kind: str | None) -> Kind:
    """Returns the record of a kind."""
    return KINDS.get(kind, _OTHER)


def reads_bare_text(settings: Mapping) -> bool:
    """Returns whether a stage learns from running text, without turns of a chat."""
    data = settings.get("data") or {}
    return of(settings.get("kind")).supervised and data.get("format") == "text"


def answers_in_turns(settings: Mapping) -> bool:
    """Whether the stage's model answers in turns of a chat."""
    return of(settings.get("kind")).speaks and not reads_bare_text(settings)
