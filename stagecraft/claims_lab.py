"""Asks claims: runs what each needs, seed by seed, and gives a verdict on each.

A claim is a file of experiments/claims/ (or any other): its docstring ends in a header
that states it (`anatomy.claims`), and its get_config, where it has one, returns the
arms that it needs beside the base chain, the quickstart of that seed, which all claims
share. Figures of both are read by the header's expressions, and with them what the
file's measure(base, own) returns, where it has one: nested dicts of numbers of two
`runs.Run`s (the second None where the file adds no arms), for what no summary holds.
What it measures beyond the header is given with its intervals too, and decides nothing.

In the work directory

    base/seed0/          the quickstart of each seed
    NAME/header.json     the header as it was when the claim was first asked
    NAME/seed0/          the claim's own arms
    claims.json          the verdicts

A header that has changed since its claim was first asked is refused: what was measured
is known by then. Everything resumes.
"""

import ast
import datetime
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from stagecraft import bounds, config_files, run, runs, schema, storage, stores
from stagecraft.anatomy import claims, statistics
from stagecraft.anatomy.claims import Claim, Outcome
from stagecraft.errors import UserError
from stagecraft.metrics import is_number

BASE = "quickstart"
TIERS = {1: 4, 2: 8}  # seeds of each tier
HEADER, MEASURED = "header.json", "measured.json"
SPENT = "measured_in.json"  # beside MEASURED: the seconds that measuring took


class Asked(NamedTuple):
    """A claim that was asked.

    Attributes:
        claim: its header.
        values, controls: the primary and that of the control, one a seed.
        outcome: the verdict.
        registered: the commit that held the header when it was first asked; "" where
            it was in none.
        seconds: wall seconds of all its runs and of what its file measures, the base
            chains left out.
        also: {figure: (mean, half its interval or None)} of what its file measured on
            every seed; nothing was stated of it before.
    """

    claim: Claim
    values: list[float]
    controls: list[float]
    outcome: Outcome
    registered: str
    seconds: float
    also: dict[str, tuple[float, float | None]] = {}


def shipped() -> dict[str, Path]:
    """Returns {name: file} of the claims that come with the package, by number."""
    folder = config_files.SHIPPED / "experiments" / "claims"
    files = {path.stem: path for path in folder.glob("*.py")}
    return dict(sorted(files.items(), key=lambda item: read(item[1]).number))


def read(path: Path) -> Claim:
    """Reads the header of a claim's file."""
    try:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as Python ({error})") from error
    return claims.read(docstring or "", str(path))._replace(name=path.stem)


def ask(
    root: str | Path, names: Sequence[str] = (), seeds: int = 4, tiny: bool = False
) -> list[Asked]:
    """Runs what claims need, and returns the verdicts; also in ROOT/claims.json.

    Args:
        root: the work directory.
        names: claims that ship, or files; () for all that ship.
        seeds: chains, the first of seed 0.
        tiny: whether stages are tiny: for a look at whether everything runs.
    """
    root, files = stores.local(root), _files(names)
    headers = {path: read(path) for path in files}
    registered = {path: _register(root, path, headers[path], tiny) for path in files}
    figures: dict[Path, list[dict]] = {path: [] for path in files}
    also: dict[Path, list[dict]] = {path: [] for path in files}
    seconds = dict.fromkeys(files, 0.0)
    for seed in range(seeds):
        base = _base(root, seed, tiny)
        for path in files:
            own, measured, spent = _own(root, path, seed, tiny)
            seconds[path] += own.get("seconds", {}).get("total", 0.0) + spent
            figures[path].append(_merged(base, _merged(own, measured)))
            also[path].append(measured)
    asked = [
        _asked(headers[path], figures[path], registered[path])._replace(
            seconds=seconds[path], also=_shared(also[path])
        )
        for path in files
    ]
    _write(root, asked, seeds)
    return asked


def _files(names):
    known = shipped()
    files = []
    for name in names or known:
        path = Path(name) if name.endswith(".py") else known.get(name)
        if path is None or not path.is_file():
            raise UserError(
                f"{name}: no such claim; {schema.hint(name, known)}there are: "
                f"{', '.join(known)}; or a file, as in mine.py"
            )
        files.append(path)
    return files


