"""Where every array lives: one device mesh, and one table from array axes to it.

Parameters name their logical axes next to their shape
(`nnx.Param(array, axes=("embed", "ff"))`); `RULES` maps those names to the three mesh
axes, and every placement in the library is read from there:

- `data` splits the batch and keeps a copy of the parameters;
- `fsdp` splits the batch and the parameters (gathered where they are used);
- `tensor` splits heads, feed-forward and vocabulary of one token.

Everything that trains, samples or restores runs inside `with jax.set_mesh(mesh):`, set
once around the whole program. Functions traced there see the mesh through
`jax.sharding.get_abstract_mesh()`; without it `constrain` does nothing, so the same
model code runs on one device, in a notebook, with no mesh at all.
"""

import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stagecraft.errors import UserError

AXES = ("data", "fsdp", "tensor")

RULES = {
    None: None,
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "ff": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "positions": None,
    "experts": None,
}


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None) -> Mesh:
    """A mesh with axes `("data", "fsdp", "tensor")`.

    Args:
        data: number of replicas that split the batch; -1 means all devices that remain.
        fsdp: number of shards of batch and parameters; -1 likewise.
        tensor: number of shards of heads, feed-forward and vocabulary; -1 likewise.
        devices: the devices to use; all of `jax.devices()` when None.

    Raises:
        UserError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1 or any(s < 1 and s != -1 for s in sizes.values()):
        raise UserError(
            f"mesh: sizes must be positive, with at most one -1 (all devices that "
            f"remain), got {asked}; write the others as numbers"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    for name in unknown:
        sizes[name] = len(devices) // known
    total = math.prod(sizes.values())
    if not unknown and total < len(devices) and jax.process_count() == 1:
        devices = devices[:total]  # asked for so many and no more
    if total != len(devices):
        raise UserError(
            f"mesh: {asked} needs {'a multiple of ' if unknown else ''}{known} "
            f"devices, but {len(devices)} are available; change the sizes, or use -1 "
            f"for one of them"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def spec(axes) -> P:
    """The `PartitionSpec` of an array whose dimensions have these logical names."""
    return P(*(RULES[name] for name in axes))


def shardings(abstract, mesh: Mesh):
    """The sharding of every array in a tree, read from its parameters' axes.

    Args:
        abstract: any tree; of modules (`jax.eval_shape` of a constructor is enough), or
            of optimizer state built from them. An `nnx.Variable` with one dimension
            more than its `axes` is stacked over layers. Variables without `axes` and
            arrays outside a variable (a step count) are replicated.
        mesh: the mesh to place on.

    Returns:
        The same tree, with a `NamedSharding` in place of every array.
    """
    return _map_specs(lambda array, spec: NamedSharding(mesh, spec), abstract)


def _map_specs(function, tree):
    """Applies (array, PartitionSpec) -> anything to every array of a tree."""

    def place(node):
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
        place, tree, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def init_sharded(make_fn, mesh: Mesh):
    """A constructor whose arrays are sharded from birth.

    Nothing is ever built whole on one device: the shapes come from `jax.eval_shape`,
    and the arrays from one compiled program with their final shardings as outputs.

    Args:
        make_fn: any function of arrays or keys that returns modules.
        mesh: the mesh to place on.

    Returns:
        A function of the same arguments as `make_fn`.
    """

    # A program that runs once: on a CPU, compiling its random numbers at full
    # optimisation takes seconds, three times as long as this, and gains nothing.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None

    def construct(*args):
        placed = shardings(jax.eval_shape(make_fn, *args), mesh)
        with jax.set_mesh(mesh):
            make = jax.jit(make_fn, out_shardings=placed, compiler_options=options)
            return make(*args)

    return construct


def abstract(function, *args, mesh: Mesh):
    """What a function returns, as shapes with the shardings of their axes.

    Args:
        function: of modules, arrays or keys, as `init_sharded` takes.
        *args: its arguments, real or abstract.
        mesh: the mesh the arrays would be placed on.

    Returns:
        The function's result with a `jax.ShapeDtypeStruct` in place of every array:
        nothing is computed or allocated.
    """
    shapes = jax.eval_shape(function, *args)
    return with_shardings(shapes, shardings(shapes, mesh))


def with_shardings(shapes, placement):
    """A tree of arrays or shapes as `jax.ShapeDtypeStruct`s with these shardings.

    Args:
        shapes: any tree of arrays or shapes.
        placement: shardings; a tree of the same form, or a prefix of it.
    """
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        jax.tree.broadcast(placement, shapes),
    )


def init_optimizer(tx, params, mesh: Mesh):
    """Optimizer state whose moments are sharded like their parameters.

    `jax.jit(tx.init)` alone leaves the moments on one device; they keep the
    parameters' axes, though, so their shardings are read in the same way.

    Args:
        tx: an `optax.GradientTransformation`.
        params: modules (or a tree of them) with real or abstract arrays.
        mesh: the mesh to place on.
    """
    return init_sharded(tx.init, mesh)(params)


def batch_sharding(mesh: Mesh, ndim: int = 1) -> NamedSharding:
    """The sharding of a batch array: rows over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, spec(("batch",) + (None,) * (ndim - 1)))


def shard_batch(batch, mesh: Mesh):
    """Puts a host's rows of a batch on the mesh, as global arrays.

    Args:
        batch: a tree of host arrays, rows first; in a program of several processes, the
            rows that belong to this process.
        mesh: the mesh to place on.

    Raises:
        UserError: the rows do not divide over `data` times `fsdp`.
    """
    shards = row_shards(mesh)

    def place(array):
        array = np.asarray(array)
        rows = array.shape[0] * jax.process_count()
        if rows % shards:
            raise UserError(
                f"batch_size: {rows} rows do not divide over data * fsdp = {shards} "
                f"shards; use a multiple of {shards}"
            )
        sharding = batch_sharding(mesh, array.ndim)
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(place, batch)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split: data times fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def replicate(tree, mesh: Mesh):
    """Puts a tree of arrays whole on every device of the mesh."""
    return jax.device_put(tree, whole(mesh))


def current_mesh():
    """The mesh being traced under, or None: no mesh, or inside a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def constrain(x, *axes):
    """Fixes the sharding of an intermediate array under the current mesh.

    Args:
        x: any array.
        *axes: one logical axis name or None for each dimension of `x`.

    Returns:
        `x`; as it is when no mesh is set.
    """
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def constrain_rows(x):
    """Fixes the rows of an array to the batch axes; a scalar stays as it is."""
    return constrain(x, "batch", *(None,) * (x.ndim - 1)) if x.ndim else x


def constrain_tree(tree):
    """Fixes every array of a tree to the sharding of its axes, as `shardings` reads it.

    For gradients: the partitioner alone may leave them whole on every device.
    """
    if current_mesh() is None:
        return tree
    return _map_specs(jax.lax.with_sharding_constraint, tree)
