"""Log-probabilities of tokens, without ever holding the logits of a large batch.

The logits of a batch are its largest array by far: B * T * V numbers. They are computed
here for one block of tokens at a time and reduced to a few numbers a token. The
backward pass makes them again, or reads them where they are few enough to be held; it
takes each token's sums from the forward pass, so that statistics cost it nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from stagecraft import sharding
from stagecraft.models import linear

# Logits of one block, in elements: 16 MiB in float32 on a CPU, whose cache they fit.
# Elsewhere each block reads the whole embedding from memory: it takes hundreds of
# tokens (of a vocabulary of 128k here 1046) before that costs less than their product.
BLOCK_ELEMENTS, BLOCK_ELEMENTS_ELSEWHERE = 2**22, 2**27
# Logits that are held for the backward pass: 64 MiB on a device.
HELD_ELEMENTS = 2**24


class TokenStats(NamedTuple):
    """Statistics of each token's logits; f32 arrays shaped like the targets.

    Attributes:
        logps: log-probability of the target in nats, at the temperature. Only this
            field and `log_z` have gradients, and `entropy` when asked for.
        entropy: of the distribution at the temperature, in nats.
        correct: 1 where no token has a larger logit than the target, else 0.
        logit_mean: mean over the vocabulary of the logits before the temperature.
        log_z: log of the sum of exponentials of the logits, at the temperature.
        log_p2: log of the sum of squared probabilities; None unless asked for.
    """

    logps: Array
    entropy: Array | None = None
    correct: Array | None = None
    logit_mean: Array | None = None
    log_z: Array | None = None
    log_p2: Array | None = None


def token_logps(
    hidden: Array,
    embedding: Array,
    targets: Array,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    block_size: int | None = None,
    stats: bool = True,
    squares: bool = False,
    entropy_gradient: bool = False,
) -> TokenStats:
    """Computes each target token's log-probability, in blocks of tokens.

    Under a mesh each device works on its own rows: the embedding is gathered over
    `fsdp` once, outside the loop over blocks, its vocabulary stays split over `tensor`
    (the log-sum-exp takes a maximum and a sum over that axis), and its
    gradient is summed over devices once, after the loop.

    Args:
        hidden: [B, T, D] final hidden states, in the compute dtype.
        embedding: f32[V, D] output embedding.
        targets: i32[B, T] token whose log-probability is wanted at each position.
        temperature: divides the logits.
        softcap: c in c tanh(logits / c), before the temperature; 0 for none.
        block_size: tokens per block on one device, whose logits are never held; None
            keeps a block's logits within `BLOCK_ELEMENTS`, or on accelerators
            `BLOCK_ELEMENTS_ELSEWHERE`, and holds those of all blocks within
            `HELD_ELEMENTS`.
        stats: False leaves every field but `logps` None.
        squares: also `log_p2`.
        entropy_gradient: let gradients through `entropy` (for an entropy bonus).

    Returns:
        `TokenStats` of f32[B, T].

    Raises:
        UserError: under a mesh, the rows do not divide over it.
    """
    mesh = sharding.current_mesh()
    options = _Options(temperature, softcap, stats, squares, entropy_gradient)
    if mesh is None:
        return _local(hidden, embedding, targets, block_size, options)
    sharding.check_rows(targets.shape[0], mesh)
    names, apart = ["batch", *(None,) * (targets.ndim - 1)], ("data", "expert")
    if targets.ndim > 1 and (tokens := sharding.length_axis(targets.shape[1])):
        names[1], apart = tokens, (*apart, "context")
    rows = sharding.spec(names)

    def on_device(hidden, embedding, targets):
        embedding = embedding.astype(hidden.dtype)
        embedding = jax.lax.all_gather(embedding, "fsdp", axis=1, tiled=True)
        # Marked as varying here and not where they are first used: the transpose of
        # this mark is the sum over devices, which belongs outside the loop.
        embedding = jax.lax.pcast(embedding, apart, to="varying")
        hidden = jax.lax.pcast(hidden, "tensor", to="varying")
        own = options._replace(axis="tensor", apart=("fsdp", "tensor", *apart))
        return _local(hidden, embedding, targets, block_size, own)

    return jax.shard_map(
        on_device,
        in_specs=(P(*rows, None), sharding.spec(("vocab", "embed")), rows),
        out_specs=rows,
    )(hidden, embedding, targets)


class _Options(NamedTuple):
    """Which fields of `TokenStats` to compute, and how.

    Attributes:
        axis: of the mesh, over which the vocabulary is split; None for none.
        apart: axes over which rows, tokens or vocabulary are split.
        blocks: parts that the tokens are worked on in.
        held: whether the logits are kept for the backward pass.
    """

    temperature: float
    softcap: float
    stats: bool
    squares: bool
    entropy_gradient: bool
    axis: str | None = None
    apart: tuple[str, ...] = ()
    blocks: int = 1
    held: bool = False

    def total(self, x):
        """Sums over the devices that share a vocabulary."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)


class _Sums(NamedTuple):
    """What the backward pass needs of each token; f32[N].

    Attributes:
        top: largest logit.
        lse: log of the sum of exponentials of (logits - top) / temperature.
        entropy: as in `TokenStats`; None where it has no gradient.
    """

    top: Array
    lse: Array
    entropy: Array | None


