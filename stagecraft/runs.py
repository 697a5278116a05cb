"""A run: its config and tokenizer, what is finished, how to load it, and its files.

`Run` loads what is finished. `read` is for reports and takes the files in whatever
state they are: a run may be unfinished, cut off in the middle of a line, or of any
graph. It needs no stage by name, and says in words what is missing.
"""

import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from stagecraft import checkpoint, metrics, sharding, storage, stores
from stagecraft.errors import UserError
from stagecraft.lineage import Lineage, StageRecord
from stagecraft.metrics import is_number
from stagecraft.models import locate
from stagecraft.models.language import Language
from stagecraft.models.translation import HOW

TOKENIZER = locate.TOKENIZER
_FILES = {
    "config.json": "the run's settings",
    "lineage.json": "what each stage started from",
    "summary.json": "the measured figures (written when the whole graph is done)",
    "prompt.json": "the single prompt through every stage",
}


@dataclasses.dataclass
class Run:
    """A work directory with its config: what is finished, and how to load it.

    Attributes:
        root: the work directory.
        config: the resolved ConfigDict.
        tokenizer: see `text.tokenizer`; None before it is trained or read.
        stages: names of the stages, parents first.
        ran: names of the stages that this process ran.
        devices: of its meshes; None for all that JAX sees. A plan's are not here.
    """

    root: Path
    config: Any
    tokenizer: Any = None
    stages: Sequence[str] = ()
    ran: list[str] = dataclasses.field(default_factory=list)
    devices: Sequence | None = None

    def _repr_html_(self) -> str:
        """Shows in a notebook how far each stage has come."""
        title = f"<p><code>{html.escape(str(self.root))}</code></p>"
        return title + html_table(STATUS, status(read(self.root)), 3)

    def source(self, name: str) -> locate.Source:
        """Returns what a name stands for: a stage of this run, or one from outside."""
        return locate.locate(name, self.root, self.config.stages)

    def record(self, name: str) -> StageRecord | None:
        """Reads a stage's record; None where the stage has not begun."""
        return self.source(name).record()

    def lineage(self) -> Lineage:
        """Reads what the stages come from."""
        return Lineage.read(self.root)

    def finished(self, name: str) -> bool:
        """Returns whether a stage is done."""
        record = self.record(name)
        return record is not None and record.finished

    def mesh(self, name: str | None = None) -> jax.sharding.Mesh:
        """Returns the run's mesh, or that of a stage."""
        sizes, devices = dict(self.config.mesh), self.devices
        if name:
            stage = self.config.stages[name]
            sizes |= {axis: size for axis, size in stage.mesh.items() if size}
            if apart := _apart(stage):
                devices, _ = self._split(apart, f"stages.{name}.")
                asked = [sizes[axis] for axis in sharding.AXES if axis in sizes]
                if self.devices is None and -1 not in asked:
                    # As without rollouts apart, a smaller mesh has the first devices.
                    devices = devices[: math.prod(asked)]
        return sharding.make_mesh(**sizes, devices=devices)

    def rollout_mesh(self, stage: Any) -> jax.sharding.Mesh | None:
        """Returns the mesh that a stage samples on; None where that is its own.

        Args:
            stage: the stage's config.
        """
        if not (apart := _apart(stage)):
            return None
        _, devices = self._split(apart)
        sizes = {axis: size for axis, size in stage.rollout_mesh.items()}
        del sizes["devices"]
        return sharding.make_mesh(**sizes, devices=devices)

    def _split(self, apart, where=""):
        """Splits the devices, or their number, into those that train and the last."""
        every = jax.devices() if self.devices is None else self.devices
        count = every if isinstance(every, int) else len(every)
        if not 0 < apart < count:
            raise UserError(
                f"{where}rollout_mesh.devices={apart}: expected from 0 (all devices "
                f"train and sample) to {count - 1}, since of {count} one must train"
            )
        if isinstance(every, int):
            return count - apart, apart
        return every[:-apart], every[-apart:]

    def model(self, name: str, mesh: jax.sharding.Mesh | None = None) -> Any:
        """Reads the parameters of a finished stage, or of a Hugging Face folder.

        Args:
            name: see `source`.
            mesh: the mesh to put them on; the run's by default.

        Returns:
            a `Transformer` or a `ScalarModel`.
        """
        how = {key: self.config.model[key] for key in HOW}
        return self.source(name).load(mesh or self.mesh(), **how)

    def language(self, name: str, rows: int) -> Language:
        """Reads a model that writes text onto the run's mesh, with its tokenizer.

        Args:
            name: see `source`.
            rows: texts worked on at once, rounded up to what divides over the mesh.
        """
        mesh = self.mesh()
        rows = whole_rows(rows, mesh)
        return Language(self.model(name, mesh), self.tokenizer, batch_size=rows)

    def chat_format(self, name: str) -> bool:
        """Returns whether a model writes in chat turns: all but those of bare text.

        A Hugging Face folder's does where its tokenizer brings a chat template.
        """
        source = self.source(name)
        if source.outward:
            return self.tokenizer.template is not None
        return StageRecord.read_finished(source.folder).format != "text"


