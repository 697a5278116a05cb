"""Compares runs: means over seeds, their intervals, and which differences are noise.

An arm is a set of stages that differ in nothing but the seed (`arms`). The same
numbers are printed (`terminal`), written as a page (`compare_page`) and as JSON.
"""

from pathlib import Path

from stagecraft import schema, stores
from stagecraft.anatomy import figures, roles
from stagecraft.anatomy.statistics import (
    CONFIDENCE,
    difference,
    error_of_mean,
    interval,
)
from stagecraft.errors import UserError
from stagecraft.report.arms import read as read_arms

# Verdicts on a difference, beside "higher" and "lower".
NOISE, FLAT = "within noise", "no spread over seeds"
ONE = "one seed: no interval"
DRAWS = "one seed: the interval is of the evaluation draw alone"
_EVALUATIONS = 6  # eval_ columns, where no world is there to measure in


def compare(
    folders: list[str | Path],
    *,
    stages: tuple[str, ...] = (),
    baseline: str = "",
    names: tuple[str, ...] = (),
) -> dict:
    """Compares runs: the figures of each arm, and their distance from the baseline's.

    Args:
        folders: work directories of finished runs. Runs that differ only in seed are
            one arm; so are the stages NAME_seed0, NAME_seed1, ... of a run.
        stages: names of the stages to compare; () for all that answer in turns.
        baseline: the label of the arm that others are compared with, or a part of it
            that only one has. By default the first arm of a stage of which the runs
            hold several versions, or else the first that does more than predict text,
            or else the first.
        names: figures of the table; () for those of `measure.table`, where all runs
            name the same, or else the world's, or eval_ metrics without one.

    Returns:
        a dict of JSON values: "arms", each with "figures" {figure: {values, mean,
        half, n, error}} and "against" {figure: {difference, half, verdict}}, in which
        there is no time; "columns",
        the figures of the table; "baseline", "runs", "notes", "confidence". `half` is
        half the width of the interval; `error` the standard error of the mean that
        comes from sampling the answers. Each is None where it is not known.

    Raises:
        UserError: no run, unfinished, given twice, not comparable, an unknown stage,
            baseline or figure.
    """
    runs, arms, notes = read_arms(folders, stages)
    base = _baseline(arms, baseline)
    columns = _columns(runs, arms, names)
    for column in columns:
        for arm in arms:
            measured = len(_known(arm, column["key"]))
            if 0 < measured < len(arm.samples):
                notes.append(
                    f"{arm.label}: {column['title']} is of {measured} of its "
                    f"{len(arm.samples)} seeds"
                )
    return {
        "baseline": base.label,
        "confidence": CONFIDENCE,
        "runs": [
            {"folder": stores.named(run.folder), "seed": run.config.get("seed")}
            for run in runs
        ],
        "world": runs[0].config.get("world", {}),
        "split": runs[0].config.get("measure", {}).get("split", ""),
        "columns": columns,
        "arms": [_arm(arm, base) for arm in arms],
        "notes": notes,
    }


def _known(arm, key):
    return [value for value in arm.values(key) if value is not None]


def _arm(arm, base):
    """Returns an arm's figures, and how they differ from the baseline's, as JSON."""
    keys = dict.fromkeys(k for sample in arm.samples for k in sample.figures)
    own, against = {}, {}
    for key in keys:
        values = _known(arm, key)
        errors = arm.errors(key)
        mean, half = interval(values, errors)
        error = error_of_mean(errors)[0] if errors else None
        own[key] = dict(
            values=arm.values(key), mean=mean, half=half, n=len(values), error=error
        )
        others = _known(base, key)
        # Time depends on the machine and on what else it did: no arm is ahead by it.
        if arm is not base and others and not figures.figure(key).time:
            against[key] = _verdict(values, others, errors, base.errors(key))
    return {
        "arm": arm.label,
        "stage": arm.stage,
        "kind": arm.kind,
        "differs": arm.differs,
        "samples": [
            {
                "run": str(sample.run),
                "stage": sample.stage,
                "seed": sample.seed[0],
                "number": sample.seed[1],
            }
            for sample in arm.samples
        ],
        "figures": own,
        "against": against,
    }


def _verdict(ones, others, errors, other_errors):
    change, half = difference(ones, others, errors, other_errors)
    single = min(len(ones), len(others)) < 2
    if half is None:
        verdict = ONE if single else FLAT
    elif single:
        verdict = DRAWS
    elif abs(change) <= half:
        verdict = NOISE
    else:
        verdict = "higher" if change > 0 else "lower"
    return {"difference": change, "half": half, "verdict": verdict}


