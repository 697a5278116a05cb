"""Draws the report's pictures as inline SVG: curves by Matplotlib, the graph of stages.

A picture is drawn once and serves light, dark and print: its colours are written as the
page's CSS variables, its text takes the page's font.
"""

import functools
import io
import logging
import re

from markupsafe import Markup, escape

from stagecraft.errors import install

_log = logging.getLogger("stagecraft")

# Matplotlib needs real colours: stand-ins that nothing else uses, replaced in the SVG.
_INK, _MUTED, _RULE, _PAPER = "#010101", "#020202", "#030303", "#040404"
_STAND_INS = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _PAPER: "var(--paper)",
}
COLOURS = 8  # stage colours in the page; more stages take them again, dashed
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_POINTS = 240  # about what a chart of this width can show


def colour(index):
    """CSS colour of a stage, by its place in the graph."""
    return f"var(--s{index % COLOURS})"


def _picture(draw):
    """Sets up Matplotlib for what draws a picture.

    Where Matplotlib is missing, the picture is a sentence that says so; the log has it
    once. What a page says in words and tables needs none.
    """

    @functools.wraps(draw)
    def picture(content, *, name, label, **axes):
        try:
            import matplotlib
        except ImportError:
            return _without_matplotlib()
        settings = {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "text.parse_math": False,
            "axes.unicode_minus": True,
            "path.simplify": True,
            "font.size": 9,
        }
        with matplotlib.rc_context(settings):
            return draw(content, name=name, label=label, **axes)

    return picture


@functools.cache
def _without_matplotlib():
    command = install("report")
    _log.warning("the page has no charts, which need Matplotlib: %s", command)
    sentence = "No chart: it needs Matplotlib, which"
    return Markup("<p>{} <code>{}</code> installs.</p>").format(sentence, command)


@_picture
def curves(series, *, name, label):
    """A line chart against steps.

    Args:
        series: [{"steps": [...], "values": [...], "colour": stage index, "marked":
            bool}]; marked series (few points: evaluations) get dots and dashes.
        name: unique on the page; salts the ids inside the SVG.
        label: what a screen reader says.

    Returns:
        Markup, an `<svg>` that scales with its container; or a `<p>`, without
        Matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4, 2.2))
    axes = figure.add_axes((0.125, 0.12, 0.85, 0.83))
    replaced = dict(_STAND_INS)
    for one in series:
        stand_in = _stand_in(one["colour"])
        replaced[stand_in] = colour(one["colour"])
        _line(axes, one, stand_in)
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.ticklabel_format(axis="x", style="plain")
    _plain(axes)
    return _inline(figure, replaced, label)


@_picture
def against(series, *, name, label, across, up):
    """A chart of one figure against another.

    Args:
        series: [{"x", "y": [...], "colour": stage index, or None for ink}]. Lines have
            "dash", 0 (solid) to 2, and become means over bins where they are long;
            points have "half": (half intervals of x, of y), None where there is none,
            and "texts", a label each.
        name, label: as of `curves`, as is what is returned.
        across, up: what the axes are, with their units.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2, 2.4))
    axes = figure.add_axes((0.15, 0.185, 0.83, 0.79))
    replaced, texts = dict(_STAND_INS), []
    for one in series:
        shade = _INK
        if one["colour"] is not None:
            shade = _stand_in(one["colour"])
            replaced[shade] = colour(one["colour"])
        style = dict(color=shade, clip_on=False)
        if "dash" in one:
            points, dash = (_binned(one["x"]), _binned(one["y"])), one["dash"]
            axes.plot(*points, linewidth=1.6, linestyle=_DASHES[dash], **style)
            continue
        halves = [[h or 0.0 for h in side] for side in one["half"]]
        points, ends = (one["x"], one["y"]), dict(xerr=halves[0], yerr=halves[1])
        fill = _PAPER if one["colour"] is None else shade
        marks = dict(fmt="o", ms=6, mfc=fill, mew=1.6, elinewidth=1.4)
        axes.errorbar(*points, **ends, **marks, **style)
        texts += zip(*points, one["texts"], strict=True)
    axes.margins(x=0.08, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(across, color=_MUTED)
    axes.set_ylabel(up, color=_MUTED)
    _plain(axes)
    _labelled(axes, texts)
    return _inline(figure, replaced, label)


def _plain(axes):
    """The look of all axes: a rule below, faint lines across, no frame."""
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.get_major_formatter().set_powerlimits((-3, 4))
    axes.set_facecolor("none")
    axes.grid(axis="y", color=_RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0, pad=4)
    axes.yaxis.get_offset_text().set_color(_MUTED)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)