def _register(root, path, claim, tiny):
    """Returns the commit that held a claim's header when it was first asked."""
    file = root / claim.name / HEADER
    header = json.loads(json.dumps(claim._asdict() | {"tiny": tiny}))
    before = storage.read_json(file)
    if before is None:
        commit = _commit(path)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.parent.mkdir(parents=True, exist_ok=True)
        first = {"asked": now, "commit": commit, "header": header}
        storage.write_json(file, first)
        return commit
    change = schema.difference(before["header"], header)
    if change:
        raise UserError(
            f"{path}: its header has changed since {before['asked']}, when {root} was "
            f"first asked ({change}): results are no longer of what was stated; choose "
            "another --workdir"
        )
    return before["commit"]


def _commit(path):
    """Returns the commit that holds the file as it is; "" where none does."""

    def git(*words):
        command = ["git", "-C", str(path.resolve().parent), *words, path.name]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    try:
        if git("status", "--porcelain", "--").stdout:
            return ""
        return git("log", "-1", "--format=%H", "--").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _base(root, seed, tiny):
    config = config_files.load(config_files.find(BASE), "tiny" if tiny else "")
    config.seed, config.measure.bounds = seed, ()
    return _summary(config, root / "base" / f"seed{seed}")


def _own(root, path, seed, tiny):
    """Returns figures of a claim's own arms, what it measures, and that in seconds.

    Either is {} where its file has none; measure(base, own) is given None for `own`
    where no get_config adds arms.
    """
    text, base = path.read_text(encoding="utf-8"), root / "base" / f"seed{seed}"
    own, summary = root / path.stem / f"seed{seed}", {}
    has_arms = "\ndef get_config(" in text
    if has_arms:
        argument = f"base={base}" + (",tiny" if tiny else "")
        summary = _summary(config_files.load(path, argument), own)
    if "\ndef measure(" not in text:
        return summary, {}, 0.0
    measured = storage.read_json(own / MEASURED)
    if measured is None:
        started = time.monotonic()
        parent = run.open_run(base)
        child = run.open_run(own) if has_arms else None
        with jax.set_mesh((child or parent).mesh()):
            measured = config_files.module(path).measure(parent, child)
        own.mkdir(parents=True, exist_ok=True)
        # First the seconds: what is measured is not measured again.
        storage.write_json(own / SPENT, {"seconds": time.monotonic() - started})
        storage.write_json(own / MEASURED, measured)
    spent = storage.read_json(own / SPENT) or {}  # older measurements have none
    return summary, measured, spent.get("seconds", 0.0)


def _shared(measured):
    """Returns the mean and half its interval of each number that all seeds have."""
    tables = [dict(schema.flat(one)) for one in measured]
    numbers = {key: [table.get(key) for table in tables] for key in (tables or [{}])[0]}
    return {
        key: statistics.interval(values)
        for key, values in numbers.items()
        if all(is_number(value) for value in values)
    }


def _summary(config, folder):
    return dict(run.run(config, folder))


def _merged(base, own):
    """Returns the figures of both, those of one stage or part side by side."""
    shared = base.keys() & own.keys()
    both = {key: runs.part(base, key) | runs.part(own, key) for key in shared}
    return base | own | both


def _asked(claim, figures, registered):
    values = [claims.value(claim.primary, one) for one in figures]
    controls = []
    if claim.control_primary:
        controls = [claims.value(claim.control_primary, one) for one in figures]
    failed = [
        f"seed {seed}: {words}"
        for seed, one in enumerate(figures)
        for words in _failed(one, claim.checks)
    ]
    outcome = claims.decide(claim, values, controls, failed)
    return Asked(claim, values, controls, outcome, registered, 0.0)


def _failed(figures, checks):
    """Returns the checks that one seed's figures do not meet, in words."""
    failed = []
    for check in checks:
        key, _, _ = bounds.parse(check)
        held = bounds.check(figures, (check,)).get(key)
        if held is None:
            raise UserError(f"checks: {check!r}: no such figures in the claim's runs")
        if not held["holds"]:
            failed.append(f"{check} does not hold")
    return failed


def _write(root, asked, seeds):
    marks = claims.holm([one.outcome.p for one in asked])
    table = [
        one.claim._asdict()
        | one.outcome._asdict()
        | {"values": one.values, "controls": one.controls, "holm": mark}
        | {"registered": one.registered, "seconds": round(one.seconds, 1)}
        | {"also": one.also}
        for one, mark in zip(asked, marks, strict=True)
    ]
    storage.write_json(root / claims.VERDICTS, {"seeds": seeds, "claims": table})
