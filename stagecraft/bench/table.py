"""The table of `stagecraft bench --page=FILE`: one row a figure, both sides beside."""

from collections.abc import Sequence
from pathlib import Path

from stagecraft import storage
from stagecraft.errors import UserError

# {which: the line before its table}, and the line behind either.
MARKS = {
    "peers": "<!-- stagecraft bench --what=all --peers=ENV --page=docs/speed.md -->",
    "accelerator": "<!-- stagecraft bench --preset=1b --page=docs/speed.md -->",
    "growth": "<!-- stagecraft bench --growth --page=docs/speed.md -->",
}
END = "<!-- end of bench -->"

HEADER = (
    "what",
    "ours, s",
    "theirs, s",
    "tokens a second, ratio",
    "CPU time a token, ratio",
    "share of the matrix rate",
    "temporaries, MiB",
)


ACCELERATOR = (
    "what",
    "seconds",
    "tokens a second a device",
    "MFU",
    "share of the matrix rate",
    "share of the memory's rate",
    "peak memory, GiB",
    "attention",
    "where the time goes",
)


def accelerator_table(lines: Sequence[dict]) -> str:
    """Returns the Markdown table of a preset on an accelerator.

    MFU is model FLOPs (remat not counted) over the device's peak; the memory's rate is
    that of its data sheet, and sampling's share counts weights and cache alone.
    """
    return _markdown(ACCELERATOR, map(_accelerator_row, lines))


def _accelerator_row(line):
    sections = line.get("sections", {})
    return (
        f"{line['what']} {line['shape']}",
        _span(*(line[k] for k in ("step_s", "fastest_s", "slowest_s"))),
        f"{line['tokens_per_s'] / line['devices']:,.0f}",
        *(f"{line[k]:.1%}" if k in line else "" for k in _SHARES),
        f"{line['peak_memory_bytes'] / 2**30:.1f}",
        line.get("attention", ""),
        ", ".join(f"{name} {share:.0%}" for name, share in sections.items()),
    )


def growth_table(lines: Sequence[dict]) -> str:
    """Returns the Markdown table of how time grows beside the FLOPs it is for.

    A cell is by how much the CPU time (an accelerator's: the time) of a step grows, and
    that over the growth of its FLOPs: above 1, time grows faster.
    """
    sizes = list(dict.fromkeys(tuple(line["grown"]) for line in lines))
    header = ("what", "share of the matrix rate", *(f"{a} × {n}" for a, n in sizes[1:]))
    cases = {}
    for line in lines:
        size = tuple(line["grown"])
        name = line["what"].partition("_")[0]  # samples are named by their rows
        cases.setdefault(name, {})[size] = line
    return _markdown(header, (_growth_row(n, c, sizes) for n, c in cases.items()))


def _growth_row(name, by_size, sizes):
    base = by_size[sizes[0]]
    key = "cpu_s" if base["device"] == "cpu" else "step_s"

    def cell(line):
        seconds = line[key] / base[key]
        flops = _flops(line) / _flops(base)
        return f"{seconds:.1f} ({seconds / flops:.2f})"

    cells = (cell(by_size[size]) for size in sizes[1:])
    return (f"{name} {base['shape']}", f"{base['share_of_matmul']:.0%}", *cells)


def _flops(line):
    return line["gflops_per_s"] * line["step_s"]


_SHARES = ("mfu", "share_of_matmul", "share_of_bandwidth")


def _markdown(header, rows):
    rows = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table(lines: Sequence[dict]) -> str:
    """Returns the Markdown table of what `bench` printed.

    A step's seconds are its median with the fastest and the slowest behind it, the
    ratio that of tokens a second, ours over theirs: the median of the turns, with the
    lowest and the highest behind it.
    """
    return _markdown(HEADER, map(_row, lines))


def _row(line):
    peer = line.get("peer", {})
    temporary = [c["temporary_bytes"] for c in line.get("programs", {}).values()]
    return (
        f"{line['what']} {line['shape']}",
        _span(*(line[k] for k in ("step_s", "fastest_s", "slowest_s"))),
        _span(*(peer[k] for k in ("step_s", "fastest_s", "slowest_s"))) if peer else "",
        _span(peer["ratio"], *peer["ratio_range"]) if peer else "",
        f"{peer['cpu_ratio']:.2f}" if peer else "",
        f"{line['share_of_matmul']:.0%}",
        f"{max(temporary) / 2**20:.0f}" if temporary else "",
    )


def _span(middle, low, high):
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def check(page: str, mark: str) -> None:
    """Refuses a page without the mark of a table, before anything is timed."""
    path = Path(page)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if mark not in text or END not in text.partition(mark)[2]:
        raise UserError(
            f"--page={page}: expected a file with the lines {mark!r} and {END!r}, "
            "between which the table goes"
        )


def write(page: str, lines: Sequence[dict], mark: str) -> None:
    """Puts the table behind its mark in a page that `check` let pass."""
    path = Path(page)
    head, _, rest = path.read_text(encoding="utf-8").partition(mark)
    tail = rest.partition(END)[2]
    keys = ("device", "devices", "machine", "jax", "preset", "dtype")
    machine = ", ".join(f"{key} {lines[0][key]}" for key in keys)
    peers = next((line["peer"]["with"] for line in lines if "peer" in line), None)
    beside = f"; theirs: {peers}" if peers else ""
    rate = f"matrix rate {lines[0]['matmul_gflops_per_s']:.0f} GFLOP/s"
    tables = dict(peers=table, accelerator=accelerator_table, growth=growth_table)
    which = next(name for name, line in MARKS.items() if line == mark)
    below = f"({machine}, {rate}{beside})"
    text = f"{head}{mark}\n{tables[which](lines)}\n\n{below}\n{END}{tail}"
    storage.write_text(path, text)
