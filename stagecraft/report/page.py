"""Writes WORKDIR/report.html: one self-contained page, from the run's files.

The page loads nothing: styles, curves and figures are in it, and its content policy
forbids the rest. What a model wrote is data and escaped as such.
"""

import datetime
import json
from pathlib import Path

from stagecraft import runs
from stagecraft.anatomy import bias, changes, claims, cost, evaluate, figures
from stagecraft.errors import UserError
from stagecraft.metrics import is_number
from stagecraft.report import (
    anatomy_page,
    charts,
    claims_page,
    compare,
    curves,
    findings,
    frontier,
    heat_map,
    render,
    tokens,
    verdict,
)
from stagecraft.report.findings import show
from stagecraft.runs import part
from stagecraft.schema import flat
from stagecraft.storage import write_text

_EFFECT = "nats that it adds to being preferred, other traits held equal"
# Of the figures that anatomy.html has; the first by layer and kind as well.
_BESIDE_NOISE = ("effective_rank", "unchanged_bf16", "rotation_write")
_PARTS = ("compile", "sample", "score", "prepare", "update", "eval", "save", "other")


def write(folder: str | Path) -> Path:
    """Writes a run's report.

    Args:
        folder: WORKDIR; finished, unfinished, or of any graph of stages.

    Returns:
        Path of WORKDIR/report.html. The same files give the same bytes.

    Raises:
        UserError: not a run's directory, or Matplotlib is missing.
    """
    run = runs.read(folder)
    noise, strip = _noise(run), _strip(run)
    heat = noise and noise["map"]
    text = render.render(
        "report.html.jinja",
        scripts=[heat_map.SCRIPT] if heat else [],
        libraries=heat_map.LIBRARIES if heat else (),
        run=run,
        answer=verdict.sentence(run.summary, [stage.name for stage in run.stages]),
        facts=_facts(run),
        strip=strip,
        shifts=[row for row in strip if row["shift"]],
        bounds=_bounds(run),
        graph=_graph(run),
        headline=_headline(run),
        other=_other(run),
        stages=[curves.panel(stage) for stage in run.stages],
        frontier=frontier.ends(run),
        paths=frontier.paths(run),
        hacking=_hacking(run),
        overlays=curves.overlays(run.stages),
        tax=_bars(run, ("heldout_accuracy", "cloze_accuracy", "seen_accuracy")),
        tasks=_tasks(run),
        weights=_weights(run),
        noise=noise,
        claims=_claims(run),
        raters=_raters(run),
        cost=_cost(run),
        time=_time(run),
        data=_data(run),
        made=_made(run),
        lineage=_lineage(run),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )
    path = run.folder / "report.html"
    write_text(path, text)
    return path


def _facts(run):
    """[(label, value)] for the head of the page."""
    facts = []
    if "seed" in run.config:
        facts.append(("Seed", run.config["seed"]))
    model = next((s.info["model"] for s in run.stages if "model" in s.info), None)
    model = model or run.config.get("model")
    if isinstance(model, dict) and {"layers", "width"} <= set(model):
        facts.append(("Model", f"{model['layers']} layers, width {model['width']}"))
        if set(model) >= cost.NEEDED:
            facts.append(("Parameters", show(cost.parameters(model)["total"])))
    own = [part(run.summary, stage.name) for stage in run.stages]
    asked = [(part(o, "draws").get("count"), part(o, "n").get("length")) for o in own]
    asked = [(draws, n) for draws, n in asked if is_number(draws) and is_number(n)]
    if asked:
        draws, n = max(asked)
        facts.append(("Sampled answers", f"{draws} to each of {n:,} prompts"))
    # The newest file, not the clock: a page written again stays the same.
    paths = [*run.folder.glob("*.json"), *run.folder.glob("*/*.json*")]
    newest = max(path.stat().st_mtime for path in paths)
    date = datetime.datetime.fromtimestamp(newest, datetime.UTC)
    facts.append(("Last written", f"{date:%Y-%m-%d %H:%M} UTC"))
    return facts


