"""Mixtures of experts: each token chooses a few of many feed-forwards.

No token is dropped and every shape is static: the copies of tokens are sorted by their
expert into one array of rows, where each expert has its group, and a product with the
experts' weights takes every group to its own matrix. The shapes depend on the number
of tokens alone, never on what they chose.

Under a mesh each device sorts its own rows. The experts' widths are split over
`tensor`, so all of its devices have work whatever is chosen; their weights are gathered
over `fsdp` as everywhere else. Over `expert` the experts themselves are split: its
devices exchange their tokens, each runs its own experts on all of them, and the sums go
back to where the tokens came from.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from stagecraft import sharding
from stagecraft.models import kernels, linear
from stagecraft.models.config import ModelConfig

# Least and most rows of one product on a CPU; groups are padded to a multiple of it.
BLOCK = (8, 128)


class Routing(NamedTuple):
    """The router's output for each token.

    Attributes:
        probabilities: f32[B, T, E], of all experts, before any choice.
        chosen: i32[B, T, k].
    """

    probabilities: Array
    chosen: Array


class Balance(NamedTuple):
    """How evenly the real tokens of a batch load the experts, mean over layers.

    Attributes:
        loss: f32[B, T]; its mean over real tokens is E sum_e f_e P_e, f_e being the
            copies of tokens that e gets per token and P_e its mean probability (Fedus
            et al. 2021, eq. 4; with k choices it is k where all are equal). A gradient
            goes through P alone.
        load: f32[E], share of the copies that each expert gets.
    """

    loss: Array
    load: Array


class Experts(nnx.Module):
    """Softmax over all experts, then the k most likely (Shazeer et al. 2017)."""

    def __init__(self, config: ModelConfig, key):
        c = config
        keys = jax.random.split(key, 4)
        down_std = c.init_std / (2 * c.layers) ** 0.5
        wide = (c.experts, c.width, c.expert_width)
        narrow = (c.experts, c.expert_width, c.width)
        axes, normal = ("experts", "embed", "ff"), linear.normal
        self.activation = c.activation
        self.per_token = c.experts_per_token
        self.renormalize = c.experts_renormalize
        self.router = normal(
            keys[0], (c.width, c.experts), c.init_std, ("embed", "experts")
        )
        self.gate = normal(keys[1], wide, c.init_std, axes)
        self.up = normal(keys[2], wide, c.init_std, axes)
        self.down = normal(keys[3], narrow, down_std, ("experts", "ff", "embed"))

    def __call__(self, x: Array) -> tuple[Array, Routing]:
        """[B, T, D] -> ([B, T, D], Routing)."""
        logits = linear.project(x, self.router).astype(jnp.float32)
        probabilities = jax.nn.softmax(logits, axis=-1)
        shares, chosen = jax.lax.top_k(probabilities, self.per_token)
        if self.renormalize:
            shares = shares / shares.sum(axis=-1, keepdims=True)
        weights = [w[...].astype(x.dtype) for w in (self.gate, self.up, self.down)]
        mix = functools.partial(_mix, activation=self.activation)
        mixed = _on_each_device(mix, x, shares.astype(x.dtype), chosen, weights)
        return mixed, Routing(probabilities, chosen)


def copies(routing: Routing, real: Array) -> Array:
    """Counts the copies of real tokens that each expert gets: f32[E].

    Args:
        real: bool[B, T], False on padding.
    """
    count = routing.probabilities.shape[-1]
    each = jax.nn.one_hot(routing.chosen, count).sum(axis=-2)
    return jnp.where(real[..., None], each, 0).sum(axis=(0, 1))


def balance(routing: Routing, real: Array, share: Array | None = None) -> Balance:
    """Computes the balance of one layer.

    Args:
        real: bool[B, T], False on padding.
        share: f32[E], copies that each expert gets per real token, where these rows are
            a part of the batch; None for those of these rows.
    """
    count = routing.probabilities.shape[-1]
    if share is None:
        share = copies(routing, real) / jnp.maximum(real.sum(), 1)
    loss = count * (routing.probabilities * share).sum(axis=-1)
    return Balance(loss, share / routing.chosen.shape[-1])


def _on_each_device(mix, x, shares, chosen, weights):
    """Runs `mix` on rows of [N, D]; under a mesh each device on its own rows."""

    def flat(x, shares, chosen, weights):
        rows = [a.reshape(-1, a.shape[-1]) for a in (x, shares, chosen)]
        return mix(*rows, *weights).reshape(x.shape)

    mesh = sharding.current_mesh()
    if mesh is None:
        return flat(x, shares, chosen, weights)
    tokens = sharding.length_axis(x.shape[1])
    apart = ("data", "context") if tokens else ("data",)
    shards = mesh.shape["expert"]

    def on_device(x, shares, chosen, weights):
        gate, up, down = weights
        gate, up = (
            jax.lax.all_gather(w, "fsdp", axis=1, tiled=True) for w in (gate, up)
        )
        down = jax.lax.all_gather(down, "fsdp", axis=2, tiled=True)
        # Marked as varying before their use: the transpose of this mark is the sum
        # over devices, which is then done once for each weight.
        weights = [jax.lax.pcast(w, apart, to="varying") for w in (gate, up, down)]
        x, shares = (jax.lax.pcast(a, "tensor", to="varying") for a in (x, shares))
        if shards > 1:
            x, shares, chosen = (
                jax.lax.all_gather(a, "expert", axis=0, tiled=True)
                for a in (x, shares, chosen)
            )
            # Expert 0 is this device's first; those of others are below 0, or beyond.
            chosen = chosen - jax.lax.axis_index("expert") * gate.shape[0]
        out = flat(x, shares, chosen, weights)
        if shards > 1:
            out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
        return jax.lax.psum(out, "tensor")

    if shards > 1:
        mix = functools.partial(mix, some_elsewhere=True)
    rows = sharding.spec(("batch", tokens, None))
    wide = sharding.spec(("experts", "embed", "ff"))
    narrow = sharding.spec(("experts", "ff", "embed"))
    return jax.shard_map(
        on_device, in_specs=(rows, rows, rows, [wide, wide, narrow]), out_specs=rows
    )(x, shares, chosen, weights)


def _mix(x, shares, chosen, gate, up, down, *, activation, some_elsewhere=False):
    """Sums the chosen experts' outputs, weighted by their shares.

    Args:
        x: [N, D].
        shares: [N, k].
        chosen: i32[N, k].
        gate, up: [E, D, F].
        down: [E, F, D].
        activation: a name of `linear.ACTIVATIONS`.
        some_elsewhere: whether `chosen` may name experts that are not here, below 0 or
            from E on, which add nothing.

    Returns:
        [N, D].
    """
    here, groups = None, gate.shape[0]
    if some_elsewhere:
        here = (chosen >= 0) & (chosen < groups)
        chosen, groups = jnp.where(here, chosen, groups), groups + 1

    def work(block, product, x, shares, gate, up, down):
        layout = _layout(chosen, groups, block)
        # Rows of experts elsewhere come last, and no product takes them.
        layout = layout._replace(sizes=layout.sizes[: gate.shape[0]])
        rows = _spread(x, layout)
        activate = linear.ACTIVATIONS[activation]
        inner = activate(product(rows, gate, layout)) * product(rows, up, layout)
        out = _collect(product(inner, down, layout), layout)
        if here is not None:
            out = jnp.where(here[..., None], out, 0)
        return (out * shares[..., None]).sum(axis=1)

    on_cpu = sharding.platform() == "cpu"
    name = "blockwise" if on_cpu else "ragged_dot"
    kernels.log_once("products of experts", kernels.Choice(name, "the only one here"))
    # Ragged products are dense ones on a CPU: every expert on every row.
    least, most = BLOCK
    block = chosen.size // (2 * gate.shape[0]) // least * least
    block = max(least, min(most, block))
    return jax.lax.platform_dependent(
        x,
        shares,
        gate,
        up,
        down,
        cpu=functools.partial(work, block, _blockwise_product),
        default=functools.partial(work, 1, _ragged_product),
    )


class _Layout(NamedTuple):
    """The order of the copies of tokens among the sorted rows.

    Attributes:
        row: i32[N, k], the row of each copy.
        copy: i32[R], the copy (token * k + choice) in each row; N k in an empty row.
        sizes: i32[E], rows of each expert's group, padding included.
        block: rows of a block, all of one expert.
    """

    row: Array
    copy: Array
    sizes: Array
    block: int


def _layout(chosen, experts, block):
    """Sorts i32[N, k] choices, each group padded to a multiple of `block`."""
    copies = chosen.size
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    counts = (expert[:, None] == jnp.arange(experts)).sum(axis=0, dtype=jnp.int32)
    sizes = -(-counts // block) * block
    first, padded_first = jnp.cumsum(counts) - counts, jnp.cumsum(sizes) - sizes
    by_expert = expert[order]
    row = padded_first[by_expert] + jnp.arange(copies) - first[by_expert]
    # At worst every expert needs a block for one row, and the rest fill blocks.
    opened = min(experts, copies)
    blocks = opened + (copies - opened) // block
    row_of_copy = jnp.zeros((copies,), jnp.int32).at[order].set(row)
    copy = jnp.full((blocks * block,), copies, jnp.int32).at[row].set(order)
    return _Layout(row_of_copy.reshape(chosen.shape), copy, sizes, block)


def _spread(x, layout):
    """Copies tokens to rows: [N, D] -> [R, D], zero in empty rows."""
    count, k = layout.row.shape

    @jax.custom_vjp
    def spread(x, row, copy):
        return _take(x, copy // k, copy < count * k)

    def forward(x, row, copy):
        return spread(x, row, copy), row

    def backward(row, dy):
        # As a gather: scattering rows back is far slower on every device.
        return dy[row].sum(axis=1), None, None

    spread.defvjp(forward, backward)
    return spread(x, layout.row, layout.copy)


def _collect(rows, layout):
    """Collects the copies of tokens from rows: [R, D] -> [N, k, D]."""
    count, k = layout.row.shape

    @jax.custom_vjp
    def collect(rows, row, copy):
        return rows[row]

    def forward(rows, row, copy):
        return rows[row], copy

    def backward(copy, dy):
        return _take(dy.reshape(count * k, -1), copy, copy < count * k), None, None

    collect.defvjp(forward, backward)
    return collect(rows, layout.row, layout.copy)


def _take(x, index, there):
    return jnp.where(there[:, None], jnp.take(x, index, axis=0, mode="clip"), 0)


def _ragged_product(rows, weight, layout):
    """Multiplies groups of rows by their experts: [R, D], [E, D, F] -> [R, F]."""
    return jax.lax.ragged_dot(rows, weight, layout.sizes)


def _blockwise_product(rows, weight, layout):
    """Does the same, one block of rows after the other."""
    return _by_blocks(rows, weight, layout.sizes, layout.block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_blocks(rows, weight, sizes, block):
    expert = _expert_of_block(sizes, rows.shape[0] // block, block)
    blocks = rows.reshape(-1, block, rows.shape[1])
    out = jax.lax.map(lambda xs: xs[0] @ weight[xs[1]], (blocks, expert))
    return out.reshape(rows.shape[0], -1)


def _by_blocks_forward(rows, weight, sizes, block):
    return _by_blocks(rows, weight, sizes, block), (rows, weight, sizes)


def _by_blocks_backward(block, saved, dy):
    rows, weight, sizes = saved
    expert = _expert_of_block(sizes, rows.shape[0] // block, block)
    blocks, dy = (x.reshape(-1, block, x.shape[1]) for x in (rows, dy))

    def body(d_weight, xs):
        rows, dy, expert = xs
        d_weight = d_weight.at[expert].add(rows.T @ dy)
        return d_weight, dy @ weight[expert].T

    # Zeros that vary over a mesh's axes as the weight does, as a loop's carry must.
    start = jnp.where(weight == 0, jnp.zeros_like(weight), 0)
    d_weight, d_rows = jax.lax.scan(body, start, (blocks, dy, expert))
    return d_rows.reshape(rows.shape), d_weight, None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


def _expert_of_block(sizes, blocks, block):
    """Returns i32[blocks]; blocks after the last group may belong to any expert."""
    ends = jnp.cumsum(sizes) // block
    expert = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return jnp.minimum(expert, sizes.size - 1).astype(jnp.int32)
