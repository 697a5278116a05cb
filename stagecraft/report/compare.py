"""Holds runs side by side: means over seeds, their intervals, and what is only noise.

The same table is printed, written as a self-contained page and kept as JSON. An arm is
what `arms` makes one: stages that differ in nothing but the seed.
"""

import difflib
import json
import math
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import special

from stagecraft import storage
from stagecraft.errors import UserError
from stagecraft.report import arms as grouping
from stagecraft.report import render
from stagecraft.report.page import MEANINGS

CONFIDENCE = 0.95
NOISE, ONE, FLAT = "within noise", "one seed: no interval", "no spread over seeds"

# The columns: figure, digits after the point.
FIGURES = {
    "gold_win_rate": 3,
    "gold_mean": 3,
    "kl": 2,
    "length": 1,
    "heldout_accuracy": 3,
    "entropy": 3,
    "pair_accuracy": 3,
    "seconds": 1,
}
_HEADS = {"heldout_accuracy": "Fact accuracy"}
_SECONDS = "wall time of the stage alone"
_EVALUATIONS = 6  # eval_ columns, where no world is there to measure in


def compare(folders, *, stages=(), baseline=""):
    """Runs side by side: what each arm comes to, and against the baseline.

    Args:
        folders: work directories of finished runs. Runs that differ only in seed are
            one arm; so are the stages NAME_seed0, NAME_seed1, ... of a run.
        stages: names of the stages to compare; () for all that answer in turns.
        baseline: the label of the arm others are held against, or a part of it that
            only one has. By default the first arm of a stage of which the runs hold
            several versions, or else the first that is no language_model stage, or
            else the first.

    Returns:
        a dict of JSON values: "arms", each with "figures" {figure: {values, mean,
        half, n}} and "against" {figure: {difference, half, verdict}}; "columns", the
        figures of the table; "baseline", "runs", "notes", "confidence". `half` is half
        the width of the interval, None with one seed.

    Raises:
        UserError: no run, unfinished, given twice, not comparable, an unknown stage or
            baseline.
    """
    runs, arms, notes = grouping.read(folders, stages)
    base = _baseline(arms, baseline)
    told = [_arm(arm, base) for arm in arms]
    columns = _columns(arms)
    for column in columns:
        for arm in arms:
            found = [v for v in arm.values(column["key"]) if v is not None]
            if 0 < len(found) < len(arm.samples):
                notes.append(
                    f"{arm.label}: {column['title']} is of {len(found)} of its "
                    f"{len(arm.samples)} seeds"
                )
    return {
        "baseline": base.label,
        "confidence": CONFIDENCE,
        "runs": [
            {"folder": str(run.folder), "seed": run.config.get("seed")} for run in runs
        ],
        "world": runs[0].config.get("world", {}),
        "split": runs[0].config.get("measure", {}).get("split", ""),
        "columns": columns,
        "arms": told,
        "notes": notes,
    }


def interval(values):
    """Mean of a few seeds' figures, and half its interval (Student's t).

    Args:
        values: numbers, one a seed.

    Returns:
        (mean, half): the interval is mean - half to mean + half; half is None for one
        value, which tells nothing of its spread.

    >>> interval([1.0])
    (1.0, None)
    >>> interval([2.0, 2.0, 2.0])
    (2.0, 0.0)
    """
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return mean, None
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, _quantile(n - 1) * error


def difference(ones, others):
    """Difference of two means, and half its interval (Welch's unequal variances).

    Args:
        ones, others: numbers, one a seed each.

    Returns:
        (difference, half): half is None where either side is one value, or where
        neither side shows any spread.

    >>> difference([3.0], [1.0, 2.0])
    (1.5, None)
    """
    found = float(np.mean(ones) - np.mean(others))
    if min(len(ones), len(others)) < 2:
        return found, None
    parts = [(float(np.var(x, ddof=1)) / len(x), len(x)) for x in (ones, others)]
    variance = sum(v for v, _ in parts)
    if not variance:
        return found, None
    freedom = variance**2 / sum(v**2 / (n - 1) for v, n in parts)
    return found, _quantile(freedom) * math.sqrt(variance)


