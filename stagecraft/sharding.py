"""Sharding: one device mesh, and one table from the axes of arrays to its axes.

Parameters name their logical axes next to their shape
(`nnx.Param(array, axes=("embed", "ff"))`); `RULES` maps those names to the mesh axes,
and every sharding in the library is read from there:

- `data` splits the batch and keeps a copy of the parameters;
- `fsdp` splits the batch and the parameters (gathered where they are used);
- `expert` splits the batch, and a mixture's experts among its devices;
- `context` splits the tokens of a row, which meet in attention alone;
- `tensor` splits heads, feed-forward and vocabulary of one token.

Everything that trains, samples or restores runs inside `with jax.set_mesh(mesh):`, set
once around the whole program. Functions traced there see the mesh through
`jax.sharding.get_abstract_mesh()`; without it `constrain` does nothing, so the same
model code runs on one device, in a notebook, with no mesh at all.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stagecraft.errors import UserError

# From the slowest links to the fastest: neighbours along the last axis talk most.
AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH = ("data", "fsdp", "expert")  # those that split rows

RULES = {
    None: None,
    "batch": BATCH,
    "length": "context",
    "layers": None,
    "embed": "fsdp",
    "ff": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "positions": None,
    "experts": "expert",
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    dcn_data: int = 0,
    dcn_fsdp: int = 0,
    devices: Any = None,
) -> Mesh:
    """Makes a mesh with the axes `AXES`.

    Of several TPU slices each holds whole replicas, unless told otherwise: only sums
    over `data` cross the network between them.

    Args:
        data: number of replicas that split the batch; -1 means all devices that remain.
        fsdp: number of shards of batch and parameters; -1 likewise.
        tensor: number of shards of heads, feed-forward and vocabulary; -1 likewise.
        context: number of parts of each row of tokens; -1 likewise.
        expert: number of shards of batch and experts; -1 likewise.
        dcn_data: into how many groups of devices `data` is split over the data-center
            network: slices of TPUs, hosts of GPUs; 0 leaves it to the slices.
        dcn_fsdp: the same of `fsdp`, whose weights then cross that network.
        devices: the devices to use; all of `jax.devices()` when None; or their number,
            for an `AbstractMesh` that has shapes and shardings alone.

    Raises:
        UserError: the product of the sizes is not the number of devices, or groups do
            not divide an axis or are not the slices.
    """
    given = jax.devices() if devices is None else devices
    count = given if isinstance(given, int) else len(given)
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor, context=context, expert=expert)
    asked = ", ".join(
        f"{name}={size}"
        for name, size in sizes.items()
        if size != 1 or name in ("data", "fsdp", "tensor")
    )
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(s < 1 and s != -1 for s in sizes.values()):
        raise UserError(
            f"mesh: sizes must be positive, with at most one -1 (all devices that "
            f"remain), got {asked}; write the others as numbers"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name in free:
        sizes[name] = count // fixed
    total = math.prod(sizes.values())
    if devices is None and not free and jax.process_count() == 1:
        given, count = jax.devices()[:total], min(total, count)
    if total != count:
        raise UserError(
            f"mesh: {asked} needs {'a multiple of ' if free else ''}{fixed} "
            f"devices, but {count} are available; change the sizes, or use -1 "
            f"for one of them"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    types = (AxisType.Auto,) * len(AXES)
    if isinstance(given, int):
        return AbstractMesh(shape, AXES, axis_types=types)  # type: ignore
    split = dict(allow_split_physical_axes=True)  # a part of an axis of the torus
    slices = len({getattr(device, "slice_index", 0) for device in given})
    outer = _groups(sizes, slices, dict(data=dcn_data, fsdp=dcn_fsdp))
    inner = tuple(size // groups for size, groups in zip(shape, outer, strict=True))
    if given[0].platform != "tpu":
        if math.prod(outer) == 1:
            return jax.make_mesh(shape, AXES, axis_types=types, devices=given)
        arranged = _side_by_side(given, outer, inner)
    elif slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, given, **split)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(inner, outer, given, **split)
    return Mesh(arranged, AXES, axis_types=types)


def _groups(sizes, slices, asked):
    """Returns for each axis the groups that the slower network splits it into."""
    keys = {f"mesh.dcn_{axis}": groups for axis, groups in asked.items() if groups}
    if not keys:
        asked = {"data": slices}
    wrong = " * ".join(f"{key}={groups}" for key, groups in keys.items())
    product = math.prod(max(groups, 1) for groups in asked.values())
    if any(groups < 0 for groups in asked.values()) or slices not in (1, product):
        raise UserError(
            f"{wrong}: expected positive numbers whose product is the number of "
            f"slices that the data-center network links, which is {slices}"
        )
    for axis, groups in asked.items():
        if sizes[axis] % max(groups, 1):
            over = f"{groups} slices, which the data-center network links"
            raise UserError(
                f"mesh: {axis}={sizes[axis]} does not divide over {over}; use a "
                f"multiple of {groups} for mesh.{axis}"
            )
    return tuple(max(asked.get(axis, 1), 1) for axis in AXES)


def _side_by_side(devices, outer, inner):
    """Arranges devices, in the order of their hosts, with groups along the axes."""
    order = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(order).reshape(*outer, *inner)
    # One behind the other, an axis' groups and its places within a group.
    count = len(outer)
    axes = [axis for place in range(count) for axis in (place, place + count)]
    shape = [a * b for a, b in zip(outer, inner, strict=True)]
    return grid.transpose(axes).reshape(shape)


def spec(axes: Iterable[str | None]) -> P:
    """Returns the `PartitionSpec` of an array with these logical dimension names."""
    return P(*(RULES[name] for name in axes))


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every array in a tree, read from its parameters' axes.

    Args:
        abstract: any tree; of modules (`jax.eval_shape` of a constructor is enough), or
            of optimizer state built from them. An `nnx.Variable` with one dimension
            more than its `axes` is stacked over layers. Variables without `axes` and
            arrays outside a variable (a step count) are replicated.

    Returns:
        The same tree, with a `NamedSharding` in place of every array.
    """
    return _map_specs(lambda array, spec: NamedSharding(mesh, spec), abstract)


