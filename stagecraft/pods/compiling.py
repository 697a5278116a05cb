"""Compiles the programs of a stage for chips that are not here."""

import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from stagecraft.chips import Topology
from stagecraft.errors import UserError
from stagecraft.pods import hlo, roofline, shapes

_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Compiled(NamedTuple):
    """A program as the compiler left it.

    Attributes:
        seconds: that it took to lower and compile.
        memory: {"arguments", "temporaries", "outputs", "aliased", "peak"}, bytes a
            device; the peak is the compiler's, of all of them together.
        flops_once: XLA's count, the body of every loop once.
        counts: ours of its text.
        largest: [(bytes, what)] of its largest arrays in HBM.
        error: why it does not compile, "" where it does: it needs more than there is,
            and of its memory only the temporaries are known.
        depths: numbers of layers that it was compiled with, where that of the model is
            more; () where it was compiled whole.
    """

    seconds: float
    memory: dict[str, int]
    flops_once: float
    counts: hlo.Counts | None
    largest: list[tuple[int, str]]
    error: str = ""
    depths: tuple[int, ...] = ()


def devices(topology: Topology) -> list[Any]:
    """Returns the devices of TPUs that are not here, as their compiler describes them.

    Raises:
        UserError: libtpu is missing, or knows no such slice.
    """
    # Several processes may plan at once, and none of them runs anything.
    # Nothing is asked of a metadata server, and nothing said about its silence.
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    name, more = topology.name, {}
    if topology.slices > 1:
        name, more = name.partition("x")[2], {"num_slices": topology.slices}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **more).devices)
    except Exception as error:  # of many kinds, by what is wrong
        text = " ".join(str(error).split())
        if "libtpu" in text or isinstance(error, ImportError):
            raise UserError(
                f"--topology={topology.name}: its compiler is missing; install it with "
                "pip install 'stagecraft-lm[plan]'"
            ) from error
        raise UserError(
            f"--topology={topology.name}: libtpu knows no such slice ({text[:160]})"
        ) from error


def compile_program(program: Any, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles one `stages.stage.Program` for the devices of its mesh."""
    started = time.perf_counter()
    with shapes.on(mesh):
        lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(str(error), time.perf_counter() - started)
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        seconds=seconds,
        memory={
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
        },
        flops_once=compiled.cost_analysis()["flops"],
        counts=hlo.read(text, mesh.size),
        largest=largest(text),
    )


def depths(specs: Sequence[Any]) -> tuple[int, ...]:
    """Returns two depths from which that of a model follows; () where it is as small.

    They begin with the same layers as the model, and end with the same part of the
    pattern in which its layers repeat.

    Args:
        specs: what kind each layer is of, from the first to the last.

    >>> depths(["local"] * 32), depths((["local"] * 5 + ["global"]) * 8)
    ((2, 4), (6, 12))
    >>> depths(["dense"] + ["sparse"] * 31), depths(["dense"] * 4)
    ((), ())
    """
    layers = len(specs)
    period = next(
        p
        for p in range(1, layers + 1)
        if all(specs[i] == specs[i % p] for i in range(layers))
    )
    step = period * -(-2 // period)
    few = step + layers % period
    return (few, few + step) if few + step < layers else ()


def extended(
    few: Compiled, many: Compiled, depths: Sequence[int], layers: int
) -> Compiled:
    """Returns a program of a deep model, from the same program of two shallow ones.

    What a layer adds is the difference of the two, as often as there are layers more.
    The largest arrays are those of the deeper of them.

    Args:
        few, many: as compiled.
        depths: their numbers of layers.
        layers: that of the model.
    """
    seconds = few.seconds + many.seconds
    for one in (few, many):
        if one.error:
            return one._replace(seconds=seconds, depths=tuple(depths))
    share = (layers - depths[0]) / (depths[1] - depths[0])
    weights = (1 - share, share)

    def total(a, b):
        return weights[0] * a + weights[1] * b

    return Compiled(
        seconds=seconds,
        memory={k: round(total(v, many.memory[k])) for k, v in few.memory.items()},
        flops_once=total(few.flops_once, many.flops_once),
        counts=hlo.weighted([*zip(weights, (few.counts, many.counts), strict=True)]),
        largest=many.largest,
        depths=tuple(depths),
    )


def largest(text: str, count: int = 5) -> list[tuple[int, str]]:
    """Returns the largest arrays that a program makes in HBM: (bytes, what it is)."""
    best, body = {}, False
    for line in text.splitlines():
        if line.endswith("{"):
            body = "fused" in line or "all-reduce-scatter" in line
        if body or " = " not in line or not line.startswith("  "):
            continue
        one = hlo.parse(line)
        if one.opcode in (
            "parameter",
            "tuple",
            "get-tuple-element",
            "bitcast",
            "while",
        ):
            continue
        for array in one.arrays:
            if array.in_hbm:
                where = re.search(r'op_name="([^"]*)"', line)
                what = _plain(where[1]) if where else one.opcode
                shape = ",".join(map(str, array.shape))
                label = f"{array.dtype}[{shape}] {what}"
                best[label] = array.bytes
    ranked = sorted(((size, label) for label, size in best.items()), reverse=True)
    return ranked[:count]


def _plain(name):
    """Returns the end of an operation's name, which says what it is in our code."""
    parts = [p for p in name.split("/") if p not in ("closed_call", "checkpoint")]
    return "/".join(parts[-2:])


def _too_large(text, seconds):
    """Reads what XLA says of a program that needs more memory than there is."""
    needs = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", text)
    size = 0
    if needs:
        size = int(float(needs[1]) * 1024 ** " KMGT".index(needs[2] or " "))
    return Compiled(
        seconds=seconds,
        memory={"temporaries": size},
        flops_once=0.0,
        counts=None,
        largest=[],
        error=" ".join(text.split())[:300],
    )


def exchanges(compiled: Compiled, mesh, topology: Topology) -> list[roofline.Exchange]:
    """Returns what a compiled program exchanges."""
    return roofline.exchanges(compiled.counts.collectives, mesh, topology)
