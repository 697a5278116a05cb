"""Names, sizes, norms and digests of any tree of arrays, Flax modules included.

A parameter's name is the path a reader would write, `layers/attention/query`, without
the wrapper that Flax puts around each array.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def is_variable(x: Any) -> bool:
    """Returns whether Flax wraps an array here."""
    return isinstance(x, nnx.Variable)


def named(tree: Any) -> dict[str, Any]:
    """Returns every array of a tree by its name.

    Args:
        tree: any pytree: modules, dicts or lists of modules, optimizer states, abstract
            trees of `jax.ShapeDtypeStruct`.

    Returns:
        {name: array}, in the order of `jax.tree.leaves(tree)`; a lone array is "".

    Raises:
        ValueError: when two leaves share a name ({"a": {"b": x}, "a/b": y}).

    >>> list(named({"policy": {"embed": jnp.ones(2)}, "steps": [1, 2]}))
    ['policy/embed', 'steps/0', 'steps/1']
    """
    names = {}
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_variable):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in names:
            raise ValueError(f"two leaves of this tree are both named {name!r}")
        leaf = leaf.get_value() if is_variable(leaf) else leaf
        if leaf is not None:  # jax does not count an empty variable as a leaf either
            names[name] = leaf
    return names


def map_names(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Applies a function to the name and the array of each leaf.

    Args:
        function: (name, array) -> new leaf.
        tree: any pytree, as in `named`.

    Returns:
        A tree of the same structure, so that it pairs with `tree` in `jax.tree.map`.
    """
    leaves = [function(name, leaf) for name, leaf in named(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def count(tree: Any) -> int:
    """Counts parameters: the sum of the sizes of all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm of all floating-point leaves taken as one vector.

    Args:
        tree: any pytree of arrays; integer leaves (step counters) are left out.

    Returns:
        f32 scalar; 0 for a tree without floating-point leaves. Squares of half
        precision leaves are added in float32.
    """
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            total += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return jnp.sqrt(total)


def digest(tree: Any) -> str:
    """Returns the SHA-256 of a tree: names, dtypes, shapes and bytes, sorted by name.

    Equal digests mean equal trees bit for bit, whatever their sharding or the order of
    their dicts. Every leaf must be addressable from this process.

    Args:
        tree: any pytree of arrays and Python scalars.

    Returns:
        64 hexadecimal digits.
    """
    hasher = hashlib.sha256()
    for name, leaf in sorted(named(tree).items()):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        hasher.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()