def _map_specs(function, tree):
    """Applies (array, PartitionSpec) -> anything to every array of a tree."""

    def apply(node):
        if not isinstance(node, nnx.Variable):
            return function(node, P())
        axes = node.get_metadata().get("axes")

        def leaf(array):
            if axes is None or array.ndim - len(axes) not in (0, 1):
                return function(array, P())
            stacked = ("layers",) * (array.ndim - len(axes))
            return function(array, spec(stacked + tuple(axes)))

        return jax.tree.map(leaf, node)

    return jax.tree.map(
        apply, tree, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def init_sharded(
    init_fn: Callable, mesh: Mesh, donate: tuple[int, ...] = ()
) -> Callable:
    """Makes a constructor whose arrays are sharded as soon as they exist.

    No array is ever complete on one device: the shapes come from `jax.eval_shape`,
    and the arrays from one compiled program with their final shardings as outputs.

    Also for an optimizer's state: its moments keep their parameters' axes, though
    `jax.jit(tx.init)` alone would leave them on one device.

    Args:
        init_fn: any function of arrays or keys that returns modules, or trees of
            variables with axes.
        donate: positions of the arguments whose buffers the result may take.

    Returns:
        A function of the same arguments as `init_fn`.
    """

    # A program that runs once: on a CPU, compiling its random numbers at full
    # optimisation takes seconds, three times as long as this, and gains nothing.
    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    less = jax.config.read("jax_disable_most_optimizations")  # than this already
    options = {"xla_backend_optimization_level": 1} if on_cpu and not less else None

    def construct(*args):
        outputs = shardings(jax.eval_shape(init_fn, *args), mesh)
        with jax.set_mesh(mesh):
            init = jax.jit(
                init_fn,
                out_shardings=outputs,
                compiler_options=options,
                donate_argnums=donate,
            )
            return init(*args)

    return construct


def abstract(init_fn: Callable, mesh: Mesh, *args: Any) -> Any:
    """Returns the result of `init_sharded(init_fn, mesh)(*args)` without its data.

    Arrays are `jax.ShapeDtypeStruct`s with shardings; nothing is allocated.
    """
    shapes = jax.eval_shape(init_fn, *args)
    return with_shardings(shapes, shardings(shapes, mesh))


def with_shardings(shapes: Any, placement: Any) -> Any:
    """Returns arrays or shapes as `jax.ShapeDtypeStruct`s with these shardings.

    Args:
        shapes: any tree of arrays or shapes.
        placement: shardings; a tree of the same form, or a prefix of it.
    """
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        jax.tree.broadcast(placement, shapes),
    )


HOST = "pinned_host"  # the kind of memory that devices reach without the processor


