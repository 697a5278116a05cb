"""The interactive map of layers by kinds: its numbers, its picture, and a table.

The picture is Vega-Lite's; the page shows finding and table without it.
"""

import json
import math
from statistics import fmean

from stagecraft.anatomy import changes, weights
from stagecraft.report import anatomy_page
from stagecraft.report.findings import show

SCRIPT = "heat_map.js"
LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")
BUDGET = 1_500_000  # bytes of numbers in a page
_FIRST = "effective_rank"


def build(tables: changes.Anatomy, names: list[str]) -> dict | None:
    """Reads the map out of a run's anatomy.

    Args:
        tables: what changed.
        names: stages to show, against what each started from.

    Returns:
        {"title": the finding, "head", "rows": of a table, the cell farthest from noise
        of each figure, "data": what the script reads (columns, with texts by their
        index in "names", and the picture), "left_out": figures beyond `BUDGET`}; None
        without layers.
    """
    pairs = {
        (one["stage"], one["against"]): one["stage"]
        for one in tables["comparisons"]
        if one["role"] == changes.PARENT and one["stage"] in names
    }
    groups = {}
    for line in tables["matrices"]:
        stage = pairs.get((line["stage"], line["against"]))
        if stage and line["layer"] is not None:
            groups.setdefault((stage, line["layer"], line["kind"]), []).append(line)
    figures = [
        (key, title, unit)
        for key, title, unit in anatomy_page.OF_A_KIND
        if any(line.get(key) is not None for one in groups.values() for line in one)
    ]
    figures.sort(key=lambda figure: figure[0] != _FIRST)
    cells, left_out, size = [], [], 0
    for key, title, unit in figures:
        own = _cells(groups, key, title, unit)
        size += len(json.dumps(_columns(own)["columns"], separators=(",", ":")))
        if cells and size > BUDGET:
            left_out.append(title)
        else:
            cells += own
    if not cells:
        return None
    far = {}
    for cell in sorted(filter(_distance, cells), key=_distance):
        far[cell["figure"]] = cell
    return {
        "title": _finding(far.get(cells[0]["figure"], cells[0])),
        "head": ("Figure", "Stage", "Layer", "Kind", "Value", "Noise", "Ratio"),
        "rows": [
            _row(far[name])
            for name in dict.fromkeys(c["figure"] for c in cells)
            if name in far
        ],
        "data": _columns(cells) | {"spec": _spec(cells)},
        "left_out": left_out,
    }


def _cells(groups, key, title, unit):
    """A cell for each stage, layer and kind: the mean over its matrices."""
    share = unit == "share"
    title += {"": "", "share": ", %"}.get(unit, f", {unit}")
    cells = []
    for (stage, layer, kind), lines in groups.items():
        known = [line for line in lines if line.get(key) is not None]
        if not known:
            continue
        bands = [line["null"].get(weights.ISOTROPIC, {}).get(key) for line in known]
        noise = low = high = None
        if all(bands):
            low, noise, high = map(fmean, zip(*bands, strict=True))
        numbers = dict(value=fmean(line[key] for line in known), noise=noise)
        numbers |= dict(low=low, high=high)
        numbers = {name: _digits(x, share) for name, x in numbers.items()}
        where = dict(figure=title, stage=stage, layer=layer, kind=kind)
        cells.append(where | numbers)
    return cells


def _digits(value, share):
    """Four digits, shares in percent."""
    return None if value is None else float(f"{value * (100 if share else 1):.4g}")


def _distance(cell):
    """How many times noise a cell is, or noise the cell: the log; 0 without a ratio."""
    ratio = cell["value"] / cell["noise"] if cell["noise"] else 0.0
    return abs(math.log(ratio)) if ratio > 0 else 0.0


def _noise(cell):
    text = show(cell["noise"])
    if cell["low"] != cell["high"]:
        text += f" ({show(cell['low'])} to {show(cell['high'])})"
    return text


