"""Writes runs side by side as a page that loads nothing, with the numbers beside it."""

import json
from pathlib import Path

from stagecraft import storage
from stagecraft.anatomy import figures
from stagecraft.errors import UserError
from stagecraft.report import charts, compare, render
from stagecraft.report.compare import number


def write(comparison: dict, out: str | Path = "compare.html") -> Path:
    """Writes what `compare.compare` returned as a page, and as JSON beside it.

    Args:
        out: path of the page, NAME.html, which is returned; the numbers go to
            NAME.json.

    Raises:
        UserError: cannot be written there, or Matplotlib is missing.
    """
    out = Path(out)
    if out.suffix != ".html" or out.is_dir():
        raise UserError(f"--out={out}: expected a page to write, NAME.html")
    text = render.render(
        "compare.html.jinja",
        comparison=comparison,
        base=compare.baseline_name(comparison),
        columns=comparison["columns"],
        rows=[_row(comparison, arm) for arm in comparison["arms"]],
        plots=[_plot(comparison, column) for column in comparison["columns"]],
        contents=compare.contents(comparison),
        legend=compare.legend(comparison),
    )
    try:
        storage.write_text(out, text)
        storage.write_json(out.with_suffix(".json"), comparison)
    except UserError as error:
        raise UserError(f"--out={out}: cannot write there") from error
    return out


def _row(comparison, arm):
    """Returns one arm's row of the table."""
    count = len(arm["samples"])
    cells = [
        {
            "mean": compare.mean_text(arm, column),
            "change": compare.change_text(arm, column),
            "verdict": arm["against"].get(column["key"], {}).get("verdict", ""),
        }
        for column in comparison["columns"]
    ]
    return {
        "arm": arm,
        "seeds": f"{count} seed{'s' if count > 1 else ''}",
        "baseline": arm["arm"] == comparison["baseline"],
        "cells": cells,
        "differs": {k: json.dumps(v) for k, v in arm["differs"].items()},
    }


def _plot(comparison, column):
    """Plots one figure of all arms: means, intervals and seeds on one scale."""
    rows = []
    for arm in comparison["arms"]:
        figure = arm["figures"].get(column["key"], {})
        against = arm["against"].get(column["key"])
        note = f"{_spelled(against, column)}, {against['verdict']}" if against else ""
        baseline = arm["arm"] == comparison["baseline"]
        rows.append(
            {
                "name": arm["stage"],
                "detail": arm["arm"].removeprefix(arm["stage"]).strip(),
                "text": compare.mean_text(arm, column),
                "note": "baseline" if baseline else note,
                "baseline": baseline,
                "apart": bool(against) and against["verdict"] in ("higher", "lower"),
                "mean": figure.get("mean"),
                "half": figure.get("half"),
                "values": [v for v in figure.get("values", ()) if v is not None],
            }
        )
    better = figures.figure(column["key"]).better
    spoken = "; ".join(
        " ".join(filter(None, (r["name"], r["detail"], r["text"], r["note"])))
        for r in rows
    )
    svg = charts.intervals(
        rows, name=f"compare {column['key']}", label=f"{column['title']}: {spoken}"
    )
    return {
        "column": column,
        "title": f"{column['title']}: {_finding(comparison, column)}",
        "better": f"{better} is better" if better else "",
        "svg": svg,
    }


def _finding(comparison, column):
    """The arm that differs most, in half intervals; without any, most and least."""
    apart = [
        (arm, against)
        for arm in comparison["arms"]
        if (against := arm["against"].get(column["key"])) and against["half"]
    ]
    if not apart:
        known = {
            a["arm"]: a for a in comparison["arms"] if column["key"] in a["figures"]
        }
        order = sorted(known, key=lambda n: -known[n]["figures"][column["key"]]["mean"])
        ends = dict.fromkeys([*order[:1], *order[-1:]])
        texts = (f"{compare.mean_text(known[n], column)} in {n}" for n in ends)
        return " to ".join(texts)
    arm, against = max(apart, key=lambda o: abs(o[1]["difference"]) / o[1]["half"])
    verdict = f", {against['verdict']}," * (":" not in against["verdict"])
    text = f"{_spelled(against, column)} in {arm['arm']}{verdict}"
    return f"{text} against {comparison['baseline']}"


def _spelled(against, column):
    """Formats the difference and its interval, "+0.031 (−0.01 to +0.07)"."""
    digits, change, half = column["digits"], against["difference"], against["half"]
    text = number(change, digits, sign=True)
    if half is None:
        return text
    ends = [number(end, digits, sign=True) for end in (change - half, change + half)]
    return f"{text} ({' to '.join(ends)})"
