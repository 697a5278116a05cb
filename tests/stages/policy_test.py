"""PPO's rollout and update against plain numpy, and the identities it must keep."""

import jax
import numpy as np
import pytest

from stagecraft import tree
from tests.stages import cases

TEMPERATURE = 0.7  # of cases.stage


@pytest.fixture(scope="module")
def rollout():
    """A prepared batch, the models behind it, and the update's metrics."""
    shared = cases.single()
    with jax.set_mesh(shared):
        made, raw, config = cases.stage(
            "policy", shared, optimizer=dict(warmup_steps=0, lr=1e-2), kl_target=6.0
        )
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, jax.random.key(1))
        held = jax.tree.map(np.asarray, batch)
        state, metrics = made.update(state, batch)
    return held, raw, config, state, {k: float(v) for k, v in metrics.items()}


def test_the_batch_is_what_numpy_says(rollout):
    batch, raw, config, _, metrics = rollout
    found, models = batch["rollout"], cases.models(cases.single())
    mask = found["mask"]
    new, prompt = mask.shape[1], raw["prompt_ids"].shape[1]
    ended = (found["tokens"] == cases.STOP).any(1)
    assert 0 < ended.sum() < len(ended)  # both kinds are in the batch

    # The mask runs through the stop token and no further; the rest is one row of text.
    for row in range(len(mask)):
        stops = np.flatnonzero(found["tokens"][row] == cases.STOP)
        length = stops[0] + 1 if len(stops) else new
        assert mask[row].tolist() == [i < length for i in range(new)]
    seen = np.concatenate([raw["prompt_mask"], mask], 1)
    assert np.array_equal(found["segments"], seen.astype(int))
    assert np.array_equal(
        np.where(seen, found["positions"], 0), np.where(seen, seen.cumsum(1) - 1, 0)
    )

    old = cases.token_logps(models["policy"], found, TEMPERATURE)[:, -new:]
    ref = cases.token_logps(models["reference"], found, TEMPERATURE)[:, -new:]
    np.testing.assert_allclose(found["old_logps"][mask], old[mask], atol=2e-5)

    outputs = cases.scalars(models["reward"], found)
    values = outputs[:, prompt - 1 : -1]
    np.testing.assert_allclose(found["old_values"][mask], values[mask], atol=2e-5)

    last = prompt + mask.sum(1) - 1
    scores = outputs[np.arange(len(mask)), last]
    paid = scores - config.missing_eos_penalty * ~ended
    rewards = np.where(mask, -config.kl_coef * (old - ref), 0)
    rewards[np.arange(len(mask)), mask.sum(1) - 1] += paid
    advantages = np.zeros_like(rewards)
    for row in range(len(mask)):
        next_value = next_advantage = 0.0
        for t in reversed(range(mask[row].sum())):
            delta = rewards[row, t] + next_value - values[row, t]
            next_advantage = delta + config.lambda_ * next_advantage
            advantages[row, t], next_value = next_advantage, values[row, t]
    returns = advantages + values
    np.testing.assert_allclose(found["returns"][mask], returns[mask], atol=1e-4)
    kept = advantages[mask]
    whitened = (advantages - kept.mean()) / np.sqrt(kept.var() + 1e-8)
    np.testing.assert_allclose(found["advantages"][mask], whitened[mask], atol=1e-4)
    assert not found["advantages"][~mask].any()

    kl = np.where(mask, old - ref, 0).sum(1)
    assert metrics["objective/kl"] == pytest.approx(kl.mean(), abs=1e-4)
    assert metrics["objective/scores"] == pytest.approx(paid.mean(), abs=1e-4)
    assert metrics["objective/missing_eos_rate"] == pytest.approx(1 - ended.mean())
    spread = 1 - (returns - values)[mask].var() / returns[mask].var()
    assert metrics["val/explained_variance"] == pytest.approx(spread, abs=1e-3)


def test_the_sampler_and_the_trainer_agree(rollout):
    assert rollout[4]["val/rollout_logp_gap"] < 1e-5


def test_the_first_minibatch_has_not_moved(rollout):
    metrics = rollout[4]
    assert metrics["val/ratio_first"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/ratio_max_first"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/clipfrac_avg_first"] == 0
    # The later ones have, or nothing was learned.
    assert metrics["policy/ratio_max"] > 1.01


def test_every_minibatch_is_an_optimizer_step(rollout):
    _, _, config, state, _ = rollout
    counts = [
        int(v) for k, v in tree.named(state.opt_state).items() if k.endswith("count")
    ]
    assert counts == [config.epochs * config.minibatches]
    assert int(state.step) == 1


def test_an_epoch_sees_every_row_once(rollout):
    order = rollout[0]["order"].reshape(2, -1)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(16))
    assert order[0].tolist() != order[1].tolist()


def test_one_learning_rate_a_rollout_and_a_kl_coefficient_that_adapts(rollout):
    _, _, config, state, metrics = rollout
    assert metrics["learning_rate"] == pytest.approx(config.optimizer.lr)
    error = np.clip(metrics["objective/kl"] / config.kl_target - 1, -0.2, 0.2)
    expected = config.kl_coef * (1 + error * 16 / config.kl_horizon)
    assert float(state.extra["kl_coef"]) == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_first_step_is_the_policy_gradient():
    """At ratio 1 the clipped loss has the gradient of -A log p, and nothing else."""
    shared = cases.single()
    with jax.set_mesh(shared):
        made, raw, config = cases.stage(
            "policy", shared, epochs=1, minibatches=1, value_coef=0.0
        )
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, jax.random.key(1))
        held = batch["rollout"]
        policy = jax.tree.map(lambda x: x.copy(), state.model["policy"])

        def surrogate(model):
            logits = model.logits(held["ids"], held["positions"], held["segments"])
            logps = jax.nn.log_softmax(logits / TEMPERATURE)
            new = held["tokens"].shape[1]
            picked = jax.numpy.take_along_axis(
                logps[:, -new - 1 : -1], held["tokens"][..., None], -1
            )[..., 0]
            total = jax.numpy.where(held["mask"], held["advantages"] * picked, 0).sum()
            return -total / held["mask"].sum()

        grads = tree.named(jax.jit(jax.grad(surrogate))(policy))
        before = {k: np.asarray(v) for k, v in tree.named(policy).items()}
        state, _ = made.update(state, batch)
        after = tree.named(state.model["policy"])
    for name, grad in grads.items():
        step = (before[name] - np.asarray(after[name])) / config.optimizer.lr
        scale = np.abs(grad).max() + 1e-6
        assert np.abs(step - np.asarray(grad)).max() < 1e-4 * scale + 1e-5, name