def _local(hidden, embedding, targets, block_size, options):
    """Computes one device's rows."""
    vocab, width = embedding.shape
    shape, count = targets.shape, targets.size
    held = block_size is None and count * vocab <= HELD_ELEMENTS
    if block_size is None:
        on_cpu = sharding.platform() == "cpu"
        elements = BLOCK_ELEMENTS if on_cpu else BLOCK_ELEMENTS_ELSEWHERE
        block_size = max(1, elements // vocab)
    blocks = -(-count // block_size)
    size = -(-count // blocks)
    padding = blocks * size - count
    hidden = jnp.pad(hidden.reshape(count, width), ((0, padding), (0, 0)))
    targets = jnp.pad(targets.reshape(count), (0, padding))
    embedding = embedding.astype(hidden.dtype)
    options = options._replace(blocks=blocks, held=held)
    out = _stats(options, hidden, embedding, targets)
    return jax.tree.map(lambda x: x[:count].reshape(shape), out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(options, hidden, embedding, targets):
    """[N, D], [V, D], i32[N] -> TokenStats of f32[N]."""
    return _forward(options._replace(held=False), hidden, embedding, targets)[0]


def _forward(options, hidden, embedding, targets):
    """Returns the statistics and what the backward pass needs."""

    def block(xs):
        return _block(options, *xs, embedding)

    out, sums, raw = _each_block(block, (hidden, targets), options.blocks)
    return out, (hidden, embedding, targets, sums, raw)


def _backward(options, saved, gradient):
    """Returns the gradients of hidden states and embedding, from those of the stats."""
    hidden, embedding, targets, sums, raw = saved

    def block(total, xs):
        hidden, targets, sums, raw, gradient = xs
        if raw is None:
            raw = _logits(options, hidden, embedding)
        d_raw = _d_logits(options, targets, sums, raw, gradient).astype(hidden.dtype)
        d_hidden = _product("nv,vd->nd", d_raw, embedding)
        return total + _product("nd,nv->dv", hidden, d_raw), d_hidden

    # [D, V] until the end: the product for [V, D] takes half as long again on a CPU.
    total = jnp.zeros(embedding.shape[::-1], jnp.float32)
    if options.axis is not None:  # each device adds what its own rows give
        total = jax.lax.pcast(total, options.apart, to="varying")
    xs = (hidden, targets, sums, raw, gradient)
    total, d_hidden = _scan_blocks(block, total, xs, options.blocks)
    total = jax.lax.optimization_barrier(total)
    return d_hidden.astype(hidden.dtype), total.T.astype(embedding.dtype), None


_stats.defvjp(_forward, _backward)


def _each_block(block, xs, blocks):
    return _scan_blocks(lambda _, xs: (None, block(xs)), None, xs, blocks)[1]


def _scan_blocks(body, carry, xs, blocks):
    """Scans over blocks of rows, [blocks * n, ...]; the outs are rows again."""
    if blocks == 1:
        return body(carry, xs)
    xs = jax.tree.map(lambda x: x.reshape(blocks, -1, *x.shape[1:]), xs)
    carry, out = jax.lax.scan(body, carry, xs)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _product(subscripts, *operands):
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _logits(options, hidden, embedding):
    return linear.softcap(_product("nd,vd->nv", hidden, embedding), options.softcap)


def _hits(options, targets, vocab):
    """Marks the targets: bool[N, V].

    A comparison instead of a lookup: it fuses with the sums around it, and a target
    outside this device's vocabulary counts zero.
    """
    if options.axis is not None:
        targets = targets - jax.lax.axis_index(options.axis) * vocab
    return targets[:, None] == jnp.arange(vocab)[None, :]


def _block(options, hidden, targets, embedding):
    """[N, D], i32[N], [V, D] -> TokenStats, _Sums; f32[N, V] where it is held."""
    total, vocab = options.total, embedding.shape[0]
    raw = _logits(options, hidden, embedding)
    top = raw.max(axis=-1)
    if options.axis is not None:
        top = jax.lax.pmax(top, options.axis)
    shifted = (raw - top[:, None]) / options.temperature
    exps = jnp.exp(shifted)
    lse = jnp.log(total(exps.sum(axis=-1)))
    hit = _hits(options, targets, vocab)
    target = total(jnp.where(hit, raw, 0.0).sum(axis=-1))
    logps = (target - top) / options.temperature - lse
    held, sums = raw if options.held else None, _Sums(top, lse, None)
    if not options.stats:
        return TokenStats(logps), sums, held
    expected = total((exps * shifted).sum(axis=-1)) * jnp.exp(-lse)
    entropy = lse - expected
    if options.entropy_gradient:
        sums = sums._replace(entropy=entropy)
    parts = 1 if options.axis is None else jax.lax.axis_size(options.axis)
    if options.softcap:
        mean = raw.sum(axis=-1) / (vocab * parts)
    else:  # the product with the mean embedding: no pass over the logits
        mean = embedding.astype(jnp.float32).sum(axis=0) / (vocab * parts)
        mean = hidden.astype(jnp.float32) @ mean
    log_p2 = None
    if options.squares:
        log_p2 = jnp.log(total(jnp.square(exps).sum(axis=-1))) - 2 * lse
    stats = TokenStats(
        logps=logps,
        entropy=entropy,
        correct=(target >= top).astype(jnp.float32),
        logit_mean=total(mean),
        log_z=lse + top / options.temperature,
        log_p2=log_p2,
    )
    return stats, sums, held


def _d_logits(options, targets, sums, raw, gradient):
    """Returns f32[N, V], the gradient of a block's logits."""
    logps = (raw - sums.top[:, None]) / options.temperature - sums.lse[:, None]
    rest = -gradient.logps
    if options.stats:
        rest = rest + gradient.log_z
    rest = rest[:, None]
    if options.entropy_gradient:
        rest = rest - gradient.entropy[:, None] * (logps + sums.entropy[:, None])
    hit = _hits(options, targets, raw.shape[1])
    out = jnp.exp(logps) * rest + jnp.where(hit, gradient.logps[:, None], 0.0)
    out = out / options.temperature
    if options.softcap:
        out = out * (1 - jnp.square(raw / options.softcap))
    return out
