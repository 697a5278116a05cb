"""A scalar model's word on whole sequences: its output at their last real token."""

import jax
import jax.numpy as jnp
import numpy as np


def last_token(mask):
    """Index of the last true element along the last axis; 0 where none is.

    Args:
        mask: bool[..., T].

    Returns:
        i32[...].
    """
    length = mask.shape[-1]
    last = length - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
    return jnp.where(mask.any(-1), last, 0).astype(jnp.int32)


def scores(model, ids, mask, segments, positions):
    """The scalar model's output at the last masked token of each row.

    Args:
        model: a `ScalarModel`.
        ids, segments, positions: i32[B, T]; mask: bool[B, T].

    Returns:
        f32[B].
    """
    values = model(ids, positions, segments)
    return jnp.take_along_axis(values, last_token(mask)[:, None], axis=1)[:, 0]


_scores = jax.jit(scores)


def of_rows(model, rows, place, *, batch_size=128, multiple=16):
    """Scores of id sequences of any lengths.

    Args:
        model: a `ScalarModel`.
        rows: list of ids, the last one being where the score is read.
        place: puts a dict of numpy arrays on the mesh.
        batch_size: rows at once.
        multiple: lengths are rounded up to one of this, to bound compilations.

    Returns:
        list of float.
    """
    length = -(-max(map(len, rows)) // multiple) * multiple
    out = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = np.zeros((batch_size, length), np.int32)
        seen = np.zeros((batch_size, length), bool)
        for i, row in enumerate(part):
            ids[i, : len(row)] = row
            seen[i, : len(row)] = True
        positions = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
        batch = dict(
            ids=ids, mask=seen, segments=seen.astype(np.int32), positions=positions
        )
        out += np.asarray(_scores(model, **place(batch)))[: len(part)].tolist()
    return out
