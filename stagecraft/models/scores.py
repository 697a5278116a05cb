"""Scores of whole sequences: a scalar model's output at their last real token."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from stagecraft import sharding
from stagecraft.models.transformer import ScalarModel

ROUND = 16  # lengths are rounded up to a multiple of this, to bound compilations


def last_token(mask: Array) -> Array:
    """Returns the index of the last true element along the last axis; 0 where none is.

    Args:
        mask: bool[..., T].

    Returns:
        i32[...].
    """
    length = mask.shape[-1]
    last = length - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
    return jnp.where(mask.any(-1), last, 0).astype(jnp.int32)


def scores(
    model: ScalarModel, ids: Array, mask: Array, segments: Array, positions: Array
) -> Array:
    """Returns the scalar model's output at the last masked token of each row.

    Args:
        ids, segments, positions: i32[B, T]; mask: bool[B, T].

    Returns:
        f32[B].
    """
    values = model(ids, positions, segments)
    return jnp.take_along_axis(values, last_token(mask)[:, None], axis=1)[:, 0]


_scores = jax.jit(scores)


def padded_tokens(rows: int, longest: int, *, batch_size: int = 128) -> int:
    """Counts the tokens that `of_rows` runs through the model, padding too."""
    return -(-rows // batch_size) * batch_size * _rounded(longest)


def _rounded(length):
    return -(-length // ROUND) * ROUND


def of_rows(model: ScalarModel, rows: list, *, batch_size: int = 128) -> list[float]:
    """Scores id sequences of any lengths.

    Args:
        rows: list of ids, the last one being where the score is read.
        batch_size: rows at once.

    Returns:
        a score for each row; NaN where it is longer than the model's max_length.
    """
    limit = model.body.config.max_length
    fits = [len(row) <= limit for row in rows]
    rows = [row[:limit] for row in rows]
    length = _rounded(max(map(len, rows)))
    out = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = np.zeros((batch_size, length), np.int32)
        mask = np.zeros((batch_size, length), bool)
        for i, row in enumerate(part):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        positions = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
        batch = dict(
            ids=ids, mask=mask, segments=mask.astype(np.int32), positions=positions
        )
        values = _scores(model, **sharding.on_mesh(batch))
        out += sharding.to_host(values)[: len(part)].tolist()
    return [score if fit else math.nan for score, fit in zip(out, fits, strict=True)]
