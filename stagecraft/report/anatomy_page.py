"""Writes anatomy.html: what changed in the weights, each figure beside its nulls."""

import math
from pathlib import Path

from stagecraft import storage
from stagecraft.anatomy import changes, token_shift, weights
from stagecraft.report import render, tokens
from stagecraft.report.findings import show

SHADE = 56  # percent of a stage's colour behind the largest number of a map
PAGE = f"{changes.FOLDER}/anatomy.html"

# A figure each: its key, unit, the words of its finding, and what it is.
FIGURES = (
    (
        "unchanged_bf16",
        "share",
        "{} of the weights stay the same in bfloat16",
        "Share of weights that are equal after both sides are rounded to bfloat16. How "
        "many depends on how far the weights moved, whatever moved them.",
    ),
    (
        "low_overlap",
        "share",
        "{} of what changed in bfloat16 is among the 30% smallest weights",
        "30% is even. Steps of bfloat16 are finer at small weights, so that noise "
        "shows there too.",
    ),
    (
        "effective_rank",
        "",
        "its changes have effective rank {}",
        "exp of the entropy of its squared singular values, mean over matrices: in how "
        "many directions a matrix moved. Noise moves in all.",
    ),
    (
        "top_energy",
        "share",
        "{} of a change lies in 8 directions",
        "Share of the squared norm in the first 8 singular directions of each matrix.",
    ),
    (
        "rotation_write",
        "°",
        "the main directions that are written turn by {}",
        "Largest angle between the spans of the first 8 left singular vectors before "
        "and after, mean over matrices. Where the gap behind the 8th is small the "
        "vectors trade places, for noise as well.",
    ),
    (
        "rotation_read",
        "°",
        "the main directions that are read turn by {}",
        "The same of right singular vectors.",
    ),
    (
        "nss_scaled",
        "",
        "the spectrum shifts by {} times its size",
        "Change of the singular values over their norm, times sqrt(m) over the "
        "relative change: about 1 for noise that is small, sqrt(m) for a rescaling, 0 "
        "for a rotation.",
    ),
    (
        "intruders",
        "",
        "{} intruder directions",
        "Main directions after the change that have no counterpart before it, of 10 in "
        "each matrix, all matrices together.",
    ),
)


def write(tables: changes.Anatomy, causes: dict | None = None) -> Path:
    """Writes FOLDER/anatomy.html beside the tables; returns its path.

    Args:
        tables: what changed.
        causes: what `causes.of_run` returns: which weights did it, and to which tokens.
    """
    names = dict.fromkeys(
        [*(one["stage"] for one in tables["comparisons"]), *(causes or ())]
    )
    stages = {name: {"name": name, "index": i} for i, name in enumerate(names)}
    first = _first(tables["comparisons"])
    text = render.render(
        "anatomy.html.jinja",
        tables=tables,
        stages=stages,
        answer=_answer(first),
        far=_far(tables["comparisons"], stages),
        figures=[
            figure
            for row in FIGURES
            if (figure := beside_null(tables["comparisons"], stages, *row))
        ],
        maps=_maps(tables, stages),
        kinds=[_kinds(one, stages) for one in first],
        ulps=_ulps(first, stages),
        between=tables["between"],
        causes=_causes(causes or {}, stages),
        shifts=_shifts(causes or {}, stages),
    )
    path = tables.folder / "anatomy.html"
    storage.write_text(path, text)
    return path


def _first(comparisons):
    """The comparisons with what a stage started from."""
    return [one for one in comparisons if one["role"] != changes.PRETRAINING]