def _labelled(axes, texts):
    """Writes names beside points (x, y, name), at the side where there is room."""
    middle, placed = sum(axes.get_xlim()) / 2, []
    for x, y, text in sorted(texts, key=lambda one: one[1]):
        px, py = axes.transData.transform((x, y)) * 72 / axes.figure.dpi  # in points
        text, side = _cut(text, 24), 1 if x <= middle else -1
        width, lift = 5.2 * len(text), 3.0
        left = px + 8 if side > 0 else px - 8 - width
        for other, end, height in placed:
            if left < end and other < left + width:
                lift = max(lift, height + 10 - py)
        placed.append((left, left + width, py + lift))
        style = dict(color=_INK, ha="left" if side > 0 else "right")
        near = dict(xytext=(8 * side, lift), textcoords="offset points")
        axes.annotate(text, (x, y), **near, **style)


def _binned(values):
    """Means over equal bins of a long line's points."""
    size = -(-len(values) // _POINTS)
    bins = (values[i : i + size] for i in range(0, len(values), size or 1))
    return [sum(one) / len(one) for one in bins]


def _stand_in(index):
    return f"#0a0a{index:02x}"


def _line(axes, one, stand_in):
    steps, values = _thin(one["steps"], one["values"])
    dash = _DASHES[one["colour"] // COLOURS % len(_DASHES)]
    if one["marked"]:
        axes.plot(
            steps,
            values,
            color=_INK,
            linewidth=1.1,
            linestyle=(0, (3, 2)),
            marker="o",
            markersize=3.2 if len(steps) < 40 else 0,
        )
        return
    smooth = _running_mean(values)
    if smooth is not None:
        axes.plot(steps, values, color=stand_in, linewidth=0.7, alpha=0.35)
        values = smooth
    lone = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color=stand_in, linewidth=1.7, linestyle=dash, marker=lone)


def _thin(steps, values):
    """Means over equal bins of points, so that a long run stays a small picture."""
    size = -(-len(steps) // _POINTS)
    if size <= 1:
        return steps, values
    bins = range(0, len(steps), size)
    return (
        [steps[min(i + size, len(steps)) - 1] for i in bins],
        [sum(values[i : i + size]) / len(values[i : i + size]) for i in bins],
    )


def _running_mean(values):
    """A centred mean over about a twentieth of a long series; None for a short one."""
    if len(values) < 60:
        return None
    half = len(values) // 40
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _inline(figure, replaced, label):
    """A Matplotlib figure as an element of the page; stand-ins become its colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\s(?:xmlns(?::xlink)?|version)=\"[^\"]*\"", "", text, count=3)
    # Numbered ids repeat from figure to figure; only hashed ones are referred to.
    text = re.sub(r"\sid=\"[A-Za-z]+[A-Za-z0-9.]*_\d+\"", "", text)
    text = re.sub(r"(<svg[^>]*?)\swidth=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg[^>]*?)\sheight=\"[^\"]*\"", r"\1", text, count=1)
    for stand_in, value in replaced.items():
        text = text.replace(stand_in, value)
    head = f'<svg role="img" aria-label="{escape(label)}"'
    return Markup(text.replace("<svg", head, 1).strip())


# -- means and intervals ------------------------------------------------------

_PLOT = 390  # width, in points: about a phone's screen
_MARGIN = 9
_LINE = 16  # height of a line of text
_RAIL = 34  # height below the text of a row, in which its marks lie
_AXIS = 22  # height of the tick labels


@_picture
def intervals(rows, *, name, label):
    """Draws means of several arms with their intervals on one scale.

    Args:
        rows: [{"name", "detail", "text", "note": texts; "baseline", "apart" (it differs
            from the baseline): bools; "mean", "half": floats or None, "values": one a
            seed}].
        name, label: as of `curves`, as is what is returned.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = 3 if any(row["detail"] for row in rows) else 2
    size = _LINE * lines + _RAIL
    height = size * len(rows)
    figure = Figure(figsize=(_PLOT / 72, (height + _AXIS) / 72))
    bottom, side = _AXIS / (height + _AXIS), _MARGIN / _PLOT
    axes = figure.add_axes((side, bottom, 1 - 2 * side, 1 - bottom))
    low, high = _scale(rows)
    axes.set(xlim=(low, high), ylim=(height, 0), facecolor="none", yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.tick_params(colors=_MUTED, length=0, pad=4, labelsize=11)
    axes.spines[:].set_visible(False)
    base = next((row["mean"] for row in rows if row["baseline"]), None)
    for i, row in enumerate(rows):
        axes.axhline(i * size, color=_RULE, linewidth=0.8, clip_on=False)
        _texts(axes, row, i * size, lines)
        _marks(axes, row, base, (i + 1) * size - _RAIL / 2 + 1, (low, high))
    axes.axhline(height, color=_RULE, linewidth=0.8, clip_on=False)
    return _inline(figure, {**_STAND_INS, _stand_in(0): colour(0)}, label)


def _texts(axes, row, top, lines):
    """Writes an arm's name at the left and its numbers at the right."""
    shade, weight = (_INK, "bold") if row["apart"] else (_MUTED, "normal")
    for x, line, text, style in (
        (0, 0, row["name"], dict(color=_INK, size=12, weight="bold")),
        (0, 1, _cut(row["detail"], 62), dict(color=_MUTED, size=11)),
        (1, 0, row["text"], dict(color=_INK, size=12)),
        (1, lines - 1, row["note"], dict(color=shade, size=11, weight=weight)),
    ):
        style |= dict(ha=("left", "right")[x], va="top")
        across = axes.get_yaxis_transform()  # 0 to 1 across, points down
        axes.text(x, top + _LINE * line + 7, text, transform=across, **style)


def _marks(axes, row, base, y, limits):
    """Draws interval, mean and seeds; an end beyond the limits becomes a caret."""
    blue = _stand_in(0)
    free = {"clip_on": False, "linestyle": "none"}  # no clip paths in the page
    if base is not None:
        axes.vlines(base, y - 11, y + 14, _MUTED, "dashed", linewidth=1, clip_on=False)
    if row["mean"] is None:
        return
    if row["half"] is not None:
        ends = row["mean"] - row["half"], row["mean"] + row["half"]
        inside = [min(max(end, limits[0]), limits[1]) for end in ends]
        axes.hlines(y, *inside, color=blue, linewidth=2, clip_on=False)
        for end, shown, caret in zip(ends, inside, "<>", strict=True):
            marker, size = (caret, 7) if shown != end else ("|", 10)
            axes.plot(shown, y, marker, color=blue, ms=size, mew=2, **free)
    if len(row["values"]) > 1:
        seeds = [y + 11] * len(row["values"])
        axes.plot(row["values"], seeds, "o", color=_MUTED, ms=4, mew=0, **free)
    marker, edge = ("s", _INK) if row["baseline"] else ("o", blue)
    fill = edge if row["baseline"] or row["apart"] else _PAPER
    axes.plot(row["mean"], y, marker, color=edge, mfc=fill, ms=9, mew=2.2, **free)


def _scale(rows):
    """A range that holds every value; intervals far wider than it are cut."""
    values = [value for row in rows for value in row["values"]]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) * 0.1 or 1.0
    measured = [row for row in rows if row["mean"] is not None]
    ends = [row["mean"] + s * (row["half"] or 0.0) for row in measured for s in (-1, 1)]
    low = max(min(low, *ends), low - span)
    high = min(max(high, *ends), high + span)
    room = 0.06 * ((high - low) or span)
    return low - room, high + room


# -- the graph of stages ------------------------------------------------------

_WIDTH, _HEIGHT, _GAP, _LEVEL = 120, 46, 16, 84
_THREAD = 10  # room a long edge takes on a level it only passes


def graph(nodes, edges):
    """Draws stages from top (roots) to bottom, each below everything it needs.

    Args:
        nodes: {name: {"note": str, "colour": stage index, or None for a model that
            came from outside the run}}.
        edges: [(parent, child, main)]; main edges hand over weights and are solid.

    Returns:
        Markup, an `<svg>`, or an empty one for no nodes.
    """
    levels, links = _levels(nodes, edges)
    rows = _ordered(levels, links)
    places, width = _places(rows)
    height = len(rows) * _LEVEL - (_LEVEL - _HEIGHT) + 4
    parts = [
        f'<svg role="img" viewBox="0 0 {width} {height}" '
        f'style="width:{width:g}px;min-width:{0.75 * width:g}px" '
        f'aria-label="{escape(_spoken(edges))}">'
    ]
    for parent, child, path, main in links:
        points = [places[name] for name in (parent, *path, child)]
        parts.append(_edge(points, main))
    for name, node in nodes.items():
        parts.append(_node(name, node, places[name]))
    return Markup("".join(parts) + "</svg>")


def _spoken(edges):
    if not edges:
        return "Stages"
    return "Stages: " + "; ".join(f"{a} leads to {b}" for a, b, _ in edges)


def depths(names, edges):
    """{name: longest path from a root}; edges that would close a circle are ignored."""
    depth = dict.fromkeys(names, 0)
    for _ in names:
        for parent, child, *_rest in edges:
            depth[child] = max(depth[child], min(depth[parent] + 1, len(depth) - 1))
    return depth


def _levels(nodes, edges):
    """Names by level, and each edge with the threads it passes levels by."""
    depth = depths(nodes, edges)
    levels = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for name in nodes:
        levels[depth[name]].append(name)
    levels = [level for level in levels if level]
    at = {name: i for i, level in enumerate(levels) for name in level}
    links = []
    for parent, child, main in edges:
        # One thread a parent and level: its long edges run together, then part.
        path = [(parent, main, i) for i in range(at[parent] + 1, at[child])]
        for thread in path:
            if thread not in levels[thread[2]]:
                levels[thread[2]].append(thread)
        links.append((parent, child, path, main))
    return levels, links


def _ordered(levels, links):
    """Orders each level by the mean place of its neighbours, to cross few edges."""
    neighbours = {}
    for parent, child, path, _ in links:
        chain = [parent, *path, child]
        for a, b in zip(chain, chain[1:], strict=False):
            neighbours.setdefault(a, []).append(b)
            neighbours.setdefault(b, []).append(a)
    rows = [list(level) for level in levels]
    for _ in range(6):
        for sweep in (rows, rows[::-1]):
            place = {
                name: (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)
            }
            for row in sweep:
                wish = {
                    name: sum(place[n] for n in near) / len(near)
                    for name in row
                    if (near := neighbours.get(name))
                }
                row.sort(key=lambda name: wish.get(name, place[name]))
                place |= {name: (i + 0.5) / len(row) for i, name in enumerate(row)}
    return rows


def _places(rows):
    """{name: (x of the middle, y of the top)}, and the picture's width, in pixels."""
    sizes = [[_THREAD if isinstance(n, tuple) else _WIDTH for n in row] for row in rows]
    width = max(sum(row) + _GAP * (len(row) - 1) for row in sizes) + 4
    places = {}
    for level, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        x = (width - sum(size) - _GAP * (len(row) - 1)) / 2
        for name, one in zip(row, size, strict=True):
            places[name] = (x + one / 2, 2 + level * _LEVEL)
            x += one + _GAP
    return places, width


def _edge(points, main):
    x, y = points[0]
    path = f"M{x:g} {y + _HEIGHT}"
    y += _HEIGHT
    for nx, ny in points[1:]:
        bend = (y + ny) / 2
        path += f"C{x:g} {bend:g} {nx:g} {bend:g} {nx:g} {ny}"
        x, y = nx, ny
        if (nx, ny) != points[-1]:  # a thread runs straight down past its level
            y += _HEIGHT
            path += f"L{x:g} {y}"
    return f'<path class="edge{"" if main else " side"}" d="{path}"/>'


def _node(name, node, place):
    x, y = place[0] - _WIDTH / 2, place[1]
    outside = node["colour"] is None
    shade = "var(--muted)" if outside else colour(node["colour"])
    kind = "node outside" if outside else "node"
    return (
        f'<g class="{kind}"><title>{escape(name)}</title>'
        f'<rect x="{x:g}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="7" '
        f'style="stroke:{shade}"/>'
        f'<text x="{place[0]:g}" y="{y + 20}" class="name">{escape(_cut(name, 12))}'
        f'</text><text x="{place[0]:g}" y="{y + 36}" class="note">'
        f"{escape(_cut(node['note'], 19))}</text></g>"
    )


def _cut(text, length):
    return text if len(text) <= length else text[: length - 1] + "…"
