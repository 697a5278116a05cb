"""Losses over pairs beside TRL's own, on the log-probs that TRL's models give.

TRL's trainer computes its loss on a batch of its own making; a spy keeps the token
log-probs that went in, and the gradient that came out at them. Both must be ours.
"""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked
from stagecraft.losses import pairs, reference_free
from tests.peers import bridge
from tests.peers.bridge import torch

trl = pytest.importorskip("trl")
cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]

ROWS = 4
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
# Those that TRL takes with every f-divergence; it refuses the others with any but the
# reverse KL, and ours are held against numpy there (tests/losses/preference_test.py).
SCORED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
SCORED += ("sft",)
UNSCORED = ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
UNSCORED += ("apo_zero", "apo_down")
LOSS_TYPES = SCORED + UNSCORED
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
METRICS += ("rewards/accuracies", "logps/chosen", "logps/rejected")
# What the contract of a loss calls them, and TRL's config.
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js": "js_divergence",
    "alpha": "alpha_divergence",
}


class Theirs:
    """One loss of TRL's DPOTrainer.

    Attributes:
        logps, ref_logps, log_p2, gradient: [B, 2, T], of tokens; the last is the
            loss's, with respect to the first.
        mask: bool[B, 2, T].
        loss: float.
        metrics: {name: float}.
    """

    def __init__(self, rng, seed, folder, **settings):
        data = [
            {
                "prompt": bridge.spelled(bridge.words(rng, 1, 6)),
                "chosen": bridge.spelled(bridge.words(rng, 1, 8)),
                "rejected": bridge.spelled(bridge.words(rng, 1, 8)),
            }
            for _ in range(ROWS)
        ]
        trainer = trl.DPOTrainer(
            # Not far apart, or e^-ratio would be all there is to a loss.
            model=bridge.make_peer(bridge.CONFIG, seed, std=0.05),
            ref_model=bridge.make_peer(bridge.CONFIG, seed + 1, std=0.05),
            args=bridge.arguments(trl.DPOConfig, folder, rows=ROWS, **settings),
            train_dataset=bridge.datasets.Dataset.from_list(data),
            processing_class=bridge.tokenizer(),
        )
        inputs = next(iter(trainer.get_train_dataloader()))
        policy, reference = spied(trainer.model), spied(trainer.ref_model)
        loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
        loss.backward()
        self.loss = loss.item()
        told = trainer._metrics["train" if trainer.model.training else "eval"]
        self.metrics = {k: v[-1] for k, v in told.items()}
        (policy,), (reference,) = policy, reference
        self.mask = paired(inputs["completion_mask"][:, 1:]).astype(bool)
        self.logps = paired(policy.log_probs.detach())
        self.ref_logps = paired(reference.log_probs)
        self.gradient = paired(policy.log_probs.grad)
        self.log_p2 = None
        if policy.log_sum_sq_probs is not None:
            self.log_p2 = paired(policy.log_sum_sq_probs)


