"""Twenty steps of ours are twenty steps of torch.optim's, on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, optim
from tests.peers.bridge import torch

pytestmark = pytest.mark.peers

STEPS = 20
# A matrix, one large enough to factor, and what is not decayed.
SHAPES = {"up": (5, 7), "wide": (128, 130), "norm/scale": (7,), "bias": (3,)}
UNDECAYED = ("norm/scale", "bias")


def drawn(rng, shapes, steps=STEPS, smallest=-6):
    """Parameters, and gradients of sizes from 10^smallest to 1: where eps shows."""
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    grads = []
    for _ in range(steps):
        size = 10.0 ** rng.uniform(smallest, 0)
        grads.append(
            {
                k: (size * rng.normal(size=s)).astype(np.float32)
                for k, s in shapes.items()
            }
        )
    return params, grads


def ours(params, grads, **settings):
    """The parameters after each step."""
    config = defaults.optimizer()
    flat = dict(schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.0)
    config.update(flat | settings)
    made = optim.make(config, steps=len(grads))
    params = jax.tree.map(jnp.asarray, params)
    state = made.tx.init(params)
    step = jax.jit(lambda p, s, g, i: optim.apply(made, g, s, p, i)[:2])
    found = []
    for i, g in enumerate(grads):
        params, state = step(params, state, g, i)
        found.append({k: np.asarray(v) for k, v in params.items()})
    return found


def theirs(make, params, grads):
    """The same of a torch optimizer, made from {name: tensor}."""
    tensors = {k: torch.tensor(v.copy(), requires_grad=True) for k, v in params.items()}
    peer = make(tensors)
    found = []
    for g in grads:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(g[name])
        peer.step()
        found.append({k: v.detach().numpy().copy() for k, v in tensors.items()})
    return found


def assert_same(found, wanted, tolerance=2e-6):
    assert len(found) == len(wanted)
    for step, (got, want) in enumerate(zip(found, wanted, strict=True)):
        for name in want:
            np.testing.assert_allclose(
                got[name],
                want[name],
                rtol=2e-5,
                atol=tolerance,
                err_msg=f"{name} after step {step}",
            )


@pytest.mark.parametrize("eps", [1e-8, 1e-5])
def test_adamw_with_the_decay_of_the_peer(eps, parity_rng):
    params, grads = drawn(parity_rng, SHAPES)

    def make(tensors):
        # As transformers' trainer groups them: no norms, no biases.
        groups = [
            {
                "params": [t for n, t in tensors.items() if (n in UNDECAYED) == bare],
                "weight_decay": 0.0 if bare else 0.1,
            }
            for bare in (False, True)
        ]
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=eps)

    settings = dict(name="adamw", lr=0.01, b1=0.9, b2=0.95, eps=eps, weight_decay=0.1)
    want = theirs(make, params, grads)
    assert_same(ours(params, grads, **settings), want)
    # eps is felt, or nothing was tested of it.
    other = ours(params, grads, **settings | dict(eps=1e-3))
    assert np.abs(other[-1]["up"] - want[-1]["up"]).max() > 1e-3


def test_adam(parity_rng):
    params, grads = drawn(parity_rng, SHAPES)
    want = theirs(
        lambda t: torch.optim.Adam(t.values(), lr=0.01, betas=(0.8, 0.99), eps=1e-8),
        params,
        grads,
    )
    found = ours(params, grads, name="adam", lr=0.01, b1=0.8, b2=0.99, eps=1e-8)
    assert_same(found, want)


def test_rmsprop_and_sgd(parity_rng):
    params, grads = drawn(parity_rng, SHAPES)
    want = theirs(
        lambda t: torch.optim.RMSprop(t.values(), lr=0.01, alpha=0.95, eps=1e-6),
        params,
        grads,
    )
    assert_same(ours(params, grads, name="rmsprop", lr=0.01, b2=0.95, eps=1e-6), want)
    want = theirs(lambda t: torch.optim.SGD(t.values(), lr=0.3), params, grads)
    assert_same(ours(params, grads, name="sgd", lr=0.3), want)


def test_adafactor(parity_rng):
    # The peer factors every matrix, we only large ones; the small ones are left out.
    shapes = {k: v for k, v in SHAPES.items() if k != "up"}
    # It floors a row's mean square at float32's machine epsilon, and we do not.
    params, grads = drawn(parity_rng, shapes, smallest=-2)
    want = theirs(
        lambda t: torch.optim.Adafactor(t.values(), lr=0.01, weight_decay=0.0),
        params,
        grads,
    )
    assert_same(ours(params, grads, name="adafactor", lr=0.01), want, tolerance=1e-5)


@pytest.mark.parametrize("update_rms", [0.2, 0.0])
def test_muon(update_rms, parity_rng, monkeypatch):
    """The peer's momentum starts at 0 and is not corrected for it; later they agree."""
    # So that two roundings of bfloat16 are not what is compared.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    warm = 40  # 0.5^40 is nothing
    shapes = {"up": (5, 7), "down": (8, 3)}
    # Nor that one side adds eps to a norm and the other takes the larger of the two.
    params, grads = drawn(parity_rng, shapes, warm + STEPS, smallest=-2)
    # Theirs are output by input, ours input by output.
    turned = [{k: v.T.copy() for k, v in g.items()} for g in [params, *grads]]

    def make(tensors):
        return torch.optim.Muon(
            tensors.values(),
            lr=0.01,
            momentum=0.5,
            weight_decay=0.1,
            eps=1e-8,
            adjust_lr_fn="match_rms_adamw" if update_rms else "original",
        )

    want = theirs(make, turned[0], turned[1:])
    found = ours(
        params,
        grads,
        name="muon",
        lr=0.01,
        momentum=0.5,
        weight_decay=0.1,
        update_rms=update_rms,
    )
    for name in shapes:
        # The first step: there is nothing but the gradient yet.
        np.testing.assert_allclose(found[0][name], want[0][name].T, atol=1e-5)
        for step in range(warm, warm + STEPS):
            got = found[step][name] - 0.999 * found[step - 1][name]
            peer = (want[step][name] - 0.999 * want[step - 1][name]).T
            np.testing.assert_allclose(got, peer, atol=2e-5, err_msg=f"{name} {step}")
        assert np.abs(got).max() > 1e-3