def _answer(first):
    """The page's first sentences: how far, and in how many directions."""
    moved = sorted(
        (one for one in first if one["relative_change"]),
        key=lambda one: -one["relative_change"],
    )
    if not moved:
        return "Nothing moved."
    far = [_text(one["relative_change"], "share") for one in moved]
    text = f"{moved[0]['stage']} moved the weights by {far[0]} of their norm"
    if len(moved) > 1:
        text += f", the farthest; {moved[-1]['stage']} by {far[-1]}, the least"
    ranks = [one["effective_rank"] for one in moved if one.get("effective_rank")]
    noise = [band[1] for one in moved if (band := _null(one, "effective_rank"))]
    if ranks and noise:
        text += (
            f". A matrix changed in {_range(ranks)} directions, where noise of that "
            f"size changes it in {_range(noise)}"
        )
    return text + "."


def _range(values):
    low, high = (f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _null(one, key, name=weights.ISOTROPIC):
    return one["null"].get(name, {}).get(key)


def _text(value, unit):
    if value is None:
        return "–"
    if unit == "share":
        return f"{100 * value:.3g}%".replace("-", "−", 1)
    return show(float(value)) + unit


def _far(comparisons, stages):
    """Bars of the relative change, and the cast's own where dtypes differ."""
    rows = [one for one in comparisons if one["relative_change"] is not None]
    most = max((one["relative_change"] for one in rows), default=0.0) or 1.0
    top = max(_first(rows), key=lambda one: one["relative_change"], default=None)
    title = "Nothing moved"
    if top:
        far = f"by {_text(top['relative_change'], 'share')} of the weights' norm"
        title = f"{top['stage']} moved {far}"
        if len(_first(rows)) > 1:
            title = f"{top['stage']} moved farthest from where it started: {far}"
    marks = [
        _row(one, stages)
        | {
            "width": 100 * one["relative_change"] / most,
            "text": _text(one["relative_change"], "share"),
            "floor": _text(one["dtype_floor"], "share") if one["dtype_floor"] else "",
        }
        for one in rows
    ]
    return {"title": title, "rows": marks}


def _row(one, stages):
    return {
        "stage": stages[one["stage"]],
        "part": one.get("part"),
        "against": one["against"],
        "pretraining": one["role"] == changes.PRETRAINING,
    }


def parts(one: dict, stages: dict, row: tuple) -> dict | None:
    """A figure of a comparison, by layer and by kind, each beside its null.

    Args:
        one: of a run's comparisons.
        stages: as of `beside_null`.
        row: of `FIGURES`.
    """
    sides = {f"layer {layer}": own for layer, own in one["layers"].items()}
    sides |= one["kinds"]
    about = {k: one[k] for k in ("stage", "against", "role")}
    rows = [own | about | {"part": part} for part, own in sides.items()]
    return beside_null(rows, stages, *row)


def beside_null(comparisons, stages, key, unit, words, about):
    """A figure's rows: value, null bands, ratio; None where nothing has it.

    Args:
        comparisons: of `changes.Anatomy`; a part of one has its "part" in words.
        stages: {name: what has a name and a colour's index}.
        key, unit, words, about: as of `FIGURES`.
    """
    rows = [one for one in comparisons if one.get(key) is not None]
    if not rows:
        return None
    bands = [band for one in rows for n in one["null"] if (band := _null(one, key, n))]
    most = max([one[key] for one in rows] + [band[2] for band in bands]) or 1.0
    return {
        "key": key,
        "about": about,
        "title": _finding(_first(rows) or rows, key, unit, words),
        "rows": [
            _row(one, stages)
            | {
                "at": 98 * one[key] / most,
                "text": _text(one[key], unit),
                "nulls": _nulls(one, key, unit, most),
            }
            for one in rows
        ],
    }


def _nulls(one, key, unit, most):
    out = []
    for name in one["null"]:
        band = _null(one, key, name)
        if band is None:
            continue
        low, mean, high = band
        out.append(
            {
                "name": "noise" if name == weights.ISOTROPIC else name,
                "left": 98 * low / most,
                "width": 98 * (high - low) / most,
                "text": _text(mean, unit),
                "low": _text(low, unit),
                "high": _text(high, unit),
                "ratio": f"{one[key] / mean:.3g}" if mean else "–",
            }
        )
    return out


def _finding(rows, key, unit, words):
    """The figure's title: the row that differs most from noise, with its band."""

    def distance(one):
        band = _null(one, key)
        if not band or not band[1] or not one[key]:
            return 0.0
        return abs(one[key] / band[1] - 1)

    one = max(rows, key=distance)
    band, value = _null(one, key), _text(one[key], unit)
    name = ", ".join(filter(None, (one["stage"], one.get("part"))))
    if not band:
        return f"{name}: {words.format(value)}"
    noise = _text(band[1], unit)
    if band[0] != band[2]:
        noise += f" ({_text(band[0], unit)} to {_text(band[2], unit)})"
    return f"{name}: {words.format(value)}; noise of its size gives {noise}"


def _maps(tables, stages):
    maps = []
    for one in _first(tables["comparisons"]):
        rows = [
            row
            for row in tables["matrices"]
            if (row["stage"], row["against"]) == (one["stage"], one["against"])
            and row["layer"] is not None
        ]
        kinds = dict.fromkeys(row["kind"] for row in rows)
        depth = 1 + max((row["layer"] for row in rows), default=-1)
        layers = {kind: [_share(rows, kind, i) for i in range(depth)] for kind in kinds}
        if layers:
            shown = heat(stages[one["stage"]], layers)
            maps.append(shown | {"against": one["against"], "gini": one["gini"]})
    return maps


def _share(rows, kind, layer):
    own = [row for row in rows if (row["kind"], row["layer"]) == (kind, layer)]
    size = sum(row["before_norm"] ** 2 for row in own)
    return (sum(row["change_norm"] ** 2 for row in own) / size) ** 0.5 if size else None


def heat(stage, layers):
    """A map of layers by kinds, as its macro shows it.

    Args:
        stage: with a name and a colour's index.
        layers: {kind: [value of layer 0, ...]}, None where there is none.
    """
    depth = max(len(values) for values in layers.values())
    known = [v for values in layers.values() for v in values if v is not None]
    largest = max(known, default=0) or 1.0
    rows = []
    for i in range(depth):
        cells = [values[i] if i < len(values) else None for values in layers.values()]
        shades = [round(SHADE * (value or 0.0) / largest, 1) for value in cells]
        rows.append(
            [
                {"value": value, "shade": shade}
                for value, shade in zip(cells, shades, strict=True)
            ]
        )
    return {"stage": stage, "kinds": list(layers), "rows": rows}


OF_A_KIND = (
    ("relative_change", "Change", "share"),
    ("spectral_change", "Spectral", "share"),
    ("unchanged_exact", "Same, exact", "share"),
    ("unchanged_bf16", "Same, bf16", "share"),
    ("unchanged_eta", "Same, η-rule", "share"),
    ("low_overlap", "Of the 30% smallest", "share"),
    ("high_overlap", "Of the 30% largest", "share"),
    ("rank", "Rank", ""),
    ("effective_rank", "Eff. rank", ""),
    ("stable_rank", "Stable rank", ""),
    ("rotation_write", "Turn, write", "°"),
    ("rotation_read", "Turn, read", "°"),
    ("gap", "Gap", ""),
    ("nss_scaled", "Spectrum", ""),
    ("intruders", "Intruders", ""),
)


def _kinds(one, stages):
    """A table of kinds: each cell a figure, under it what noise gives."""
    columns = [
        row
        for row in OF_A_KIND
        if any(kind.get(row[0]) is not None for kind in one["kinds"].values())
    ]
    rows = []
    for kind, own in one["kinds"].items():
        cells = []
        for key, _, unit in columns:
            null = _null(own, key)
            cells.append(
                {
                    "text": _text(own.get(key), unit),
                    "null": _text(null[1], unit) if null else "",
                }
            )
        rows.append({"kind": kind, "full": own.get("full_rank"), "cells": cells})
    heads = [title for _, title, _ in columns]
    return _row(one, stages) | {"heads": heads, "rows": rows}


def _ulps(first, stages):
    return [
        _row(one, stages) | {"shares": [_text(share, "share") for share in one["ulps"]]}
        for one in first
        if one["ulps"] is not None
    ]


_BROKEN = 0.1  # nats above the chord at which a graft is no language model any more


def _causes(causes, stages):
    """Which weights did it, a stage each: the findings and their tables."""
    return [
        {"stage": stages[name], "refused": one["refused"]}
        if "refused" in one
        else {
            "stage": stages[name],
            "refused": "",
            "divergence": one["divergence"],
            "error": one["standard_error"],
            "answers": one["answers"],
            "tables": [
                _players(one[key]["players"], name, what)
                for key, what in (("layers", "Part"), ("kinds", "Kind"))
            ],
            "path": one["path"],
            "subspaces": one["subspaces"],
            "gains": _gains(one["gains"]),
            "lenses": one["lenses"],
        }
        for name, one in causes.items()
    ]


def _shifts(causes, stages):
    """Which tokens shift, a stage each: shares, places, words and answers."""
    shown = []
    for name, one in causes.items():
        said = one.get("shift", {}).get("said", {})
        if said.get("tokens"):
            rows = [_classes(one["shift"][key], key) for key in ("said", "own")]
            title = (
                f"{name}: its parent would have written "
                f"{_text(said['unshifted'], 'share')} of its tokens as well; "
                f"{_text(said['shifted'], 'share')} are shifted"
            )
            if said["early"] is not None:
                times = math.exp(said["early"])
                title += f", those at the first three places {times:.2g} times as far"
            shown.append(
                {"stage": stages[name], "title": title, "rows": [r for r in rows if r]}
                | {"places": said["places"], "words": said["words"]}
                | {"examples": [[_token(t) for t in e] for e in said["examples"]]}
            )
    return shown


def _classes(side, key):
    if not side.get("tokens"):
        return None
    title = {"said": "its own answers", "own": "its parent’s answers"}[key]
    shares = [side[label] for label in token_shift.CLASSES]
    return {
        "title": title,
        "shares": [
            {"label": label, "width": 100 * share, "text": _text(share, "share")}
            for label, share in zip(token_shift.CLASSES, shares, strict=True)
        ],
        "tokens": side["tokens"],
        "divergence": side["divergence"],
    }


def _token(token):
    """A token of an answer: marks of leading spaces in its vocabulary become spaces."""
    text = token["token"].replace("\u2581", " ").replace("\u0120", " ")
    return tokens.span(token | {"token": text.replace("\u010a", "\n")})


def _players(players, stage, what):
    rows = [
        {
            "name": name,
            "shapley": row["shapley"],
            "left": 98 * min(max(row["norm_share"], 0.0), 1.0),
            "at": 98 * min(max(row["shapley"], 0.0), 1.0),
            "text": _text(row["shapley"], "share"),
            "norm": _text(row["norm_share"], "share"),
            "sufficiency": _text(row["sufficiency"], "share"),
            "necessity": _text(row["necessity"], "share"),
            "density": show(row["density"]) if row["density"] is not None else "–",
            "excess": row["loss_excess"],
            "broken": row["loss_excess"] > _BROKEN,
        }
        for name, row in players.items()
    ]
    top = max(rows, key=lambda row: row["shapley"])
    title = (
        f"{stage}: {top['name']} did {top['text']} of it with {top['norm']} of the "
        "squared change"
    )
    return {"what": what, "title": title, "rows": rows}


def _gains(gains):
    """The logit gain by kind, layers together: [(kind, least, largest)]."""
    kinds = {}
    for name, gain in gains.items():
        if gain is not None:
            kinds.setdefault(name.rsplit("/", 1)[-1], []).append(gain)
    return [(kind, min(values), max(values)) for kind, values in kinds.items()]
