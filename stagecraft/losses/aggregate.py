"""Reductions of the token losses of a batch of completions to one number.

The reduction is sum(weights * loss) / sum(count), both sums over the global batch and
the whole accumulation window. Only the weights and counts differ by name.
"""

import jax.numpy as jnp
from jax import Array

from stagecraft import masked, schema
from stagecraft.errors import UserError

AGGREGATIONS = ("grpo", "bnpo", "dapo", "dr_grpo")


def aggregate(
    name: str, mask: Array, *, max_length: int | None = None
) -> masked.Reduction:
    """Returns the weights and counts of one way to average.

    - "grpo": each completion counts alike: the mean over completions of the mean over
      their tokens (Shao et al. 2024, arxiv.org/abs/2402.03300, eq. 3). A token of a
      long completion weighs less.
    - "dapo": each token counts alike (Yu et al. 2025, arxiv.org/abs/2503.14476, eq. 8).
    - "bnpo": the same here. The names come from TRL, where "bnpo" averages over the
      tokens of each micro-batch and then over micro-batches, so that a token's weight
      depends on its neighbours, and "dapo" divides by the tokens of the whole
      generation batch, shared out evenly to its optimizer steps.
    - "dr_grpo": the sum over a constant, completions times the length limit (Liu et
      al. 2025, arxiv.org/abs/2503.20783, section 3.2): neither rewards length.

    Args:
        name: one of the above.
        mask: bool[B, T], True on the completions; a row left empty by
            `overlong_filter` still counts as a completion in "grpo" and "dr_grpo".
        max_length: tokens, the longest completion that is sampled; "dr_grpo" only.

    Returns:
        a `masked.Reduction`: weights f32[B, T], 0 outside the mask, and count f32[B].

    Raises:
        UserError: for an unknown name, or "dr_grpo" without a `max_length` above 0.

    >>> ends = jnp.array([[True, True], [True, False]])
    >>> weights, count = aggregate("grpo", ends)
    >>> weights.tolist(), count.tolist()
    ([[0.5, 0.5], [1.0, 0.0]], [1.0, 1.0])
    """
    schema.choice("aggregate", name, AGGREGATIONS)
    weights = mask.astype(jnp.float32)
    lengths = masked.count(mask, axis=1)  # [B]
    if name == "grpo":
        weights = weights / jnp.maximum(lengths, 1.0)[:, None]
        return masked.Reduction(weights, jnp.ones_like(lengths))
    if name == "dr_grpo":
        if max_length is None or max_length <= 0:
            raise UserError(
                f"max_length={max_length!r}: aggregate 'dr_grpo' divides by the length "
                "limit of completions; expected a number of tokens above 0"
            )
        return masked.Reduction(weights, jnp.full_like(lengths, max_length))
    return masked.Reduction(weights, lengths)


def overlong_filter(mask: Array, ended: Array) -> Array:
    """Masks out completions that were cut off at the length limit.

    DAPO (Yu et al. 2025, arxiv.org/abs/2503.14476), section 3.4: a cut completion may
    have been right so far, so its score is noise.

    Args:
        mask: bool[B, T], True on the completions.
        ended: bool[B], True where the stop token was sampled.

    Returns:
        bool[B, T].

    Raises:
        ValueError: when the shapes do not fit.

    >>> overlong_filter(jnp.ones((2, 1), bool), jnp.array([True, False])).tolist()
    [[True], [False]]
    """
    masked.check_shapes(rows=mask[:, 0], ended=ended)
    return mask & ended[:, None]


__all__ = ["AGGREGATIONS", "aggregate", "overlong_filter"]
