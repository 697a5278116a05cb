"""Norms over the last axis, in float32 whatever the compute dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from stagecraft.models import linear
from stagecraft.models.config import ModelConfig


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang, Sennrich 2019).

    Args:
        size: of the last axis.
        eps: added to the mean square.
        axis: logical name of the last axis, or None.
        offset: added to the scale, which starts at 1 - offset.
    """

    def __init__(self, size: int, eps: float, axis: str | None, offset: float = 0.0):
        self.eps = eps
        self.offset = offset
        start = jnp.full((size,), 1.0 - offset, jnp.float32)
        self.scale = nnx.Param(start, axes=(axis,))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(mean_square + self.eps) * _scale(self)
        return y.astype(x.dtype)


class LayerNorm(RMSNorm):
    """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al. 2016).

    Args: as of `RMSNorm`; eps is added to the variance.
    """

    def __init__(self, size: int, eps: float, axis: str | None, offset: float = 0.0):
        super().__init__(size, eps, axis, offset)
        self.bias = linear.zeros((size,), (axis,))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * _scale(self)
        return (y + self.bias[...]).astype(x.dtype)


def make(config: ModelConfig) -> RMSNorm | LayerNorm:
    """Makes a norm of the residual stream."""
    norm_class = RMSNorm if config.norm == "rms" else LayerNorm
    return norm_class(config.width, config.norm_eps, "embed", config.norm_offset)


def _scale(norm):
    scale = norm.scale[...]
    return norm.offset + scale if norm.offset else scale
