"""Tables on the terminal: figures of a run, answers, tasks, runs side by side."""

import math
import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagecraft import runs
from stagecraft.anatomy import evaluate, figures, statistics
from stagecraft.metrics import is_number
from stagecraft.report import compare, verdict

WAYS = {"higher": "↑", "lower": "↓", "": ""}  # what is better
_ROWS = 8  # figures at the end of a run


def show_summary(summary: dict, file=None) -> None:
    """Prints a run's figures, stages across, and its verdict in a line."""
    console = Console(file=file, highlight=False)
    stages = [name for name in summary if name not in figures.APART]
    own = {name: runs.part(summary, name) for name in stages}
    measured = [name for name in stages if any(map(is_number, own[name].values()))]
    others = [name for figures_ in own.values() for name in figures_]
    keys = dict.fromkeys([*figures.SHORT, *figures.BY_NAME, *others])
    keys = [k for k in keys if any(is_number(own[s].get(k)) for s in measured)][:_ROWS]
    for part in _that_fit(console, measured, keys, own) if keys else ():
        console.print(_summary_table(part, keys, own))
    answer = verdict.sentence(summary, stages, named=len(summary))
    text = f"{answer['text']} {runs.part(summary, 'seconds').get('total', 0.0):.0f} s."
    for bound in verdict.rows_of(summary):
        if bound["time"] and bound["holds"] is False:
            text += f" {bound['title']} must be {bound['short']}."
    console.print(Text(text, style="red" if answer["holds"] is False else ""))


def _that_fit(console, stages, keys, own):
    """Returns the stages in groups, each a table no wider than the terminal."""
    groups = [[]]
    for name in stages:
        table = _summary_table([*groups[-1], name], keys, own)
        wide = Console(width=10_000).measure(table).maximum > console.width
        if wide and groups[-1]:
            groups.append([])
        groups[-1].append(name)
    return groups


def _summary_table(stages, keys, own):
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in stages:
        # A long name in two lines rather than a table in two parts.
        table.add_column(Text(name.replace("_", "_\n")), justify="right", no_wrap=True)
    for key in keys:
        row = figures.figure(key)
        cells = [own[name].get(key) for name in stages]
        cells = [compare.number(v, row.digits) if is_number(v) else "" for v in cells]
        table.add_row(Text(f"{row.title} {WAYS[row.better]}".rstrip()), *cells)
    return table


def show_status(files: runs.RunFiles, file=None) -> None:
    """Prints how far each stage of a work directory has come."""
    table = Table(title=Text(str(files.folder)), title_justify="left", box=box.SIMPLE)
    for column in ("stage", "starts from", "state"):
        table.add_column(column, overflow="fold")
    for column in ("saved", "loss", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in files.stages:
        table.add_row(*map(Text, _status(files, stage)))
    Console(file=file or sys.stdout, highlight=False).print(table)


def _status(files, stage):
    """Returns the cells of a stage: the last row it logged, or that it has none."""
    steps = runs.part(runs.part(files.config, "stages"), stage.name).get("steps", 0)
    logged = [int(row["step"]) for row in stage.rows]
    folder = files.folder / stage.name
    if stage.info.get("finished"):
        state = "finished"
    elif logged:
        state = f"at step {logged[-1]:,} of {steps:,}"
    else:
        state = "begun" if folder.is_dir() else "not started"
    saved = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdecimal()]
    _, losses = stage.series("loss")
    _, seconds = stage.series("seconds")
    seconds = runs.part(stage.info, "seconds").get("total", (seconds or [None])[-1])
    return (
        stage.name,
        stage.start_from or "–",
        state,
        f"step {max(saved):,}" if saved else "–",
        f"{losses[-1]:.4g}" if losses else "–",
        f"{seconds:,.0f}" if seconds is not None else "–",
    )


