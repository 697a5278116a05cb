"""Tables on the terminal: figures of a run, answers, tasks, runs side by side."""

import math
import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagecraft import runs
from stagecraft.anatomy import changes, evaluate, figures, refusal, statistics
from stagecraft.metrics import is_number
from stagecraft.report import compare, verdict

WAYS = {"higher": "↑", "lower": "↓", "": ""}  # what is better
_ROWS = 8  # figures at the end of a run


def show_summary(summary: dict, file=None) -> None:
    """Prints a run's figures, stages across, and its verdict in a line."""
    console = Console(file=file, highlight=False)
    stages, rows = summary_rows(summary)
    for part in _that_fit(console, stages, rows) if rows else ():
        console.print(_summary_table(part, rows))
    text, holds = summary_answer(summary)
    console.print(Text(text, style="red" if holds is False else ""))


def summary_rows(summary: dict) -> tuple[list[str], list[tuple[str, dict]]]:
    """Returns the stages that were measured, and a few figures of theirs.

    Returns:
        (stages, [(title of a figure, {stage: its value as text})]).
    """
    names = [name for name in summary if name not in figures.APART]
    own = {name: runs.part(summary, name) | _cost(summary, name) for name in names}
    chosen = summary.get("table") or ()
    order, most = chosen, len(chosen)
    if not chosen:
        others = [key for values in own.values() for key in values]
        order, most = [*figures.SHORT, *figures.BY_NAME, *others], _ROWS
    stages = [name for name in names if any(map(is_number, own[name].values()))]
    rows = []
    for key in dict.fromkeys(order):
        values = {s: own[s][key] for s in stages if is_number(own[s].get(key))}
        if values and len(rows) < most:
            row = figures.figure(key)
            texts = {s: compare.number(v, row.digits) for s, v in values.items()}
            if chosen:
                texts = {s: t + _interval(own[s], row) for s, t in texts.items()}
            rows.append((f"{row.title} {WAYS[row.better]}".rstrip(), texts))
    return stages, rows


def _interval(own, row):
    """Returns Wilson's interval of a share of so many answers, "" of anything else."""
    drawn = row.name in runs.part(runs.part(own, "draws"), "standard_error")
    count = runs.part(own, "n").get(row.name)
    if row.unit != "share" or drawn or not count or not 0 <= own[row.name] <= 1:
        return ""
    low, high = statistics.wilson(own[row.name] * count, count)
    return f"\n{low:.2f}–{high:.2f}"


def _cost(summary, name):
    flops = runs.part(runs.part(summary, "cost"), name).get("flops")
    return {"gflops": flops / 1e9} if is_number(flops) else {}


def summary_answer(summary: dict) -> tuple[str, bool | None]:
    """Returns the verdict on a run in a line, and whether its bounds hold."""
    stages = [name for name in summary if name not in figures.APART]
    answer = verdict.sentence(summary, stages, named=len(summary))
    text = f"{answer['text']} {runs.part(summary, 'seconds').get('total', 0.0):.0f} s."
    for bound in verdict.rows_of(summary):
        if bound["time"] and bound["holds"] is False:
            text += f" {bound['title']} must be {bound['short']}."
    return text, answer["holds"]


def _that_fit(console, stages, rows):
    """Returns the stages in groups, each a table no wider than the terminal."""
    groups = [[]]
    for name in stages:
        table = _summary_table([*groups[-1], name], rows)
        wide = Console(width=10_000).measure(table).maximum > console.width
        if wide and groups[-1]:
            groups.append([])
        groups[-1].append(name)
    return groups


def _summary_table(stages, rows):
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in stages:
        # A long name in two lines rather than a table in two parts.
        table.add_column(Text(name.replace("_", "_\n")), justify="right", no_wrap=True)
    for title, texts in rows:
        table.add_row(Text(title), *(texts.get(name, "") for name in stages))
    return table