def batch_sharding(mesh: Mesh, ndim: int = 1) -> NamedSharding:
    """Returns the sharding of a batch array: rows over `BATCH`."""
    return NamedSharding(mesh, spec(("batch",) + (None,) * (ndim - 1)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch on the mesh, as global arrays.

    Args:
        batch: a tree of host arrays, rows first: all rows, in every process. Of those
            that its devices do not hold, a process reads nothing but the shape.

    Raises:
        UserError: the rows do not divide over `BATCH`.
    """

    def shard(array):
        array = np.asarray(array)
        check_rows(array.shape[0], mesh)
        sharding = batch_sharding(mesh, array.ndim)
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(shard, batch)


def own_rows(rows: int, mesh: Mesh) -> np.ndarray | None:
    """Returns the numbers of the rows that this process's devices hold, i64[N].

    None for all of them: in a program of one process, and where the mesh splits no
    rows over processes.

    Args:
        rows: of a batch.
        mesh: the mesh.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    numbers = np.arange(rows)
    own = np.unique(np.concatenate([numbers[index] for index in places.values()]))
    return None if len(own) == rows else own


def to_host(tree: Any) -> Any:
    """Returns whole numpy arrays, rows in their order, in every process.

    Where there are several, all of them must call it: each gives its parts.

    Args:
        tree: of arrays; keys of random numbers must be taken out of it.
    """

    def whole_array(array):
        apart = isinstance(array, jax.Array) and not (
            array.is_fully_addressable or array.is_fully_replicated
        )
        if apart:
            return multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return jax.tree.map(whole_array, tree)


def joined(part: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Returns the parts of all processes one behind the other, bit for bit.

    Args:
        part: this process's, [N, ...] of any dtype of the host's.
        sizes: N of every process.
    """
    if len(sizes) == 1:
        return part
    padded = np.zeros((max(sizes), *part.shape[1:]), part.dtype)
    padded[: len(part)] = part
    # As bytes: arrays of the device have no 64 bits by default.
    every = multihost_utils.process_allgather(np.frombuffer(padded.tobytes(), np.uint8))
    parts = [
        np.frombuffer(one.tobytes(), part.dtype).reshape(padded.shape)[:size]
        for one, size in zip(np.asarray(every), sizes, strict=True)
    ]
    return np.concatenate(parts)


class Vote:
    """The largest of a number that each process has, known a step later.

    A host that waits for the others in every step leaves its devices idle. `cast` only
    starts a computation, and what `count` returns is the same in every process.
    """

    def __init__(self):
        devices = np.array(jax.devices())
        mesh = Mesh(devices, ("every",), axis_types=(AxisType.Auto,))
        self._placement = NamedSharding(mesh, P("every"))
        self._most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._devices, self._open = len(devices), None

    def cast(self, number: int) -> None:
        """Gives this process's number, an i32."""
        array = jax.make_array_from_callback(
            (self._devices,),
            self._placement,
            lambda index: np.full(1, number, np.int32),
        )
        self._open = self._most(array)

    def count(self) -> int:
        """Returns the largest that was cast last; 0 before the first."""
        return 0 if self._open is None else int(self._open)


def on_mesh(batch: Any) -> Any:
    """Shards a batch over the mesh that is set; without one its arrays are only moved.

    Args:
        batch: as of `shard_batch`.
    """
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(jnp.asarray, batch) if mesh.empty else shard_batch(batch, mesh)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def rows_split_by(mesh: Mesh | AbstractMesh) -> str:
    """Returns what splits rows, in words: "data * fsdp = 4"."""
    axes = [axis for axis in BATCH if axis != "expert" or mesh.shape[axis] > 1]
    return f"{' * '.join(axes)} = {row_shards(mesh)}"


def check_rows(rows: int, mesh: Mesh | AbstractMesh) -> None:
    """Refuses rows that do not divide over a mesh."""
    shards = row_shards(mesh)
    if rows % shards:
        raise UserError(
            f"batch_size: {rows} rows do not divide over {rows_split_by(mesh)} "
            f"shards; use a multiple of {shards}"
        )


def whole(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds complete."""
    return NamedSharding(mesh, P())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of arrays to every device of the mesh."""
    return jax.device_put(tree, whole(mesh))


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh being traced under; None for none or in a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def platform() -> str:
    """Returns what programs are traced for: "cpu", "gpu" or "tpu".

    That of the mesh that is set, which may lie on devices that are not here; without
    one, JAX's default.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device else jax.default_backend()


def constrain(x: Array, *axes: str | None) -> Array:
    """Fixes the sharding of an intermediate array under the current mesh.

    Args:
        x: any array.
        *axes: one logical axis name or None for each dimension of `x`.

    Returns:
        `x`, unchanged when no mesh is set.
    """
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def length_axis(tokens: int) -> str | None:
    """Returns "length" where rows of so many tokens divide over `context`, else None.

    Rows that do not, such as the single tokens of decoding, are whole on each device.
    """
    mesh = current_mesh()
    if mesh is None or tokens % mesh.shape["context"]:
        return None
    return "length"


def constrain_tokens(x: Array) -> Array:
    """Fixes [B, T, ...] to rows over `BATCH` and, where they divide, tokens apart."""
    return constrain(x, "batch", length_axis(x.shape[1]), *(None,) * (x.ndim - 2))


def constrain_rows(tree: Any) -> Any:
    """Fixes every array of a tree to rows over the batch axes; scalars stay."""

    def rows(x):
        return constrain(x, "batch", *(None,) * (x.ndim - 1)) if x.ndim else x

    return jax.tree.map(rows, tree)


def constrain_tree(tree: Any) -> Any:
    """Fixes every array of a tree to the sharding of its axes, as `shardings` reads it.

    For gradients: the partitioner alone may leave them replicated on every device.
    """
    if current_mesh() is None:
        return tree
    return _map_specs(jax.lax.with_sharding_constraint, tree)
