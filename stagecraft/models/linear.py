"""Building blocks of the decoder's layers: parameters, products, activations."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

# Activations of a feed-forward, by their names in a config.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def normal(
    key: Array, shape: tuple[int, ...], std: float, axes: tuple[str | None, ...]
) -> nnx.Param:
    """Makes a parameter of N(0, std^2), with the logical names of its dimensions."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Makes a parameter that starts at zero: a bias."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


class Adapted(nnx.Module):
    """A frozen weight plus a low-rank product: W + s A B.

    Args:
        weight: Param [*contracted, *out].
        a: Param [*contracted, R].
        b: Param [R, *out].
        scale: s.
        dropout: share of the inputs of A that are dropped.
        key: u32[2], data of the random key for dropout; None drops nothing.
    """

    def __init__(self, weight, a, b, scale: float, dropout: float = 0.0, key=None):
        self.weight, self.a, self.b = weight, a, b
        self.scale, self.dropout = scale, dropout
        self.key = nnx.data(key)  # under a trace Flax would take it for a setting

    def low_rank(self, x: Array, contracted: int) -> Array:
        """Computes s x A B, which is added to the product of x with the weight."""
        if self.key is not None:
            key = jax.random.wrap_key_data(self.key)
            mask = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(mask, x / (1 - self.dropout), 0)
        inner = project(x, self.a, contracted=contracted)
        return self.scale * project(inner, self.b)


def project(
    x: Array,
    weight: nnx.Param | Adapted,
    bias: nnx.Param | None = None,
    contracted: int = 1,
) -> Array:
    """Contracts the last dimensions of x with the first ones of a weight.

    Both are flattened to matrices: the gradient of the weight is then a plain matmul.
    With [B, T, D] kept, XLA on a CPU transposes whole activations for it.

    Args:
        x: [..., *contracted], in the compute dtype.
        weight: Param [*contracted, *out], or an `Adapted` one.
        bias: Param [*out], or None.
        contracted: number of dimensions to sum over.

    Returns:
        [..., *out].
    """
    if isinstance(weight, Adapted):
        out = project(x, weight.weight, bias, contracted)
        return out + weight.low_rank(x, contracted)
    weight = weight[...].astype(x.dtype)
    rows, columns = x.shape[: x.ndim - contracted], weight.shape[contracted:]
    size = math.prod(weight.shape[:contracted])
    out = x.reshape(-1, size) @ weight.reshape(size, -1)
    out = out.reshape(rows + columns)
    return out if bias is None else out + bias[...].astype(x.dtype)


def softcap(x: Array, cap: float) -> Array:
    """Limits x to (-cap, cap): cap tanh(x / cap); 0 changes nothing."""
    return cap * jnp.tanh(x / cap) if cap else x
