"""What a change of the same size would look like if it meant nothing.

Every figure of a change stands beside that of an isotropic one: Gaussian noise of the
same norm on the same weights, rounded as the file rounds, measured by the same code.
"""

import zlib

import numpy as np

from stagecraft.anatomy import elements

_SAMPLE = 1 << 16  # weights on which the size of the noise is set


def isotropic(
    before: np.ndarray, norm: float, dtype: str, *, name: str, draw: int, seed: int = 0
) -> np.ndarray:
    """Adds Gaussian noise of a given norm to a matrix and rounds it as it is stored.

    In half precision rounding adds to the norm, or removes changes: the noise is scaled
    so that the norm after rounding is the one asked for.

    Args:
        before: f32.
        norm: Frobenius norm that the change is to have.
        dtype: as the matrix after the change is stored.
        name, draw, seed: choose the noise; equal ones give equal noise.

    Returns:
        f32 of the same shape.
    """
    random = np.random.default_rng([seed, draw, zlib.crc32(name.encode())])
    scale = _scale(before, norm / before.size**0.5, dtype)
    after = np.empty(before.shape, np.float32)
    for a, out in elements.blocks(before, after):
        noise = random.standard_normal(a.shape, np.float32)
        out[...] = elements.cast(a + np.float32(scale) * noise, dtype)
    return after


def _scale(before, target, dtype):
    """Finds the SD of noise whose root mean square after rounding is the target."""
    if dtype in ("F32", "F64") or not target:
        return target
    # A flat view of the axis order in memory: of any other it would be a copy.
    stored = before if before.flags.c_contiguous else before.T
    flat = stored.reshape(-1)
    sample = flat[:: max(1, flat.size // _SAMPLE)].astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(sample.shape, np.float32)

    def rms(scale):
        moved = elements.cast(sample + np.float32(scale) * noise, dtype)
        return float(np.sqrt(np.mean(np.square(moved - sample, dtype=np.float64))))

    low, high = 0.0, 4 * target
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rms(middle) < target else (low, middle)
    return (low + high) / 2
