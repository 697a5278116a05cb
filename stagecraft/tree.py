"""Names, sizes, norms and digests of any tree of arrays, Flax modules included.

A parameter's name is the path a reader would write, `layers/attention/query`: the
wrapper that Flax puts around each array has no part in it.
"""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def _is_variable(x):
    return isinstance(x, nnx.Variable)


def named(tree):
    """Every array of a tree by its name.

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
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=_is_variable):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in names:
            raise ValueError(f"two leaves of this tree are both named {name!r}")
        leaf = leaf.get_value() if _is_variable(leaf) else leaf
        if leaf is not None:  # an empty variable is no leaf for jax either
            names[name] = leaf
    return names


def map_names(function, tree):
    """Replaces each leaf by what `function` makes of its name and itself.

    Args:
        function: (name, array) -> new leaf.
        tree: any pytree, as in `named`.

    Returns:
        A tree of the same structure, so that it pairs with `tree` in `jax.tree.map`.
    """
    leaves = [function(name, leaf) for name, leaf in named(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def count(tree):
    """Number of parameters: the sizes of all leaves added up, as a Python int."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def global_norm(tree):
    """Euclidean norm of all floating-point leaves taken as one vector.

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


def digest(tree):
    """SHA-256 of a tree's contents: names, dtypes, shapes and bytes, sorted by name.

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
