"""What every loss test shares: strict array arithmetic and a judge of gradients."""

import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def strict():
    """No silent casts and no silent broadcasting inside a loss."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def run():
    """Applied to a function: compiled, as stages do. Other tests call losses as are."""
    return jax.jit


@pytest.fixture
def check_gradient():
    """Compares jax.grad with central differences, in float64, for every argument."""

    def check(function, *arrays, step=1e-6):
        arrays = [np.asarray(a, np.float64) for a in arrays]
        with jax.enable_x64(True):
            gradients = jax.jit(jax.grad(function, argnums=range(len(arrays))))(*arrays)
            for i, (array, got) in enumerate(zip(arrays, gradients, strict=True)):
                axes = [0 if j == i else None for j in range(len(arrays))]
                values = jax.jit(jax.vmap(function, in_axes=axes))
                moves = step * np.eye(array.size).reshape(-1, *array.shape)
                up, down = (
                    values(*arrays[:i], array[None] + sign * moves, *arrays[i + 1 :])
                    for sign in (1, -1)
                )
                want = np.asarray(up - down).reshape(array.shape) / (2 * step)
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)

    return check