def _quantile(freedom):
    return float(special.stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def _arm(arm, base):
    """An arm's figures and how they stand against the baseline's, as JSON."""
    keys = dict.fromkeys(k for sample in arm.samples for k in sample.figures)
    figures, against = {}, {}
    for key in keys:
        values = arm.values(key)
        known = [v for v in values if v is not None]
        mean, half = interval(known)
        figures[key] = {"values": values, "mean": mean, "half": half, "n": len(known)}
        others = [v for v in base.values(key) if v is not None]
        if arm is not base and others:
            against[key] = _verdict(known, others)
    return {
        "arm": arm.label,
        "stage": arm.stage,
        "kind": arm.kind,
        "differs": arm.differs,
        "samples": [
            {"run": str(s.run), "stage": s.stage, "seed": seed, "number": number_}
            for s in arm.samples
            for seed, number_ in [s.seed]
        ],
        "figures": figures,
        "against": against,
    }


def _verdict(ones, others):
    found, half = difference(ones, others)
    if half is not None:
        verdict = NOISE if abs(found) <= half else "higher" if found > 0 else "lower"
    else:
        verdict = ONE if min(len(ones), len(others)) < 2 else FLAT
    return {"difference": found, "half": half, "verdict": verdict}


def _baseline(arms, wanted):
    labels = [arm.label for arm in arms]
    if not wanted:
        several = [a for a in arms if a.differs] or arms
        trained = [a for a in several if a.kind != "language_model"]
        return (trained or several)[0]
    near = [label for label in labels if wanted in label]
    exact = [label for label in labels if wanted == label]
    if len(exact or near) == 1:
        return arms[labels.index((exact or near)[0])]
    if near:
        raise UserError(f"--baseline={wanted}: may be any of: {'; '.join(near)}")
    close = difflib.get_close_matches(wanted, labels, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(
        f"--baseline={wanted}: no such arm; {hint}arms: {'; '.join(labels)}"
    )


def _columns(arms):
    """The figures to show: those of the world, or the eval_ metrics without one."""
    found = dict.fromkeys(k for a in arms for s in a.samples for k in s.figures)
    keys = [k for k in FIGURES if k in found]
    if keys in ([], ["seconds"]):
        evals = [k for k in found if k.startswith("eval_")]
        evals.sort(key=lambda k: k != "eval_loss")
        keys = evals[:_EVALUATIONS] + keys
    columns = []
    for key in keys:
        plain = key.removeprefix("eval_").replace("_", " ").replace("/", " ")
        title, meaning = MEANINGS.get(key, (plain.capitalize(), ""))
        if key.startswith("eval_"):
            meaning = "on held-out rows, at the last evaluation"
        columns.append(
            {
                "key": key,
                "title": _HEADS.get(key, title),
                "meaning": _SECONDS if key == "seconds" else meaning,
                "digits": FIGURES.get(key, 3),
            }
        )
    return columns


# -- on the terminal -------------------------------------------------------------------

_MARKS = {"higher": " ▲", "lower": " ▼", NOISE: " ≈", ONE: " †"}


def number(value, digits, sign=False):
    """A number for people; an en dash for None.

    >>> number(0.5, 2), number(-0.5, 1), number(0.5, 1, sign=True), number(None, 2)
    ('0.50', '−0.5', '+0.5', '–')
    """
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")  # 0.000 has no sign
    return text.replace("-", "−")


def _mean(arm, column):
    found = arm["figures"].get(column["key"])
    if not found:
        return "–"
    text = number(found["mean"], column["digits"])
    half = found["half"]
    return text if half is None else f"{text} ±{number(half, column['digits'])}"


def _change(arm, column):
    found = arm["against"].get(column["key"])
    if not found:
        return "–"
    text = number(found["difference"], column["digits"], sign=True)
    half = found["half"]
    text = text if half is None else f"{text} ±{number(half, column['digits'])}"
    return text + _MARKS.get(found["verdict"], "")


def _seeds(arm):
    n = len(arm["samples"])
    return f"{n} seed{'s' if n > 1 else ''}"


def show(found, file=None):
    """Prints what `compare` returned: what each arm comes to, and the differences."""
    console = Console(file=file, highlight=False)
    arms, columns, base = found["arms"], found["columns"], found["baseline"]
    others = [arm for arm in arms if arm["arm"] != base]
    parts = [(f"mean ± {CONFIDENCE:.0%} interval over seeds", arms, _mean, True)]
    if others:
        parts.append((f"difference from {base}", others, _change, False))
    grids = [_grid(*part, columns) for part in parts]
    if all(_fits(console, grid) for grid in grids):
        for grid in grids:
            console.print(grid)
    else:
        for column in columns:
            words = column["title"], column["meaning"]
            console.print(Text(": ".join(filter(None, words)), style="italic"))
            console.print(_strip(found, column))
            console.print()
    for line in _legend(found):
        console.print(Text(line))
    for note in found["notes"]:
        console.print(Text(f"note: {note}"))


def _fits(console, grid):
    wide = Console(width=10_000)
    return wide.measure(grid).maximum <= console.width


def _grid(title, arms, cell, seeds, columns):
    """Arms down, figures across."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("arm")
    if seeds:
        table.add_column("seeds", justify="right")
    for column in columns:
        table.add_column(Text(column["title"]), justify="right")
    for arm in arms:
        count = [str(len(arm["samples"]))] if seeds else []
        cells = [cell(arm, column) for column in columns]
        table.add_row(Text(arm["arm"]), *count, *cells)
    return table


def _strip(found, column):
    """One figure, for a narrow terminal: arms down, mean and difference across."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold", ratio=1)
    table.add_column("mean", justify="right", no_wrap=True)
    several = len(found["arms"]) > 1
    if several:
        table.add_column("difference", justify="right", no_wrap=True)
    for arm in found["arms"]:
        change = _change(arm, column)
        if arm["arm"] == found["baseline"]:
            change = "baseline"
        row = [_mean(arm, column)] + [change] * several
        table.add_row(Text(arm["arm"]), *row)
    return table


def _brief(baseline):
    return baseline if len(baseline) <= 32 else "the baseline"


def _legend(found):
    verdicts = {
        one["verdict"]
        for arm in found["arms"]
        for key, one in arm["against"].items()
        if key in {c["key"] for c in found["columns"]}
    }
    base = _brief(found["baseline"])
    lines = []
    if verdicts & {"higher", "lower"}:
        lines.append(
            f"▲ ▼ above or below {base}: the {CONFIDENCE:.0%} interval of the "
            "difference (Welch) leaves 0 out"
        )
    if NOISE in verdicts:
        lines.append(f"≈ {NOISE}: the interval of the difference holds 0")
    if ONE in verdicts:
        lines.append(f"† {ONE}")
    if FLAT in verdicts:
        lines.append(
            "a number with neither ± nor †: no seed differs from another on either "
            "side, so there is no interval either"
        )
    return lines


# -- as a page -------------------------------------------------------------------------


def write(found, out="compare.html"):
    """Writes what `compare` returned as a page, and as JSON beside it.

    Args:
        found: what `compare` returned.
        out: path of the page, NAME.html; the numbers go to NAME.json.

    Returns:
        Path of the page.

    Raises:
        UserError: cannot be written there.
    """
    out = Path(out)
    if out.suffix != ".html" or out.is_dir():
        raise UserError(f"--out={out}: expected a page to write, NAME.html")
    text = render.render(
        "compare.html.jinja",
        found=found,
        base=_brief(found["baseline"]),
        columns=found["columns"],
        rows=[_row(found, arm) for arm in found["arms"]],
        plots=[_plot(found, column) for column in found["columns"]],
        legend=_legend(found),
    )
    try:
        storage.write_text(out, text)
        storage.write_json(out.with_suffix(".json"), found)
    except UserError as error:
        raise UserError(f"--out={out}: cannot write there") from error
    return out


def _row(found, arm):
    cells = [
        {
            "mean": _mean(arm, column),
            "change": _change(arm, column),
            "verdict": arm["against"].get(column["key"], {}).get("verdict", ""),
        }
        for column in found["columns"]
    ]
    return {
        "arm": arm,
        "seeds": _seeds(arm),
        "baseline": arm["arm"] == found["baseline"],
        "cells": cells,
        "differs": {k: json.dumps(v) for k, v in arm["differs"].items()},
    }


def _plot(found, column):
    """One figure as dots and intervals on one scale, places in percent of its width."""
    key, digits = column["key"], column["digits"]
    rows = [(arm, arm["figures"].get(key)) for arm in found["arms"]]
    low, high = _scale([figure for _, figure in rows if figure])

    def place(value):
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)

    told = []
    for arm, figure in rows:
        row = {"arm": arm, "mean": _mean(arm, column), "figure": figure}
        row["baseline"] = arm["arm"] == found["baseline"]
        against = arm["against"].get(key)
        row["verdict"] = against["verdict"] if against else ""
        row["change"] = _spelled(against, digits) if against else ""
        if figure:
            row["at"] = place(figure["mean"])
            row["dots"] = [place(v) for v in figure["values"] if v is not None]
            if figure["half"] is not None:
                ends = figure["mean"] - figure["half"], figure["mean"] + figure["half"]
                row["left"], row["right"] = map(place, ends)
                row["cut"] = [ends[0] < low, ends[1] > high]
        told.append(row)
    base = next(row for row in told if row["baseline"])
    return {
        "column": column,
        "rows": told,
        "ticks": [{"at": place(t), "text": _tick(t)} for t in _ticks(low, high)],
        "base": base.get("at"),
    }


def _spelled(against, digits):
    """ "+0.031, −0.01 to 0.07": the difference and its interval in words."""
    text = number(against["difference"], digits, sign=True)
    if against["half"] is None:
        return text
    ends = [against["difference"] + s * against["half"] for s in (-1, 1)]
    return f"{text} ({' to '.join(number(e, digits, sign=True) for e in ends)})"


def _scale(figures):
    """A range that holds every value; intervals far wider than it are cut."""
    values = [v for f in figures for v in f["values"] if v is not None]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) * 0.1 or 1.0
    halves = [f["half"] or 0.0 for f in figures]
    ends = [
        (f["mean"] - half, f["mean"] + half)
        for f, half in zip(figures, halves, strict=True)
    ]
    low = max(min(low, *(a for a, _ in ends)), low - span)
    high = min(max(high, *(b for _, b in ends)), high + span)
    room = 0.06 * ((high - low) or span)
    return low - room, high + room


def _ticks(low, high):
    """Three to six round numbers inside a range."""
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]


def _tick(value):
    text = f"{value:.6g}" if value else "0"
    return text.replace("-", "−")
