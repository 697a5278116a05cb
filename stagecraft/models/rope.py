"""Rotary positions, and how their wavelengths stretch beyond the trained length.

Two of the scalings depend on the length of a text. That is its own document alone: what
else is in the row or the batch changes nothing.
"""

import math

import jax.numpy as jnp
from jax import Array

from stagecraft.models.config import ROPE_SCALING, ModelConfig

# Scalings whose wavelengths depend on the length of the document.
BY_LENGTH = ("dynamic", "longrope")


def angles(
    config: ModelConfig, positions: Array, segments: Array | None, *, sliding: bool
) -> tuple[Array, Array]:
    """Computes cosines and sines of rotary position embedding (Su et al. 2021, eq. 15).

    Args:
        positions: i32[B, T], of each token in its document.
        segments: i32[B, T], which document each token belongs to; None where every
            position is the last of its document so far (decoding).
        sliding: for layers with a window, which may have a base of their own.

    Returns:
        Two f32[B, T, 1, R/2] for `rotate`, R channels rotating.
    """
    c = config
    own = sliding and c.rope_theta_sliding > 0
    scaling = "none" if own else c.rope_scaling
    theta = c.rope_theta_sliding if own else c.rope_theta
    lengths = None
    if scaling in BY_LENGTH:
        lengths = document_lengths(positions, segments)[..., None, None]
    given = dict(zip(ROPE_SCALING[scaling], c.rope_arguments, strict=False))
    factor = given.pop("attention_factor", 1.0)
    exponents = jnp.arange(0, c.rotary_channels, 2, dtype=jnp.float32)
    exponents = exponents / c.rotary_channels
    frequencies = _SCALINGS[scaling](theta, exponents, lengths, **given)
    turns = positions[..., None, None].astype(jnp.float32) * frequencies
    if factor == 1.0:
        return jnp.cos(turns), jnp.sin(turns)
    return jnp.cos(turns) * factor, jnp.sin(turns) * factor


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotates channel pairs (i, i + R/2), Llama's pairing; x is [B, T, H, C].

    Channels from R on, R twice the width of `angles`, stay as they are.
    """
    cos, sin = angles
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    if 2 * half == x.shape[-1]:
        first, second = jnp.split(x32, 2, axis=-1)
        rest = ()
    else:
        first, second, *rest = jnp.split(x32, (half, 2 * half), axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, *rest)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def document_lengths(positions: Array, segments: Array | None) -> Array:
    """Returns the length of each token's document so far or in full: i32[B, T].

    Args: as of `angles`.
    """
    if segments is None:
        return positions + 1
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.where(same, positions[:, None, :], 0).max(axis=-1) + 1


def _none(theta, exponents, lengths):
    return theta**-exponents


def _linear(theta, exponents, lengths, *, factor):
    """Divides positions by the factor (Chen et al. 2023)."""
    return theta**-exponents / factor


def _dynamic(theta, exponents, lengths, *, factor, original_length):
    """Grows the base with the length, once beyond the original (NTK-aware)."""
    channels = 2 * exponents.size
    longer = jnp.maximum(lengths, original_length).astype(jnp.float32)
    growth = factor * longer / original_length - (factor - 1)
    power = channels / (channels - 2) if channels > 2 else 1.0
    return (theta * growth**power) ** -exponents


def _llama3(
    theta, exponents, lengths, *, factor, low_frequency, high_frequency, original_length
):
    """Divides long waves by the factor, keeps short ones, and mixes both in between.

    Dubey et al. 2024; long and short are measured in turns over the original length.
    """
    plain = theta**-exponents
    turns = original_length * plain / (2 * math.pi)
    share = (turns - low_frequency) / (high_frequency - low_frequency)
    share = jnp.clip(share, 0.0, 1.0)
    return (1 - share) * plain / factor + share * plain


def _yarn(
    theta,
    exponents,
    lengths,
    *,
    factor,
    original_length,
    beta_fast,
    beta_slow,
    truncate,
):
    """Does the same with a ramp over channels (Peng et al. 2023, section 3.2)."""
    plain = theta**-exponents
    pairs = exponents.size

    def channel(turns):
        """Returns the pair of channels with `turns` turns over the original length."""
        share = math.log(original_length / (turns * 2 * math.pi)) / math.log(theta)
        return pairs * share

    low, high = channel(beta_fast), channel(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high = high if high != low else high + 0.001
    ramp = (jnp.arange(pairs, dtype=jnp.float32) - low) / (high - low)
    scaled = jnp.clip(ramp, 0.0, 1.0)
    return plain / factor * scaled + plain * (1 - scaled)


def _longrope(
    theta, exponents, lengths, *, short_factors, long_factors, original_length
):
    """Divides each pair by its factor: one set up to the original length, one after."""
    short, long = (
        jnp.asarray(factors, jnp.float32) for factors in (short_factors, long_factors)
    )
    factors = jnp.where(lengths > original_length, long, short)
    return theta**-exponents / factors


_SCALINGS = {
    "none": _none,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
