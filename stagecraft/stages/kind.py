"""What a kind of stage is: a record, which ends the file that defines the kind."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Role(NamedTuple):
    """A model that a stage takes from elsewhere, named by its key ROLE_from.

    Attributes:
        models: what the model may be: "transformer", "scalar".
        required: whether the key may be empty.
        fallback: the role whose model is taken where the key is empty, or "".
    """

    models: tuple[str, ...]
    required: bool = False
    fallback: str = ""


# Roles that several kinds have: the parent, the frozen reference (by default the
# parent as it was), the reward model, and a model that judges texts.
START = {"start": Role(("transformer",), required=True)}
REFERENCE = {"reference": Role(("transformer",), fallback="start")}
REWARD = {"reward": Role(("scalar",))}
JUDGE = {"judge": Role(("transformer",))}


def in_chat_turns(config) -> str:
    """Returns "chat", or "text" where prompts and completions are read as one text."""
    return config.data.get("render", "chat")


class Kind(NamedTuple):
    """A kind of stage.

    Attributes:
        name: as a config's `kind` spells it.
        check: (where, config, experiment, mesh) -> None: refuses impossible values of a
            stage's config, in one line that begins with `where`.
        data: (stage config, `data.stage_data.Sources`) -> `StageData`.
        roles: {role: Role}.
        make: (config, context) -> Stage, of a kind that trains; else None.
        write: (config, context) -> the stage's record, of a kind that samples answers
            and writes records of them; else None.
        model: what is trained: "transformer", which writes text, "scalar", or "".
        samples: whether training samples completions and has them scored.
        supervised: whether it learns given texts; later stages are compared with it.
        format: (config) -> what the model reads and writes: "chat", "text", "records".
        losses: {name: function}, what `objective` may name.
        offers: {name: axes} of the arrays that a loss may ask for.
        places: {name: axes} of where a loss may lie; the first is that of a loss that
            returns a bare array.
        unit: what the loss is counted in.
        finish: (config, StageData, frozen) -> (state) -> (state, {metric: float}), what
            is done after the last step, or None; or None.
    """

    name: str
    check: Callable[..., None]
    data: Callable[..., Any]
    roles: Mapping[str, Role]
    make: Callable[..., Any] | None = None
    write: Callable[..., Any] | None = None
    model: str = ""
    samples: bool = False
    supervised: bool = False
    format: Callable[[Any], str] = in_chat_turns
    losses: Mapping[str, Callable] = {}
    offers: Mapping[str, str] = {}
    places: Mapping[str, str] = {}
    unit: str = "the objective, as trained on"
    finish: Callable[..., Any] | None = None

    @property
    def speaks(self) -> bool:
        """Returns whether its model writes text."""
        return self.model == "transformer"

    @property
    def trains(self) -> bool:
        """Returns whether it trains a model; other kinds write records."""
        return self.make is not None
