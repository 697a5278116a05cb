"""What a step of a given size in the weights does to behaviour, by direction.

How far weights move says little of what changes: the same norm along one direction may
turn every answer and along another none. So steps of equal norm are taken from one
model along the changes of several stages and along noise, and what each does is
measured: the divergence on the model's own answers, and what is lost on other texts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stagecraft.anatomy import causes
from stagecraft.anatomy.texts import Texts
from stagecraft.models.transformer import Transformer


def change(before: Any, after: Any) -> Any:
    """Returns after - before, array by array."""
    return jax.tree.map(lambda a, b: b - a, before, after)


def norm(tree: Any) -> float:
    """Returns the Frobenius norm over all arrays."""
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))))


def noise(like: Any, seed: int = 0) -> Any:
    """Draws a change of the same norm in each array, isotropic within it."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def one(array, key):
        random = jax.random.normal(key, array.shape, array.dtype)
        return random * (jnp.linalg.norm(array) / jnp.linalg.norm(random))

    arrays = [one(array, key) for array, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def step(model: Any, direction: Any, size: float) -> Any:
    """Moves a model along a direction, by `size` times the model's norm.

    Args:
        model, direction: trees of one structure.
        size: relative change of the result.
    """
    factor = size * norm(model) / norm(direction)
    return jax.tree.map(lambda a, d: a + factor * d, model, direction)


def measure(
    model: Transformer,
    directions: Mapping[str, Any],
    sizes: Sequence[float],
    said: Texts,
    others: Texts,
) -> list[dict]:
    """Measures what steps do.

    Args:
        model: where they start.
        directions: by name.
        sizes: relative changes of the weights.
        said: the model's own answers.
        others: texts of another kind, which it should not forget.

    Returns:
        [{"direction", "size", "divergence": KL(model || moved) in nats a token of its
        answers, "forgotten": nats a token that the other texts cost more}].
    """
    before = float(causes.answer_loss(model, others.batch))
    rows = []
    for name, direction in directions.items():
        for size in sizes:
            moved = step(model, direction, size)
            kl = causes.divergence(moved, model, said.batch)
            lost = float(causes.answer_loss(moved, others.batch)) - before
            row = {"direction": name, "size": size}
            rows.append(row | {"divergence": float(kl.mean()), "forgotten": lost})
    return rows
