"""Accelerators and how they are wired: the one table of peaks, memory and links.

Figures are a chip's, from the vendors' pages and "How to Scale Your Model" (Google
DeepMind 2025, jax-ml.github.io/scaling-book, chapters 2 and 12), as `Chip.source` says.
"""

import math
import re
from typing import Any, NamedTuple

from stagecraft import schema
from stagecraft.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One kind of accelerator.

    Attributes:
        name: as topologies spell it.
        platform: "tpu" or "gpu".
        memory: bytes of HBM.
        peaks: {dtype: dense FLOP/s}. JAX multiplies float32 on a TPU in one pass of
            bfloat16 unless asked otherwise, on a GPU in TF32.
        bandwidth: bytes/s of HBM.
        link: bytes/s one way over one ICI link of a TPU; over NVLink of a GPU, to all
            of its host's GPUs together.
        dcn: bytes/s one way that a chip can send outside its slice or host.
        axes: dimensions of the torus; 0 where chips of a host are all linked.
        host: chips of one host of a large slice.
        cores: devices that JAX sees of one chip.
        wraps: an axis is a ring where its length is a multiple of this.
        source: where the figures are from.
        accelerator: GKE's name of it; slurm and others name GPUs by `name`.
    """

    name: str
    platform: str
    memory: int
    peaks: dict[str, float]
    bandwidth: float
    link: float
    dcn: float
    axes: int
    host: int
    cores: int
    wraps: int
    source: str
    accelerator: str


def _tpu(bf16, int8, **rest):
    peaks = {"bfloat16": bf16, "float32": bf16, "int8": int8}
    return dict(platform="tpu", peaks=peaks) | rest


def _gpu(bf16, tf32, fp8, **rest):
    peaks = {"bfloat16": bf16, "float16": bf16, "float32": tf32, "float8": fp8}
    rest = dict(axes=0, host=8, cores=1, wraps=1) | rest
    return dict(platform="gpu", peaks=peaks) | rest


_BOOK = "scaling-book, chapter 2"
_CLOUD = "docs.cloud.google.com/tpu/docs"
CHIPS = {
    name: Chip(name=name, **figures)
    for name, figures in {
        "v5e": _tpu(
            1.97e14,
            3.94e14,
            memory=16 * GIB,
            bandwidth=8.2e11,
            link=4.5e10,
            dcn=3.125e9,
            axes=2,
            host=4,
            cores=1,
            wraps=16,
            source=f"{_BOOK}; {_CLOUD}/v5e",
            accelerator="tpu-v5-lite-podslice",
        ),
        "v6e": _tpu(
            9.18e14,
            1.836e15,
            memory=32 * GIB,
            bandwidth=1.6e12,
            link=9e10,
            dcn=1.25e10,
            axes=2,
            host=4,
            cores=1,
            wraps=16,
            source=f"{_BOOK}; {_CLOUD}/v6e",
            accelerator="tpu-v6e-slice",
        ),
        "v5p": _tpu(
            4.59e14,
            9.18e14,
            memory=95 * GIB,
            bandwidth=2.8e12,
            link=9e10,
            dcn=6.25e9,
            axes=3,
            host=4,
            cores=1,
            wraps=4,
            source=f"{_BOOK}; {_CLOUD}/v5p",
            accelerator="tpu-v5p-slice",
        ),
        "tpu7x": _tpu(
            2.307e15,
            4.614e15,
            memory=192 * GIB,
            bandwidth=7.4e12,
            link=9e10,
            dcn=1.25e10,
            axes=3,
            host=4,
            cores=2,
            wraps=4,
            source=f"{_BOOK}; {_CLOUD}/tpu7x",
            accelerator="tpu7x",
        ),
        "h100": _gpu(
            9.89e14,
            4.945e14,
            1.979e15,
            memory=80 * 10**9,
            bandwidth=3.35e12,
            link=4.5e11,
            dcn=5e10,
            source="NVIDIA H100 SXM data sheet, dense; scaling-book, chapter 12",
            accelerator="nvidia-h100-80gb",
        ),
        "h200": _gpu(
            9.89e14,
            4.945e14,
            1.979e15,
            memory=141 * 10**9,
            bandwidth=4.8e12,
            link=4.5e11,
            dcn=5e10,
            source="NVIDIA H200 SXM data sheet, dense; scaling-book, chapter 12",
            accelerator="nvidia-h200-141gb",
        ),
    }.items()
}
# How JAX spells the kinds of devices; of an H100 only the module on a board of eight,
# whose figures are above.
_KINDS = {
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "tpu7x": ("TPU7x",),
    "h100": ("NVIDIA H100 80GB HBM3",),
    "h200": ("NVIDIA H200",),
}


def of_device(device: Any) -> Chip | None:
    """Returns the chip that a JAX device is of; None for one not in the table."""
    kinds = {kind: name for name, spelled in _KINDS.items() for kind in spelled}
    name = kinds.get(device.device_kind)
    return None if name is None else CHIPS[name]


# Slices that the compiler was asked for here, the first ones to name in a message.
KNOWN = (
    *("v5e:4x4", "v5e:8x8", "v5e:16x16", "2xv5e:16x16", "v6e:4x4", "v6e:8x8"),
    *("v6e:16x16", "v5p:4x4x4", "v5p:8x8x8", "tpu7x:4x4x4"),
    *("h100:8", "h100:64", "h200:1", "h200:8", "h200:64"),
)


class Topology(NamedTuple):
    """Chips of one kind and how they are laid out.

    Attributes:
        name: as it was given, "2xv5e:16x16".
        chip: the `Chip`.
        shape: chips along each axis of the torus; of GPUs their number.
        slices: that are linked by the data-center network alone.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of devices that JAX sees."""
        return self.chips * self.chip.cores

    @property
    def hosts(self) -> int:
        """Number of hosts, each a process of the run."""
        return self.slices * -(-math.prod(self.shape) // self.chip.host)

    @property
    def host_chips(self) -> int:
        """Chips of each host."""
        return min(self.chip.host, math.prod(self.shape))

    @property
    def memory(self) -> int:
        """Bytes of HBM of a device."""
        return self.chip.memory // self.chip.cores

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a device's HBM."""
        return self.chip.bandwidth / self.chip.cores

    @property
    def dcn(self) -> float:
        """Bytes/s a device can send outside its slice."""
        return self.chip.dcn / self.chip.cores

    def peak(self, dtype: str) -> float:
        """Returns dense FLOP/s of a device in a dtype of the computation."""
        return self.chip.peaks[dtype] / self.chip.cores

    @property
    def compiles(self) -> bool:
        """Whether a compiler for it runs on a machine without it."""
        return self.chip.platform == "tpu"


