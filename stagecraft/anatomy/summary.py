"""The figures of a run, measured on its finished stages.

Nested dicts of numbers, STAGE.FIGURE. With an embedded world they are about entities in
no demonstration, prompt or comparison (`world_figures`); without one they are of
answers to held-out prompts (`heldout_figures`). With them stand the last eval_ metrics
of each stage. Beside them: what each stage changed in the weights, what
it cost and how long it took.
"""

import contextlib
import time
from math import isfinite

from stagecraft import metrics
from stagecraft.anatomy import (
    bias,
    cost,
    heldout_figures,
    roles,
    signal_figures,
    stored,
    verdicts,
    weights,
    world_figures,
)
from stagecraft.errors import UserError
from stagecraft.stages import records


def measure(run, started: float, asked=()) -> dict[str, dict]:
    """Measures what is finished.

    Args:
        run: a `runs.Run`, inside its mesh.
        started: time.perf_counter() when the run began.
        asked: held-out prompts of a run that does not ask its world's questions.

    Returns:
        {stage: {figure: value}}, and under "weights", "cost" and "seconds" what stages
        changed, cost and took; under "raters", for each stage of comparisons, {figure:
        {"value", "low", "high", "count"}} of who rated its pairs, as `bias.measure`.
    """
    summary = {name: _last_evaluation(run, name) for name in _finished(run)}
    measured = {}
    if asked:
        measured = heldout_figures.measure(run, asked)
    elif run.config.world.name and run.config.measure.probes:
        measured = world_figures.measure(run)
        for name, figures in signal_figures.measure(run).items():
            own = measured.setdefault(name, {})
            counts = own.get("n", {}) | figures.get("n", {})
            measured[name] = own | figures | {"n": counts}
    for name, figures in measured.items():
        counts = summary[name].get("n", {}) | figures.get("n", {})
        summary[name] |= figures | ({"n": counts} if counts else {})
    summary["weights"] = _weights(run)
    summary["raters"] = _raters(run)
    summary["cost"] = _cost(run)
    summary["seconds"] = _seconds(run, started)
    return summary


def _finished(run):
    return [name for name in run.stages if run.finished(name)]


def _last_evaluation(run, name):
    """Returns the stage's last eval_ metrics, and "n", the rows that they are of."""
    rows = metrics.read(run.root / name / "metrics.jsonl")
    rows = [{k: v for k, v in row.items() if k.startswith("eval_")} for row in rows]
    last = next((row for row in reversed(rows) if row), {})
    count = (run.record(name).data or {}).get("heldout")
    return last | ({"n": dict.fromkeys(last, count)} if last and count else {})


def _weights(run):
    """Measures what each stage changed in the weights of its parent."""
    changes = {}
    for name in _finished(run):
        stage = run.config.stages[name]
        parent = stage.start_from
        here = parent in run.config.stages and run.finished(parent)
        if here and roles.of(stage.kind).trains:
            before, after = (stored.weights_of(run.source(n)) for n in (parent, name))
            changes[name] = weights.summary(before, after)
    return changes


def _raters(run):
    """Measures what the raters of compared pairs went by."""
    raters = {}
    for name in _finished(run):
        if "rater" in run.config.stages[name]:
            path = run.root / name / records.RECORDS
            # Nothing but ties says nothing of a rater.
            with contextlib.suppress(UserError):
                rows = verdicts.read(path, run.config.world.name)
                raters[name] = {
                    figure: {k: v for k, v in one._asdict().items() if isfinite(v)}
                    for figure, one in bias.measure(rows).items()
                }
    return raters


def _cost(run):
    """Returns the FLOPs of each stage, and their share of pretraining's."""
    flops = {}
    stages = run.config.stages
    for name in _finished(run):
        record, reward = run.record(name), stages[name].get("reward_from")
        judge = stages[name].get("judge_from")
        model = record.model or _shape(run, record.start_from)
        # Older versions did not count what stages of records read.
        if model and "context" in record.tokens:
            flops[name] = cost.stage_flops(
                record.tokens,
                model,
                scalar=_shape(run, reward) if reward else None,
                judge=_shape(run, judge) if judge else None,
                adapter=record.lora is not None,
            )
    pretraining = sum(
        count
        for name, count in flops.items()
        if roles.reads_bare_text(stages[name]) and not stages[name].start_from
    )
    return {
        name: {"flops": count}
        | ({"share": cost.share(count, pretraining)} if pretraining else {})
        for name, count in flops.items()
    }


def _shape(run, name):
    """Returns the config of a model a stage was given; None where it is gone."""
    try:
        return run.source(name).info()["model"]
    except UserError:
        return None


def _seconds(run, started):
    """Returns wall seconds by stage and in total; resumed stages count all runs."""
    seconds, before = {}, 0.0
    for name in _finished(run):
        record = run.record(name)
        seconds[name] = record.seconds["total"]
        last = record.seconds_this_time
        last = seconds[name] if last is None else last
        before += seconds[name] - last
        if name not in run.ran:
            before += last
    here = time.perf_counter() - started
    seconds["rest"] = here - sum(seconds.values()) + before
    seconds["total"] = here + before
    return {name: round(value, 2) for name, value in seconds.items()}
