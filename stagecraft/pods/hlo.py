"""Reads compiled programs: FLOPs, bytes and collectives, loops counted as they run.

XLA's own cost analysis counts the body of a loop once, and a kernel of Pallas not at
all. Here every computation of a compiled module has the number of times it runs, from
the trip counts of the loops around it. What a compiler fuses differs between its
releases: figures are as good as the forms below, those of libtpu 0.0.42 and 0.0.52.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SIZES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-broadcast"),
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?(?: *\{([^}]*)\})?"
)
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# They only name, wait for, or hold together what others compute.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("conditional", "call", "after-all", "partition-id", "opt-barrier", "iota"),
    *("recv", "replica-id", "add-dependency", "async-update", "send-done"),
}


class Array(NamedTuple):
    """An array of a program: its dtype, its shape, whether it lies in HBM."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * SIZES.get(self.dtype, 4)

    @property
    def is_float(self) -> bool:
        """Whether its numbers have a fraction."""
        return self.dtype.startswith(("f", "bf"))


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
        name: without the percent sign.
        arrays: those it returns.
        opcode: "fusion", "while", ...
        operands: names of what it reads.
        rest: the attributes behind them, as text.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str


class Collective(NamedTuple):
    """Data that devices exchange.

    Attributes:
        kind: of `COLLECTIVES`, or "send" between slices.
        bytes: of the whole array that a group gathers or reduces, on each device.
        group: indices in the mesh, in its order, of one group of devices; () unknown.
        times: how often it runs.
        overlapped: whether it starts in one place and ends in another.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: float
    overlapped: bool


class Counts(NamedTuple):
    """What one device does in a program.

    Attributes:
        products: FLOPs of matrix products, loops as often as they run.
        products_once: the same, the body of every loop once, as XLA counts.
        kernels: {name of a Pallas kernel: [(times, shapes it reads)]}.
        traffic: bytes read from HBM and written to it.
        collectives: a list of `Collective`.
    """

    products: float
    products_once: float
    kernels: dict[str, list[tuple[float, tuple[Array, ...]]]]
    traffic: float
    collectives: list[Collective]


def weighted(parts: list[tuple[float, Counts]]) -> Counts:
    """Sums up counts of several programs, each as often as its weight says.

    Args:
        parts: [(weight, counts)]; a weight may be below 0.
    """
    kernels = defaultdict(list)
    for weight, counts in parts:
        for name, calls in counts.kernels.items():
            kernels[name] += [(weight * times, arrays) for times, arrays in calls]
    return Counts(
        products=sum(w * c.products for w, c in parts),
        products_once=sum(w * c.products_once for w, c in parts),
        kernels=dict(kernels),
        traffic=sum(w * c.traffic for w, c in parts),
        collectives=[
            one._replace(times=w * one.times) for w, c in parts for one in c.collectives
        ],
    )


def read(text: str, devices: int) -> Counts:
    """Counts what one device does in a compiled program.

    Args:
        text: `compiled.as_text()`.
        devices: of the mesh.
    """
    module = _Module(text)
    products, once, traffic = 0.0, 0.0, 0.0
    kernels, seen = defaultdict(list), {}
    for name, times in module.times.items():
        inside = name in module.fused
        types = module.types[name]
        for one in module.computations[name]:
            if one.opcode in ("convolution", "dot"):
                flops = _product(one, types)
                products += times * flops
                once += flops
            if _kernel(one):
                arrays = tuple(a for o in one.operands for a in types.get(o, ()))
                kernels[re.sub(r"[.\d]+$", "", one.name)].append((times, arrays))
            if not inside:
                traffic += times * module.traffic(one, types)
            base = one.opcode.removesuffix("-start")
            if base in COLLECTIVES or one.opcode == "send":
                channel = re.search(r"channel_id=(\d+)", one.rest)
                key = channel[1] if channel else f"{name}/{one.name}"
                exchange = _collective(one, types, base, name, times, inside, devices)
                if key not in seen or exchange.times > seen[key].times:
                    seen[key] = exchange
    return Counts(products, once, dict(kernels), traffic, list(seen.values()))


def _kernel(one):
    return one.opcode == "custom-call" and '"tpu_custom_call"' in one.rest


class _Module:
    """A compiled module: its computations, and how often each runs."""

    def __init__(self, text):
        self.computations, self.types, entry = {}, {}, None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                instructions = self.computations[head[2]] = []
                types = self.types[head[2]] = {}
                entry = head[2] if head[1] else entry
            elif " = " in line and line.startswith("  "):
                one = parse(line)
                instructions.append(one)
                types[one.name] = one.arrays
        self.fused = set()
        self.times = defaultdict(float)
        self._run(entry, 1.0)

    def _run(self, name, times):
        self.times[name] += times
        for one in self.computations[name]:
            for callee, count in self._callees(one):
                if one.opcode == "fusion" or name in self.fused:
                    self.fused.add(callee)
                self._run(callee, times * count)

    def _callees(self, one):
        """Yields the computations that an instruction runs, and how often."""
        if one.opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", one.rest)[1]
            yield body, self._trips(one)
        elif one.opcode in ("fusion", "call", "async-start"):
            for name in _CALLS.findall(one.rest):
                yield name, 1
        elif one.opcode == "conditional":
            if branches := _BRANCHES.search(one.rest):
                names = _NAME.findall(branches[1])
            else:
                names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest)
            for name in names:  # the average branch
                yield name, 1 / len(names)

    def _trips(self, loop):
        known = re.search(r"known_trip_count[^\d]*(\d+)", loop.rest)
        if known:
            return int(known[1])
        # The largest number that its condition compares with.
        name = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
        return max(self._numbers(name), default=1)

    def _numbers(self, name):
        for one in self.computations[name]:
            if one.opcode == "constant" and one.arrays[0].dtype in ("s32", "s64"):
                value = re.match(r"-?\d+", one.rest)
                yield int(value[0]) if value else 1
            elif one.opcode == "fusion":
                for callee in _CALLS.findall(one.rest):
                    yield from self._numbers(callee)

    def traffic(self, one, types):
        """Returns the bytes that an instruction moves from and to HBM."""
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            return 0
        results = list(one.arrays)
        reads = [types.get(name, ()) for name in one.operands]
        if one.opcode.endswith("-start"):  # it returns what it reads and its handle
            results = results[:1] if one.opcode == "copy-start" else []
        sizes = [sum(a.bytes for a in arrays if a.in_hbm) for arrays in reads]
        written = sum(a.bytes for a in results if a.in_hbm)
        if one.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * written
        if one.opcode == "dynamic-update-slice":
            return 2 * (sizes[1] if len(sizes) > 1 else written)
        if one.opcode == "fusion":
            body = _CALLS.search(one.rest)[1]
            part, replaced = self._parts(body)
            sizes = [min(size, part.get(i, size)) for i, size in enumerate(sizes)]
            written = replaced if replaced is not None else written
        return sum(sizes) + written

    def _parts(self, body):
        """Returns what a fusion reads of parameters it takes slices of, and writes.

        Returns:
            {parameter: bytes}; the bytes of an update in place, or None.
        """
        numbers, users = {}, defaultdict(list)
        for one in self.computations[body]:
            if one.opcode == "parameter":
                numbers[one.name] = int(re.match(r"\d+", one.rest)[0])
            for position, name in enumerate(one.operands):
                users[name].append((one, position))
        part = {}
        for name, number in numbers.items():
            sliced = [
                one.arrays[0].bytes
                for one, position in users[name]
                if one.opcode in ("dynamic-slice", "gather", "slice") and position == 0
            ]
            updated = [
                one
                for one, position in users[name]
                if one.opcode == "dynamic-update-slice" and position == 0
            ]
            if len(sliced) + len(updated) == len(users[name]):
                part[number] = sum(sliced)
        root, types = self.computations[body][-1], self.types[body]
        while root.opcode == "bitcast":
            root = next(
                o for o in self.computations[body] if o.name == root.operands[0]
            )
        if root.opcode == "dynamic-update-slice":
            return part, sum(a.bytes for a in types[root.operands[1]])
        return part, None


def parse(line: str) -> Instruction:
    """Reads one line of a computation.

    >>> one = parse("  %a.1 = bf16[2,8]{1,0:T(8,128)S(1)} add(%b, %c), metadata={}")
    >>> one.opcode, one.operands, one.arrays[0].bytes, one.arrays[0].in_hbm
    ('add', ('b', 'c'), 32, False)
    """
    left, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    opening = right.index("(", end)
    closing = _closing(right, opening)
    inside = right[opening + 1 : closing]
    opcode = right[end:opening].strip()
    plain = opcode in ("constant", "parameter")
    return Instruction(
        name=left.lstrip("%"),
        arrays=tuple(_arrays(right[:end])),
        opcode=opcode,
        operands=() if plain else tuple(_NAME.findall(inside)),
        rest=inside if plain else right[closing + 1 :],
    )


def _closing(text, opening):
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def _arrays(text) -> Iterator[Array]:
    for dtype, shape, layout in _ARRAY.findall(text):
        if dtype in SIZES:
            sizes = tuple(map(int, filter(None, shape.split(","))))
            yield Array(dtype, sizes, "S(" not in layout)


def _product(one, types):
    """Returns the FLOPs of a convolution, which TPUs write products as, or of a dot."""
    result = math.prod(one.arrays[0].shape)
    left, right = (types[name][0].shape for name in one.operands[:2])
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1]
        return 2 * result * math.prod(left[int(i)] for i in contracted.split(",") if i)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    features = right[labels[2].index("i")]
    out = one.arrays[0].shape
    batches = out[labels[3].index("b")] * out[labels[3].index("f")]
    flops = 2.0 * batches * features
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    window = window[1] if window else ""
    spatial = sorted(c for c in labels[1] if c.isdigit())
    for i, label in enumerate(spatial):
        flops *= _pairs(
            left[labels[1].index(label)],
            right[labels[2].index(label)],
            out[labels[3].index(label)],
            {
                key: _at(window, key, i)
                for key in ("stride", "lhs_dilate", "rhs_dilate")
            },
            _padding(window, i),
        )
    return flops


def _at(window, key, i):
    match = re.search(rf"\b{key}=([\dx]+)", window)
    return int(match[1].split("x")[i]) if match else 1


def _padding(window, i):
    match = re.search(r"\bpad=([\d_x\-]+)", window)
    return int(match[1].split("x")[i].split("_")[0]) if match else 0


def _pairs(size, kernel, out, by, padding):
    """Counts the products along one spatial axis that are not with padding."""
    place = np.arange(out)[:, None] * by["stride"] - padding
    place = place + np.arange(kernel)[None] * by["rhs_dilate"]
    inside = (place >= 0) & (place <= (size - 1) * by["lhs_dilate"])
    return int((inside & (place % by["lhs_dilate"] == 0)).sum())


def _collective(one, types, kind, computation, times, inside, devices):
    read = sum(a.bytes for name in one.operands for a in types.get(name, ()))
    written = max((a.bytes for a in one.arrays), default=0)
    if "all-reduce-scatter" in computation:  # one fusion of both
        kind = "reduce-scatter"
    size = max(written, read) if kind == "all-gather" else read
    overlapped = one.opcode.endswith("-start") or (
        inside and "all-reduce-scatter" not in computation
    )
    return Collective(kind, size, group(one.rest, devices), times, overlapped)


def group(text: str, devices: int) -> tuple[int, ...]:
    """Returns one group of devices from a collective's attributes; () for none named.

    >>> group("replica_groups=[4,2]<=[2,4]T(1,0)", 8)
    (0, 4)
    >>> group("replica_groups={{0,2},{1,3}}", 4)
    (0, 2)
    >>> group("replica_groups=mesh['axis_0'=2,'axis_1'=2], to_apply=%add", 4)
    (0, 1, 2, 3)
    >>> group("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", 8)
    (0, 1)
    >>> group("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 8)
    (0, 1, 2, 3)
    """
    if match := _MESH_GROUPS.search(text):
        if not match[4]:  # of all axes
            return tuple(range(devices))
        sizes = dict(re.findall(r"'([\w]+)'=(\d+)", match[1]))
        shape = [int(size) for size in sizes.values()]
        index = np.arange(math.prod(shape))
        if match[2]:  # the mesh numbers its devices in another order
            order = index.reshape(_numbers(match[2]))
            index = order.transpose(_numbers(match[3]) if match[3] else None).ravel()
        at = [slice(None) if f"'{name}'" in match[4] else 0 for name in sizes]
        return tuple(sorted(index.reshape(shape)[tuple(at)].ravel().tolist()))
    if match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", text
    ):
        count, dims = _numbers(match[1]), _numbers(match[2])
        index = np.arange(math.prod(dims)).reshape(dims)
        if match[4]:
            index = index.transpose(_numbers(match[4]))
        return tuple(index.reshape(-1, count[-1])[0].tolist())
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(_numbers(match[1]))
    if "replica_groups={}" in text:
        return tuple(range(devices))
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        follow = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)", match[1])}
        ring, at = [next(iter(follow))], next(iter(follow))
        while follow.get(at) not in (None, *ring):
            at = follow[at]
            ring.append(at)
        return tuple(ring)
    return ()


def _numbers(text):
    return [int(part) for part in text.split(",")]