_TPU_NAME = re.compile(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)")


def parse(text: str) -> Topology:
    """Reads a topology: "v5e:16x16", two slices of it "2xv5e:16x16", or "h200:8".

    Raises:
        UserError: one that does not exist; names the nearest.

    >>> parse("2xv5e:16x16").devices
    512
    >>> parse("tpu7x:4x4x4").devices
    128
    """
    match = _TPU_NAME.fullmatch(text)
    if not match or match[2] not in CHIPS:
        raise _unknown(text)
    chip, slices = CHIPS[match[2]], int(match[1] or 1)
    shape = tuple(map(int, match[3].split("x")))
    if slices < 1 or min(shape) < 1 or len(shape) != max(chip.axes, 1):
        raise _unknown(text)
    if chip.platform == "gpu":
        size = shape[0]
        if slices > 1 or (size > chip.host and size % chip.host):
            raise UserError(
                f"--topology={text}: {chip.name}s come in hosts of {chip.host}; "
                f"expected {chip.name}:N with N up to {chip.host} or a multiple of it"
            )
    return Topology(text, chip, shape, slices)


def _unknown(text):
    near = schema.hint(text, KNOWN)
    return UserError(
        f"--topology={text}: no such topology; {near}expected a chip "
        f"({', '.join(CHIPS)}) and its shape, as in {', '.join(KNOWN)}"
    )