def _strip(run):
    """Each stage in a line: [{"stage", "figures": [cell], "texts", "shift"}]."""
    answers = part(run.prompt, "answers")
    rows = []
    for stage in run.stages:
        own = _figures(run, stage)
        order = dict.fromkeys([*figures.SHORT, *figures.BY_NAME, *own])
        names = [name for name in order if name in own][:4]
        texts = answers.get(stage.name)
        texts = texts if isinstance(texts, list) else []
        texts = [one for one in texts if isinstance(one, dict) and "text" in one]
        cells = [_cell(run, stage, name) for name in names]
        shift = tokens.shift(stage.name, texts[0]) if texts else None
        row = {"stage": stage, "figures": cells, "texts": texts, "shift": shift}
        rows.append(row)
    return rows


def _cell(run, stage, name):
    """A stage's figure as it is shown, with its interval or its number of questions."""
    own, row = part(run.summary, stage.name), figures.figure(name)
    if not is_number(own.get(name)):
        return None
    return {
        "title": row.title,
        "better": row.better,
        "text": compare.number(own[name], row.digits),
        "half": figures.half(own, name),
        "digits": row.digits,
        "n": part(own, "n").get(name),
        "bound": _bound(run, f"{stage.name}.{name}"),
    }


def _bounds(run):
    """{"science": [...], "time": [...]}: every bound of the run, failed ones first."""
    tables = {"science": [], "time": []}
    for bound in verdict.rows_of(run.summary):
        tables["time" if bound["time"] else "science"].append(bound)
    return tables


def _graph(run):
    nodes, edges = {}, []
    names = {stage.name for stage in run.stages}
    for stage in run.stages:
        for source, main in stage.parents.items():
            label = source
            if source not in names:
                label = source.rstrip("/").rsplit("/", 1)[-1]
                nodes.setdefault(label, {"note": "from outside", "colour": None})
            edges.append((label, stage.name, main))
        note = stage.kind.replace("_", " ") or "stage"
        nodes[stage.name] = {"note": note, "colour": stage.index}
    return charts.graph(nodes, edges) if nodes else ""


def _figures(run, stage):
    """A stage's own numbers in the summary."""
    own = part(run.summary, stage.name)
    return {key: value for key, value in own.items() if is_number(value)}


def _bound(run, key):
    """{"must": text, "holds": bool or None} from summary["bounds"], or None."""
    bound = part(run.summary, "bounds").get(key)
    if isinstance(bound, str):
        return {"must": bound, "holds": None}
    return bound if isinstance(bound, dict) and "must" in bound else None


def _headline(run):
    """Figures by stage: {"stages": [...], "rows": [{title, better, cells, ...}]}."""
    table = {stage.name: _figures(run, stage) for stage in run.stages}
    stages = [stage for stage in run.stages if table[stage.name]]
    keys = dict.fromkeys(key for own in table.values() for key in own)
    order = [key for key in figures.BY_NAME if key in keys]
    rows = []
    for key in order + [key for key in keys if key not in figures.BY_NAME]:
        row = figures.figure(key)
        cells = [_cell(run, stage, key) for stage in stages]
        rows.append(row._asdict() | {"cells": cells})
    return {"stages": stages, "rows": rows}


def _other(run):
    """Figures that belong to no stage, by dotted name: [(name, value, bound)]."""
    shown = {stage.name for stage in run.stages} | {*figures.APART}
    other = {key: value for key, value in run.summary.items() if key not in shown}
    rows = [row for row in flat(other) if is_number(row[1])]
    return [(key, value, _bound(run, key)) for key, value in rows]


def _bars(run, keys, table=None):
    """Bars by stage for each of the figures that the summary, or its table, has."""
    table, bars = run.summary if table is None else table, []
    for key in keys:
        rows = [(stage, part(table, stage.name).get(key)) for stage in run.stages]
        rows = [(stage, value) for stage, value in rows if is_number(value)]
        if rows:
            bars.append(_scaled(key, rows, table))
    return bars