def show_answers(prompt: str, answers: dict, file=None) -> None:
    """Prints what `behaviour.through_stages` returned, one row a stage."""
    table = Table(title=Text(prompt), show_lines=True, title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("says", overflow="fold")
    for name, completions in answers.items():
        texts = [
            Text(one["text"].strip() + ("" if one["ended"] else " ..."))
            for one in completions
        ]
        table.add_row(name, Text("\n").join(texts))
    Console(file=file or sys.stdout, highlight=False).print(table)


def show_tasks(records: list, order=(), file=None) -> None:
    """Prints the records of `evaluate`, stages side by side."""
    stages, rows = evaluate.side_by_side(records, order)
    table = Table(title="tasks", title_justify="left")
    table.add_column("task", overflow="fold")
    for name in stages:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [_task_cell(row["cells"].get(name)) for name in stages]
        label = f"{row['task']} {row['metric']}"
        table.add_row(f"{label}\n  {row['how']}" if row["how"] else label, *cells)
    Console(file=file or sys.stdout, highlight=False).print(table)


def _task_cell(cell):
    if cell is None:
        return ""
    error = f" ±{cell['stderr']:.3f}" if cell["stderr"] is not None else ""
    return f"{cell['value']:.4g}{error}"


# -- a judge ---------------------------------------------------------------------------


def show_bias(figures: dict, file=None) -> None:
    """Prints what `anatomy.bias` measured of a judge."""
    table = Table(title="what the rater goes by", title_justify="left", box=box.SIMPLE)
    for name in ("figure", "value", "95% interval", "pairs"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, one in figures.items():
        known = math.isfinite(one.low) and math.isfinite(one.high)
        interval = f"{one.low:.3f} to {one.high:.3f}" if known else ""
        table.add_row(name, f"{one.value:.3f}", interval, f"{one.count:,}")
    Console(file=file or sys.stdout, highlight=False).print(table)


# -- runs side by side -----------------------------------------------------------------


def show_comparison(comparison: dict, file=None) -> None:
    """Prints what `compare.compare` returned: means of each arm, and differences."""
    console = Console(file=file, highlight=False)
    arms, columns = comparison["arms"], comparison["columns"]
    base = comparison["baseline"]
    others = [arm for arm in arms if arm["arm"] != base]
    title = f"mean ± {statistics.CONFIDENCE:.0%} interval"
    grids = [_grid(title, arms, compare.mean_text, True, columns)]
    if others:
        title = f"difference from {base}"
        grids.append(_grid(title, others, compare.change_text, False, columns))
    if all(_fits(console, grid) for grid in grids):
        for grid in grids:
            console.print(grid)
    else:
        for column in columns:
            title = f"{column['title']} {WAYS[column['better']]}".rstrip()
            words = title, column["meaning"]
            console.print(Text(": ".join(filter(None, words)), style="italic"))
            console.print(_strip(comparison, column))
            console.print()
    for line in [*compare.contents(comparison), *compare.legend(comparison)]:
        console.print(Text(line))
    for note in comparison["notes"]:
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
        title = f"{column['title']} {WAYS[column['better']]}".rstrip()
        table.add_column(Text(title), justify="right")
    for arm in arms:
        count = [str(len(arm["samples"]))] if seeds else []
        cells = [cell(arm, column) for column in columns]
        table.add_row(Text(arm["arm"]), *count, *cells)
    return table


def _strip(comparison, column):
    """One figure, for a narrow terminal: arms down, mean and difference across."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold", ratio=1)
    table.add_column("mean", justify="right", no_wrap=True)
    several = len(comparison["arms"]) > 1
    if several:
        table.add_column("difference", justify="right", no_wrap=True)
    for arm in comparison["arms"]:
        change = compare.change_text(arm, column)
        if arm["arm"] == comparison["baseline"]:
            change = "baseline"
        row = [compare.mean_text(arm, column)] + [change] * several
        table.add_row(Text(arm["arm"]), *row)
    return table