def show_status(files: runs.RunFiles, file=None) -> None:
    """Prints how far each stage of a work directory has come."""
    table = Table(title=Text(str(files.folder)), title_justify="left", box=box.SIMPLE)
    for number, column in enumerate(runs.STATUS):
        words = number < 3
        how = dict(overflow="fold") if words else dict(justify="right", no_wrap=True)
        table.add_column(column, **how)
    for cells in runs.status(files):
        table.add_row(*map(Text, cells))
    Console(file=file or sys.stdout, highlight=False).print(table)


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


# -- claims ----------------------------------------------------------------------------


def show_claims(asked: list, file=None) -> None:
    """Prints the verdicts that `claims_lab.ask` returned, and why."""
    table = Table(
        title="claims", title_justify="left", box=box.SIMPLE, show_header=False
    )
    for name in ("number", "verdict"):
        table.add_column(name, no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for one in asked:
        claim, outcome = one.claim, one.outcome
        notes = [outcome.reason]
        if outcome.verdict == "undecided":
            seeds = outcome.seeds_needed
            notes.append(f"{seeds} seeds would do" if seeds else "over 1,000 seeds")
        if not one.registered:
            notes.append("its header was in no commit when it was first asked")
        lines = [claim.claim, _measured(claim, outcome), *filter(None, notes)]
        verdict = Text(outcome.verdict, style="bold")
        table.add_row(str(claim.number), verdict, Text("\n".join(lines)))
    Console(file=file or sys.stdout, highlight=False).print(table)


def _measured(claim, outcome):
    """Formats a primary figure, its interval and the effect it is held against."""
    effect = f"{'within ±' if claim.alike else 'beyond '}{claim.effect:g}"
    if outcome.mean is None:
        return f"{claim.primary}: {effect}?"
    interval = ""
    if outcome.low is not None:
        interval = f" ({outcome.low:.3g} to {outcome.high:.3g}, {outcome.seeds} seeds)"
    return f"{claim.primary} = {outcome.mean:.3g}{interval}; {effect}?"


# -- refusals --------------------------------------------------------------------------


def show_refusal_error(errors: dict, file=None) -> None:
    """Prints how a detector does on labelled answers: {group: `refusal.Error`}."""
    console = Console(file=file or sys.stdout, highlight=False)
    table = Table(title="people against the detector", title_justify="left")
    table.add_column("people say")
    for name in refusal.CLASSES:
        table.add_column(f"it says {name}", justify="right")
    for one in refusal.CLASSES:
        cells = (str(errors[""].table[one, other]) for other in refusal.CLASSES)
        table.add_row(one, *cells)
    console.print(table)
    table = Table(title="its errors, 95% intervals", title_justify="left")
    for name in ("answers", "refusals missed", "called a refusal, is none", "exact"):
        table.add_column(name, overflow="fold")
    for name, error in errors.items():
        rates = (error.missed, error.false, error.exact)
        table.add_row(Text(name or "all"), *map(_rate, rates))
    console.print(table)


def show_refusals(stage: str, rates: dict, file=None) -> None:
    """Prints what a stage refuses: {group: {class: `agreement.Rate`}}."""
    table = Table(title=Text(f"what {stage} refuses"), title_justify="left")
    for name in ("prompts", *refusal.CLASSES):
        table.add_column(name, overflow="fold")
    for name, by_class in rates.items():
        cells = (_rate(by_class[one]) for one in refusal.CLASSES)
        table.add_row(Text(name or "all"), *cells)
    Console(file=file or sys.stdout, highlight=False).print(table)


def _rate(rate):
    """Formats a share with its interval, "3 of 20: .150 (.052 to .360)"."""
    share, low, high = (
        "–" if x is None else f"{x:.3f}" for x in (rate.share, rate.low, rate.high)
    )
    return f"{rate.count} of {rate.n}: {share} ({low} to {high})"


# -- runs side by side -----------------------------------------------------------------


def show_anatomy(tables: dict, file=None) -> None:
    """Prints what changed in the weights, each figure beside that of noise."""
    console = Console(file=file, highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for number, head in enumerate(changes.HEAD):
        table.add_column(head, justify="left" if number < 2 else "right")
    for row in changes.table(tables):
        table.add_row(*map(Text, row))
    console.print(table)
    for note in tables["notes"]:
        console.print(Text(note))


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
