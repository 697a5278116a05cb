"""What changed between versions of a model: tables, and the files they are kept in.

FOLDER/matrices.jsonl   a line for each matrix that was compared, as it was; what is
                        there is not computed again
FOLDER/anatomy.json     the same in short, with pooled figures
"""

import html
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import progress
from rich.console import Console

from stagecraft import metrics, runs, schema, storage, stores
from stagecraft.anatomy import between, roles, stored, weights
from stagecraft.anatomy.stored import Weights
from stagecraft.errors import UserError
from stagecraft.models import locate

FOLDER = "anatomy"  # of a run, in its work directory
LINES, TABLES = "matrices.jsonl", "anatomy.json"
PARENT, PRETRAINING, BEFORE = "parent", "pretraining", "before"


class Pair(NamedTuple):
    """Two versions of a model to be compared.

    Attributes:
        stage, against: names of the later and of the earlier one.
        role: what the earlier one is: "parent", "pretraining" or "before".
        before, after: their `Weights`.
        others: {name: Weights} of further nulls: stages that began at `before`.
        rates: sum over updates of the learning rate; None where it is not on record.
    """

    stage: str
    against: str
    role: str
    before: Weights
    after: Weights
    others: dict[str, Weights]
    rates: float | None = None


class Anatomy(dict):
    """What anatomy.json holds; a notebook shows a table of its comparisons.

    Attributes:
        folder: where the files lie.
    """

    def __init__(self, tables: dict, folder: Path):
        super().__init__(tables)
        self.folder = folder

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self["notes"])
        return runs.html_table(HEAD, table(self), 2) + notes


HEAD = (
    *("stage", "against", "moved", "same in bf16", "noise"),
    *("eff. rank", "noise", "turn", "noise"),
)
_SHOWN = ("unchanged_bf16", "effective_rank", "rotation_write")


def table(anatomy: dict) -> list[tuple[str, ...]]:
    """Returns the comparisons as text under the heads of `HEAD`."""
    rows = []
    for one in anatomy["comparisons"]:
        cells = [_text(one["relative_change"])]
        for key in _SHOWN:
            null = one["null"].get(weights.ISOTROPIC, {}).get(key)
            cells += [_text(one.get(key)), _text(null and null[1])]
        rows.append((one["stage"], one["against"], *cells))
    return rows


def _text(value):
    return "–" if value is None else f"{value:.3g}"


def of_run(
    root: str | Path,
    *,
    stages: Sequence[str] = (),
    to: str | Path = "",
    nulls: Sequence[str] = (),
    **settings,
) -> Anatomy:
    """Compares every finished stage of a run with its parent and with pretraining.

    Args:
        root: WORKDIR; only its files are read.
        stages: which; by default all that are finished.
        to: the folder to write into; WORKDIR/anatomy by default.
        nulls: stages, here or of other runs, each a further null of all stages that
            have its parent: a control with shuffled labels, another seed, continued
            pretraining.
        **settings: see `write`.

    Raises:
        UserError: a stage is missing, not finished, or nothing is.
    """
    root = stores.local(root)
    config = runs.read_config(root)
    if config is None:
        raise UserError(f"{root}: no run here (no config.json)")
    names = [stage.name for stage in runs.read(root).stages]  # parents first
    for name in stages:
        if name not in names:
            raise UserError(schema.unknown("--stages", name, names))
    opened, notes, pairs = _Opened(root, names), [], []
    for name in stages or names:
        if not roles.of(config["stages"][name]["kind"]).trains:
            continue
        if not stages and not opened.finished(name):
            notes.append(f"{name} is not finished and left out.")
            continue
        rates = _rates(root / name, config["stages"][name])
        for role, source in _targets(opened.parents(name)):
            before, after = opened(source), opened(locate.locate(name, root, names))
            pairs.append(Pair(name, before.name, role, before, after, {}, rates))
    if not pairs:
        raise UserError(
            f"{root}: no finished stage that started from another; run it again to "
            "resume"
        )
    for null in nulls:
        pairs = _with_null(pairs, null, opened)
    return write(pairs, to or root / FOLDER, notes=notes, **settings)


def of_pair(
    before: str, after: str, *, to: str | Path, nulls: Sequence[str] = (), **settings
) -> Anatomy:
    """Compares two versions of a model.

    Args:
        before, after: "hf:FOLDER", or the folder WORKDIR/STAGE of a finished stage.
        to: the folder to write into.
        nulls: more versions that began at `before`.
        **settings: see `write`.

    Raises:
        UserError: they are no two versions of one model: names what differs first.
    """
    opened = _Opened(Path(), ())
    sources = [locate.locate(name) for name in (before, after)]
    one, other = (
        opened(source)._replace(name=name)
        for source, name in zip(sources, short_names(before, after), strict=True)
    )
    others = {name: opened(locate.locate(name)) for name in nulls}
    pair = Pair(other.name, one.name, BEFORE, one, other, others)
    return write([pair], to, **settings)


