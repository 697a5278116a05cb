"""Reward and preference stages: which side is up, and where the gradient comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, losses, tree
from stagecraft.stages import preference, reward
from stagecraft.stages.stage import Context
from tests.stages import cases


def naive_logps(model, ids, mask):
    """Summed log-probabilities of the masked tokens of one unpadded row, in numpy."""
    length = len(ids)
    args = (ids[None], np.arange(length)[None], np.ones((1, length), int))
    logits = np.asarray(model.logits(*map(jnp.asarray, args)), np.float64)[0]
    logps = logits - logits.max(-1, keepdims=True)
    logps -= np.log(np.exp(logps).sum(-1, keepdims=True))
    return sum(logps[t - 1, ids[t]] for t in range(1, length) if mask[t])


def summed(model, batch):
    """Log-probabilities of both completions, f32[B, 2]."""
    stats, mask = preference.pair_logps(model, batch)
    return losses.sequence_logps(stats.logps, mask)


@pytest.fixture(scope="module")
def pairs():
    with jax.set_mesh(cases.single()):
        return cases.pairs(rows=4), cases.models(cases.single())


def test_pair_logps_are_those_of_the_rows_alone(pairs):
    raw, models = pairs
    batch = jax.tree.map(jnp.asarray, raw)
    sums = jax.jit(summed)(models["policy"], batch)
    for row in range(4):
        for side in range(2):
            real = raw["segments"][row, side] > 0
            ids, mask = raw["ids"][row, side][real], raw["mask"][row, side][real]
            expected = naive_logps(models["policy"], ids, mask)
            assert float(sums[row, side]) == pytest.approx(expected, abs=1e-4)


def test_scores_are_read_at_the_last_real_token(pairs):
    raw, models = pairs
    found = reward.pair_scores(models["reward"], jax.tree.map(jnp.asarray, raw))
    for row in range(4):
        for side in range(2):
            ids = raw["ids"][row, side][raw["segments"][row, side] > 0]
            args = (ids[None], np.arange(len(ids))[None], np.ones((1, len(ids)), int))
            alone = models["reward"](*map(jnp.asarray, args))[0, -1]
            assert float(found[row, side]) == pytest.approx(float(alone), abs=1e-5)


def test_dpo_at_the_reference_is_a_coin_toss_whose_gradient_is_half_beta():
    """The reference is data: were it in the gradient, it would cancel the policy's."""
    shared = cases.single()
    with jax.set_mesh(shared):
        start = cases.models(shared)["policy"]
        made, raw, config = cases.stage("preference", shared)
        roles = {"start": start, "reference": start}
        made = preference.make(config, Context(shared, cases.CONFIG, roles))
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, None)
        before = {k: np.asarray(v) for k, v in tree.named(state.model).items()}

        def margin(model):
            logps = summed(model, batch)
            return (logps[:, 0] - logps[:, 1]).mean()

        grads = tree.named(jax.jit(jax.grad(margin))(start))
        state, metrics = made.update(state, batch)
        after = tree.named(state.model)
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-5)
    assert float(metrics["rewards/margins"]) == pytest.approx(0, abs=1e-5)
    for name, grad in grads.items():
        step = (np.asarray(after[name]) - before[name]) / config.optimizer.lr
        expected = 0.05 * np.asarray(grad)  # beta / 2, towards the chosen
        assert np.abs(step - expected).max() < 1e-3 * np.abs(expected).max() + 2e-6


@pytest.mark.parametrize(
    ("kind", "key"), [("reward", "margin"), ("preference", "rewards/margins")]
)
def test_training_puts_the_chosen_first(kind, key):
    shared = cases.single()
    with jax.set_mesh(shared):
        settings = dict(warmup_steps=0, lr=1e-2)
        made, raw, _ = cases.stage(kind, shared, optimizer=settings, steps=40)
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, None)
        for _ in range(30):
            state, metrics = made.update(state, batch)
    assert float(metrics[key]) > 1


def test_padding_rows_count_nowhere(pairs):
    raw, models = pairs
    padded = {
        k: np.concatenate([v, np.zeros((2, *v.shape[1:]), v.dtype)])
        for k, v in raw.items()
    }
    objective, needs = preference.make_objective(defaults.stage("preference"))
    assert needs == {"policy_logps", "ref_logps", "scores", "preference"}
    for batch in (raw, padded):
        batch["ref_logps"] = np.zeros((len(batch["ids"]), 2), np.float32)

    def loss(batch):
        batch = jax.tree.map(jnp.asarray, batch)
        rows = objective.reductions(batch)["rows"]
        values, _ = objective.terms(models["policy"], batch)
        return float(rows.sum(values["rows"]) / rows.total())

    assert loss(raw) == pytest.approx(loss(padded), rel=1e-6)


def test_ipo_written_by_hand_runs_as_an_objective():
    def squared(policy_logps, ref_logps, *, beta=0.1):
        margin = (policy_logps - ref_logps) @ jnp.array([1.0, -1.0])
        return (margin - 1 / (2 * beta)) ** 2, {"margin": margin}

    shared = cases.single()
    with jax.set_mesh(shared):
        made, raw, _ = cases.stage("preference", shared, objective=squared)
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, None)
        expected, _ = squared(summed(state.model, batch), batch["ref_logps"])
        _, metrics = made.update(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert losses.dpo is not squared
