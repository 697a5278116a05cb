"""Mixtures of experts: every copy of a token finds its expert, and no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft.models import experts
from stagecraft.models.experts import Routing

N, D, F = 13, 6, 10


def arrays(count, k, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (N, D)).astype(np.float32)
    shares = rng.uniform(0.1, 1, (N, k)).astype(np.float32)
    sizes = ((D, F), (D, F), (F, D))
    weights = [rng.normal(0, 1, (count, *s)).astype(np.float32) for s in sizes]
    return x, shares, weights


def routes(count, k, kind):
    rng = np.random.default_rng(1)
    if kind == "one takes all":  # and the experts before and after it get nothing
        return np.tile(np.arange(k) + count // 2, (N, 1)).astype(np.int32)
    return np.stack([rng.permutation(count)[:k] for _ in range(N)]).astype(np.int32)


def numpy_mix(x, shares, chosen, weights):
    gate, up, down = (np.float64(w) for w in weights)
    out = np.zeros_like(x, np.float64)
    for n, j in np.ndindex(chosen.shape):
        e = chosen[n, j]
        inner = np.maximum(x[n] @ gate[e], 0) * (x[n] @ up[e])
        out[n] += shares[n, j] * (inner @ down[e])
    return out


MIX = functools.partial(experts._mix, activation="relu")


@pytest.mark.parametrize("count,k", [(4, 1), (4, 2), (64, 3), (3, 3)])
@pytest.mark.parametrize("kind", ["spread", "one takes all"])
def test_the_mixture_equals_plain_numpy(count, k, kind):
    if kind == "one takes all" and count < 2 * k:
        k = 1
    x, shares, weights = arrays(count, k)
    chosen = routes(count, k, kind)
    got = jax.jit(MIX)(x, shares, chosen, *weights)
    expected = numpy_mix(x, shares, chosen, weights)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [1, 2, 8])
def test_products_and_their_gradients(block):
    """By blocks, as a ragged product, and as each row times its own matrix."""
    x, shares, weights = arrays(5, 2)
    chosen = routes(5, 2, "spread")

    def run(product, block, x, shares, weights):
        layout = experts._layout(jnp.asarray(chosen), 5, block)
        rows = experts._spread(x, layout)
        out = experts._collect(product(rows, weights[0], layout), layout)
        return jnp.sin((out * shares[..., None]).sum(1)).sum()

    def plain(x, shares, weights):
        out = jnp.einsum("nd,nkdf->nkf", x, jnp.asarray(weights[0])[chosen])
        return jnp.sin((out * shares[..., None]).sum(1)).sum()

    args = x, shares, weights
    value, gradient = jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(*args)
    for product in (experts._blockwise_product, experts._ragged_product):
        one = functools.partial(run, product, block)
        got, found = jax.jit(jax.value_and_grad(one, (0, 1, 2)))(*args)
        assert got == pytest.approx(float(value), abs=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (found, gradient)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_layout_holds_every_copy_once_in_its_experts_group():
    for count, k, kind, block in [
        *((5, 2, "spread", 4), (5, 2, "one takes all", 4)),
        *((40, 3, "spread", 8), (2, 2, "spread", 1)),
    ]:
        chosen = routes(count, k, kind)
        lay = jax.jit(lambda x, e=count, b=block: experts._layout(x, e, b)[:3])
        place, copy, sizes = map(np.asarray, lay(chosen))
        assert len(set(place.ravel().tolist())) == chosen.size
        assert place.max() < len(copy) and len(copy) % block == 0
        np.testing.assert_array_equal(copy[place.ravel()], np.arange(chosen.size))
        assert (copy == chosen.size).sum() == len(copy) - chosen.size
        ends = np.cumsum(sizes)
        owner = np.searchsorted(ends, place, side="right")
        np.testing.assert_array_equal(owner, chosen)


def test_balance_counts_real_tokens_alone():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (2, 7, 4))
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    chosen = np.argsort(-scores, axis=-1)[..., :2]
    real = rng.random((2, 7)) < 0.6
    routing = Routing(jnp.asarray(probabilities), chosen)
    found = jax.jit(experts.balance)(routing, real)
    copies = np.zeros(4)
    for e in chosen[real].ravel():
        copies[e] += 1
    share, mean = copies / real.sum(), probabilities[real].mean(0)
    got = np.asarray(found.loss)[real].mean()
    assert got == pytest.approx(4 * (share * mean).sum(), rel=1e-5)
    np.testing.assert_allclose(found.load, share / 2, rtol=1e-5)
    even = Routing(jnp.full((1, 4, 4), 0.25), jnp.arange(4)[None, :, None])
    level = experts.balance(even, jnp.ones((1, 4), bool))
    np.testing.assert_allclose(level.loss, 1.0)
