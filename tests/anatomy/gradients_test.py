"""Gradients of objectives: anchors where two of them are one, and planted noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft.anatomy import gradients
from stagecraft.anatomy.texts import Texts
from stagecraft.models.transformer import Transformer
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda key: Transformer(tiny.CONFIG, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    """Four pairs of answers of equal length, and of advantages +1 and -1."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(4):
        prompt = random.integers(1, 64, 3).tolist()
        rows += [(prompt, random.integers(1, 64, 5).tolist()) for _ in range(2)]
    signs = jnp.array([1.0, -1.0] * 4)
    return Texts.of(rows).batch | {"advantages": signs}


def test_a_reward_of_1_for_demonstrations_is_sft(model, batch):
    both = batch | {"advantages": jnp.array([1.0, 0.0] * 4)}
    one = gradients.gradients(model, both)
    # Half of all tokens have no advantage, and the mean is over all.
    np.testing.assert_allclose(2 * one["ppo"], one["sft"], rtol=1e-4, atol=1e-7)


def test_signs_of_pairs_at_the_reference_are_dpo(model, batch):
    """At policy = reference DPO weighs every pair by beta / 2."""
    one = gradients.gradients(model, batch)
    assert gradients.cosine(one["ppo"], one["dpo"]) == pytest.approx(1, abs=1e-6)
    # A mean over 8 answers of 5 tokens, against a mean over 4 pairs of sums.
    scale = (gradients.BETA / 2 / 4) / (1 / 40)
    np.testing.assert_allclose(scale * one["ppo"], one["dpo"], rtol=1e-3, atol=1e-6)


def test_pretraining_learns_prompts_as_well(model, batch):
    one = gradients.gradients(model, batch)
    bare = batch | {"mask": batch["segments"] > 0}
    other = gradients.gradients(model, bare)
    np.testing.assert_allclose(one["text"], other["text"], rtol=1e-6)
    assert gradients.cosine(one["sft"], other["sft"]) < 0.999


def test_agreement_is_corrected_by_what_each_has_with_itself():
    """A shared direction under noise: cosine a^2 / (a^2 + 1), corrected 1."""
    random = np.random.default_rng(0)
    shared = random.normal(size=200_000)
    halves = tuple(
        {name: 0.5 * shared + random.normal(size=shared.size) for name in ("x", "y")}
        for _ in range(2)
    )
    row = gradients.agreement(halves, "x", "y")
    assert row["cosine"] == pytest.approx(0.2, abs=0.01)
    assert row["reliability"] == pytest.approx(0.2, abs=0.01)
    assert row["corrected"] == pytest.approx(1, abs=0.05)
    # Noise of a half that both objectives have in common is no agreement.
    one_noise = tuple({"x": one["x"], "y": one["x"]} for one in halves)
    assert gradients.agreement(one_noise, "x", "y")["cosine"] < 0.25
    opposite = tuple({"x": one["x"], "y": -one["y"]} for one in halves)
    assert gradients.agreement(opposite, "x", "y")["corrected"] == pytest.approx(
        -1, abs=0.05
    )
    silent = ({"x": shared, "y": shared}, {"x": shared, "y": 0 * shared})
    assert gradients.agreement(silent, "x", "y")["corrected"] is None
