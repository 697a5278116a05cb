"""What a work directory says of its stages: stage.json and lineage.json, typed.

A file is written back as it was read: keys keep their order, and keys that have no
field here stay.
"""

import dataclasses
from pathlib import Path
from typing import Any, Self, TypedDict

from stagecraft import storage
from stagecraft.errors import UserError


@dataclasses.dataclass
class _Json:
    """A JSON object with typed fields; a field that is None is left out of the file.

    Attributes:
        as_read: the object in the file it was read from, which has the order of the
            keys, and keys without a field of their own.
    """

    as_read: dict[str, Any] = dataclasses.field(
        default_factory=dict, kw_only=True, repr=False, compare=False
    )

    REQUIRED = ()  # keys without which a file was edited or damaged

    @classmethod
    def from_json(cls, values: Any, where: str = "") -> Self:
        """Returns the typed object; `where` names the file in a UserError."""
        object_ = isinstance(values, dict)
        missing = [key for key in cls.REQUIRED if not object_ or key not in values]
        if missing or not object_:
            what = f"lacks {', '.join(missing)}" if object_ else "is no JSON object"
            raise UserError(
                f"{where}: {what}; it was edited or damaged: restore it, or start in "
                "another --workdir"
            )
        fields = {key: values[key] for key in cls._fields() if key in values}
        return cls(**fields, as_read=values)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object: as read, further keys behind."""
        values = self.as_read | {name: getattr(self, name) for name in self._fields()}
        return {k: v for k, v in values.items() if v is not None or k in self.as_read}

    @classmethod
    def _fields(cls):
        names = [field.name for field in dataclasses.fields(cls)]
        return [name for name in names if name != "as_read"]


@dataclasses.dataclass
class StageRecord(_Json):
    """One stage's own record, WORKDIR/STAGE/stage.json.

    Attributes:
        kind: the kind of the stage, a name of `defaults.KINDS`.
        start_from: a stage's name, a path or "hf:FOLDER"; "" for none.
        finished: whether the stage is done.
        format: "chat", "text" for a model of bare text, "records" for no model.
        tokenizer: digest of the tokenizer.
        data: counts of the data the stage was trained on.
        lora, base: settings of the adapter, and {"name", "id"} of the model it sits on,
            where one was trained.
        module, model: what the parameters are: see `models.saved.describe`.
        steps: optimizer steps.
        seconds: {section: wall seconds}, over all times the stage was resumed.
        seconds_this_time: wall seconds since it was last resumed.
        tokens: {what was done with them: count}.
        peak_memory_bytes: the most the process held.
        made_with: versions, device and command, see `process.made_with`.
    """

    kind: str
    start_from: str
    finished: bool = False
    format: str | None = None
    tokenizer: str | None = None
    data: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    base: dict[str, str] | None = None
    module: str | None = None
    model: dict[str, Any] | None = None
    steps: int | None = None
    seconds: dict[str, float] | None = None
    seconds_this_time: float | None = None
    tokens: dict[str, float] | None = None
    peak_memory_bytes: int | None = None
    made_with: dict[str, str] | None = None

    REQUIRED = ("kind", "start_from", "finished")

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """Reads the record of WORKDIR/STAGE; None where there is no stage."""
        path = Path(folder) / "stage.json"
        values = storage.read_json(path)
        return None if values is None else cls.from_json(values, str(path))

    @classmethod
    def read_finished(cls, folder: str | Path) -> Self:
        """Reads the record of a finished stage, or raises a UserError."""
        record = cls.read(folder)
        if record is None:
            raise UserError(
                f"{folder}: no stage here (no stage.json); expected WORKDIR/STAGE of a "
                "run"
            )
        if not record.finished:
            raise UserError(
                f"{folder}: this stage is not finished; run it again to resume"
            )
        return record

    def write(self, folder: str | Path) -> None:
        """Writes WORKDIR/STAGE/stage.json."""
        storage.write_json(Path(folder) / "stage.json", self.to_json())


class Parent(TypedDict):
    """A parent of a stage: its name as the config has it, and the id of its lineage."""

    stage: str
    id: str


@dataclasses.dataclass
class LineageEntry(_Json):
    """What one stage comes from: digests of its config, its data and its parents.

    Attributes:
        kind, start_from: as in `StageRecord`.
        config: digest of the settings that decide the stage's numbers.
        tokenizer: digest of the tokenizer.
        data: {file, or "stage:NAME": digest}.
        parents: {role: Parent}, a role being a key such as start_from.
        id: digest of all the rest; computed where it is not given.
    """

    kind: str
    start_from: str
    config: str | None = None
    tokenizer: str | None = None
    data: dict[str, str] | None = None
    parents: dict[str, Parent] = dataclasses.field(default_factory=dict)
    id: str | None = None

    REQUIRED = ("kind", "start_from", "parents", "id")

    def __post_init__(self):
        if self.id is None:
            self.id = storage.digest(self.to_json())


@dataclasses.dataclass
class Lineage(_Json):
    """WORKDIR/lineage.json: what each stage that began comes from.

    Attributes:
        stages: {name: LineageEntry}.
    """

    stages: dict[str, LineageEntry] = dataclasses.field(default_factory=dict)

    REQUIRED = ("stages",)

    @classmethod
    def read(cls, root: str | Path) -> Self:
        """Reads the lineage of a work directory; an empty one where there is none."""
        path = Path(root) / "lineage.json"
        lineage = cls.from_json(storage.read_json(path, {"stages": {}}), str(path))
        lineage.stages = {
            name: LineageEntry.from_json(entry, f"{path}: {name}")
            for name, entry in lineage.stages.items()
        }
        return lineage

    def write(self, root: str | Path) -> None:
        """Writes WORKDIR/lineage.json."""
        storage.write_json(Path(root) / "lineage.json", self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object, the entries of its stages as read."""
        entries = {name: entry.to_json() for name, entry in self.stages.items()}
        return super().to_json() | {"stages": entries}

    def id_of(self, name: str) -> str:
        """Returns the id of a stage; "" for one that is not there."""
        return (self.stages[name].id or "") if name in self.stages else ""
