"""What a name in start_from stands for: a stage, another run's stage, or a folder.

A stage that trained an adapter has only that on disk. It is read together with the
model it sits on and returned as a plain model, so that callers need not tell them
apart.
"""

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import Any, Literal

import jax

from stagecraft import checkpoint, hub, stores
from stagecraft.errors import UserError
from stagecraft.lineage import Lineage, StageRecord
from stagecraft.models import gguf, huggingface, lora, peft, saved
from stagecraft.models.translation import HOW

# What a name begins with when it stands for a Hugging Face folder, or its hub's id.
PREFIX = "hf:"
GGUF = "gguf:"  # or for a GGUF file
TOKENIZER = "tokenizer"  # its folder in a work directory


@dataclasses.dataclass(frozen=True)
class Source:
    """What a name stands for.

    Attributes:
        name: the name.
        where: "here", a stage of this run; "stage", a finished stage of another run, by
            its folder; "folder", a Hugging Face folder; "adapter", one with a PEFT
            adapter; "gguf", a GGUF file; "nowhere", neither a stage of this run nor a
            path.
        folder: WORKDIR/STAGE, or the Hugging Face folder, or the file.
    """

    name: str
    where: Literal["here", "stage", "folder", "adapter", "gguf", "nowhere"]
    folder: Path

    @property
    def outward(self) -> bool:
        """Whether it is no stage: a Hugging Face folder or a GGUF file."""
        return self.where in ("folder", "adapter", "gguf")

    @property
    def _reader(self):
        if self.where == "gguf":
            return gguf
        if hub.is_id(self.folder):
            raise UserError(hub.absent(self.folder))
        return peft if self.where == "adapter" else huggingface

    def record(self) -> StageRecord | None:
        """Reads stage.json; None where there is no stage."""
        return None if self.outward else StageRecord.read(self.folder)

    def info(self) -> dict[str, Any]:
        """Returns {"module", "model"} of a finished stage or a folder.

        module: "transformer" or "scalar"; model: fields of `ModelConfig`. An adapter
        has those of the model it sits on.
        """
        if self.outward:
            return self._reader.info(self.folder)
        record = StageRecord.read_finished(self.folder)
        if record.model is None:
            raise UserError(f"{self.folder}: a stage of records, which has no model")
        return {"module": record.module, "model": record.model}

    def load(self, mesh: jax.sharding.Mesh, **how):
        """Reads the model, adapters merged into the weights they sit on.

        Args:
            mesh: the mesh to put the parameters on.
            **how: fields of `ModelConfig` that are the run's, for a folder.

        Returns:
            a `Transformer` or a `ScalarModel`.
        """
        if self.outward:
            return self._reader.load(self.folder, mesh, **how)
        if StageRecord.read_finished(self.folder).lora is not None:
            return lora.merge(*load_adapter(self.folder, mesh))
        return saved.load(self.folder, mesh)

    def examine(self, mesh: jax.sharding.Mesh, *, module: str | None = None) -> None:
        """Checks a Hugging Face folder's config and headers before anything is read.

        Args:
            mesh: the mesh the parameters must divide over.
            module: "transformer" or "scalar", where only one will do.
        """
        if self.where in ("folder", "gguf"):
            self._reader.examine(self.folder, mesh, module=module)
            return
        has = self._reader.info(self.folder)["module"]
        if module not in (None, has):
            raise UserError(
                f"{self.folder}: makes a {has} model, expected a {module} one"
            )
        huggingface.examine(peft.base_of(self.folder), mesh)

    def id(self) -> str:
        """Returns the id in a lineage: that of the stage, or a digest of the folder.

        Empty for a stage that no lineage.json names.
        """
        if self.outward:
            return self._reader.digest(self.folder)
        return Lineage.read(self.folder.parent).id_of(self.folder.name)

    def tokenizer(self) -> Path:
        """Returns where the tokenizer lies that the model was trained with."""
        if not self.outward:
            return self.folder.parent / TOKENIZER
        if self.where == "adapter" and not any(self.folder.glob("tokenizer*")):
            return peft.base_of(self.folder)
        return self.folder

    def above(self, record: StageRecord) -> str:
        """Returns the start_from of a stage of another run, as this run can name it.

        Empty where the stage started from nothing, or from a stage that is gone.
        """
        if "/" in record.start_from or not record.start_from:
            return record.start_from
        beside = self.folder.parent / record.start_from
        return str(beside) if beside.exists() else ""

    def seen_from(self, folder: str | Path) -> str:
        """Returns the name that stage.json in WORKDIR/STAGE has for it.

        Stages of one run are named relative to each other, so that the run may be
        moved.
        """
        if self.where == "gguf":
            return f"{GGUF}{self.folder.absolute()}"
        if self.outward:
            path = self.name.removeprefix(PREFIX)
            return self.name if hub.is_id(path) else f"{PREFIX}{Path(path).absolute()}"
        if self.folder.parent.resolve() == Path(folder).parent.resolve():
            return f"../{self.folder.name}"
        return stores.named(self.folder.absolute())


