"""`stagecraft plan`: what every stage of a run would need on chips that are not here.

Where a compiler for the chips runs on this machine (TPUs, through libtpu), every
program of every stage is compiled for them from shapes alone, and read. Elsewhere
(GPUs) the figures are those of `formulas`.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from stagecraft import chips, schema, sharding, tree
from stagecraft.anatomy import cost
from stagecraft.models import kernels
from stagecraft.models.config import ModelConfig
from stagecraft.pods import compiling, formulas, goodput, roofline, shapes
from stagecraft.pods.roofline import Bounds
from stagecraft.stages import kinds

# Memory that the runtime and the compiler keep for themselves.
RESERVED = 0.02
HEADLESS = ("evaluate",)  # programs that are no part of a step
# Programs in which layers are written out one by one, so that compiling takes longer
# the more there are: compiled at two small depths.
UNROLLED = ("sample",)


@dataclasses.dataclass
class ProgramPlan:
    """What one program needs.

    Attributes:
        name: as of `Stage.programs`.
        memory: as of `compiling.Compiled`; of an estimate by formula, {part: bytes}.
        peak: bytes a device while it runs, with all that lies beside it.
        bounds: seconds by resource; None where it does not compile.
        flops: a device's products, loops as often as they run, kernels included.
        xla_flops: XLA's count, {"once", "corrected"}; {} without a compiler.
        ledger_flops: by the ledger (`anatomy.cost`); None where it has no such split.
        exchanges: what devices exchange.
        largest: [(bytes, what)] of the largest arrays.
        seconds_to_compile: on this machine.
        error: what the compiler said, "" where it fits.
        depths: as of `compiling.Compiled`.
    """

    name: str
    memory: dict[str, float]
    peak: float
    bounds: Bounds | None
    flops: float = 0.0
    xla_flops: dict[str, float] = dataclasses.field(default_factory=dict)
    ledger_flops: float | None = None
    exchanges: list[roofline.Exchange] = dataclasses.field(default_factory=list)
    largest: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    seconds_to_compile: float = 0.0
    error: str = ""
    depths: tuple[int, ...] = ()


@dataclasses.dataclass
class StagePlan:
    """What one stage needs.

    Attributes:
        name, kind: of the stage.
        mesh: {axis: size}.
        rows, length: of a batch.
        steps: of the stage.
        parameters: of the model it trains.
        state_bytes, frozen_bytes: of a device.
        programs: a list of `ProgramPlan`.
        kernels: what attention and experts run on, with the reason.
        flops: of a step by the ledger, on all devices.
        tokens: of a step that are trained on.
        decode: of `formulas.decode`, for a stage that samples; else {}.
        peak: bytes a device.
        fits: whether that is less than there is.
        seconds: of a step at the bounds; None where a program does not compile.
        tokens_per_second: of a chip, at that.
        mfu: share of the peak that the ledger's FLOPs would reach at that.
        chip_hours: of all steps.
        advice: the line for a stage that does not fit.
        saving: the `goodput.Saving` of its checkpoints.
    """

    name: str
    kind: str
    mesh: dict[str, int]
    rows: int
    length: int
    steps: int
    parameters: int
    state_bytes: int
    frozen_bytes: int
    programs: list[ProgramPlan]
    kernels: list[str]
    flops: float
    tokens: float
    decode: dict[str, float]
    peak: float = 0.0
    fits: bool = True
    seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    chip_hours: float | None = None
    advice: str = ""
    saving: goodput.Saving | None = None


def plan(
    config: ConfigDict,
    topology: chips.Topology,
    only: Sequence[str] = (),
    programs: Sequence[str] = (),
    **failing: float,
) -> Iterator[StagePlan]:
    """Yields what each stage that trains needs, parents first.

    Args:
        config: what an experiment's `get_config` returns.
        topology: where it would run.
        only: names of stages; () for all.
        programs: names of programs to compile; () for all.
        **failing: how often chips fail, and what a restart takes, as of
            `goodput.saving`.
    """
    devices = compiling.devices(topology) if topology.compiles else topology.devices

    def compiled(one, name):
        whole = one.programs[name]
        specs = ModelConfig(**one.model).layer_specs
        depths = compiling.depths(specs) if name in UNROLLED else ()
        if not depths:
            return compiling.compile_program(whole, one.mesh)
        shallow = []
        for layers in depths:
            [small] = shapes.stages(config, devices, [one.name], layers=layers)
            program = small.programs[name]
            shallow.append(compiling.compile_program(program, small.mesh))
        return compiling.extended(*shallow, depths, len(specs))

    for one in shapes.stages(config, devices, only):
        plan = _stage(one, topology, programs, compiled)
        minutes = one.config.every.save_minutes
        plan.saving = goodput.saving(
            plan.state_bytes, minutes, topology.chips, **failing
        )
        yield plan


def _stage(one, topology, wanted, compiled):
    work = dict(one.work)
    length = int(work.pop("length"))
    context = (length + 1) / 2
    adapter = bool(one.config.lora.rank)

    def ledger(uses):
        counters = {use: work[use] for use in uses if use in work}
        counters["context"] = context
        return cost.stage_flops(counters, one.model, scalar=one.scalar, adapter=adapter)

    trained = next((work[u] for u in ("trained", "scalar_trained") if work.get(u)), 0)
    state = shapes.device_bytes(one.state)
    frozen = sum(shapes.device_bytes(m) for m in one.parents.values())
    plan = StagePlan(
        name=one.name,
        kind=one.config.kind,
        mesh=dict(one.mesh.shape),
        rows=one.config.batch_size,
        length=length,
        steps=one.config.steps,
        parameters=tree.count(one.programs["update"].arguments[0].model),
        state_bytes=state,
        frozen_bytes=frozen,
        programs=[],
        kernels=chosen_kernels(one.model, length, topology),
        flops=ledger(work),
        tokens=trained,
        decode=_decode(one, topology),
    )
    split = {
        "update": ledger([u for u in work if u.endswith("trained")]),
        "sample": ledger(["sampled"]),
    }
    if topology.compiles:
        for name in one.programs:
            if not wanted or name in wanted:
                plan.programs.append(
                    _read(one, name, compiled(one, name), topology, plan)
                )
    else:
        plan.programs = _by_formula(one, plan, topology, ledger, trained)
    for program in plan.programs:
        per_device = split.get(program.name)
        program.ledger_flops = per_device and per_device / one.mesh.size
    _conclude(plan, one, topology)
    return plan


def _read(one, name, compiled, topology, plan):
    """Returns what a compiled program needs."""
    program = one.programs[name]
    beside = plan.state_bytes + plan.frozen_bytes
    if compiled.error:
        return ProgramPlan(
            name=name,
            memory=compiled.memory,
            peak=compiled.memory["temporaries"]
            + beside
            + shapes.device_bytes(program.arguments)
            - _resident_arguments(program),
            bounds=None,
            largest=compiled.largest,
            seconds_to_compile=compiled.seconds,
            error=compiled.error,
            depths=compiled.depths,
        )
    memory = compiled.memory
    peak = memory["peak"] + beside - _resident_arguments(program)
    between = compiling.exchanges(compiled, one.mesh, topology)
    density = _density(one.model, plan.length)
    counts = compiled.counts
    bounds = roofline.bounds(
        counts, between, topology, dtype=one.model["dtype"], density=density
    )
    return ProgramPlan(
        name=name,
        memory=memory,
        peak=peak,
        bounds=bounds,
        flops=counts.products + roofline.kernel_flops(counts.kernels, density),
        xla_flops={
            "once": compiled.flops_once,
            "corrected": compiled.flops_once + counts.products - counts.products_once,
        },
        exchanges=between,
        largest=compiled.largest,
        seconds_to_compile=compiled.seconds,
        depths=compiled.depths,
    )


def _resident_arguments(program):
    """Returns the bytes of arguments that lie on a device all stage long."""
    return sum(shapes.device_bytes(a) for a in program.arguments if shapes.resident(a))


def _density(model, length):
    """Returns the share of pairs of tokens that attention sees, mean over layers."""
    specs = ModelConfig(**model).layer_specs
    half = (length + 1) / 2
    seen = [min(half, spec.window) if spec.window else half for spec in specs]
    return sum(seen) / len(seen) / length


def layout_of(one: shapes.StageShapes) -> formulas.Layout:
    """Returns the mesh, micro-batches and remat of a stage."""
    sizes = {axis: one.mesh.shape[axis] for axis in sharding.AXES}
    remat = one.model["remat"]
    return formulas.Layout(**sizes, micro_batches=one.config.micro_batches, remat=remat)


def rows_trained(one: shapes.StageShapes) -> int:
    """Returns the rows that one optimizer step is taken on."""
    tokens = next(one.work[u] for u in ("trained", "scalar_trained") if one.work.get(u))
    steps = one.config.get("epochs", 1)
    parts = steps * one.config.get("minibatches", 1)
    return max(1, round(tokens / one.work["length"] / parts))


def _by_formula(one, plan, topology, ledger, trained):
    """Estimates a stage without a compiler: the update, and all before it together."""
    layout = layout_of(one)
    step = formulas.step(
        one.model,
        layout,
        topology,
        rows=rows_trained(one),
        length=plan.length,
        state_bytes=plan.state_bytes,
        models=tree.count(one.state.model) / cost.parameters(one.model)["total"],
    )
    several = round(trained / (rows_trained(one) * plan.length))
    bounds = Bounds(*(several * seconds for seconds in step.bounds))
    memory = step.memory | {"frozen models": plan.frozen_bytes}
    peak = sum(memory.values())
    programs = [ProgramPlan("update", memory, peak, bounds)]
    programs[0].flops = bounds.compute * topology.peak(one.model["dtype"])
    rate = one.mesh.size * topology.peak(one.model["dtype"])
    if scored := [u for u in one.work if u.endswith("scored") and one.work[u]]:
        seconds = ledger(scored) / rate
        memory = {"state": plan.state_bytes, "frozen models": plan.frozen_bytes}
        beside = sum(memory.values())
        programs.insert(
            0, ProgramPlan("scores", memory, beside, Bounds(seconds, 0, 0, 0))
        )
    if plan.decode:
        memory = {"state": plan.state_bytes, "frozen models": plan.frozen_bytes}
        memory["cache"] = plan.decode["cache_bytes"]
        bounds = Bounds(ledger(["sampled"]) / rate, plan.decode["seconds"], 0, 0)
        programs.insert(0, ProgramPlan("sample", memory, sum(memory.values()), bounds))
    return programs


def _decode(one, topology):
    if not kinds.of(one.config).samples:
        return {}
    new = one.config.sampling.max_new_tokens
    prompts = one.config.batch_size * one.config.get("oversample", 1)
    samples = one.config.get("group_size", 2 if "alpha" in one.config else 1)
    return formulas.decode(
        one.model,
        layout_of(one),
        topology,
        rows=prompts * samples,
        prompt=int(one.work["length"]) - new,
        new=new,
    )


def chosen_kernels(model: dict, length: int, topology: chips.Topology) -> list[str]:
    """Returns what attention and experts would run on there, and why."""
    c, platform = ModelConfig(**model), topology.chip.platform
    request = kernels.Request(length, c.head_dim, c.dtype, c.attention_softcap)
    choice = kernels.choose(c.attention, request, platform=platform)
    lines = [f"attention: {choice.kernel} ({choice.reason})"]
    if c.experts:
        lines.append("products of experts: ragged_dot (the only one there)")
    return lines


def _conclude(plan, one, topology):
    """Sums up a stage's programs; says what would help where it does not fit."""
    plan.peak = max((p.peak for p in plan.programs), default=0.0)
    room = topology.memory * (1 - RESERVED)
    failed = [p for p in plan.programs if p.error]
    plan.fits = not failed and plan.peak <= room
    if not plan.fits:
        plan.advice = advice(plan, one, topology)
    step = [p for p in plan.programs if p.name not in HEADLESS]
    if failed or not step:
        return
    plan.seconds = sum(p.bounds.seconds for p in step)
    plan.tokens_per_second = plan.tokens / plan.seconds / topology.chips
    peak = one.mesh.size * topology.peak(one.model["dtype"])
    plan.mfu = plan.flops / plan.seconds / peak
    plan.chip_hours = plan.steps * plan.seconds * topology.chips / 3600


