"""Gold against KL: where the stages of a run ended, and the way each policy went."""

import math

from stagecraft.anatomy import figures, overoptimisation
from stagecraft.errors import UserError
from stagecraft.metrics import is_number
from stagecraft.report import charts, verdict
from stagecraft.runs import part

GOLD, REWARD, DISTANCE = "gold_mean", "reward_mean", "kl"
_SCORES = "objective/scores", "reward"  # what a policy is trained on, as it is logged
_ROWS = 24  # of a path's table


def ends(run) -> dict | None:
    """Draws each stage's held-out gold against its KL to its parent.

    Args:
        run: `runs.RunFiles`.

    Returns:
        {"id", "title": the finding, "note", "svg", "head", "rows": text cells of its
        table}; None where no stage has both figures.
    """
    stages = [s for s in run.stages if _has(run, s.name, GOLD, DISTANCE)]
    if not stages:
        return None
    parents = dict.fromkeys(stage.start_from for stage in stages)
    starts = [
        stage
        for stage in run.stages
        if stage.name in parents and _has(run, stage.name, GOLD) and stage not in stages
    ]
    shown = [(stage, 0.0, None) for stage in starts]
    for stage in stages:
        own = part(run.summary, stage.name)
        shown.append((stage, own[DISTANCE], figures.half(own, DISTANCE)))
    series = [_point(run, *one, stage_colour=True) for one in shown]
    title = _of_ends(run, stages, starts)
    return {
        "id": "fig-frontier",
        "title": title,
        "note": "What a stage started from stands at 0; lines are 95% intervals over "
        "draws of sampled answers.",
        "svg": charts.against(
            series,
            name="frontier",
            label=f"Gold score against KL. {title}",
            across="KL to the parent, nats a sequence",
            up="gold score, held out",
        ),
        "head": ("Stage", "KL to the parent, nats", "Gold score"),
        "rows": [
            (
                stage.name,
                verdict.value(run.summary, f"{stage.name}.{DISTANCE}") if kl else "0",
                verdict.value(run.summary, f"{stage.name}.{GOLD}"),
            )
            for stage, kl, _ in shown
        ],
    }


def _has(run, name, *keys):
    return all(is_number(part(run.summary, name).get(key)) for key in keys)


def _point(run, stage, kl, half, stage_colour=False):
    own = part(run.summary, stage.name)
    return {
        "x": [kl],
        "y": [own[GOLD]],
        "half": ([half], [figures.half(own, GOLD)]),
        "texts": [stage.name if stage_colour else ""],
        "colour": stage.index if stage_colour else None,
    }


def _of_ends(run, stages, starts):
    """The finding: whether who went farthest has the highest gold."""

    def said(stage, key):
        return verdict.value(run.summary, f"{stage.name}.{key}")

    def gold(stage):
        return part(run.summary, stage.name)[GOLD]

    best = max([*starts, *stages], key=gold)
    far = max(stages, key=lambda stage: part(run.summary, stage.name)[DISTANCE])
    where = f"{far.name} went farthest, {said(far, DISTANCE)} nats"
    if len(stages) + len(starts) == 1:
        return f"{far.name}: gold score {said(far, GOLD)} at {said(far, DISTANCE)} nats"
    if best is far:
        return f"{where}, and has the highest gold score, {said(far, GOLD)}"
    apart = _differ(run, best.name, far.name, GOLD)
    at = f" at {said(best, DISTANCE)} nats" if best in stages else " at the start"
    return (
        f"{where}, to a gold score of {said(far, GOLD)}; {best.name} has "
        f"{said(best, GOLD)}{at}{'' if apart else ': no difference'}"
    )


def _differ(run, one, other, key):
    """Tells whether two stages' figures lie farther apart than their intervals."""
    own = [part(run.summary, name) for name in (one, other)]
    halves = [figures.half(figure, key) or 0.0 for figure in own]
    return abs(own[0][key] - own[1][key]) > math.hypot(*halves)


def paths(run) -> list[dict]:
    """Draws the reward of each policy against the KL of its steps, gold as well.

    Args:
        run: `runs.RunFiles`.

    Returns:
        as `ends`, one for each stage that logged both, with "colour" and "key": [(dash
        of a line or None for a point, what it is)].
    """
    return [one for stage in run.stages if (one := _path(run, stage))]


