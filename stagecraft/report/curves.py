"""A run's metrics as small charts: which to draw, in which words, and their numbers."""

from stagecraft.anatomy import roles
from stagecraft.metrics import is_number
from stagecraft.report import charts


def _both(key):
    return (key, "training"), (f"eval_{key}", "held out")


# One chart each: title, unit, and the series it may show as (metric, label, marked).
CHARTS = (
    ("Loss", "", *_both("loss")),
    ("Token accuracy", "share of target tokens", *_both("mean_token_accuracy")),
    ("Pair accuracy", "share of pairs in the labelled order", *_both("accuracy")),
    (
        "Pair accuracy",
        "share of pairs in the labelled order",
        *_both("rewards/accuracies"),
    ),
    ("Margin", "reward of the chosen less the rejected", *_both("margin")),
    (
        "Margin",
        "implicit reward of the chosen less the rejected",
        *_both("rewards/margins"),
    ),
    (
        "Implicit rewards",
        "beta times log-ratio to the reference",
        ("rewards/chosen", "chosen"),
        ("rewards/rejected", "rejected"),
    ),
    ("Reward (proxy)", "reward model, a sample", *_both("objective/scores")),
    ("KL to the reference", "nats a sequence", *_both("objective/kl")),
    ("Entropy", "nats a sequence", ("objective/entropy", "training")),
    ("Clip fraction", "share of tokens clipped", ("policy/clipfrac_avg", "training")),
    ("Explained variance", "of returns, by critic", ("val/explained_variance", "")),
    ("Reward", "a sample", *_both("reward")),
    ("Length", "mean tokens of a sample", ("completions/mean_length", "training")),
)
_UNDRAWN = ("epoch", "num_tokens", "episode")
_MORE = 24  # other metrics drawn a stage


def show(value):
    """A number for people: three significant digits, thousands apart.

    >>> show(0.12345), show(12), show(3.1e7), show(1.0), show(2.1e-5)
    ('0.123', '12', '31,000,000', '1.00', '2.1e-05')
    """
    if not is_number(value):
        return str(value) if value else "–"
    if isinstance(value, int) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif value and abs(value) < 1e-3:
        text = f"{value:.2g}"
    elif abs(value) < 1:
        text = f"{value:.3f}"
    else:
        text = f"{value:#.3g}".rstrip(".")
    return "−" + text[1:] if text.startswith("-") else text


def _line(stage, key, label, marked=False):
    """Returns a list of one series of a chart; of none where the stage lacks it."""
    steps, values = stage.series(key)
    line = {"key": key, "label": label, "steps": steps, "values": values}
    return [line | {"colour": stage.index, "marked": marked}] if steps else []


def _chart(stage, title, unit, *series):
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
    name = f"{stage.name} {' '.join(one['key'] for one in lines)}"
    svg = charts.curves(lines, name=name, label=f"{stage.name}, {title}: {spoken}")
    return dict(name=name, title=title, unit=unit, series=lines, svg=svg)


def panel(stage):
    """A stage's charts, the usual ones first; its samples; what it was."""
    keys, main, used = stage.keys(), [], set()
    specs = list(CHARTS)
    golds = [key for key in keys if "gold" in key and not key.endswith("std")]
    specs[8:8] = [("Gold score", key.replace("eval_", ""), (key, "")) for key in golds]
    for title, unit, *series in specs:
        if title == "Loss":
            unit = roles.of(stage.kind).unit
        chart = _chart(stage, title, unit, *series)
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
            more.append(_chart(stage, key, "", *pair))
    last = stage.samples[-1].get("step") if stage.samples else None
    samples = [row for row in stage.samples if row.get("step") == last][:6]
    return {"stage": stage, "charts": main, "more": more, "samples": samples}


def overlays(stages):
    """Proxy and gold while training, all stages that have them in one chart each."""
    shown = []
    for title, unit, wanted in (
        ("Reward (proxy)", "reward model, a sample", lambda k: k == "objective/scores"),
        ("Gold score", "rules nobody trains on", lambda k: "gold" in k),
        ("KL to the reference", "nats a sequence", lambda k: k == "objective/kl"),
    ):
        lines = []
        for stage in stages:
            key = next((k for k in stage.keys() if wanted(k)), None)  # noqa: SIM118
            if key:
                lines += _line(stage, key, stage.name)
        if len(lines) > 1:
            names = ", ".join(one["label"] for one in lines)
            label = f"{title} against step: {names}"
            name = f"overlay {title}"
            svg = charts.curves(lines, name=name, label=label)
            shown.append(dict(name=name, title=title, unit=unit, series=lines, svg=svg))
    return shown
