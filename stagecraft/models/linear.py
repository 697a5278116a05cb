"""What the decoder's layers are made of: parameters, products, activations."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

# Of a feed-forward, by the names a config gives them.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def normal(key, shape, std, axes):
    """A parameter of N(0, std^2), with the logical names of its dimensions."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


def zeros(shape, axes):
    """A parameter that starts at zero: a bias."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


def project(x, weight, bias=None, contracted: int = 1):
    """Contracts the last dimensions of x with the first ones of a weight.

    Both are flattened to matrices: the gradient of the weight is then a plain matmul.
    With [B, T, D] kept, XLA on a CPU transposes whole activations for it.

    Args:
        x: [..., *contracted], in the compute dtype.
        weight: Param [*contracted, *out].
        bias: Param [*out], or None.
        contracted: how many dimensions are summed over.

    Returns:
        [..., *out].
    """
    weight = weight[...].astype(x.dtype)
    rows, columns = x.shape[: x.ndim - contracted], weight.shape[contracted:]
    size = math.prod(weight.shape[:contracted])
    out = x.reshape(-1, size) @ weight.reshape(size, -1)
    out = out.reshape(rows + columns)
    return out if bias is None else out + bias[...].astype(x.dtype)


def softcap(x, cap: float):
    """Keeps x within (-cap, cap): cap tanh(x / cap); 0 leaves it alone."""
    return cap * jnp.tanh(x / cap) if cap else x