def _path(run, stage):
    keys = stage.keys()
    score = next((key for key in _SCORES if key in keys), None)
    if score is None or "objective/kl" not in keys:
        return None
    golds = (k for k in keys if k.startswith("rewards/") and k.endswith("gold/mean"))
    columns = ["step", "objective/kl", score, *list(golds)[:1]]
    rows = [[row.get(key) for key in columns] for row in stage.rows]
    rows = [row for row in rows if all(map(is_number, row))]
    if len(rows) < 2:
        return None
    steps, kl, *scores = zip(*rows, strict=True)
    kl = overoptimisation.smoothed(kl).tolist()
    series = [
        {"x": kl, "y": [*values], "colour": None if i else stage.index, "dash": i}
        for i, values in enumerate(scores)
    ]
    key = [(0, "reward it is trained on")] + [(1, "gold")] * (len(scores) > 1)
    curve = _fit(kl, scores[1]) if len(scores) > 1 else None
    if curve:
        distance = [math.sqrt(max(x, 0.0)) for x in kl]
        far = sorted(d for d in distance if d >= overoptimisation.LEAST)
        line = {"x": [d * d for d in far], "y": curve.at(far).tolist()}
        series.append(line | {"colour": None, "dash": 2})
        key.append((2, "gold, Gao’s curve"))
    held = _held_out(run, stage)
    if held:
        series += held
        key.append((None, "gold, held out, 95% interval"))
    title = _of_path(run, stage, kl, scores, curve)
    head = ["Step", "KL, nats", "Reward", *["Gold"] * (len(scores) > 1)]
    stride = -(-len(rows) // _ROWS)
    table = list(zip(steps, kl, *scores, strict=True))
    return {
        "id": f"fig-path-{stage.name}",
        "title": title,
        "note": "KL is a running mean over 5 steps. One run: no interval over seeds.",
        "svg": charts.against(
            series,
            name=f"path {stage.name}",
            label=f"Reward against KL. {title}",
            across="KL to the reference, nats a sequence",
            up="score of an answer",
        ),
        "colour": stage.index,
        "key": key,
        "head": head,
        "rows": [
            (str(step), *(f"{value:.3f}" for value in values))
            for step, *values in [*table[:-1:stride], table[-1]]
        ],
    }


def _fit(kl, gold):
    """The curve of Gao et al. through a path's gold; None where it is too short."""
    try:
        return overoptimisation.fit([math.sqrt(max(x, 0.0)) for x in kl], gold)
    except UserError:
        return None


def _held_out(run, stage):
    """Points of held-out gold where the path starts, and where it ends."""
    own, points = part(run.summary, stage.name), []
    start = next((s for s in run.stages if s.name == stage.start_from), None)
    if start and _has(run, start.name, GOLD):
        points.append(_point(run, start, 0.0, None))
    if _has(run, stage.name, GOLD, DISTANCE):
        half = figures.half(own, DISTANCE)
        points.append(_point(run, stage, own[DISTANCE], half))
    return points


def _of_path(run, stage, kl, scores, curve):
    """The finding: what became of the reward, and of gold meanwhile."""
    before, after = (overoptimisation.smoothed(scores[0])[i] for i in (0, -1))
    text = f"{stage.name}: its reward goes from {before:.3f} to {after:.3f}"
    names = stage.start_from, stage.name
    by = {part(run.summary, name).get("reward_mean_by") for name in names}
    if len(by) == 1 and all(_has(run, name, REWARD) for name in names):
        text = f"{stage.name}: its held-out reward {_moved(run, *names, REWARD)}"
    if curve and curve.peak and curve.past >= overoptimisation.PAST:
        at = f"{curve.peak**2:.2g} nats, {curve.best:.2g} above its start"
        return f"{text}; gold turns down after {at}"
    if all(_has(run, name, GOLD) for name in names):
        return f"{text} while gold {_moved(run, *names, GOLD)}"
    return f"{text} over {kl[-1]:.2g} nats"


def _moved(run, start, end, key):
    """A figure of two stages in words: "fell from 0.732 ±0.137 to 0.1 ±0.02"."""
    verb = "stays"
    if _differ(run, start, end, key):
        fell = part(run.summary, end)[key] < part(run.summary, start)[key]
        verb = "falls" if fell else "rises"
    values = (verdict.value(run.summary, f"{name}.{key}") for name in (start, end))
    return f"{verb}{', ' if verb == 'stays' else ' '}from {' to '.join(values)}"