def advice(plan: StagePlan, one: shapes.StageShapes, topology: chips.Topology) -> str:
    """Returns one line: what fills the memory, and the three changes that help most."""
    worst = max(plan.programs, key=lambda p: p.peak)
    now, helps = layout_of(one), []
    length, rows = plan.length, rows_trained(one)
    named = [f"{in_gib(size)} {what}" for size, what in worst.largest[:3]]
    if not named:  # what does not compile has no arrays to name
        parts = formulas.step(one.model, now, topology, rows=rows, length=length).memory
        parts |= {"state": plan.state_bytes, "frozen models": plan.frozen_bytes}
        parts = sorted(parts.items(), key=lambda item: -item[1])
        named = [f"{what} {in_gib(size)}" for what, size in parts[:3]]

    def peak(layout):
        return formulas.step(one.model, layout, topology, rows=rows, length=length).peak

    base = peak(now)
    for text, layout in changes(now, rows, one.model):
        if base - peak(layout) > 0:
            helps.append((base - peak(layout), text))
    if not one.config.lora.rank:
        adapters = 12 * plan.parameters / (now.fsdp * now.tensor)
        helps.append((adapters, f"stages.{plan.name}.lora.rank=16"))
    helps.sort(reverse=True)
    listed = ", ".join(f"{text} (about -{in_gib(size)})" for size, text in helps[:3])
    return (
        f"{plan.name} does not fit: {worst.name} needs {in_gib(worst.peak)} of "
        f"{in_gib(topology.memory)} a device; largest: {'; '.join(named)}; what "
        f"would help most: {listed or 'more chips'}"
    )