def spied(model):
    """A list that will hold what the model returns; its log-probs keep a gradient."""
    kept, forward = [], model.forward

    def spy(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if outputs.log_probs.requires_grad:
            outputs.log_probs.retain_grad()
        kept.append(outputs)
        return outputs

    model.forward = spy
    return kept


def paired(x):
    """[2 B, T], all chosen first, as [B, 2, T]."""
    chosen, rejected = np.split(np.asarray(x), 2)
    return np.stack([chosen, rejected], 1)


def ours(theirs, terms, *, beta, ld_alpha=None, weighted=False, **divergence):
    """Our loss, its gradient and metrics, from the tokens that TRL scored.

    Args:
        theirs: `Theirs`.
        terms: [(loss type, weight, hyper-parameters)].
        beta: float.
        ld_alpha: weight of surplus tokens, or None.
        weighted: whether WPO's weights apply.
        **divergence: settings of `divergence_scores`.
    """
    mask = jnp.asarray(theirs.mask)
    lengths = mask.sum(-1).astype(jnp.float64)

    def sums(logps):
        if ld_alpha is None:
            return masked.sum(logps, mask, axis=-1)
        return pairs.length_desensitized(logps, mask, alpha=ld_alpha)

    def total(logps):
        offered = {
            "policy_logps": sums(logps),
            "ref_logps": sums(jnp.asarray(theirs.ref_logps)),
            "lengths": lengths,
            "chosen_logps": masked.clear(logps, mask)[:, 0],
        }
        offered["scores"] = pairs.divergence_scores(
            offered["policy_logps"], offered["ref_logps"], **divergence
        )
        result, told = 0.0, {}
        for loss_type, weight, hyper in terms:
            function = losses.PAIRS[loss_type]
            names = inspect.signature(function).parameters
            arrays = {k: offered[k] for k in names if k in offered}
            loss, told = function(**arrays, beta=beta, **hyper)
            if isinstance(loss, dict):
                result += weight * masked.mean(loss["chosen"], mask[:, 0])
                continue
            if weighted:
                log_p2 = jnp.asarray(theirs.log_p2)
                loss = loss * pairs.wpo_weights(logps, log_p2, mask)
            result += weight * loss.mean()
        return result, {k: v.mean() for k, v in told.items()}

    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(
        jnp.asarray(theirs.logps)
    )
    return float(loss), np.asarray(gradient), metrics


def check(theirs, found):
    loss, gradient, metrics = found
    np.testing.assert_allclose(loss, theirs.loss, rtol=1e-5, atol=1e-5)
    scale = max(1.0, np.abs(theirs.gradient[theirs.mask]).max())
    want = np.where(theirs.mask, theirs.gradient, 0)
    np.testing.assert_allclose(gradient / scale, want / scale, rtol=0, atol=1e-5)
    for key in METRICS:
        np.testing.assert_allclose(
            metrics[key], theirs.metrics[key], rtol=1e-5, atol=1e-5, err_msg=key
        )


def smoothing(loss_type, rng):
    """TRL's setting of label smoothing, and our hyper-parameters."""
    if loss_type not in SMOOTHED:
        return {}
    return {"label_smoothing": float(rng.uniform(0.01, 0.4))}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type(loss_type, parity_rng, parity_seed, tmp_path):
    beta, hyper = float(parity_rng.uniform(0.05, 1.0)), smoothing(loss_type, parity_rng)
    settings = dict(loss_type=[loss_type], beta=beta, **hyper)
    if loss_type == "discopop":
        hyper["tau"] = settings["discopop_tau"] = float(parity_rng.uniform(0.05, 1.0))
    theirs = Theirs(parity_rng, parity_seed, tmp_path, **settings)
    assert np.abs(theirs.gradient).max() > 1e-4 or loss_type == "hinge"
    check(theirs, ours(theirs, [(loss_type, 1.0, hyper)], beta=beta))


def test_label_smoothing_of_sigmoid_is_ours_alone(parity_rng, parity_seed, tmp_path):
    """TRL's "sigmoid" takes no notice of label smoothing; ours does, as cDPO."""
    theirs = Theirs(
        parity_rng, parity_seed, tmp_path, loss_type=["sigmoid"], label_smoothing=0.3
    )
    check(theirs, ours(theirs, [("sigmoid", 1.0, {})], beta=0.1))
    smoothed = ours(theirs, [("sigmoid", 1.0, {"label_smoothing": 0.3})], beta=0.1)
    straight = torch.as_tensor((theirs.logps - theirs.ref_logps) * theirs.mask).sum(-1)
    margin = 0.1 * (straight[:, 0] - straight[:, 1])
    target = torch.full_like(margin, 0.7)  # of a classifier that is right so often
    want = torch.nn.functional.binary_cross_entropy_with_logits(margin, target)
    np.testing.assert_allclose(smoothed[0], want.item(), rtol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", SCORED)
def test_every_divergence(loss_type, divergence, parity_rng, parity_seed, tmp_path):
    beta, hyper = float(parity_rng.uniform(0.05, 0.5)), smoothing(loss_type, parity_rng)
    alpha = float(parity_rng.choice([-0.5, 0.3, 0.5, 1.0, 1.5]))
    theirs = Theirs(
        parity_rng,
        parity_seed,
        tmp_path,
        loss_type=[loss_type],
        beta=beta,
        f_divergence_type=DIVERGENCES[divergence],
        f_alpha_divergence_coef=alpha,
        **hyper,
    )
    settings = dict(f_divergence=divergence, alpha=alpha)
    check(theirs, ours(theirs, [(loss_type, 1.0, hyper)], beta=beta, **settings))


@pytest.mark.parametrize("loss_type", UNSCORED)
def test_divergences_that_the_peer_refuses(loss_type, parity_rng, tmp_path):
    """Should it take them one day, they belong in `SCORED`."""
    with pytest.raises(ValueError, match="f_divergence_type"):
        Theirs(
            parity_rng,
            0,
            tmp_path,
            loss_type=[loss_type],
            f_divergence_type="js_divergence",
        )


def test_several_losses_share_the_scores(parity_rng, parity_seed, tmp_path):
    kinds = ["sigmoid", "hinge", "sft"]
    weights = parity_rng.uniform(0.1, 2.0, 3).tolist()
    theirs = Theirs(
        parity_rng,
        parity_seed,
        tmp_path,
        loss_type=kinds,
        loss_weights=weights,
        f_divergence_type="forward_kl",
    )
    terms = [(t, w, {}) for t, w in zip(kinds, weights, strict=True)]
    check(theirs, ours(theirs, terms, beta=0.1, f_divergence="forward_kl"))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_length_desensitized(alpha, parity_rng, parity_seed, tmp_path):
    theirs = Theirs(
        parity_rng, parity_seed, tmp_path, loss_type=["sigmoid"], ld_alpha=alpha
    )
    lengths = theirs.mask.sum(-1)
    assert (lengths[:, 0] != lengths[:, 1]).any()
    found = ours(theirs, [("sigmoid", 1.0, {})], beta=0.1, ld_alpha=alpha)
    check(theirs, found)


def test_several_losses_with_weights(parity_rng, parity_seed, tmp_path):
    weights = parity_rng.uniform(0.1, 2.0, 3).tolist()
    types_ = ["sigmoid", "bco_pair", "sft"]
    theirs = Theirs(
        parity_rng, parity_seed, tmp_path, loss_type=types_, loss_weights=weights
    )
    terms = [(t, w, {}) for t, w in zip(types_, weights, strict=True)]
    check(theirs, ours(theirs, terms, beta=0.1))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero"])
def test_wpo_weights(loss_type, parity_rng, parity_seed, tmp_path):
    theirs = Theirs(
        parity_rng, parity_seed, tmp_path, loss_type=[loss_type], use_weighting=True
    )
    found = ours(theirs, [(loss_type, 1.0, {})], beta=0.1, weighted=True)
    check(theirs, found)
    plain, _, _ = ours(theirs, [(loss_type, 1.0, {})], beta=0.1)
    assert abs(plain - theirs.loss) > 1e-4  # they do weigh something


# Without a reference


def drawn(rng):
    """Sums, lengths and token log-probs of the chosen completion."""
    lengths = rng.integers(1, 9, (ROWS, 2)).astype(np.float64)
    sums = -lengths * rng.uniform(0.05, 3, (ROWS, 2))
    tokens = -rng.uniform(0.1, 3, (ROWS, 9))
    tokens[rng.random((ROWS, 9)) < 0.3] = 0
    return sums, lengths, tokens


def stub(**settings):
    """What the methods of TRL's trainers ask of `self`."""
    accelerator = types.SimpleNamespace(
        device="cpu", gather_for_metrics=lambda x: torch.as_tensor(x)
    )
    return types.SimpleNamespace(
        accelerator=accelerator, aux_loss_enabled=False, **settings
    )


def peer_of(trainer, method, logps, tokens, self):
    """TRL's whole loss and metrics on given log-probs, and the gradient at these."""
    logps = torch.tensor(logps, requires_grad=True)
    nll = -torch.tensor(tokens[tokens != 0]).mean()
    none = torch.zeros(1)
    setattr(self, method, types.MethodType(getattr(trainer, method), self))
    self.concatenated_forward = lambda model, batch: (*logps.T, none, none, nll)
    loss, metrics = trainer.get_batch_loss_metrics(self, None, {})
    loss.backward()
    return loss.item(), logps.grad.numpy(), metrics


def agree(function, sums, tokens, want, *, averages=None):
    """Our function of sums has TRL's loss, gradient and metrics.

    Args:
        function: (sums, tokens) -> (loss or {place: loss}, metrics).
        sums, tokens: arrays.
        want: what `peer_of` returns.
        averages: lengths, where TRL was given averages.
    """

    def total(x):
        loss, metrics = function(x, jnp.asarray(tokens))
        loss = loss if isinstance(loss, dict) else {"rows": loss}
        kept = jnp.asarray(tokens != 0)
        parts = [
            v.mean() if place == "rows" else masked.mean(v, kept)
            for place, v in loss.items()
        ]
        pair = {k: v if isinstance(v, tuple) else (v,) for k, v in metrics.items()}
        return sum(parts), {k: masked.Mean.of(*v).compute() for k, v in pair.items()}

    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(
        jnp.asarray(sums)
    )
    their_loss, their_gradient, their_metrics = want
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5, atol=1e-5)
    if averages is not None:
        their_gradient = their_gradient / averages
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-4, atol=1e-5)
    compared = metrics.keys() & their_metrics.keys()
    assert compared >= {*METRICS}
    for key in compared:
        np.testing.assert_allclose(
            metrics[key], their_metrics[key], rtol=1e-5, atol=1e-5, err_msg=key
        )
    return compared


