"""The table of `stagecraft bench --page=FILE`: one row a figure, both sides beside."""

from collections.abc import Sequence
from pathlib import Path

from stagecraft import storage
from stagecraft.errors import UserError

START = "<!-- stagecraft bench --what=all --peers=ENV --page=docs/speed.md -->"
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


def table(lines: Sequence[dict]) -> str:
    """Returns the Markdown table of what `bench` printed.

    A step's seconds are its median with the fastest and the slowest behind it, the
    ratio that of tokens a second, ours over theirs: the median of the turns, with the
    lowest and the highest behind it.
    """
    rows = [HEADER, ("---",) * len(HEADER), *map(_row, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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


def check(page: str) -> None:
    """Refuses a page without the two markers, before anything is timed."""
    path = Path(page)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if START not in text or END not in text.partition(START)[2]:
        raise UserError(
            f"--page={page}: expected a file with the lines {START!r} and {END!r}, "
            "between which the table goes"
        )


def write(page: str, lines: Sequence[dict]) -> None:
    """Puts the table between the markers of a page that `check` let pass."""
    path = Path(page)
    head, _, rest = path.read_text(encoding="utf-8").partition(START)
    tail = rest.partition(END)[2]
    machine = ", ".join(
        f"{key} {lines[0][key]}" for key in ("device", "devices", "machine", "jax")
    )
    peers = next((line["peer"]["with"] for line in lines if "peer" in line), None)
    beside = f"; theirs: {peers}" if peers else ""
    rate = f"matrix rate {lines[0]['matmul_gflops_per_s']:.0f} GFLOP/s"
    text = f"{head}{START}\n{table(lines)}\n\n({machine}, {rate}{beside})\n{END}{tail}"
    storage.write_text(path, text)