def changes(
    now: formulas.Layout, rows: int, model: dict
) -> Iterator[tuple[str, formulas.Layout]]:
    """Yields (override, layout) of single changes that may save memory."""
    c = ModelConfig(**model)
    for micro in (2, 4):
        parts = now.micro_batches * micro
        if rows % (parts * now.rows) == 0:
            yield f"micro_batches={parts}", now._replace(micro_batches=parts)
    if now.remat != "full":
        yield "model.remat='full'", now._replace(remat="full")
    if now.data > 1:
        for factor in (now.data, 4, 2):
            if now.data % factor == 0 and c.width % (now.fsdp * factor) == 0:
                new = now._replace(data=now.data // factor, fsdp=now.fsdp * factor)
                yield f"mesh.data={new.data}, mesh.fsdp={new.fsdp}", new
                break
    if now.fsdp % 2 == 0 and not any(
        getattr(c, name) % (2 * now.tensor) for name in ("kv_heads", "ff_width")
    ):
        new = now._replace(fsdp=now.fsdp // 2, tensor=2 * now.tensor)
        yield f"mesh.fsdp={new.fsdp}, mesh.tensor={new.tensor}", new


def in_gib(size: float) -> str:
    """Returns bytes in words: 3.25 GiB, 410 MiB."""
    gib = size / chips.GIB
    return f"{gib:.2f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def total(stages: Sequence[StagePlan], topology: chips.Topology, price: float) -> dict:
    """Sums up the graph: chip-hours, days, and dollars at a price a chip-hour."""
    hours = [stage.chip_hours for stage in stages]
    known = [h for h in hours if h is not None]
    spent = sum(known)
    return {
        "chip_hours": spent,
        "days": spent / topology.chips / 24,
        "dollars": spent * price if price else None,
        "without": [s.name for s, h in zip(stages, hours, strict=True) if h is None],
    }


def as_json(
    stages: Sequence[StagePlan], topology: chips.Topology, price: float, **more: Any
) -> dict[str, Any]:
    """Returns a plan as JSON values."""
    chip = topology.chip
    return more | {
        "topology": {
            "name": topology.name,
            "chips": topology.chips,
            "devices": topology.devices,
            "hosts": topology.hosts,
            "memory": topology.memory,
            "peaks": {k: v / chip.cores for k, v in chip.peaks.items()},
            "bandwidth": topology.bandwidth,
            "link": chip.link / chip.cores,
            "dcn": topology.dcn,
            "source": chip.source,
        },
        "compiled": topology.compiles,
        "stages": [_plain(stage) for stage in stages],
        "total": total(stages, topology, price),
        "at": time.strftime("%Y-%m-%d"),
    }


def _plain(stage):
    plain = dataclasses.asdict(stage)
    for program, one in zip(plain["programs"], stage.programs, strict=True):
        program["bounds"] = one.bounds and one.bounds._asdict() | {
            "seconds": one.bounds.seconds,
            "name": one.bounds.name,
        }
        program["exchanges"] = [e._asdict() for e in one.exchanges]
    plain["saving"] = stage.saving and stage.saving._asdict()
    return schema.plain(plain)