class Spoken(NamedTuple):
    """A stage that writes text and started from one that does.

    Attributes:
        name: the stage's.
        before, after: `locate.Source`s of the parent and of the stage.
        chat: whether each answers in turns of a chat.
    """

    name: str
    before: locate.Source
    after: locate.Source
    chat: tuple[bool, bool]


def speaking(root: Path, tokenizer) -> list[Spoken]:
    """Lists the finished stages of a run whose weights can be asked what they do."""
    config = runs.read_config(root)
    names = [stage.name for stage in runs.read(root).stages]
    opened, out = _Opened(root, names), []
    for name in names:
        if not opened.finished(name) or not opened.parents(name):
            continue
        before, after = opened.parents(name)[0], locate.locate(name, root, names)
        records = [source.record() for source in (before, after)]
        kinds = [config["stages"][name]["kind"], *(r.kind for r in records if r)]
        if all(roles.of(kind).speaks for kind in kinds):
            chat = (chats(before, tokenizer), chats(after, tokenizer))
            out.append(Spoken(name, before, after, chat))
    return out


def chats(source: locate.Source, tokenizer) -> bool:
    """Tells whether a model answers in turns of a chat."""
    if source.outward:
        return tokenizer.template is not None
    return source.record().format != "text"


def short_names(before: str, after: str) -> tuple[str, str]:
    """Returns what two models are called: the last part of their paths, if it differs.

    >>> short_names("hf:models/a", "runs/b/sft"), short_names("hf:x/a", "hf:y/a")
    (('a', 'sft'), ('hf:x/a', 'hf:y/a'))
    """
    one, other = (
        Path(name.removeprefix(locate.PREFIX)).name for name in (before, after)
    )
    return (one, other) if one != other else (before, after)


def _targets(parents):
    """[(role, source)] of what a stage is compared with: its parent, and the root."""
    if not parents:
        return []
    targets = [(PARENT, parents[0])]
    return targets + ([(PRETRAINING, parents[-1])] if len(parents) > 1 else [])


class _Opened:
    """Opens the weights of sources once each, and follows what they started from."""

    def __init__(self, root, names):
        self.root, self.names, self.open = root, names, {}

    def __call__(self, source) -> Weights:
        key = str(source.folder.resolve())
        if key not in self.open:
            self.open[key] = stored.weights_of(source)
        return self.open[key]

    def finished(self, name):
        record = locate.locate(name, self.root, self.names).record()
        return record is not None and record.finished

    def parents(self, name):
        """Lists what a stage started from, the nearest first, as far as it is here."""
        source, ancestors = locate.locate(name, self.root, self.names), []
        while (above := self.above(source)) is not None:
            ancestors.append(above)
            source = above
        return ancestors

    def above(self, source):
        record = source.record()
        if record is None or not record.start_from:
            return None
        if source.where == "here":
            above = locate.locate(record.start_from, self.root, self.names)
        else:
            name = source.above(record)
            above = locate.locate(name) if name else None
        if above is None or not above.folder.is_dir():
            return None
        here = above.folder.parent.resolve() == self.root.resolve()
        if above.where == "stage" and here and above.folder.name in self.names:
            return locate.locate(above.folder.name, self.root, self.names)
        return above


def _with_null(pairs, name, opened):
    """Adds a stage as a null of all pairs that have its parent before them."""
    source = locate.locate(name, opened.root, opened.names)
    parent = opened.above(source)
    out, fits = [], False
    for pair in pairs:
        same = parent is not None and opened(parent) is pair.before
        if same and pair.stage != name and pair.role == PARENT:
            fits = True
            pair = pair._replace(others=pair.others | {name: opened(source)})
        out.append(pair)
    if not fits:
        raise UserError(
            f"--null={name}: started from no parent of a stage that is compared; a "
            "null starts where the stage did"
        )
    return out


def _rates(folder, settings):
    """Sums the learning rate over a stage's updates, from its metrics."""
    rows = metrics.read(folder / "metrics.jsonl")
    rows = [row for row in rows if metrics.is_number(row.get("learning_rate"))]
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    rates = [row["learning_rate"] for row in rows]
    # A step of a policy is so many updates on one batch of samples.
    updates = settings.get("epochs", 1) * settings.get("minibatches", 1)
    return updates * float(np.interp(np.arange(1, steps[-1] + 1), steps, rates).sum())


# -- the comparisons themselves --------------------------------------------------------


