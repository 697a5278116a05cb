"""PPO's options against numpy: placement B, bootstrap, two optimizers, ptx, KL."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import checkpoint, defaults, train, tree
from stagecraft.signals.verifiers import Verifier, Verifiers
from stagecraft.stages import policy
from tests.stages import cases

TAU, NEW, P = 0.7, 10, 8
WORDS = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def odd(prompts, completions):
    """One for a first word of odd number; what begins with a large one is refused."""
    first = [int(c.split()[0]) if c else 1 for c in completions]
    return [float("nan") if n > 56 else float(n % 2) for n in first]


def ptx(rows=4, length=12):
    """Rows of pretraining text, two documents in each."""
    found = cases.documents(rows=rows, length=24, seed=5)
    return {f"ptx_{k}": v[:, :length] for k, v in found.items()}


@pytest.fixture(scope="module")
def run():
    """One rollout, one optimizer step on all of it: its gradient can be read off."""
    shared = cases.single()
    records = [{"prompt": f"p{i}"} for i in range(16)]
    own = cases.OPTIMIZER | dict(lr=0.02)
    with jax.set_mesh(shared), cases.watched() as seen:
        made, raw, config = cases.stage(
            "policy",
            shared,
            verifiers=Verifiers([Verifier("odd", odd)], records, WORDS),
            reward_weights=(1.0, 3.0),
            objective="ppo_policy,entropy_bonus",
            objective_weights=(1.0, 0.05),
            objective_args=dict(clip=0.1),
            epochs=1,
            minibatches=1,
            score_placement="B",
            bootstrap_truncated=True,
            whiten_rewards=True,
            unbiased_whitening=True,
            replace_missing_eos=True,
            missing_eos_score=-2.0,
            missing_eos_penalty=7.0,  # replaced, not lowered
            kl_estimator="k3",
            kl_coef=0.1,
            value_optimizer=own,
            ptx_coef=0.3,
            ema_decay=0.75,
        )
        raw |= {"index": np.arange(16)} | ptx()
        state = made.init(jax.random.key(0))
        first = jax.tree.map(jnp.copy, state)
        batch = made.prepare(state, raw, jax.random.key(2))
        held = cases.host(batch)
        state, metrics = made.update(state, batch)
        models = cases.models(shared)
    return types.SimpleNamespace(
        made=made,
        raw=raw,
        config=config,
        held=held,
        kept=held["rollout"],
        drawn=seen["drawn"],
        rewards=seen["rewards"].astype(np.float64),
        first=first,
        state=state,
        metrics=cases.told(metrics),
        models=models,
    )


def test_the_batch_under_placement_b_is_what_numpy_says(run):
    drawn, kept, models = run.drawn, run.kept, run.models
    mask, ended = drawn["mask"], drawn["ended"]
    lengths = mask.sum(1)
    scored = np.isfinite(run.rewards).all(1)
    assert 0 < scored.sum() < 16 and 0 < ended.sum() < 16
    policy_, ref = (
        cases.token_logps(models[k], drawn, TAU)[:, -NEW:]
        for k in ("policy", "reference")
    )
    outputs = cases.scalars(models["reward"], drawn)  # also the critic's
    scores = np.where(scored, run.rewards[:, 0] + 3 * run.rewards[:, 1], 0)
    paid = np.where(ended, scores, -2.0)

    rewards, counted = np.zeros((16, NEW)), np.zeros((16, NEW), bool)
    for row in range(16):
        if not scored[row]:
            continue
        away = policy_[row] - ref[row]
        kl = np.exp(-away) - 1 + away
        rewards[row, : lengths[row]] = -0.1 * kl[: lengths[row]]
        slot = min(lengths[row], NEW - 1)  # after the end token, if there is room
        rewards[row, slot] += paid[row]
        counted[row, : slot + 1] = True
    own = rewards[counted]
    spread = np.sqrt(own.var(ddof=1) + 1e-8)
    rewards = np.where(counted, (rewards - own.mean()) / spread + own.mean(), 0)

    values = np.where(counted, outputs[:, P - 1 : -1], 0)
    advantages = np.zeros((16, NEW))
    for row in np.flatnonzero(scored):
        last = counted[row].sum() - 1
        ahead = 0.0 if ended[row] else outputs[row, -1]
        later = 0.0
        for t in range(last, -1, -1):
            delta = rewards[row, t] + ahead - values[row, t]
            later = delta + run.config.lambda_ * later
            advantages[row, t], ahead = later, values[row, t]
    returns = advantages + values
    kept_mask = mask & scored[:, None]
    np.testing.assert_array_equal(kept["mask"], kept_mask)
    np.testing.assert_array_equal(kept["value_mask"], counted)
    assert (counted.sum(1) - kept_mask.sum(1) == ended * scored * (lengths < NEW)).all()
    np.testing.assert_allclose(kept["old_values"][counted], values[counted], atol=1e-4)
    np.testing.assert_allclose(kept["returns"][counted], returns[counted], atol=1e-3)
    own = advantages[kept_mask]
    whitened = (advantages - own.mean()) / np.sqrt(own.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(
        kept["advantages"], np.where(kept_mask, whitened, 0), atol=1e-3
    )

    told = run.metrics
    kl = np.where(mask, policy_ - ref, 0).sum(1)
    assert told["objective/kl"] == pytest.approx(kl.mean(), abs=1e-3)
    assert told["objective/scores"] == pytest.approx(paid[scored].mean(), abs=1e-4)
    assert told["rewards/unscored"] == pytest.approx(1 - scored.mean())
    assert told["objective/missing_eos_rate"] == pytest.approx(1 - ended.mean())
    assert told["val/num_eos_tokens"] == ended.sum()
    share = 1 - (returns - values)[counted].var() / returns[counted].var()
    assert told["val/explained_variance"] == pytest.approx(share, abs=1e-3)


def test_rows_that_nobody_could_score_teach_nothing(run):
    kept, scored = run.kept, np.isfinite(run.rewards).all(1)
    for name in ("mask", "value_mask"):
        assert not kept[name][~scored].any() and kept[name][scored].any(1).all()
    assert not kept["advantages"][~scored].any()


def test_one_step_is_the_gradient_of_all_terms_with_two_learning_rates(run):
    """At ratio 1: policy gradient, entropy bonus, pretraining text; and the critic."""
    kept, raw = run.kept, run.raw
    mask, counted = kept["mask"], kept["value_mask"]

    def policy_loss(model):
        logits = model.logits(kept["ids"], kept["positions"], kept["segments"])
        logps = jax.nn.log_softmax(logits / TAU)[:, -NEW - 1 : -1]
        picked = jnp.take_along_axis(logps, kept["tokens"][..., None], -1)[..., 0]
        entropy = -(jnp.exp(logps) * logps).sum(-1)
        token = -kept["advantages"] * picked - 0.05 * entropy
        text = [raw[f"ptx_{k}"] for k in ("ids", "positions", "segments")]
        ids, _, segments = text
        after = jax.nn.log_softmax(model.logits(*text))[:, :-1]
        nll = -jnp.take_along_axis(after, ids[:, 1:, None], -1)[..., 0]
        target = raw["ptx_mask"][:, 1:] & (segments[:, 1:] == segments[:, :-1])
        target &= segments[:, 1:] > 0
        mixed = jnp.where(target, nll, 0).sum() / target.sum()
        return jnp.where(mask, token, 0).sum() / mask.sum() + 0.3 * mixed

    def value_loss(model):
        found = model(kept["ids"], kept["positions"], kept["segments"])
        error = 0.5 * (found[:, P - 1 : -1] - kept["returns"]) ** 2
        return (
            run.config.value_coef * jnp.where(counted, error, 0).sum() / counted.sum()
        )

    norms = {}
    for part, loss, rate in (("policy", policy_loss, 0.1), ("value", value_loss, 0.02)):
        grads = tree.named(jax.jit(jax.grad(loss))(run.first.model[part]))
        before, after = (
            {k: np.asarray(v) for k, v in tree.named(s.model[part]).items()}
            for s in (run.first, run.state)
        )
        for name, grad in grads.items():
            step = (before[name] - after[name]) / rate
            scale = np.abs(grad).max() + 1e-6
            difference = np.abs(step - np.asarray(grad)).max()
            assert difference < 2e-4 * scale + 2e-5, (part, name)
        norms[part] = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in grads.values()))
        assert run.metrics[f"grad_norm/{part}"] == pytest.approx(norms[part], rel=1e-3)
        assert run.metrics[f"learning_rate/{part}"] == pytest.approx(rate)
    together = np.hypot(norms["policy"], norms["value"])
    assert run.metrics["grad_norm"] == pytest.approx(together, rel=1e-3)


def test_an_average_of_policy_and_critic_survives_a_restart(run, tmp_path):
    for part in ("policy", "value"):
        start, new, average = (
            tree.named(s[part])
            for s in (run.first.model, run.state.model, run.state.extra["ema"])
        )
        for name in start:
            expected = 0.75 * np.asarray(start[name]) + 0.25 * np.asarray(new[name])
            np.testing.assert_allclose(average[name], expected, atol=1e-6)
    assert train.deployable(run.state) is run.state.extra["ema"]["policy"]
    with jax.set_mesh(cases.single()):
        saver = checkpoint.Checkpoints(tmp_path)
        saver.save(1, *train._split(run.state), {})
        saver.wait()
        again, _ = train._restore(saver, 1, run.made.init(jax.random.key(9)))
        saver.close()
    assert tree.digest(again) == tree.digest(run.state)
    assert list(again.model) == list(run.state.model)


def test_pretraining_rows_are_shared_out_to_the_minibatches():
    batch = {"ptx": {"ptx_ids": jnp.arange(12).reshape(6, 2)}}
    for now, start in ((0, 0), (1, 2), (2, 4), (3, 0), (4, 2)):
        found = policy._pretraining_part(3, batch, now)["ptx_ids"]
        np.testing.assert_array_equal(found, np.arange(12).reshape(6, 2)[start:][:2])
    assert policy._pretraining_part(3, {}, 0) == {}


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_in_the_loss(run, estimator):
    config = defaults.stage(
        "policy",
        kl_placement="loss",
        kl_estimator=estimator,
        kl_coef=0.1,
        sampling=dict(max_new_tokens=NEW, temperature=TAU),
    )
    kept, models = dict(run.kept), run.models
    goal, _ = policy.make_objective(config)
    assert goal.weights["kl"] == 0.1
    with jax.set_mesh(cases.single()):
        parts = {"policy": models["policy"], "value": models["reward"]}
        terms, metrics = jax.jit(goal.terms)(parts, kept)
        found = goal.reductions(kept)["kl"]
    away = (kept["old_logps"] - kept["ref_logps"]).astype(np.float64)
    kl = 0.5 * away**2 if estimator == "k2" else np.exp(-away) - 1 + away
    expected = kl[kept["mask"]].mean()
    got = float(found.sum(terms["kl"]) / found.total())
    assert got == pytest.approx(expected, rel=1e-3)
    assert float(metrics["kl"].compute()) == pytest.approx(expected, rel=1e-3)


def test_what_is_paid_then_is_the_score_alone(run):
    """Placement A, no bootstrap: the return of the last token is what it is paid."""
    config = defaults.stage(
        "policy",
        kl_placement="loss",
        kl_coef=0.1,
        sampling=dict(max_new_tokens=NEW, temperature=TAU),
    )
    rewards = types.SimpleNamespace(names=("reward_model", "odd"), weights=(1.0, 0.0))
    judge = functools.partial(policy.score_rollout, config, rewards)
    models, drawn = run.models, run.drawn
    parts = {"policy": models["policy"], "value": models["reward"]}
    with jax.set_mesh(cases.single()):
        judged = jax.jit(judge)(
            *(parts, models["reference"], drawn, run.rewards.astype(np.float32)),
            *(jax.random.key(0), {"kl_coef": 0.1}),
        )
    told = cases.told({k: v.compute() for k, v in judged["metrics"].items()})
    assert told["objective/non_score_reward"] == 0
    scored = np.isfinite(run.rewards).all(1)
    paid = run.rewards[:, 0] - 1.0 * ~drawn["ended"]
    last = drawn["mask"].sum(1) - 1
    returns = np.asarray(judged["rollout"]["returns"])[np.arange(16), last]
    np.testing.assert_allclose(returns[scored], paid[scored], atol=1e-4)


def test_an_adaptive_coefficient_in_the_loss_is_the_one_that_is_logged():
    """Two rollouts: the second is weighed by what the first made of the coefficient."""
    shared = cases.single()
    settings = dict(kl_placement="loss", kl_estimator="k2", kl_coef=0.5)
    adapts = dict(kl_target=1e-3, kl_horizon=20.0)

    def stage(**changes):
        return cases.stage("policy", shared, **(settings | changes))

    with jax.set_mesh(shared):
        made, raw, _ = stage(**adapts)
        state = made.init(jax.random.key(0))
        state, first = made.update(state, made.prepare(state, raw, jax.random.key(1)))
        coefficient = 0.5 * (1 + 0.2 * 16 / 20)  # far above the target
        assert float(first["objective/kl_coef"]) == 0.5
        assert float(state.extra["kl_coef"]) == pytest.approx(coefficient, rel=1e-6)
        batch = made.prepare(state, raw, jax.random.key(2))
        ends = {}
        for name, other in (
            ("adapts", made),
            ("as logged", stage(kl_coef=coefficient)[0]),
            ("fixed", stage()[0]),
        ):
            # An update donates its state.
            copy = jax.tree.map(jnp.copy, state)
            after, told = other.update(copy, batch)
            ends[name] = {k: np.asarray(v) for k, v in tree.named(after.model).items()}
            if name == "adapts":
                logged = float(told["objective/kl_coef"])
                assert logged == pytest.approx(coefficient, rel=1e-6)
    moved = 0.0
    for name, value in ends["adapts"].items():
        np.testing.assert_allclose(value, ends["as logged"][name], atol=1e-6)
        moved = max(moved, np.abs(value - ends["fixed"][name]).max())
    assert moved > 1e-4


def unscored(prompts, completions):
    """The first half of the records alone can be scored."""
    return [
        float("nan") if int(p.removeprefix("p")) >= 8 else float(len(c) % 3)
        for p, c in zip(prompts, completions, strict=True)
    ]


def test_what_was_paid_is_logged_and_minibatches_without_scores_are_left_out():
    shared = cases.single()
    records = [{"prompt": f"p{i}"} for i in range(16)]
    with jax.set_mesh(shared), cases.watched() as seen:
        made, raw, config = cases.stage(
            "policy",
            shared,
            verifiers=Verifiers([Verifier("unscored", unscored)], records, WORDS),
            without=("reward",),
            epochs=1,
            minibatches=8,
            kl_estimator="k3",
            kl_coef=0.1,
        )
        raw |= {"index": np.arange(16)}
        state = made.init(jax.random.key(0))
        batch = cases.host(made.prepare(state, raw, jax.random.key(2)))
        _, told = made.update(state, batch)
    told = cases.told(told)
    assert np.isfinite([*told.values()]).all(), told
    rewards = seen["rewards"]
    scored = np.isfinite(rewards).all(1)
    assert scored.sum() == 8
    order = batch["order"]
    assert (~scored[order].any(1)).any()  # a minibatch without any score
    # What k3 took from the completions that were scored, by numpy.
    held, mask = batch["rollout"], seen["drawn"]["mask"]
    away = (held["old_logps"] - held["ref_logps"]).astype(np.float64)
    paid = 0.1 * np.where(mask, np.exp(-away) - 1 + away, 0).sum(1)
    assert told["objective/non_score_reward"] == pytest.approx(
        -paid[scored].mean(), rel=1e-4
    )
    scores = np.where(seen["drawn"]["ended"], rewards[:, 0], rewards[:, 0] - 1.0)
    total = (scores - paid)[scored].mean()
    assert told["objective/rlhf_reward"] == pytest.approx(total, rel=1e-4)
