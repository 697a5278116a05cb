"""KTO, unpaired APO and BCO beside TRL's own, on the log-probs its models give."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import masked
from stagecraft.losses import unpaired
from tests.peers import bco_peer, bridge

trl = pytest.importorskip("trl")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]

ROOT = Path(__file__).parents[2]
# Where the Makefile puts the last TRL that has BCO.
BESIDE = Path(sys.prefix) / "trl112"
ROWS = 4
MIXED, LIKED, DISLIKED = [True, False, False, True], [True] * ROWS, [False] * ROWS


def theirs(rng, seed, folder, labels, *, negative=False, **settings):
    """One loss of TRL's KTOTrainer.

    Args:
        negative: whether the raw estimate of the KL is to be below 0. Exchanging
            policy and reference changes its sign.

    Returns:
        {"loss", "kl", "raw_kl", "metrics", "gradient", "logps", "ref_logps": [B],
        "batch"}.
    """
    data = [
        {
            "prompt": bridge.spelled(bridge.words(rng, 1, 6)),
            "completion": bridge.spelled(bridge.words(rng, 1, 8)),
            "label": label,
        }
        for label in labels
    ]
    models = [bridge.make_peer(bridge.CONFIG, seed + i, std=0.08) for i in (0, 1)]
    for _ in range(2):
        trainer = trl.KTOTrainer(
            model=bridge.clone(models[0]),
            ref_model=bridge.clone(models[1]),
            args=bridge.arguments(trl.KTOConfig, folder, rows=ROWS, **settings),
            train_dataset=bridge.datasets.Dataset.from_list(data),
            processing_class=bridge.tokenizer(),
        )
        found = one_loss(trainer)
        if found["raw_kl"] is None or (found["raw_kl"] < 0) == negative:
            return found
        models.reverse()
    raise AssertionError(found["raw_kl"])


def one_loss(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    kept = {}

    def spy(name, forward):
        def call(*args, **kwargs):
            outputs = forward(*args, **kwargs)
            if outputs.log_probs.requires_grad:
                outputs.log_probs.retain_grad()
            kept.setdefault(name, []).append(outputs.log_probs)
            return outputs

        return call

    trainer.model.forward = spy("policy", trainer.model.forward)
    trainer.ref_model.forward = spy("reference", trainer.ref_model.forward)
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    told = trainer._metrics["train" if trainer.model.training else "eval"]
    # Completions of the neighbours are scored first, each batch's own ones last.
    *others, policy = kept["policy"]
    *ref_others, reference = kept["reference"]
    raw_kl = None
    if others:
        raw_kl = (others[0].sum(-1) - ref_others[0].sum(-1)).mean().item()
    return {
        "loss": loss.item(),
        "kl": told["kl"][-1],
        "raw_kl": raw_kl,
        "metrics": {k: v[-1] for k, v in told.items()},
        "logps": policy.detach().sum(-1).numpy(),
        "ref_logps": reference.sum(-1).numpy(),
        # Any token of a row has the gradient of the row's sum.
        "gradient": policy.grad.numpy()[np.arange(ROWS), last(batch)],
        "batch": batch,
    }


def last(batch):
    """Index of each completion's last token, among targets."""
    mask = batch["completion_mask"][:, 1:].numpy()
    return mask.shape[1] - 1 - mask[:, ::-1].argmax(1)


