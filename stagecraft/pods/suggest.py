"""`stagecraft plan --suggest`: the fastest mesh, micro-batches and remat that fit.

Formulas rank all layouts; the first few are then compiled, where a compiler is here,
and the fastest one that really fits is printed as overrides to paste.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict
from rich.console import Console

from stagecraft import chips, experiment
from stagecraft.errors import UserError
from stagecraft.models.config import ModelConfig
from stagecraft.pods import compiling, formulas, plan, shapes
from stagecraft.pods.formulas import Layout

REMATS = ("none", "dots", "names", "full")
# The share of memory that formulas may fill, and the difference between two times that
# they cannot tell apart.
MARGIN, NEAR = 0.9, 0.05


class Candidate(NamedTuple):
    """A layout and what formulas say of it."""

    layout: Layout
    seconds: float
    peak: float


def candidates(one: shapes.StageShapes, topology: chips.Topology) -> list[Candidate]:
    """Returns the layouts that fit by formula, the fastest first.

    Args:
        one: the stage, on any mesh.
        topology: where it would run.
    """
    rows, length = plan.rows_trained(one), int(one.work["length"])
    state = shapes.device_bytes(one.state) + sum(
        shapes.device_bytes(m) for m in one.parents.values()
    )
    now = plan.layout_of(one)
    room = MARGIN * topology.memory
    fit = []
    for layout in layouts(one.model, rows, topology):
        # Arrays of weights are split over fsdp and tensor alone.
        own = state * now.fsdp * now.tensor / (layout.fsdp * layout.tensor)
        estimate = formulas.step(
            one.model, layout, topology, rows=rows, length=length, state_bytes=own
        )
        if estimate.peak <= room:
            fit.append(Candidate(layout, estimate.seconds, estimate.peak))
    # Of those that formulas cannot tell apart the plainest: few parts, then much room.
    best = min((c.seconds for c in fit), default=0.0)

    def rank(one):
        steps = round(math.log(one.seconds / best) / NEAR)
        return steps, one.layout.micro_batches, one.layout.tensor, one.peak

    return sorted(fit, key=rank)


def layouts(model: dict, rows: int, topology: chips.Topology) -> Iterator[Layout]:
    """Yields every layout over which the model and the rows divide."""
    c = ModelConfig(**model)
    devices = topology.devices
    split = [c.heads, c.kv_heads, c.ff_width, c.vocab_size]
    split += [c.expert_width] if c.experts else []
    for tensor in _divisors(devices):
        if any(size % tensor for size in split):
            continue
        for fsdp in _divisors(devices // tensor):
            data = devices // tensor // fsdp
            if c.width % fsdp or data % topology.slices or rows % (data * fsdp):
                continue
            for micro in _divisors(rows // (data * fsdp)):
                for remat in REMATS:
                    yield Layout(data, fsdp, tensor, micro, remat)


def _divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def overrides(name: str, layout: Layout) -> list[str]:
    """Returns a layout as flags; mesh and remat are those of every stage."""
    return [
        f"--config.mesh.data={layout.data}",
        f"--config.mesh.fsdp={layout.fsdp}",
        f"--config.mesh.tensor={layout.tensor}",
        f"--config.stages.{name}.micro_batches={layout.micro_batches}",
        f"--config.model.remat={layout.remat}",
    ]


def suggest(
    config: ConfigDict,
    topology: chips.Topology,
    only: Sequence[str] = (),
    compiles: int = 3,
) -> dict:
    """Searches the layout of one stage.

    Args:
        config: what an experiment's `get_config` returns.
        topology: where it would run.
        only: the stage; the first that trains where it is ().
        compiles: most compilations of an update.

    Returns:
        {"stage", "layout", "seconds", "peak", "compiled": how many were, "flags"}.

    Raises:
        UserError: no layout fits.
    """
    devices = compiling.devices(topology) if topology.compiles else topology.devices
    config = _divisible(config, topology)
    one = next(shapes.stages(config, devices, only))
    ranked = candidates(one, topology)
    if not ranked:
        raise UserError(
            f"--topology={topology.name}: by formula no mesh, micro-batches and remat "
            f"let {one.name} fit; use more chips, or stages.{one.name}.lora.rank=16"
        )
    best, compiled = ranked[0], 0
    if topology.compiles:
        measured = []
        for candidate in ranked[:compiles]:
            changed = _with(config, one.name, candidate.layout)
            [stage] = plan.plan(changed, topology, [one.name], ["update"])
            compiled += 1
            if stage.fits and stage.seconds:
                measured.append(Candidate(candidate.layout, stage.seconds, stage.peak))
        if compiled and not measured:
            raise UserError(
                f"{one.name}: none of the {compiled} best layouts by formula fits when "
                "compiled; raise --compiles, or use more chips"
            )
        best = min(measured, key=lambda c: c.seconds) if measured else best
    return {
        "stage": one.name,
        "layout": best.layout._asdict(),
        "seconds": best.seconds,
        "peak": best.peak,
        "compiled": compiled,
        "flags": overrides(one.name, best.layout),
    }


def _divisible(config, topology):
    """Returns the config on a mesh that any batch divides over, to start from."""
    config = config.copy_and_resolve_references()
    config.mesh = dict(data=topology.slices, fsdp=-1, tensor=1)
    width, devices = (
        experiment.resolve(config, check=False).model.width,
        topology.devices,
    )
    if width % (devices // topology.slices):
        fsdp = math.gcd(width, devices // topology.slices)
        config.mesh = dict(data=-1, fsdp=fsdp, tensor=1)
    for stage in config.stages.values():
        if "mesh" in stage:
            stage.mesh = dict(data=0, fsdp=0, tensor=0)
    return config


def _with(config, name, layout):
    config = config.copy_and_resolve_references()
    sizes = dict(data=layout.data, fsdp=layout.fsdp, tensor=layout.tensor)
    config.mesh = sizes
    config.stages[name].micro_batches = layout.micro_batches
    config.model.remat = layout.remat
    return config


def show(config, topology, only=(), compiles=3) -> None:
    """Prints what `suggest` returns, as flags to paste."""
    best = suggest(config, topology, only, compiles)
    how = f"{best['compiled']} compiled" if best["compiled"] else "by formula alone"
    Console(highlight=False, soft_wrap=True).print(
        f"{best['stage']} on {topology.name}: {best['seconds']:.3g} s a step at the "
        f"bounds, {plan.in_gib(best['peak'])} of {plan.in_gib(topology.memory)} a "
        f"device ({how})\n" + " ".join(best["flags"]),
        markup=False,
    )
