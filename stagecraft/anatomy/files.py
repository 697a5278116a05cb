"""Reads a work directory's files into one object, whatever is there or missing.

A run may be unfinished, cut off in the middle of a line, or of another graph than the
quickstart's: nothing here needs a stage by name, and what is missing is noted in words.
"""

import dataclasses
import json
import math
from pathlib import Path

from stagecraft import metrics
from stagecraft.errors import UserError

_FILES = {
    "config.json": "the run's settings",
    "lineage.json": "what each stage started from",
    "summary.json": "the measured figures (written when the whole graph is done)",
    "prompt.json": "the single prompt through every stage",
}


@dataclasses.dataclass
class Stage:
    """One stage's files.

    Attributes:
        name: its name in the graph; index: its place in the order, and its colour.
        kind, start_from: from stage.json, else lineage.json, else config.json.
        parents: {name of a stage it needs: True when it starts from its weights}.
        info: stage.json, {} when the stage is unfinished.
        lineage: its part of lineage.json.
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
        """(steps, values) of a metric, without the rows that do not have it."""
        points = [(row["step"], row[key]) for row in self.rows if number(row.get(key))]
        return [p[0] for p in points], [float(p[1]) for p in points]

    def keys(self):
        """Names of all metrics that hold numbers, in order of appearance."""
        seen = {k: None for row in self.rows for k, v in row.items() if number(v)}
        return [key for key in seen if key not in ("step", "seconds")]


@dataclasses.dataclass
class Run:
    """A work directory: its shared files ({} when missing), stages, what is missing."""

    folder: Path
    config: dict
    lineage: dict
    summary: dict
    prompt: dict
    stages: list
    missing: list


def number(value):
    """True for a finite int or float that is no bool."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def read(folder):
    """Reads a work directory.

    Args:
        folder: path of WORKDIR.

    Returns:
        A Run; its `missing` says in words what was not found or could not be read.

    Raises:
        UserError: there is no such directory, or nothing in it is of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"workdir {folder}: no such directory; give one that `run` made"
        )
    files, missing = {}, []
    for name, meaning in _FILES.items():
        files[name] = _json(folder / name, meaning, missing)
    config, lineage = files["config.json"], files["lineage.json"]
    traced, planned = _dict(lineage, "stages"), _dict(config, "stages")
    found = [
        path.parent.name
        for pattern in ("*/stage.json", "*/metrics.jsonl", "*/samples.jsonl")
        for path in sorted(folder.glob(pattern))
    ]
    names = list(dict.fromkeys([*planned, *traced, *found]))
    if not names and not any(files.values()):
        raise UserError(
            f"workdir {folder}: holds no run (no config.json, no stage with metrics); "
            "give a directory that `run` made"
        )
    stages = [
        _stage(folder / name, _dict(planned, name), _dict(traced, name), names, missing)
        for name in names
    ]
    stages = _sorted(stages)
    for index, stage in enumerate(stages):
        stage.index = index
    shared = (config, lineage, files["summary.json"], files["prompt.json"])
    return Run(folder, *shared, stages, missing)


def _stage(folder, planned, traced, names, missing):
    rows = metrics.read(folder / "metrics.jsonl")
    rows = [row for row in rows if isinstance(row, dict) and number(row.get("step"))]
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
    sources = (info, traced, planned)
    start_from = _first(sources, "start_from")
    needed = [value for key, value in planned.items() if key.endswith("_from")]
    needed = _mentioned([traced.get("parents"), *needed], names)
    parents = dict.fromkeys(needed, False)
    if start_from in names:
        parents[start_from] = True
    parents.pop(folder.name, None)
    kind = _first(sources, "kind")
    return Stage(folder.name, 0, kind, start_from, parents, info, traced, rows, samples)


def _sorted(stages):
    """Parents before children; otherwise in the order given."""
    done, left = {}, {stage.name: stage for stage in stages}
    while left:
        ready = [s for s in left.values() if not any(p in left for p in s.parents)]
        for stage in ready or list(left.values())[:1]:  # a circle: go on anyway
            done[stage.name] = left.pop(stage.name)
            break
    return list(done.values())


def _mentioned(value, names):
    """Stage names anywhere in a nest of dicts and lists: as keys or as values."""
    if isinstance(value, dict):
        here = [key for key in value if key in names]
        return here + [n for v in value.values() for n in _mentioned(v, names)]
    if isinstance(value, list):
        return [n for v in value for n in _mentioned(v, names)]
    return [value] if isinstance(value, str) and value in names else []


def _first(sources, key):
    for source in sources:
        if isinstance(source.get(key), str):
            return source[key]
    return ""


def _dict(source, key):
    value = source.get(key)
    return value if isinstance(value, dict) else {}


def _json(path, meaning, missing):
    """A JSON object; {} and a note when it is missing, cut off or something else."""
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
