"""A plan on the terminal."""

from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagecraft import chips
from stagecraft.pods import plan, shapes

ASSUMPTIONS = (
    "bound: the largest of compute, HBM, ICI and DCN, each at its peak and the others "
    "overlapped; no forecast, but the least time. Compiling, data, evaluations and "
    "saves come on top."
)


def heading(config: ConfigDict, topology: chips.Topology) -> None:
    """Prints what is planned for."""
    chip = topology.chip
    how = "compiled" if topology.compiles else "from formulas: no compiler for it here"
    line = (
        f"{topology.name}: {topology.chips} chips on {topology.hosts} host(s), each "
        f"{plan.in_gib(chip.memory)} at {chip.bandwidth / 1e12:.2f} TB/s, "
        f"{chip.peaks['bfloat16'] / 1e12:,.0f} TFLOP/s in bfloat16 ({chip.source}); "
        f"{how}"
    )
    _print(line)
    if remark := shapes.vocabulary(config)[1]:
        _print(remark)


def stage(one: plan.StagePlan, topology: chips.Topology) -> None:
    """Prints what one stage needs."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in one.mesh.items())
    _print(
        f"\n{one.name} ({one.kind}): {one.parameters / 1e9:.3g}B parameters trained, "
        f"{one.rows} rows of {one.length} tokens, {sizes}; {'; '.join(one.kernels)}"
    )
    Console(highlight=False).print(_table(one))
    for program in one.programs:
        if topology.compiles:
            _print(_counted(program))
        for e in program.exchanges:
            if e.bytes > 2**20:
                axes = "+".join(e.axes) or "?"
                _print(
                    f"  {program.name}: {e.kind} over {axes} ({e.over}), "
                    f"{e.count:.0f} times, {plan.in_gib(e.bytes)}, "
                    f"{1e3 * e.seconds:.1f} ms"
                )
    if one.decode:
        _print(
            f"  decode bound (weights and cache read for each token): "
            f"{one.decode['tokens_per_second']:,.0f} tokens/s a chip, cache "
            f"{plan.in_gib(one.decode['cache_bytes'])}"
        )
    room = plan.in_gib(topology.memory)
    line = f"  {plan.in_gib(one.peak)} of {room} a device"
    if one.seconds is not None:
        line += (
            f"; at the bounds a step takes {one.seconds:.3g} s: "
            f"{one.tokens_per_second:,.0f} tokens/s a chip, MFU {one.mfu:.1%}; "
            f"{one.steps:,} steps: {one.chip_hours:,.1f} chip-hours"
        )
    _print(line)
    if one.saving:
        _print(_saving(one.saving))
    if one.advice:
        _print(one.advice)


def _table(one):
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("program", no_wrap=True, min_width=9)
    heads = ("args", "temp", "out", "peak", "TFLOPs")
    for head in (*heads, "compute", "HBM", "ICI", "DCN", "bound"):
        table.add_column(head, justify="right", no_wrap=True)
    for program in one.programs:
        memory = program.memory
        cells = [program.name]
        cells += [_gib(memory.get(k)) for k in ("arguments", "temporaries", "outputs")]
        cells += [_gib(program.peak), _tera(program.flops)]
        bounds = program.bounds
        cells += [_seconds(s) for s in bounds] if bounds else ["–"] * 4
        cells.append(bounds.name if bounds else "too large")
        table.add_row(*map(Text, cells))
    return table


def _counted(program):
    """Returns the counts of FLOPs side by side, in one line."""
    parts = [f"{_tera(program.flops)} TFLOPs a device"]
    if program.ledger_flops:
        parts.append(f"ledger {_tera(program.ledger_flops)}")
    if once := program.xla_flops.get("once"):
        corrected = _tera(program.xla_flops["corrected"])
        parts.append(f"XLA {_tera(once)}, loops corrected {corrected}")
    how = " and ".join(map(str, program.depths))
    how = f"compiled at {how} layers" if how else "compiled"
    parts.append(f"{how} in {program.seconds_to_compile:.0f} s")
    return f"  {program.name}: " + ", ".join(parts)


def _saving(saving):
    """Returns in one line how often to save."""
    best, most = _plain(saving.best / 60), _plain(saving.most / 60)
    text = (
        f"  a failure every {_plain(saving.failures / 3600)} h, a save stops it for "
        f"{saving.save:.2g} s: goodput {saving.given:.1%} as configured, "
        f"{saving.goodput:.1%} with every.save_minutes={best}"
    )
    return text + (f", 95% up to {most}" if saving.most else "; 95% is out of reach")


def _plain(number):
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}"


def _gib(size):
    return "–" if size is None else f"{size / chips.GIB:.2f}"


def _tera(flops):
    return f"{flops / 1e12:.1f}" if flops else "–"


def _seconds(seconds):
    return f"{1e3 * seconds:.1f}" if seconds else "–"


def total(sums: dict, topology: chips.Topology) -> None:
    """Prints what the whole graph takes."""
    line = (
        f"\nall: {sums['chip_hours']:,.0f} chip-hours, {sums['days']:.2f} days on "
        f"{topology.chips} chips"
    )
    if sums["dollars"] is not None:
        line += f", ${sums['dollars']:,.0f}"
    if sums["without"]:
        line += f"; without {', '.join(sums['without'])}"
    _print(line)
    _print("memory in GiB a device, times in ms; " + ASSUMPTIONS)


def _print(line):
    Console(highlight=False, soft_wrap=True).print(line, markup=False)