def _baseline(arms, wanted):
    labels = [arm.label for arm in arms]
    if not wanted:
        several = [arm for arm in arms if arm.differs] or arms
        tuned = [arm for arm in several if not roles.of(arm.kind).supervised]
        return (tuned or several)[0]
    near = [label for label in labels if wanted in label]
    exact = [label for label in labels if wanted == label]
    if len(exact or near) == 1:
        return arms[labels.index((exact or near)[0])]
    if near:
        raise UserError(f"--baseline={wanted}: may be any of: {'; '.join(near)}")
    hint = schema.hint(wanted, labels)
    raise UserError(
        f"--baseline={wanted}: no such arm; {hint}arms: {'; '.join(labels)}"
    )


def _columns(runs, arms, names):
    """Returns the figures to show."""
    measured = dict.fromkeys(k for a in arms for s in a.samples for k in s.figures)
    for name in names:
        schema.choice("--figures", name, measured)
    tables = {tuple(run.summary.get("table") or ()) for run in runs}
    if not names and len(tables) == 1:
        names = [name for name in tables.pop() if name in measured]
    if names:
        rows = [figures.figure(name) for name in names]
    else:
        rows = [row for row in figures.COLUMNS if row.name in measured]
    if not names and not measured.keys() & {
        "heldout_accuracy",
        "gold_mean",
        "pair_accuracy",
    }:
        evaluations = [key for key in measured if key.startswith("eval_")]
        evaluations.sort(key=lambda key: key != "eval_loss")
        rows = [*map(figures.figure, evaluations[:_EVALUATIONS]), *rows]
    shown = ("title", "meaning", "digits", "better")
    return [{"key": r.name} | {k: getattr(r, k) for k in shown} for r in rows]


# -- in words --------------------------------------------------------------------------

MARKS = {"higher": " ▲", "lower": " ▼", NOISE: " ≈", ONE: " †", DRAWS: " †"}


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """Formats a number; an en dash for None.

    >>> number(0.5, 2), number(-0.5, 1), number(0.5, 1, sign=True), number(None, 2)
    ('0.50', '−0.5', '+0.5', '–')
    """
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")  # 0.000 has no sign
    return text.replace("-", "−")


def mean_text(arm: dict, column: dict) -> str:
    """Formats an arm's mean and half its interval, "0.50 ±0.01"."""
    figure = arm["figures"].get(column["key"])
    if not figure:
        return "–"
    return _with_half(number(figure["mean"], column["digits"]), figure, column)


def change_text(arm: dict, column: dict) -> str:
    """Formats an arm's difference from the baseline, its interval and a mark."""
    against = arm["against"].get(column["key"])
    if not against:
        return "–"
    text = number(against["difference"], column["digits"], sign=True)
    return _with_half(text, against, column) + MARKS.get(against["verdict"], "")


def _with_half(text, figure, column):
    half = figure["half"]
    return text if half is None else f"{text} ±{number(half, column['digits'])}"


def baseline_name(comparison: dict) -> str:
    """Returns the baseline's label, or "the baseline" where that is long."""
    label = comparison["baseline"]
    return label if len(label) <= 32 else "the baseline"


def contents(comparison: dict) -> list[str]:
    """Says what the intervals hold: which chances, and which not."""
    figures_shown = [
        arm["figures"][column["key"]]
        for arm in comparison["arms"]
        for column in comparison["columns"]
        if column["key"] in arm["figures"]
    ]
    if not any(figure["half"] is not None for figure in figures_shown):
        return []
    lines = []
    if any(figure["n"] > 1 for figure in figures_shown):
        lines.append(
            "± over seeds holds the chance of training and of the evaluation draw "
            "(which answers were sampled; greedy figures have none); it is never "
            "narrower than the draw alone makes it"
        )
    if any(f["n"] == 1 and f["half"] is not None for f in figures_shown):
        lines.append(
            "± of one seed is of the evaluation draw alone: another training seed may "
            "lie far outside it"
        )
    return lines


def legend(comparison: dict) -> list[str]:
    """Explains the marks beside the differences that occur."""
    shown = {column["key"] for column in comparison["columns"]}
    verdicts = {
        one["verdict"]
        for arm in comparison["arms"]
        for key, one in arm["against"].items()
        if key in shown
    }
    lines = []
    if verdicts & {"higher", "lower"}:
        lines.append(
            f"▲ ▼ above or below {baseline_name(comparison)}: the {CONFIDENCE:.0%} "
            "interval of the difference (Welch) does not contain 0"
        )
    if NOISE in verdicts:
        lines.append(f"≈ {NOISE}: the interval of the difference contains 0")
    if DRAWS in verdicts:
        lines.append(
            "† one seed on a side: ± is of the evaluation draw alone (greedy figures "
            "have none), so there is no verdict"
        )
    elif ONE in verdicts:
        lines.append(f"† {ONE}")
    if FLAT in verdicts:
        lines.append(
            "a difference with neither ± nor †: no seed differs from another on either "
            "side, so there is no interval either"
        )
    return lines