def _scaled(key, rows, table):
    """Bars from zero, in percent of a track that holds them all, negatives too."""
    figure = figures.figure(key)
    low = min(0.0, *(value for _, value in rows))
    high = max(0.0, *(value for _, value in rows))
    if figure.unit == "share":
        high = 1.0
    span = (high - low) or 1.0
    bars = [
        {
            "stage": stage,
            "value": value,
            "half": figures.half(part(table, stage.name), key),
            "n": part(part(table, stage.name), "n").get(key),
            "left": 100 * (min(value, 0.0) - low) / span,
            "width": 100 * abs(value) / span,
        }
        for stage, value in rows
    ]
    about = {k: getattr(figure, k) for k in ("name", "meaning", "better")}
    ends = [(bar["stage"].name, bar["value"], bar["half"]) for bar in bars]
    write = findings.in_digits(figure.digits)
    title = f"{figure.title}: {findings.most_and_least(write, ends)}"
    return about | {"title": title, "bars": bars, "zero": 100 * -low / span}


def _tasks(run):
    """Results on tasks: {"stages": [...], "rows": [{task, metric, how, cells}]}."""
    try:
        records = evaluate.read(run.folder / evaluate.FILE)
    except UserError as error:
        run.missing.append(str(error))
        records = []
    stages = {stage.name: stage for stage in run.stages}
    records = [one for one in records if one["stage"] in stages]
    names, rows = evaluate.side_by_side(records, stages)
    for row in rows:
        row["cells"] = [row["cells"].get(name) for name in names]
    return {"stages": [stages[name] for name in names], "rows": rows}


def _hacking(run):
    """Proxy, gold and facts side by side, when a stage has both scores."""
    both = [
        s for s in run.stages if {"reward_mean", "gold_mean"} <= {*_figures(run, s)}
    ]
    return _bars(run, ("reward_mean", "gold_mean", "kl")) if both else []


def _weights(run):
    """Overall bars, and a heat map of layers by kinds for each stage."""
    table = run.summary.get("weights")
    if not isinstance(table, dict):
        return None
    changes = [
        (stage, table[stage.name])
        for stage in run.stages
        if is_number(part(table, stage.name).get("relative_change"))
    ]
    changed = {stage.name: change for stage, change in changes}
    bars = _bars(run, ("relative_change", "unchanged_bf16"), changed)
    maps = [
        anatomy_page.heat(stage, part(change, "by_layer"))
        | {"by_kind": part(change, "by_kind")}
        for stage, change in changes
        if part(change, "by_layer")
    ]
    nulls = [
        {"stage": stage, "value": change.get("unchanged_bf16"), "null": null}
        for stage, change in changes
        if is_number(null := part(change, "null").get("unchanged_bf16"))
    ]
    page = anatomy_page.PAGE
    there = (run.folder / page).exists()
    return {"bars": bars, "maps": maps, "nulls": nulls, "page": page if there else ""}


def _noise(run):
    """What anatomy.json says of the weights, each figure beside its nulls."""
    try:
        tables = changes.read(run.folder / changes.FOLDER)
    except UserError as error:
        run.missing.append(str(error))
        tables = None
    if tables is None:
        return None
    stages = {stage.name: stage for stage in run.stages}
    rows = [one for one in tables["comparisons"] if one["stage"] in stages]
    own = [one for one in rows if one["role"] == changes.PARENT]
    shown = [row for row in anatomy_page.FIGURES if row[0] in _BESIDE_NOISE]
    rank = next(row for row in shown if row[0] == _BESIDE_NOISE[0])
    whole = (anatomy_page.beside_null(own, stages, *row) for row in shown)
    parts = (anatomy_page.parts(one, stages, rank) for one in own)
    return {
        "draws": tables["settings"]["draws"],
        "figures": list(filter(None, whole)),
        "parts": list(filter(None, parts)),
        "map": heat_map.build(tables, list(stages)),
    }


def _claims(run):
    """Verdicts that the run, or the work directory of claims it is part of, holds."""
    for up in range(3):  # of claims, a run is BASE/seedN or NAME/seedN
        folder = run.folder.resolve().parents[up - 1] if up else run.folder
        try:
            if rows := claims_page.read(folder):
                return {"rows": rows, "where": "../" * up + claims.VERDICTS}
        except UserError as error:
            run.missing.append(str(error))
    return None