def _apart(stage):
    """Returns the devices that a stage samples on alone; 0 for none."""
    return stage.get("rollout_mesh", {}).get("devices", 0)


def whole_rows(least: int, mesh: jax.sharding.Mesh) -> int:
    """Returns the smallest batch of at least `least` rows that divides over a mesh."""
    shards = sharding.row_shards(mesh)
    return -(-least // shards) * shards


def read_config(root: str | Path) -> dict[str, Any] | None:
    """Reads WORKDIR/config.json; None where there is no run."""
    config = storage.read_json(Path(root) / "config.json")
    measure = part(config, "measure")
    if "claims" in measure:  # as older versions call them
        measure["bounds"] = measure.pop("claims")
    return config


def write_config(root: str | Path, config: dict[str, Any]) -> None:
    """Writes WORKDIR/config.json."""
    storage.write_json(Path(root) / "config.json", config)


# -- the files as they are -------------------------------------------------------------


@dataclasses.dataclass
class StageFiles:
    """The files of one stage, in whatever state they are.

    Attributes:
        name: the stage's name in the graph.
        index: its place in the order, which decides its colour.
        kind, start_from: from stage.json, else lineage.json, else config.json.
        parents: {what it needs, a stage's name or an address from outside the run:
            True when it starts from its weights}.
        info: stage.json, {} when the stage is unfinished.
        lineage: the stage's entry of lineage.json.
        rows, samples: metrics.jsonl and samples.jsonl.
    """

    name: str
    index: int
    kind: str
    start_from: str
    parents: dict
    info: dict
    lineage: dict
    rows: list
    samples: list

    def series(self, key):
        """Returns (steps, values) of a metric, over the rows that have it."""
        points = [
            (row["step"], row[key]) for row in self.rows if is_number(row.get(key))
        ]
        return [p[0] for p in points], [float(p[1]) for p in points]

    def keys(self):
        """Returns the metrics that hold numbers, in order of appearance."""
        names = {k: None for row in self.rows for k, v in row.items() if is_number(v)}
        return [name for name in names if name not in ("step", "seconds")]


@dataclasses.dataclass
class RunFiles:
    """The files of a work directory, in whatever state they are.

    Attributes:
        folder: the work directory.
        config, lineage, summary, prompt: its shared files; {} where one is missing.
        stages: `StageFiles`, parents first.
        missing: what is not there or cannot be read, a line each.
    """

    folder: Path
    config: dict
    lineage: dict
    summary: dict
    prompt: dict
    stages: list[StageFiles]
    missing: list[str]


def read(folder: str | Path) -> RunFiles:
    """Reads the files of a work directory, in whatever state they are.

    Raises:
        UserError: there is no such directory, or it holds no file of a run.
    """
    folder = stores.local(folder)
    if not folder.is_dir():
        raise UserError(
            f"workdir {folder}: no such directory; give one that `run` made"
        )
    files, missing = {}, []
    for name, meaning in _FILES.items():
        files[name] = _json(folder / name, meaning, missing)
    config, lineage = files["config.json"], files["lineage.json"]
    entries, planned = part(lineage, "stages"), part(config, "stages")
    begun = [
        path.parent.name
        for pattern in ("*/stage.json", "*/metrics.jsonl", "*/samples.jsonl")
        for path in sorted(folder.glob(pattern))
    ]
    names = list(dict.fromkeys([*planned, *entries, *begun]))
    if not names and not any(files.values()):
        raise UserError(
            f"workdir {folder}: holds no run (no config.json, no stage with metrics); "
            "give a directory that `run` made"
        )
    stages = [
        _stage(folder / name, part(planned, name), part(entries, name), names, missing)
        for name in names
    ]
    stages = _sorted(stages)
    for index, stage in enumerate(stages):
        stage.index = index
    shared = (config, lineage, files["summary.json"], files["prompt.json"])
    return RunFiles(folder, *shared, stages, missing)


STATUS = ("stage", "starts from", "state", "saved", "loss", "seconds")


def status(files: RunFiles) -> list[tuple[str, ...]]:
    """Returns how far each stage has come, as text under the heads of `STATUS`."""
    return [_status(files, stage) for stage in files.stages]


def _status(files, stage):
    """Returns the cells of a stage: the last row it logged, or that it has none."""
    steps = part(part(files.config, "stages"), stage.name).get("steps", 0)
    logged = [int(row["step"]) for row in stage.rows]
    folder = files.folder / stage.name
    if stage.info.get("finished"):
        state = "finished"
    elif logged:
        state = f"at step {logged[-1]:,} of {steps:,}"
    else:
        state = "begun" if folder.is_dir() else "not started"
    saved = checkpoint.steps(folder / "checkpoints")
    _, losses = stage.series("loss")
    _, seconds = stage.series("seconds")
    seconds = part(stage.info, "seconds").get("total", (seconds or [None])[-1])
    return (
        stage.name,
        stage.start_from or "–",
        state,
        f"step {max(saved):,}" if saved else "–",
        f"{losses[-1]:.4g}" if losses else "–",
        f"{seconds:,.0f}" if seconds is not None else "–",
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """Returns a table for a notebook; the columns after the first `words` hold numbers.

    All text is data, and escaped.
    """

    def line(tag, cells):
        sides = ["left" if number < words else "right" for number in range(len(cells))]
        cells = "".join(
            f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{cells}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"


def _stage(folder, planned, entry, names, missing):
    rows = metrics.read(folder / "metrics.jsonl")
    rows = [row for row in rows if isinstance(row, dict) and is_number(row.get("step"))]
    samples = metrics.read(folder / "samples.jsonl")
    samples = [row for row in samples if isinstance(row, dict) and "completion" in row]
    info = {}
    if (folder / "stage.json").exists():
        info = _json(folder / "stage.json", "the stage's own record", missing)
    elif rows:
        last = rows[-1]["step"]
        missing.append(f"{folder.name}: not finished; its curves end at step {last:,}")
    else:
        state = "not finished" if folder.is_dir() else "not started"
        missing.append(f"{folder.name}: {state}")
    sources = (info, entry, planned)
    start_from = _first(sources, "start_from")
    roles = [value for key, value in planned.items() if key.endswith("_from")]
    needed = [value for value in roles if isinstance(value, str) and value]
    needed += _mentioned(entry.get("parents"), names)
    needed += _records_of(
        [*part(planned, "data").values(), *part(entry, "data")], names
    )
    parents: dict[str, bool] = dict.fromkeys(needed, False)
    if start_from:
        parents[start_from] = True
    parents.pop(folder.name, None)
    kind = _first(sources, "kind")
    return StageFiles(
        folder.name, 0, kind, start_from, parents, info, entry, rows, samples
    )


def _sorted(stages):
    """Returns the stages, parents first, otherwise in their order."""
    done, left = [], {stage.name: stage for stage in stages}
    while left:
        ready = [s for s in left.values() if not any(p in left for p in s.parents)]
        first = next(iter(ready or left.values()))  # in a circle: go on anyway
        done.append(left.pop(first.name))
    return done


def _mentioned(value, names):
    """Returns the stage names in nested dicts and lists, as keys or as values."""
    if isinstance(value, dict):
        here = [key for key in value if key in names]
        return here + [n for v in value.values() for n in _mentioned(v, names)]
    if isinstance(value, list):
        return [n for v in value for n in _mentioned(v, names)]
    return [value] if isinstance(value, str) and value in names else []


def _records_of(specs, names):
    """Returns the stages whose records some files specs name, as in "stage:NAME"."""
    parts = [p for spec in specs if isinstance(spec, str) for p in spec.split(",")]
    return [name for name in names if f"stage:{name}" in map(str.strip, parts)]


def _first(sources, key):
    values = (source.get(key) for source in sources)
    return next((value for value in values if isinstance(value, str)), "")


def part(source: Any, key: str) -> dict:
    """Returns the dict under a key; {} where there is none."""
    value = source.get(key) if isinstance(source, dict) else None
    return value if isinstance(value, dict) else {}


def _json(path, meaning, missing):
    """Reads a JSON object; {} and a note in `missing` where there is none."""
    where = path.name if path.name in _FILES else f"{path.parent.name}/{path.name}"
    if not path.exists():
        missing.append(f"{where}: {meaning}")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        missing.append(f"{where}: cannot be read as a JSON object")
        return {}
    return value