def test_orpo(parity_rng):
    sums, lengths, tokens = drawn(parity_rng)
    beta = float(parity_rng.uniform(0.05, 1))
    want = peer_of(
        orpo.ORPOTrainer, "odds_ratio_loss", sums / lengths, tokens, stub(beta=beta)
    )
    compared = agree(
        lambda x, t: reference_free.orpo(x, jnp.asarray(lengths), t, beta=beta),
        sums,
        tokens,
        want,
        averages=lengths,
    )
    assert compared >= {"log_odds_ratio", "log_odds_chosen", "nll_loss"}


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_cpo(loss_type, parity_rng):
    sums, lengths, tokens = drawn(parity_rng)
    beta, weight = parity_rng.uniform(0.05, 1, 2).tolist()
    hyper = {}
    if loss_type == "sigmoid":
        hyper["label_smoothing"] = float(parity_rng.uniform(0, 0.4))
    self = stub(
        beta=beta,
        alpha=0.0,
        cpo_alpha=weight,
        loss_type=loss_type,
        label_smoothing=hyper.get("label_smoothing", 0.0),
    )
    averaged = loss_type == "ipo"
    logps = sums / lengths if averaged else sums
    want = peer_of(cpo.CPOTrainer, "cpo_loss", logps, tokens, self)

    def function(x, t):
        settings = dict(beta=beta, alpha=weight, **hyper)
        if averaged:
            return reference_free.cpo_ipo(x, jnp.asarray(lengths), t, **settings)
        name = "cpo" if loss_type == "sigmoid" else "cpo_hinge"
        return getattr(reference_free, name)(x, t, **settings)

    compared = agree(
        function, sums, tokens, want, averages=lengths if averaged else None
    )
    assert "nll_loss" in compared


@pytest.mark.parametrize("alpha", [None, 0.25, -0.5])
def test_simpo_and_alphapo(alpha, parity_rng):
    sums, lengths, tokens = drawn(parity_rng)
    beta, gamma = parity_rng.uniform(0.5, 3), parity_rng.uniform(0, 2)
    smoothed = parity_rng.uniform(0, 0.4)
    self = stub(
        beta=beta,
        alpha=alpha or 0.0,
        cpo_alpha=0.0,
        loss_type="simpo",
        simpo_gamma=gamma,
        label_smoothing=smoothed,
    )
    want = peer_of(cpo.CPOTrainer, "cpo_loss", sums / lengths, tokens, self)
    hyper = dict(beta=float(beta), gamma=float(gamma), label_smoothing=float(smoothed))
    function = reference_free.simpo
    if alpha is not None:
        function, hyper["alpha"] = reference_free.alphapo, alpha
    agree(
        lambda x, t: function(x, jnp.asarray(lengths), **hyper),
        sums,
        tokens,
        want,
        averages=lengths,
    )
