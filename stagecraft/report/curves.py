"""A run's metrics as small charts: which to draw, in which words, and their numbers."""

from stagecraft.anatomy import figures, roles
from stagecraft.report import charts, findings
from stagecraft.report.findings import show
from stagecraft.runs import part


def _both(key):
    return (key, "training"), (f"eval_{key}", "held out")


# One chart each, of the series (metric, label) that the stage has; `figures.metric` of
# the first names it.
CHARTS = (
    _both("loss"),
    _both("mean_token_accuracy"),
    _both("accuracy"),
    _both("rewards/accuracies"),
    _both("margin"),
    _both("rewards/margins"),
    (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
    _both("objective/scores"),
    _both("objective/kl"),
    (("objective/entropy", "training"),),
    (("policy/clipfrac_avg", "training"),),
    (("val/explained_variance", ""),),
    _both("reward"),
    (("completions/mean_length", "training"),),
)
# Overlays of all stages, and how their metric is recognised.
OVERLAYS = (
    ("objective/scores", lambda key: key == "objective/scores"),
    (figures.GOLD, lambda key: figures.GOLD in key),
    ("objective/kl", lambda key: key == "objective/kl"),
)
_UNDRAWN = ("epoch", "num_tokens", "episode")
_MORE = 24  # other metrics drawn a stage


def _line(stage, key, label, marked=False):
    """Returns a list of one series of a chart; of none where the stage lacks it."""
    steps, values = stage.series(key)
    line = {"key": key, "label": label, "steps": steps, "values": values}
    return [line | {"colour": stage.index, "marked": marked}] if steps else []


def _chart(stage, *series):
    """A chart of those series that the stage has; None when it has none."""
    lines = []
    for key, label in series:
        marked = key.startswith("eval_") or key == "rewards/rejected"
        lines += _line(stage, key, label, marked)
    if not lines:
        return None
    if len(lines) == 1:
        lines[0]["marked"] = False
    spoken = "; ".join(
        f"{one['label'] or one['key']} from {show(one['values'][0])} at step "
        f"{one['steps'][0]} to {show(one['values'][-1])} at step {one['steps'][-1]}"
        for one in lines
    )
    main = series[0][0]
    figure, write = figures.metric(main), show
    title, unit = main, ""
    if figure:
        title, unit = figure.title, figure.meaning
        write = findings.in_digits(figure.digits)
    if main == "loss":
        unit = roles.of(stage.kind).unit
    name = f"{stage.name} {' '.join(one['key'] for one in lines)}"
    svg = charts.curves(lines, name=name, label=f"{stage.name}, {title}: {spoken}")
    title += f" {_finding(lines, write, part(stage.info, 'data').get('heldout'))}"
    return dict(name=name, title=title, unit=unit, series=lines, svg=svg)


def _finding(lines, write, heldout):
    """From where to where a chart's first series went, and where the others ended.

    Args:
        lines: the series.
        write: how a number is written.
        heldout: number of held-out rows; None where it is not known.
    """
    first, *others = lines
    text = findings.course(write, first["values"])
    if len(first["values"]) > 1:
        text += f" over {first['steps'][-1]:,} steps"
    more = [f"{one['label']} {write(one['values'][-1])}" for one in others]
    if heldout and any(one["key"].startswith("eval_") for one in lines):
        more.append(f"n = {heldout:,}")
    return f"{text} ({', '.join(more)})" if more else text


def panel(stage):
    """A stage's charts, the usual ones first; its samples; what it was."""
    keys, main, used = stage.keys(), [], set()
    specs = list(CHARTS)
    golds = [key for key in keys if figures.GOLD in key and not key.endswith("std")]
    specs[8:8] = [((key, ""),) for key in golds]
    for series in specs:
        chart = _chart(stage, *series)
        if chart:
            main.append(chart)
            used |= {key for key, _ in series}
    more = []
    for key in keys:
        if key in used or key.removeprefix("eval_") in _UNDRAWN:
            continue
        pair = _both(key)
        if key.startswith("eval_"):
            pair = [(key, "held out")]
        used |= {name for name, _ in pair}
        values = stage.series(key)[1]
        if len(more) < _MORE and min(values) < max(values):
            more.append(_chart(stage, *pair))
    last = stage.samples[-1].get("step") if stage.samples else None
    samples = [row for row in stage.samples if row.get("step") == last][:6]
    return {"stage": stage, "charts": main, "more": more, "samples": samples}


def overlays(stages):
    """Proxy and gold while training, all stages that have them in one chart each."""
    shown = []
    for metric, is_one in OVERLAYS:
        lines = []
        for stage in stages:
            key = next((key for key in stage.keys() if is_one(key)), None)  # noqa: SIM118
            if key:
                lines += _line(stage, key, stage.name)
        if len(lines) > 1:
            figure = figures.METRICS[metric]
            ends = [(one["label"], *findings.end(one["values"])) for one in lines]
            write = findings.in_digits(figure.digits)
            title = f"{figure.title}: {findings.most_and_least(write, ends)}"
            names = ", ".join(one["label"] for one in lines)
            label = f"{figure.title} against step: {names}"
            name = f"overlay {figure.title}"
            svg = charts.curves(lines, name=name, label=label)
            unit = figure.meaning
            shown.append(dict(name=name, title=title, unit=unit, series=lines, svg=svg))
    return shown
