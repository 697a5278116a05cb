"""Two completions in one row: passes over a rollout without most of its padding.

Rows of a rollout end early, each at its own place. The longest is put into one row with
the shortest, the second longest with the second shortest, and so on: half the rows, of
a length that is about the same for all. They do not see each other (segments 1 and 2),
and every number is that of the rows apart. Rows meet those of their own device only, so
that nothing crosses the mesh.

Packing into as few rows as possible would save more where lengths differ most, but the
shapes of its programs would hang on the data; those of pairs hang on one number.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from stagecraft import sharding
from stagecraft.models.language import padded
from stagecraft.stages import stage

# What is cut or paired is where at most this share of the tokens is left.
WORTH_CUTTING = 0.8


class Fold(NamedTuple):
    """Rows in pairs.

    Attributes:
        ids, segments, positions: i32[R / 2, W].
        begin: i32[R], where each of the R rows begins among the (R / blocks / 2) W
            places of its block, its first real token.
        skip: i32[R], the padding before it in its own row.
        blocks: parts of the rows that lie on different devices.
    """

    ids: Array
    segments: Array
    positions: Array
    begin: Array
    skip: Array
    blocks: int

    def at(self, values: Array, columns: Array) -> Array:
        """Returns values of columns of the rows apart.

        Args:
            values: [R / 2, W, ...], of the rows in pairs.
            columns: i32[R, M], places in the rows apart; of those that are padding any
                value is returned.

        Returns:
            [R, M, ...].
        """
        places = (self.begin - self.skip)[:, None] + columns
        rest = values.shape[2:]
        flat = values.reshape(self.blocks, -1, *rest)
        places = jnp.clip(places.reshape(self.blocks, -1), 0, flat.shape[1] - 1)
        places = places.reshape(*places.shape, *(1,) * len(rest))
        chosen = jnp.take_along_axis(flat, places, axis=1)
        return _rows(chosen.reshape(*columns.shape, *rest))


def fold(batch: dict[str, Array]) -> Fold:
    """Puts the rows of a rollout into pairs.

    Args:
        batch: ids, segments, i32[R, T], the real tokens of a row next to each other,
            and "fold", which has no elements: [R, 0, W].
    """
    segments, blocks = batch["segments"], row_blocks()
    width = batch["fold"].shape[-1]
    real = (segments > 0).reshape(blocks, -1, segments.shape[1])
    ids = batch["ids"].reshape(real.shape)
    lengths = real.sum(axis=-1, dtype=jnp.int32)
    skip = jnp.argmax(real, axis=-1).astype(jnp.int32)
    first, second = _partners(lengths)

    def of(array, rows):
        return jnp.take_along_axis(array, rows, axis=1)[..., None]

    column = jnp.arange(width, dtype=jnp.int32)
    here, both = of(lengths, first), of(lengths, first) + of(lengths, second)
    in_first, inside = column < here, column < both
    source = jnp.where(
        in_first, of(skip, first) + column, of(skip, second) + column - here
    )
    row = jnp.where(in_first, first[..., None], second[..., None])
    flat = ids.reshape(blocks, -1)
    source = jnp.clip(row * ids.shape[-1] + source, 0, flat.shape[1] - 1)
    tokens = jnp.take_along_axis(flat, source.reshape(blocks, -1), axis=1)
    tokens = tokens.reshape(source.shape)
    # Where each row begins: behind its partner, or at the front of their row.
    pair = jnp.broadcast_to(jnp.arange(first.shape[1]) * width, first.shape)
    order = jnp.argsort(jnp.concatenate([first, second], axis=1), axis=1)
    begin = jnp.concatenate([pair, pair + here[..., 0]], axis=1)
    begin = jnp.take_along_axis(begin, order, axis=1)

    def rows(array, where=inside):
        return _rows(jnp.where(where, array, 0).reshape(-1, width))

    return Fold(
        ids=rows(tokens),
        segments=rows(jnp.where(in_first, 1, 2)),
        positions=rows(jnp.where(in_first, column, column - here)),
        begin=begin.reshape(-1).astype(jnp.int32),
        skip=skip.reshape(-1),
        blocks=blocks,
    )


def widest(segments: Array, order: Array, micro_batches: int, blocks: int) -> Array:
    """Returns the length that every pair of some batches fits into, i32[].

    Args:
        segments: i32[R, T], of the rows.
        order: i32[K, M], the rows of each batch.
        micro_batches: parts that a batch is split into, as `update` splits it.
        blocks: as of `row_blocks`.
    """
    lengths = (segments > 0).sum(axis=-1, dtype=jnp.int32)[order]
    parts = lengths.reshape(len(order), -1, micro_batches).swapaxes(1, 2)
    in_blocks = parts.reshape(-1, parts.shape[-1] // blocks)
    first, second = _partners(in_blocks)
    both = jnp.take_along_axis(in_blocks, first, axis=1)
    return (both + jnp.take_along_axis(in_blocks, second, axis=1)).max()


def row_blocks() -> int:
    """Returns the parts that rows are split into by the mesh that is set."""
    mesh = sharding.current_mesh()
    return 1 if mesh is None else sharding.row_shards(mesh)


def _partners(lengths):
    """Returns for i32[S, r] lengths the rows of each pair, two arrays i32[S, r / 2]."""
    ranked = jnp.argsort(-lengths, axis=1).astype(jnp.int32)
    half = lengths.shape[1] // 2
    return ranked[:, :half], ranked[:, ::-1][:, :half]


def _rows(array):
    return sharding.constrain(array, "batch", *(None,) * (array.ndim - 1))


def empty(rows: int, width: int) -> np.ndarray:
    """Returns what says in a batch how wide its pairs are: no elements, [R, 0, W]."""
    return np.zeros((rows, 0, width), np.int8)


def make(config, mesh, order):
    """Makes (rollout, key) -> it, with "fold" where pairs spare much padding.

    Args:
        config: the stage's resolved config: minibatches, micro_batches.
        mesh: the stage's.
        order: as of `rollout.make_stage`; None where rows stay apart.
    """
    if order is None:
        return lambda samples, key: samples
    blocks, micro_batches = sharding.row_shards(mesh), config.micro_batches

    def width_of_all(segments, key):
        rows = len(segments)
        every = jnp.arange(rows)[None]
        return jnp.maximum(
            widest(segments, every, 1, blocks),
            widest(segments, order(rows, key), micro_batches, blocks),
        )

    width_jitted = stage.jit(width_of_all, sharding.whole(mesh))

    def folded(samples, key):
        rows, length = samples["ids"].shape
        least = rows // (config.minibatches * micro_batches)
        if rows % (2 * blocks) or least % (2 * blocks):
            return samples
        width = padded(int(width_jitted(samples["segments"], key)))
        if width > WORTH_CUTTING * 2 * length:
            return samples
        return samples | {"fold": sharding.shard_batch(empty(rows, width), mesh)}

    return folded