def check(found, loss_fn, labels, beta):
    labels = jnp.asarray(labels)

    def total(logps):
        loss, metrics = loss_fn(logps, jnp.asarray(found["ref_logps"]), labels)
        return loss.mean(), metrics

    logps = jnp.asarray(found["logps"])
    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(logps)
    np.testing.assert_allclose(loss, found["loss"], atol=1e-5)
    np.testing.assert_allclose(gradient, found["gradient"], atol=1e-5)
    assert np.abs(found["gradient"]).max() > 1e-4 * beta
    for key in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        value = float(masked.Mean.of(*metrics[key]).compute())
        # TRL says nothing of completions the batch does not have.
        want = found["metrics"].get(key, 0.0)
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("negative", [False, True], ids=["kl > 0", "kl < 0"])
@pytest.mark.parametrize(
    "labels", [MIXED, LIKED, DISLIKED], ids=["mixed", "liked", "disliked"]
)
def test_kto(labels, negative, parity_rng, parity_seed, tmp_path):
    beta, wanted, unwanted = parity_rng.uniform(0.1, 1.5, 3).tolist()
    hyper = dict(beta=beta, desirable_weight=wanted, undesirable_weight=unwanted)
    found = theirs(
        parity_rng, parity_seed, tmp_path, labels, negative=negative, **hyper
    )
    kl = max(found["raw_kl"], 0.0)
    np.testing.assert_allclose(kl, found["kl"], atol=1e-5)
    assert (kl == 0) == negative

    def loss_fn(policy, reference, labels):
        return unpaired.kto(policy, reference, labels, jnp.asarray(kl), **hyper)

    check(found, loss_fn, labels, beta)


def test_the_kl_is_of_completions_moved_on_by_one(parity_rng, parity_seed, tmp_path):
    batch = theirs(parity_rng, parity_seed, tmp_path, MIXED)["batch"]

    def split(ids, mask):
        ids, mask = batch[ids], batch[mask].bool()
        return [row[m].tolist() for row, m in zip(ids, mask, strict=True)]

    own = split("input_ids", "completion_mask")
    other = split("KL_input_ids", "KL_completion_mask")
    assert other == own[-1:] + own[:-1]


@pytest.mark.parametrize(
    "labels", [MIXED, LIKED, DISLIKED], ids=["mixed", "liked", "disliked"]
)
def test_apo_zero_unpaired(labels, parity_rng, parity_seed, tmp_path):
    beta, wanted, unwanted = parity_rng.uniform(0.1, 1.5, 3).tolist()
    hyper = dict(beta=beta, desirable_weight=wanted, undesirable_weight=unwanted)
    found = theirs(
        parity_rng,
        parity_seed,
        tmp_path,
        labels,
        loss_type="apo_zero_unpaired",
        **hyper,
    )
    assert found["raw_kl"] is None

    def loss_fn(policy, reference, labels):
        return unpaired.apo_zero_unpaired(policy, reference, labels, **hyper)

    check(found, loss_fn, labels, beta)


def test_bco(parity_rng, tmp_path):
    """Five batches, one of them all liked: the border is the mean of all so far."""
    if not (BESIDE / "trl").is_dir():
        pytest.fail(
            f"TRL {bco_peer.VERSION}, the last with BCO, is not in {BESIDE}: run "
            "`make test-peers`, which puts it there"
        )
    policy, reference = parity_rng.normal(-20, 3, (2, 5, 6))
    labels = parity_rng.random((5, 6)) < 0.5
    labels[2] = True
    beta = float(parity_rng.uniform(0.05, 1))
    given, out = tmp_path / "given.npz", tmp_path / "found.npz"
    np.savez(given, policy=policy, reference=reference, labels=labels, beta=beta)
    done = subprocess.run(
        [sys.executable, "-m", "tests.peers.bco_peer", str(given), str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BESIDE), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(np.load(out))
    for i in range(5):
        delta = (beta * (policy - reference))[: i + 1].mean()
        np.testing.assert_allclose(delta, found["delta"][i], atol=1e-5)

        def total(x, i=i, delta=delta):
            arrays = (jnp.asarray(reference[i]), jnp.asarray(labels[i]))
            loss, metrics = unpaired.bco(x, *arrays, jnp.asarray(delta), beta=beta)
            return loss.mean(), metrics

        (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(
            jnp.asarray(policy[i])
        )
        np.testing.assert_allclose(loss, found["loss"][i], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient, found["gradient"][i], atol=1e-5)
        np.testing.assert_allclose(metrics["delta"], np.full(6, delta), rtol=1e-6)