def _finding(cell):
    figure = cell["figure"][0].lower() + cell["figure"][1:]
    where = f"{cell['stage']}, layer {cell['layer']}, {cell['kind']}"
    if not cell["noise"]:
        return f"{where}: {figure} {show(cell['value'])}"
    return (
        f"Farthest from noise of its size is {where}: {figure} "
        f"{show(cell['value'])}, noise {_noise(cell)}"
    )


def _row(cell):
    places = (cell["figure"], cell["stage"], str(cell["layer"]), cell["kind"])
    ratio = f"{cell['value'] / cell['noise']:.3g}"
    return (*places, show(cell["value"]), _noise(cell), ratio)


def _columns(cells):
    names = {
        key: list(dict.fromkeys(cell[key] for cell in cells))
        for key in ("figure", "stage", "kind")
    }
    columns = {key: [cell[key] for cell in cells] for key in cells[0]}
    for key, texts in names.items():
        place = {text: i for i, text in enumerate(texts)}
        columns[key] = [place[text] for text in columns[key]]
    return {"names": names, "columns": columns}


def _spec(cells):
    """The picture, in Vega-Lite; colours are the page's, from paper (0) on."""
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))

    def choice(name, options, title):
        bind = {"input": "select", "options": options, "name": title}
        return {"name": name, "value": options[0], "bind": bind}

    figures = list(dict.fromkeys(cell["figure"] for cell in cells))
    stages = list(dict.fromkeys(cell["stage"] for cell in cells))
    above = "datum.top > 0 ? max(datum.value, 0) / datum.top : 0"
    apart = "datum.ratio > 0 ? min(abs(log(datum.ratio)) / log(10), 1) : 0"
    by_value = "by === 'value'"
    below = {"test": f"!({by_value}) && datum.ratio < 1", "value": "var(--s1)"}
    here = {"test": "datum.place === at", "value": "var(--ink)"}
    axis = {"labelColor": "var(--muted)", "titleColor": "var(--muted)"}
    axis |= {"domain": False, "ticks": False, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "width": "container",
        "height": 26 * len({cell["layer"] for cell in cells}),
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": "transparent",
        "params": [
            choice("figure", figures, "Figure "),
            choice("stage", stages, "Stage "),
            choice("by", ["value", "ratio to noise"], "Show "),
            {"name": "at", "value": ""},
        ],
        "transform": [
            {"filter": "datum.figure === figure && datum.stage === stage"},
            {"joinaggregate": [{"op": "max", "field": "value", "as": "top"}]},
            {"calculate": f"{by_value} ? ({above}) : ({apart})", "as": "shade"},
            {"calculate": f"{by_value} ? datum.text : datum.times", "as": "shown"},
        ],
        "encoding": {
            "x": {
                "field": "kind",
                "type": "nominal",
                "sort": kinds,
                "title": "kind of matrix",
                "axis": {"orient": "top", "labelAngle": 0},
            },
            "y": {"field": "layer", "type": "ordinal", "title": "layer"},
        },
        "layer": [
            {
                "mark": {"type": "rect", "strokeWidth": 2, "cornerRadius": 3},
                "encoding": {
                    "fill": {"condition": below, "value": "var(--s0)"},
                    "fillOpacity": {
                        "field": "shade",
                        "type": "quantitative",
                        "scale": {
                            "domain": [0, 1],
                            "range": [0, anatomy_page.SHADE / 100],
                        },
                        "legend": None,
                    },
                    "stroke": {"condition": here, "value": None},
                    "tooltip": {"field": "said"},
                    "description": {"field": "said"},
                },
            },
            {
                "mark": {
                    "type": "text",
                    "fill": "var(--ink)",
                    "fontSize": 11,
                    "aria": False,
                    "tooltip": None,
                },
                "encoding": {"text": {"field": "shown"}},
            },
        ],
        "config": {
            "font": "inherit",
            "axis": axis,
            "view": {"stroke": None},
            "scale": {"rectBandPaddingInner": 0.04},
        },
    }