def _raters(run):
    """What the rater of each stage of comparisons went by, as `anatomy.bias` has it."""
    table = part(run.summary, "raters")
    return [
        {
            "stage": stage,
            "rater": part(part(run.config, "stages"), stage.name).get("rater", ""),
            "rows": [
                one | {"name": name, "meaning": bias.MEANINGS.get(name, _EFFECT)}
                for name, one in table[stage.name].items()
            ],
        }
        for stage in run.stages
        if part(table, stage.name)
    ]


def _cost(run):
    """Bars of each stage's share of pretraining, and the counts they come from."""
    table = run.summary.get("cost")
    if not isinstance(table, dict):
        return None
    counts = [
        {
            "stage": stage,
            "cost": part(table, stage.name),
            "tokens": stage.info.get("tokens", {}),
        }
        for stage in run.stages
    ]
    rows = [(row["stage"], row["cost"].get("share")) for row in counts]
    rows = [(stage, value) for stage, value in rows if is_number(value)]
    return {
        "bars": _scaled("share", rows, table) if rows else None,
        "counts": counts,
        "judged": any("judged" in row["tokens"] for row in counts),
    }


def _seconds(stage):
    return {k: v for k, v in part(stage.info, "seconds").items() if is_number(v)}


def _time(run):
    """Wall seconds of each stage by activity, scaled to the longest stage."""
    rows = []
    for stage in run.stages:
        parts = _seconds(stage)
        total = parts.pop("total", None) or sum(parts.values())
        inner = parts.get("sample", 0.0) + parts.get("score", 0.0)
        # Sampling and scoring are parts of `prepare`; never count them twice.
        if sum(parts.values()) > 1.01 * total and parts.get("prepare", 0.0) >= inner:
            parts["prepare"] -= inner
        parts["other"] = parts.get("other", 0.0) + sum(
            v for k, v in parts.items() if k not in _PARTS
        )
        parts["other"] += max(total - sum(parts.get(k, 0.0) for k in _PARTS), 0.0)
        if total:
            parts = {name: parts.get(name, 0.0) for name in _PARTS}
            rows.append({"stage": stage, "total": total, "parts": parts})
    longest = max((row["total"] for row in rows), default=1.0)
    total = part(run.summary, "seconds").get("total")
    total = total or sum(row["total"] for row in rows)
    about = f"{int(total // 60)} min {total % 60:.0f} s in total"
    peaks = [s.info.get("peak_memory_bytes") for s in run.stages]
    peaks = [peak for peak in peaks if is_number(peak)]
    if peaks:
        about += f"; at most {max(peaks) / 2**30:.2f} GiB of memory"
    used = [k for k in _PARTS if any(r["parts"].get(k, 0) > 0.05 for r in rows)]
    return {"rows": rows, "longest": longest, "activities": used, "about": about}


def _data(run):
    """What each stage learned from: [(stage, {label: value}, sources of a mixture)]."""
    rows = []
    for stage in run.stages:
        data = dict(part(stage.info, "data"))
        if not data:
            continue
        sources, by = data.pop("sources", []), data.pop("share_by", "")
        facts = {k.replace("_", " "): v for k, v in data.items() if is_number(v)}
        reading = part(data, "reading")
        facts |= {"records": "; ".join(reading["said"])} if reading.get("said") else {}
        if data.get("curations"):
            facts["curated"] = ", ".join(one[:12] for one in data["curations"])
        rows.append((stage, facts, {"by": by, "rows": sources} if sources else None))
    return rows


def _made(run):
    """With what the stages were made: [(label, value)], all that differ in one."""
    records = [part(stage.info, "made_with") for stage in run.stages]
    labels = dict.fromkeys(label for record in records for label in record)
    return [
        (label, list(dict.fromkeys(str(r[label]) for r in records if label in r)))
        for label in labels
    ]


def _lineage(run):
    """[(stage, {label: hash})], nested records flattened to dotted labels."""
    rows = []
    for stage in [stage for stage in run.stages if stage.lineage]:
        entries = {k: str(v) for k, v in flat(stage.lineage) if v not in (None, "")}
        for key in ("kind", "start_from"):
            entries.pop(key, None)
        rows.append((stage, entries))
    return rows
