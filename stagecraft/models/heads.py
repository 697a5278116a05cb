"""Log-probabilities of tokens, without ever holding all logits.

The logits of a batch are its largest array by far: B * T * V numbers. They are computed
here for one block of tokens at a time, reduced to a few numbers a token, and recomputed
in the backward pass.
"""

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
        block_size: tokens per block on one device; None keeps a block's logits within
            `BLOCK_ELEMENTS`, or on accelerators `BLOCK_ELEMENTS_ELSEWHERE`.
        stats: False leaves every field but `logps` None.
        squares: also `log_p2`.
        entropy_gradient: let gradients through `entropy` (for an entropy bonus).

    Returns:
        `TokenStats` of f32[B, T].

    Raises:
        UserError: under a mesh, the rows do not divide over `data` times `fsdp`.
    """
    mesh = sharding.current_mesh()
    options = _Options(softcap, stats, squares, entropy_gradient)
    if mesh is None:
        return _local(
            hidden, embedding, targets, temperature, block_size, options, axis=None
        )
    sharding.check_rows(targets.shape[0], mesh)

    def on_device(hidden, embedding, targets):
        embedding = embedding.astype(hidden.dtype)
        embedding = jax.lax.all_gather(embedding, "fsdp", axis=1, tiled=True)
        # Marked as varying here and not where they are first used: the transpose of
        # this mark is the sum over devices, which belongs outside the loop.
        embedding = jax.lax.pcast(embedding, "data", to="varying")
        hidden = jax.lax.pcast(hidden, "tensor", to="varying")
        return _local(
            hidden, embedding, targets, temperature, block_size, options, axis="tensor"
        )

    rows = sharding.spec(("batch",) + (None,) * (targets.ndim - 1))
    return jax.shard_map(
        on_device,
        in_specs=(P(*rows, None), sharding.spec(("vocab", "embed")), rows),
        out_specs=rows,
    )(hidden, embedding, targets)


class _Options(NamedTuple):
    """Which fields of `TokenStats` to compute, and how."""

    softcap: float
    stats: bool
    squares: bool
    entropy_gradient: bool


def _local(hidden, embedding, targets, temperature, block_size, options, axis):
    """Computes one device's rows; its vocabulary is split over the mesh axis `axis`."""
    vocab, width = embedding.shape
    shape, count = targets.shape, targets.size
    if block_size is None:
        on_cpu = sharding.platform() == "cpu"
        elements = BLOCK_ELEMENTS if on_cpu else BLOCK_ELEMENTS_ELSEWHERE
        block_size = max(1, elements // vocab)
    blocks = -(-count // block_size)
    hidden, targets = hidden.reshape(count, width), targets.reshape(count)
    embedding = embedding.astype(hidden.dtype)

    def block(xs):
        return _block(*xs, embedding, temperature, options, axis)

    if blocks == 1:
        out = block((hidden, targets))
    else:
        size = -(-count // blocks)
        padding = blocks * size - count
        xs = (
            jnp.pad(hidden, ((0, padding), (0, 0))).reshape(blocks, size, width),
            jnp.pad(targets, (0, padding)).reshape(blocks, size),
        )
        body = jax.checkpoint(lambda carry, xs: (carry, block(xs)))
        _, out = jax.lax.scan(body, None, xs)
        out = jax.tree.map(lambda x: x.reshape(-1)[:count], out)
    return jax.tree.map(lambda x: x.reshape(shape), out)


def _block(hidden, targets, embedding, temperature, options, axis):
    """[N, D], i32[N], [V, D] -> TokenStats of f32[N]."""
    stop = jax.lax.stop_gradient

    def total(x):
        return x if axis is None else jax.lax.psum(x, axis)

    raw = jnp.einsum("nd,vd->nv", hidden, embedding, preferred_element_type=jnp.float32)
    raw = linear.softcap(raw, options.softcap)
    top = stop(raw).max(axis=-1)
    if axis is not None:
        top = jax.lax.pmax(top, axis)
        targets = targets - jax.lax.axis_index(axis) * embedding.shape[0]
    shifted = (raw - top[:, None]) / temperature
    exps = jnp.exp(shifted)
    lse = jnp.log(total(exps.sum(axis=-1)))
    # A comparison instead of a lookup: it fuses with the sums around it, its gradient
    # is no scatter, and a target outside this device's vocabulary counts zero.
    hit = targets[:, None] == jnp.arange(embedding.shape[0])[None, :]
    target = total(jnp.where(hit, raw, 0.0).sum(axis=-1))
    logps = (target - top) / temperature - lse
    if not options.stats:
        return TokenStats(logps)
    maybe_stop = (lambda x: x) if options.entropy_gradient else stop
    expected = total(maybe_stop(exps * shifted).sum(axis=-1))
    expected = expected * jnp.exp(-maybe_stop(lse))
    vocab = embedding.shape[0] * (1 if axis is None else jax.lax.axis_size(axis))
    if options.softcap:
        mean = stop(raw).sum(axis=-1) / vocab
    else:  # the product with the mean embedding: no pass over the logits
        mean = stop(embedding).astype(jnp.float32).sum(axis=0) / vocab
        mean = stop(hidden).astype(jnp.float32) @ mean
    return TokenStats(
        logps=logps,
        entropy=maybe_stop(lse) - expected,
        correct=(stop(target) >= top).astype(jnp.float32),
        logit_mean=total(mean),
        log_z=lse + top / temperature,
        log_p2=_log_p2(exps, lse, total) if options.squares else None,
    )


def _log_p2(exps, lse, total):
    exps, lse = map(jax.lax.stop_gradient, (exps, lse))
    return jnp.log(total(jnp.square(exps).sum(axis=-1))) - 2 * lse
