"""How fast a program can be at best: what its arithmetic, memory and links allow.

Every bound assumes that the others overlap it completely and that a device reaches its
peak, so the largest of them is the least time, not a forecast. ICI: rings in both
directions on every axis of the torus that a group covers whole (a multiple of what
wraps), one direction on a part of an axis; groups of one program share nothing at the
same time. DCN: sums between slices, each device sending its share.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import numpy as np

from stagecraft.chips import Topology
from stagecraft.pods import hlo

# Products that a splash-attention kernel does for each visible pair of tokens: scores
# and values forward; backward it computes the scores anew.
KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


class Bounds(NamedTuple):
    """Least seconds of each resource."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """Of all of them, overlapped."""
        return max(self)

    @property
    def name(self) -> str:
        """The one that decides."""
        return max(zip(self, self._fields, strict=True))[1]


class Exchange(NamedTuple):
    """What a program exchanges in one way along some axes.

    Attributes:
        kind: of `hlo.COLLECTIVES`, or "send".
        axes: of the mesh, that a group covers; () where the program does not say.
        over: "ICI" or "DCN".
        count: how often.
        bytes: of the gathered or reduced arrays, on each device.
        seconds: at the rate of the links.
        overlapped: share of the bytes that is sent while something else is computed.
    """

    kind: str
    axes: tuple[str, ...]
    over: str
    count: float
    bytes: float
    seconds: float
    overlapped: float


def exchanges(
    collectives: list[hlo.Collective], mesh: jax.sharding.Mesh, topology: Topology
) -> list[Exchange]:
    """Sums up a program's collectives by kind, axes and network."""
    sums = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for one in collectives:
        axes = axes_of(one.group, mesh)
        for over, seconds in _seconds(one, mesh, topology).items():
            total = sums[one.kind, axes, over]
            total[0] += one.times
            total[1] += one.times * one.bytes
            total[2] += one.times * seconds
            total[3] += one.times * one.bytes * one.overlapped
    return [
        Exchange(*key, count, size, seconds, overlapped / size if size else 0.0)
        for key, (count, size, seconds, overlapped) in sorted(sums.items())
    ]


def axes_of(group: tuple[int, ...], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ."""
    if not group:
        return ()
    places = np.unravel_index(np.array(group), mesh.devices.shape)
    return tuple(
        axis
        for axis, at in zip(mesh.axis_names, places, strict=True)
        if len(set(at.tolist())) > 1
    )


def _seconds(one, mesh, topology):
    """Returns {"ICI" or "DCN": seconds} of a collective, run once."""
    if one.kind == "send":
        return {"DCN": one.bytes / topology.dcn}
    devices = mesh.devices.ravel()[list(one.group)] if one.group else mesh.devices
    devices = devices.ravel()
    by_slice = defaultdict(list)
    for device in devices:
        by_slice[getattr(device, "slice_index", 0)].append(device)
    inner, slices = len(next(iter(by_slice.values()))), len(by_slice)
    rate = ici_rate(next(iter(by_slice.values())), topology)
    seconds = {"ICI": _ring(one.kind, one.bytes, inner) / rate if inner > 1 else 0.0}
    if slices > 1:
        share = one.bytes / (inner if one.kind == "all-reduce" else 1)
        seconds["DCN"] = _ring(one.kind, share, slices) / topology.dcn
    return seconds


def _ring(kind, size, count):
    """Returns the bytes each device sends in a group of `count`."""
    part = size * (count - 1) / count
    if kind == "all-reduce":
        return 2 * part
    if "all-to-all" in kind:
        return size * count / 4
    return size if kind.startswith("collective") else part


def ici_rate(devices: list[Any], topology: Topology) -> float:
    """Returns the bytes/s that each of some devices can send to the others."""
    chip = topology.chip
    if chip.platform == "gpu":
        return chip.link
    coordinates = np.array([device.coords for device in devices])
    rate = 0.0
    for axis, length in zip(coordinates.T, topology.shape, strict=False):
        places = len(set(axis.tolist()))
        if places > 1:
            ring = places == length and length % chip.wraps == 0
            rate += chip.link * (2 if ring else 1)
    return (rate or chip.link) / chip.cores


def kernel_flops(kernels: dict, density: float) -> float:
    """Returns the FLOPs of attention kernels, which XLA does not count.

    Args:
        kernels: `hlo.Counts.kernels`.
        density: share of all pairs of tokens that is visible.
    """
    total = 0.0
    for name, calls in kernels.items():
        products = next(
            (n for start, n in KERNEL_PRODUCTS.items() if name.startswith(start)), 0
        )
        for times, arrays in calls:
            # Queries come first of its numbers, [B, H, T, C]; one row has no B.
            query = next((a for a in arrays if a.is_float and len(a.shape) > 2), None)
            if query:
                *rows, t, c = query.shape
                pairs = math.prod(rows) * t * t * density
                total += times * products * 2 * c * pairs
    return total


def bounds(
    counts: hlo.Counts,
    between: list[Exchange],
    topology: Topology,
    *,
    dtype: str,
    density: float,
) -> Bounds:
    """Returns the bounds of a compiled program.

    Args:
        counts: of the program.
        between: its exchanges.
        topology: where it runs.
        dtype: of its products.
        density: as of `kernel_flops`.
    """
    flops = counts.products + kernel_flops(counts.kernels, density)
    network = {
        over: sum(one.seconds for one in between if one.over == over)
        for over in ("ICI", "DCN")
    }
    return Bounds(
        compute=flops / topology.peak(dtype),
        hbm=counts.traffic / topology.bandwidth,
        ici=network["ICI"],
        dcn=network["DCN"],
    )
