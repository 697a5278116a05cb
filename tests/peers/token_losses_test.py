"""What is read off each token's logits beside TRL's functions, and the losses of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import masked
from stagecraft.losses.next_token import dft, z_loss
from stagecraft.models import heads
from tests.peers import bridge
from tests.peers.bridge import torch

trl = pytest.importorskip("trl")
utils = pytest.importorskip("trl.trainer.utils")

pytestmark = pytest.mark.peers

SHAPE, VOCAB = (2, 7), 64


def drawn(rng):
    """Logits f32[2, 7, 64] and targets.

    What ours makes of them in float32 is compared with the peer's float64: of two
    roundings one is left, and it grows with the logits.
    """
    logits = rng.normal(0, 2, (*SHAPE, VOCAB)).astype(np.float32)
    return logits, rng.integers(0, VOCAB, SHAPE)


def stats(logits, targets, **hyper):
    """Ours; under the identity as an embedding hidden states are the logits."""
    eye = jnp.eye(VOCAB, dtype=jnp.float32)
    targets = jnp.asarray(targets, jnp.int32)
    return heads.token_logps(logits, eye, targets, squares=True, **hyper)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_and_their_gradient(temperature, block_size, parity_rng):
    logits, targets = drawn(parity_rng)
    weights = parity_rng.normal(size=SHAPE).astype(np.float32)
    leaf = torch.tensor(logits).double().requires_grad_()
    want = utils.selective_log_softmax(
        leaf, torch.tensor(targets), temperature=temperature
    )
    plain = torch.log_softmax(leaf.detach() / temperature, -1)
    plain = plain.gather(-1, torch.tensor(targets)[..., None])[..., 0]
    np.testing.assert_allclose(want.detach(), plain, atol=1e-5)
    (want * torch.tensor(weights)).sum().backward()

    def total(x):
        found = stats(x, targets, temperature=temperature, block_size=block_size)
        return jnp.sum(found.logps * weights), found.logps

    (_, logps), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logits))
    np.testing.assert_allclose(logps, want.detach(), atol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad, atol=1e-5)


def test_logps_of_bfloat16_logits(parity_rng):
    """Theirs stay in bfloat16 throughout, ours are float32: as near as theirs get."""
    logits, targets = drawn(parity_rng)
    theirs = torch.tensor(logits).bfloat16()
    want = utils.selective_log_softmax(theirs, torch.tensor(targets))
    assert want.dtype == torch.bfloat16
    ours = stats(jnp.asarray(logits, jnp.bfloat16), targets).logps
    assert ours.dtype == jnp.float32
    # A number is rounded to bfloat16 by at most 2**-8 of it.
    np.testing.assert_allclose(ours, want.float(), rtol=2**-7)
    exact = utils.selective_log_softmax(theirs.double(), torch.tensor(targets))
    np.testing.assert_allclose(ours, exact, atol=1e-5)


def test_entropy(parity_rng):
    logits, targets = drawn(parity_rng)
    want = utils.entropy_from_logits(torch.tensor(logits).double())
    np.testing.assert_allclose(stats(logits, targets).entropy, want, atol=1e-5)


def test_log_z_and_log_p2(parity_rng):
    logits, targets = drawn(parity_rng)
    found, z = stats(jnp.asarray(logits), targets), torch.tensor(logits).double()
    log_z = torch.logsumexp(z, -1)
    np.testing.assert_allclose(found.log_z, log_z, atol=1e-5)
    want = torch.logsumexp(2 * z, -1) - 2 * log_z
    np.testing.assert_allclose(found.log_p2, want, atol=1e-5)


def test_z_loss(parity_rng):
    logits, targets = drawn(parity_rng)
    leaf = torch.tensor(logits).double().requires_grad_()
    want = torch.logsumexp(leaf, -1).square().mean()
    want.backward()

    def total(x):
        return z_loss(stats(x, targets).log_z)[0].mean()

    loss, gradient = jax.value_and_grad(total)(jnp.asarray(logits))
    np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad, atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_dft(parity_rng, parity_seed, tmp_path):
    """TRL's SFTTrainer with loss_type="dft", on the log-probs it computed itself."""
    data = [
        {
            "prompt": bridge.spelled(bridge.words(parity_rng, 2, 6)),
            "completion": bridge.spelled(bridge.words(parity_rng, 1, 8)),
        }
        for _ in range(4)
    ]
    trainer = trl.SFTTrainer(
        model=bridge.make_peer(bridge.CONFIG, parity_seed),
        args=bridge.arguments(trl.SFTConfig, tmp_path, rows=4, loss_type="dft"),
        train_dataset=bridge.datasets.Dataset.from_list(data),
        processing_class=bridge.tokenizer(),
    )
    kept, forward = [], trainer.model.forward

    def spy(*args, **kwargs):
        kept.append(forward(*args, **kwargs))
        kept[-1].log_probs.retain_grad()
        return kept[-1]

    trainer.model.forward = spy
    batch = next(iter(trainer.get_train_dataloader()))
    want = trainer.compute_loss(trainer.model, batch)
    want.backward()
    (outputs,) = kept
    mask = jnp.asarray(outputs.label_mask.numpy())
    assert 0 < mask.sum() < mask.size

    def total(logps):
        return masked.mean(dft(logps)[0], mask)

    logps = jnp.asarray(outputs.log_probs.detach().numpy())
    loss, gradient = jax.value_and_grad(total)(logps)
    np.testing.assert_allclose(loss, want.item(), atol=1e-5)
    theirs = np.where(mask, outputs.log_probs.grad, 0)
    np.testing.assert_allclose(gradient, theirs, atol=1e-5)