def locate(
    name: str | Path, root: str | Path = "", stages: Container[str] = ()
) -> Source:
    """Returns what a name stands for; no model is read.

    Args:
        name: a stage of this run, the folder or address WORKDIR/STAGE of another,
            "hf:FOLDER", or
            "hf:ORG/NAME" for a model in the cache of the Hugging Face hub, or
            "gguf:FILE".
        root: this run's work directory.
        stages: names of this run's stages.

    >>> locate("sft", "runs/a", ["sft"]).folder.as_posix()
    'runs/a/sft'
    >>> locate("runs/b/dpo", "runs/a", ["sft"]).where
    'stage'
    """
    text = str(name)
    if text.startswith(GGUF):
        return Source(text, "gguf", Path(text.removeprefix(GGUF)))
    if text.startswith(PREFIX):
        path = text.removeprefix(PREFIX)
        folder = hub.find(path) or Path(path)
        where = "adapter" if peft.is_adapter(folder) else "folder"
        return Source(text, where, folder)
    if text in stages:
        return Source(text, "here", Path(root) / text)
    if "://" in text:
        root, _, name = text.rstrip("/").rpartition("/")
        return Source(text, "stage", stores.local(root, refresh=False) / name)
    path = Path(text)
    return Source(text, "stage" if "/" in text or path.exists() else "nowhere", path)


def shortest_context(stage, experiment) -> tuple[int, str]:
    """Returns the most tokens that each model of a stage holds, and what limits them.

    No row of a run is longer than its model.max_length either.

    Args:
        stage: the stage's resolved config.
        experiment: the whole config.

    Returns:
        the tokens; the key that sets them, with its value.
    """
    limits = []
    for key in stage:
        if key == "judge_from":  # which reads texts of its own, whatever their length
            continue
        if key.endswith("_from") and _root(stage[key], experiment):
            holds = context(stage[key], experiment)
            limits.append((holds, f"the max_length={holds} of {key}={stage[key]!r}"))
    own = experiment.model.max_length
    limits.append((own, f"model.max_length={own}"))
    return min(limits, key=lambda limit: limit[0])


def context(name: str, experiment) -> int:
    """Returns the tokens that the model of a name holds, which is its max_length.

    With learned positions it has no more of them, and with rotary ones nothing samples
    or scores beyond it. A stage of this run has that of the model it starts from,
    through all stages of the run.
    """
    root = _root(name, experiment)
    if not root:
        return experiment.model.max_length
    return locate(root).info()["model"]["max_length"]


def _root(name, experiment):
    """Returns the model outside the run that a stage's comes from; "" for none."""
    while name in experiment.stages:
        name = experiment.stages[name].start_from
    return name


def run_of(text: str) -> tuple[Path, str] | None:
    """Returns (work directory, name) of the run that a path leads into.

    The name is that of a stage, or "tokenizer", or "world:FILE". None for a text that
    is no path, or leads into no run.
    """
    path = Path(text)
    for root, name in (
        (path.parent, path.name),  # RUN/STAGE, RUN/tokenizer
        (path.parent.parent, path.parent.name),  # RUN/STAGE/records.jsonl
    ):
        if "/" in text and (root / "config.json").exists():
            return root, f"world:{path.name}" if name == "world" else name
    return None


def load_adapter(folder: str | Path, mesh: jax.sharding.Mesh):
    """Reads the base of a stage that trained an adapter, and the `lora.Adapter`."""
    record = StageRecord.read_finished(folder)
    if record.lora is None:
        raise UserError(f"{folder}: trained all weights and has no adapter")
    how = {key: record.model[key] for key in HOW if key in record.model}
    base = base_of(folder, record).load(mesh, **how)
    abstract = lora.abstract(
        lora.Settings(**record.lora), base, mesh, scalar=record.module == "scalar"
    )
    adapter, _ = checkpoint.load_model(folder, abstract)
    return base, adapter


def base_of(folder: str | Path, record: StageRecord) -> Source:
    """Returns what a stage's adapter sits on, if it is still the same model."""
    base = locate(record.base["name"])
    if not base.outward and "://" not in base.name:
        base = dataclasses.replace(base, folder=Path(folder) / base.name)
    if not base.folder.exists():
        lost = hub.absent(base.folder) if hub.is_id(base.folder) else ""
        raise UserError(
            f"{folder}: is an adapter (LoRA) on {base.folder}, which is not there; "
            + (lost or "restore that folder")
        )
    digest = base.id()
    if not digest:
        raise UserError(
            f"{folder}: is an adapter (LoRA) on {base.folder}, which no lineage.json "
            "names; copy the whole work directory"
        )
    if digest != record.base["id"]:
        raise UserError(
            f"{folder}: is an adapter (LoRA) on {base.folder}, which is another model "
            "now; restore the one it was trained on"
        )
    return base
