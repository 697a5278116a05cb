"""Reward model losses beside torch's formulas and TRL's RewardTrainer."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses
from stagecraft.losses import reward
from tests.peers.bridge import torch

trl = pytest.importorskip("trl")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]

ROWS = 4


def compare(loss_fn, rewards, expected, leaf):
    """Our mean loss and gradient against torch's scalar and the leaf's gradient."""
    loss, gradient = jax.value_and_grad(lambda x: loss_fn(x).mean())(
        jnp.asarray(rewards)
    )
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("margins", [False, True], ids=["plain", "margin"])
def test_bradley_terry_is_torchs_formula(margins, centering, parity_rng):
    rewards = parity_rng.normal(0, 2, (ROWS, 2))
    margin = parity_rng.uniform(0, 2, ROWS) * margins
    leaf = torch.tensor(rewards, requires_grad=True)
    chosen, rejected = leaf.T
    difference = chosen - rejected - torch.tensor(margin)
    expected = -torch.nn.functional.logsigmoid(difference).mean()
    expected = expected + centering * ((chosen + rejected) ** 2).mean()
    hyper = dict(margin=jnp.asarray(margin) if margins else None, centering=centering)
    compare(lambda x: losses.bradley_terry(x, **hyper)[0], rewards, expected, leaf)


def test_soft_labels_are_torchs_cross_entropy(parity_rng):
    rewards = parity_rng.normal(0, 2, (ROWS, 2))
    p = parity_rng.random(ROWS)
    leaf = torch.tensor(rewards, requires_grad=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        leaf[:, 0] - leaf[:, 1], torch.tensor(p)
    )
    preference = jnp.asarray(p)
    compare(
        lambda x: losses.bradley_terry(x, preference=preference)[0],
        rewards,
        expected,
        leaf,
    )


def test_ranked_is_the_mean_over_each_prompts_pairs(parity_rng):
    rewards = parity_rng.normal(0, 2, (ROWS, 5))
    present = np.arange(5) < parity_rng.integers(2, 6, (ROWS, 1))
    leaf = torch.tensor(rewards, requires_grad=True)
    prompts = []
    for row, count in enumerate(present.sum(1)):
        pairs = itertools.combinations(range(count), 2)
        parts = [leaf[row, i] - leaf[row, j] for i, j in pairs]
        prompts.append(-torch.nn.functional.logsigmoid(torch.stack(parts)).mean())
    there = jnp.asarray(present)
    compare(
        lambda x: reward.bradley_terry_ranked(x, there)[0],
        rewards,
        torch.stack(prompts).mean(),
        leaf,
    )


@pytest.mark.parametrize("margins", [False, True], ids=["plain", "margin"])
def test_trls_trainer(margins, parity_rng):
    """Its `compute_loss`, on a model that only hands out the rewards."""
    rewards = parity_rng.normal(0, 2, (ROWS, 2))
    margin = parity_rng.uniform(0, 2, ROWS)
    centering = float(parity_rng.uniform(0, 0.1))
    leaf = torch.tensor(rewards, requires_grad=True)
    told = {"eval": {k: [] for k in ("accuracy", "margin", "mean_reward")}}
    told["eval"] |= {k: [] for k in ("min_reward", "max_reward")}
    self = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        args=types.SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=types.SimpleNamespace(
            gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        _metrics=told,
        _total_train_tokens=0,
    )
    inputs = {"margin": torch.tensor(margin)} if margins else {}

    def model(**kwargs):  # chosen ones first, then all rejected
        return types.SimpleNamespace(logits=leaf.T.reshape(-1, 1))

    expected = trl.RewardTrainer.compute_loss(self, model, inputs)
    hyper = dict(margin=jnp.asarray(margin) if margins else None, centering=centering)
    compare(lambda x: losses.bradley_terry(x, **hyper)[0], rewards, expected, leaf)
    _, metrics = losses.bradley_terry(jnp.asarray(rewards), **hyper)
    for key in ("accuracy", "margin"):
        np.testing.assert_allclose(
            metrics[key].mean(), told["eval"][key][0], rtol=1e-5, atol=1e-6
        )