def write(
    pairs: Sequence[Pair],
    to: str | Path,
    *,
    depth: str = "all",
    draws: int = weights.DRAWS,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> Anatomy:
    """Compares pairs matrix by matrix and writes FOLDER/anatomy.json.

    Args:
        pairs: what to compare.
        to: the folder; lines of an earlier call that was stopped are used.
        depth: "all", "top" or "none": see `weights.compare`.
        draws: isotropic changes of each matrix.
        seed: of their noise.
        notes: what a reader should know.
    """
    if depth not in weights.SPECTRA:
        raise UserError(schema.unknown("--spectra", depth, weights.SPECTRA))
    folder, notes = Path(to), list(notes)
    cosines = [weights.check_lineage(pair.before, pair.after) for pair in pairs]
    for pair in pairs:
        for other in pair.others.values():
            weights.check_lineage(pair.before, other)
    notes += _dtype_notes(pairs)
    settings = {"spectra": depth, "draws": draws, "seed": seed}
    journal = storage.AppendedLines(folder / LINES)
    done = {one["key"]: one["line"] for one in journal.values if "line" in one}
    jobs = [
        (pair, name)
        for pair in pairs
        for name in weights.shared(pair.before, pair.after)
    ]
    lines = {pair: [] for pair in map(id, pairs)}
    for pair, name in _shown(jobs, "matrices"):
        others = {
            label: other.matrices[name]
            for label, other in pair.others.items()
            if name in other.matrices
        }
        ids = {label: other.id for label, other in pair.others.items()}
        key = storage.digest([pair.before.id, pair.after.id, ids, name, settings])[:24]
        if key not in done:
            line = weights.compare(
                *(pair.before.matrices[name], pair.after.matrices[name]),
                **{"depth": depth, "draws": draws, "seed": seed, "others": others},
            )
            done[key] = journal.append({"key": key, "line": line})["line"]
        lines[id(pair)].append(done[key])
    together = _between(pairs, seed, journal) if depth != "none" else []
    journal.close()
    tables = {
        "settings": settings,
        "comparisons": [
            _comparison(pair, lines[id(pair)], cosine)
            for pair, cosine in zip(pairs, cosines, strict=True)
        ],
        "between": together,
        "notes": notes,
        "matrices": [
            {"stage": pair.stage, "against": pair.against} | _banded(line)
            for pair in pairs
            for line in lines[id(pair)]
        ],
    }
    storage.write_json(folder / TABLES, tables)
    return Anatomy(tables, folder)


def read(folder: str | Path) -> Anatomy | None:
    """Reads FOLDER/anatomy.json; None where there is none."""
    tables = storage.read_json(Path(folder) / TABLES)
    return None if tables is None else Anatomy(tables, Path(folder))


def _shown(jobs, what):
    """Yields jobs with a bar on the terminal."""
    console = Console(stderr=True)
    quiet = not sys.stderr.isatty()
    return progress.track(jobs, what, console=console, transient=True, disable=quiet)


def _dtype_notes(pairs):
    notes = []
    for pair in pairs:
        names = weights.shared(pair.before, pair.after)
        kinds = [
            {m.matrices[n].dtype for n in names} for m in (pair.before, pair.after)
        ]
        one, other = (" and ".join(sorted(kind)) for kind in kinds)
        if one != other:
            notes.append(
                f"{pair.against} is stored in {one}, {pair.stage} in {other}: where "
                "the two differ, the cast alone may be a change (dtype_floor), and "
                "shares of unchanged weights are left out."
            )
    return notes


def _comparison(pair, lines, cosine):
    whole = weights.pooled(lines)
    layers = {k: v for k, v in weights.by(lines, "layer").items() if k is not None}
    moved = [row["change_norm"] ** 2 for row in layers.values()]
    directedness = None
    if pair.rates and pair.role == PARENT:
        directedness = whole["change_norm"] / (whole["weights"] ** 0.5 * pair.rates)
    kinds = weights.by(lines, "kind")
    return (
        {"stage": pair.stage, "against": pair.against, "role": pair.role}
        | _banded(whole)
        | {
            "median_cosine": cosine,
            "directedness": directedness,
            # Of few layers it has few values: the bars say more.
            "gini": weights.gini(moved) if len(moved) >= 12 else None,
            "kinds": {kind: _banded(row) for kind, row in kinds.items()},
            "layers": {str(layer): _banded(row) for layer, row in layers.items()},
        }
    )


def _banded(row):
    """A row with [least, mean, largest] of each null in place of its draws."""
    null = {}
    for key in row:
        for name, band in weights.band(row["null"], key).items():
            null.setdefault(name, {})[key] = band
    return row | {"null": null}


def _between(pairs, seed, journal):
    """Compares the changes of all stages with one another, each against its parent."""
    done = {one["key"]: one["row"] for one in journal.values if "row" in one}
    own, rows = [pair for pair in pairs if pair.role == PARENT], []
    for both in _shown([*itertools.combinations(own, 2)], "pairs of stages"):
        ids = [[pair.before.id, pair.after.id] for pair in both]
        key = storage.digest(["between", ids, seed])[:24]
        if key not in done:
            row = between.compare(*both, seed=seed)
            done[key] = journal.append({"key": key, "row": row})["row"]
        rows += [done[key]] if done[key] else []
    return between.corrected(rows, _siblings(own))


def _siblings(pairs) -> dict[str, list[str]]:
    """{stage: other seeds of it from the same parent}, by names such as dpo_seed1."""
    groups: dict[Any, list[str]] = {}
    for pair in pairs:
        base, _, number = pair.stage.rpartition("_seed")
        if base and number.isdecimal():
            groups.setdefault((base, pair.before.id), []).append(pair.stage)
    return {one: [n for n in g if n != one] for g in groups.values() for one in g}
