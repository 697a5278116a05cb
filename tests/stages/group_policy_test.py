"""Policy optimization without a critic: whole batches and updates against numpy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, tree
from stagecraft.signals.verifiers import Verifier, Verifiers
from stagecraft.stages import group_policy
from tests.stages import cases

TAU, NEW, G = 0.7, 10, 4
SETTINGS = dict(batch_size=8, group_size=G, oversample=1, overlong_cache=0, kl_coef=0.0)
WORDS = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def early(prompts, completions):
    """Pays 1 for a first word below 36; an empty completion cannot be judged."""
    return [float(int(c.split()[0]) < 36) if c else None for c in completions]


def wide(prompts, completions, bonus):
    """Pays by length, and raises on some rows; `bonus` is a key of the records."""
    found = []
    for completion, extra in zip(completions, bonus, strict=True):
        size = len(completion.split())
        if size == 3:
            raise ZeroDivisionError("three words")
        found.append(size + extra)
    return found


def verifiers(*functions, prompts=16):
    records = [{"prompt": f"p{i}", "bonus": 0.1 * i} for i in range(prompts)]
    return Verifiers([Verifier(f.__name__, f) for f in functions], records, WORDS)


def prepared(prompts=8, **changes):
    """A prepared batch on the host, all that was sampled, and the update's metrics."""
    shared = cases.single()
    with jax.set_mesh(shared), cases.watched() as seen:
        settings = SETTINGS | changes
        made, _, config = cases.stage("group_policy", shared, **settings)
        raw = cases.prompts(rows=prompts) | {"index": np.arange(prompts)}
        state = made.init(jax.random.key(0))
        before = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
        batch = made.prepare(state, raw, jax.random.key(3))
        held = cases.host(batch)
        state, metrics = made.update(state, batch)
        after = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
        models = cases.models(shared)
    step = {k: (before[k] - after[k]) / config.optimizer.lr for k in before}
    return types.SimpleNamespace(
        raw=raw,
        config=config,
        held=held,
        kept=held["rollout"],
        drawn=seen["drawn"],
        rewards=seen["rewards"].astype(np.float64),
        metrics=cases.told(metrics),
        models=models,
        step=step,
    )


def response_logps(model, drawn):
    new = drawn["tokens"].shape[1]
    return cases.token_logps(model, drawn, TAU)[:, -new:]


def by_group(rewards, scored, kind, scale="group", normalize=False):
    """Advantages f64[R], one completion at a time."""
    out = np.zeros(len(rewards))
    everything = rewards[scored]
    compared = np.zeros(len(rewards), bool)
    for start in range(0, len(rewards), G):
        rows = [r for r in range(start, start + G) if scored[r]]
        if len(rows) < 2:
            continue
        own = rewards[rows]
        for r in rows:
            compared[r] = True
            if kind == "leave_one_out":
                out[r] = rewards[r] - np.mean([rewards[o] for o in rows if o != r])
                continue
            spread = {"group": own.std(ddof=1), "batch": everything.std(ddof=1)}
            divisor = 1.0 if scale == "none" else spread[scale] + 1e-4
            out[r] = (rewards[r] - own.mean()) / divisor
    if normalize:
        own = out[compared]
        out[compared] = (own - own.mean()) / (own.std(ddof=1) + 1e-4)
    return out


def by_token(scores, scored, mask, penalty, discount, *, baseline):
    """Returns f64[R, N] whitened over all tokens of scored rows."""
    if baseline:
        scores = by_group(scores, scored, "group", "none")
    out = np.zeros(mask.shape)
    for row in range(len(mask)):
        later, last = 0.0, int(mask[row].sum()) - 1
        for t in range(last, -1, -1):
            paid = (scores[row] if t == last else 0.0) - penalty[row, t]
            out[row, t] = later = paid + discount * later
    kept = mask & scored[:, None]
    own = out[kept]
    return np.where(kept, (out - own.mean()) / np.sqrt(own.var() + 1e-8), 0)


# -- GRPO with everything on: filters, penalties, KL in the loss -----------------------


@pytest.fixture(scope="module")
def grpo():
    return prepared(
        prompts=16,
        oversample=2,
        without=("reward",),
        verifiers=verifiers(early),
        mask_truncated=True,
        overlong_cache=4,
        missing_eos_penalty=0.5,
        kl_coef=0.1,
        aggregation="grpo",
    )


def test_grpo_keeps_the_groups_that_teach(grpo):
    drawn, kept = grpo.drawn, grpo.kept
    rewards = grpo.rewards[:, 0]
    scored, ended = np.isfinite(rewards), drawn["ended"]
    lengths = drawn["mask"].sum(1)
    scores = np.where(scored, rewards, 0) - 0.5 * ~ended
    scores += np.clip((NEW - 4 - lengths) / 4, -1, 0)
    groups = scores.reshape(16, G), scored.reshape(16, G)
    each = zip(*groups, strict=True)
    teaches = [np.ptp(s[k]) > 0 if k.sum() > 1 else False for s, k in each]
    assert 0 < sum(teaches) < 16
    chosen = [n for n in range(16) if teaches[n]] + [
        n for n in range(16) if not teaches[n]
    ]
    rows = [n * G + g for n in chosen[:8] for g in range(G)]
    np.testing.assert_array_equal(kept["ids"], drawn["ids"][rows])
    np.testing.assert_array_equal(kept["tokens"], drawn["tokens"][rows])

    advantages = by_group(scores[rows], scored[rows], "group")
    mask = drawn["mask"][rows] & (scored & ended)[rows][:, None]
    assert ended[rows].any() and not ended[rows].all()
    np.testing.assert_array_equal(kept["mask"], mask)
    expected = np.where(mask, advantages[:, None], 0)
    np.testing.assert_allclose(kept["advantages"], expected, atol=1e-4)

    policy, ref = (
        response_logps(grpo.models[k], kept) for k in ("policy", "reference")
    )
    whole = drawn["mask"][rows]
    np.testing.assert_allclose(kept["old_logps"][whole], policy[whole], atol=3e-5)
    np.testing.assert_allclose(kept["ref_logps"][whole], ref[whole], atol=3e-5)

    told = grpo.metrics
    assert told["reward"] == pytest.approx(scores[scored].mean(), abs=1e-5)
    assert told["rewards/early/mean"] == pytest.approx(rewards[scored].mean(), abs=1e-5)
    spread = rewards[scored].std(ddof=1)
    assert told["rewards/early/std"] == pytest.approx(spread, abs=1e-5)
    assert told["rewards/unscored"] == pytest.approx(1 - scored.mean(), abs=1e-6)
    assert told["frac_reward_zero_std"] == pytest.approx(1 - np.mean(teaches))
    deviations = [
        s[k].std(ddof=1) if k.sum() > 1 else 0
        for s, k in zip(
            scores[rows].reshape(8, G), scored[rows].reshape(8, G), strict=True
        )
    ]
    assert told["reward_std"] == pytest.approx(np.mean(deviations), abs=1e-5)
    kl = np.where(whole, policy - ref, 0).sum(1)
    assert told["objective/kl"] == pytest.approx(kl.mean(), abs=1e-3)
    assert told["val/rollout_logp_gap"] < 1e-5
    assert told["completions/mean_length"] == pytest.approx(lengths.mean())
    assert told["completions/max_length"] == lengths.max()
    assert told["completions/min_length"] == lengths.min()
    assert told["completions/clipped_ratio"] == pytest.approx(1 - ended.mean())
    found = told["completions/mean_terminated_length"]
    assert found == pytest.approx(lengths[ended].mean())


@pytest.mark.parametrize("name", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_loss_of_every_aggregation(grpo, name, estimator):
    """Of another policy than the one that sampled, so that ratios and clips count."""
    changes = dict(aggregation=name, kl_coef=0.1, kl_estimator=estimator)
    changes["sampling"] = dict(max_new_tokens=NEW, temperature=TAU)
    goal, _ = group_policy.make_objective(defaults.stage("group_policy", **changes))
    kept, model = dict(grpo.kept), nudged(grpo.models["policy"])
    kept["mask"] = kept["mask"].copy()
    kept["mask"][3] = False  # a row that teaches nothing still is a completion
    with jax.set_mesh(cases.single()):
        terms, _ = jax.jit(goal.terms)(model, kept)
        found = goal.reductions(kept)
    mask = kept["mask"]
    logps = response_logps(model, kept)
    ratio = np.where(mask, np.exp(logps - kept["old_logps"]), 1)
    advantages = kept["advantages"].astype(np.float64)
    policy = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    assert (policy != -ratio * advantages)[mask].any()
    away = np.where(mask, logps - kept["ref_logps"], 0)
    kl = 0.5 * away**2 if estimator == "k2" else np.exp(-away) - 1 + away

    def reduced(x):
        x = np.where(mask, x, 0)
        if name == "grpo":
            return np.mean([x[r].sum() / max(mask[r].sum(), 1) for r in range(len(x))])
        if name == "dr_grpo":
            return x.sum() / (len(x) * NEW)
        return x.sum() / mask.sum()

    for place, values in (("policy", policy), ("kl", kl)):
        got = float(found[place].sum(terms[place]) / found[place].total())
        assert got == pytest.approx(reduced(values), rel=2e-4, abs=1e-6)
    assert goal.weights == {"kl": 0.1}


def nudged(model):
    """The model a small step away."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype), model
    )


def test_the_first_minibatch_has_not_moved(grpo):
    """Its loss is that of ratio 1, read off a one-minibatch objective."""
    goal, _ = group_policy.make_objective(grpo.config)
    with jax.set_mesh(cases.single()):
        _, metrics = jax.jit(goal.terms)(grpo.models["policy"], dict(grpo.kept))
    ratio = metrics["val/ratio"].compute(), metrics["policy/ratio_max"].compute()
    assert [float(x) for x in ratio] == pytest.approx([1, 1], abs=1e-5)
    assert float(metrics["policy/clipfrac_avg"].compute()) == 0
    assert grpo.metrics["policy/ratio_max"] > 1.0001  # the later ones have


def test_an_epoch_sees_every_row_once(grpo):
    order = grpo.held["order"]
    assert order.shape == (4, 8 * G // 2)
    for epoch in order.reshape(2, -1):
        assert sorted(epoch.tolist()) == list(range(8 * G))


# -- RLOO: a KL in the reward, two rewards, rows nobody could score --------------------


@pytest.fixture(scope="module")
def rloo():
    return prepared(
        verifiers=verifiers(wide),
        reward_weights=(0.5, 2.0),
        advantage="leave_one_out",
        normalize_advantages=True,
        kl_coef=0.05,
        kl_placement="reward",
        kl_estimator="k1",
        objective="rloo_policy",
    )


def test_rloo_with_two_rewards_and_rows_that_nobody_could_score(rloo):
    drawn, kept = rloo.drawn, rloo.kept
    mask, lengths = drawn["mask"], drawn["mask"].sum(1)
    rows, prompt = np.arange(8 * G), drawn["ids"].shape[1] - NEW
    model = cases.scalars(rloo.models["reward"], drawn)[rows, prompt + lengths - 1]
    words = lengths - drawn["ended"]  # the stop token is no word
    assert (words == 3).any()
    verified = np.where(words == 3, np.inf, words + 0.1 * (rows // G))
    np.testing.assert_allclose(rloo.rewards[:, 0], model, atol=1e-4)
    np.testing.assert_allclose(rloo.rewards[:, 1], verified, atol=1e-5)

    scored = np.isfinite(verified)
    policy, ref = (
        response_logps(rloo.models[k], kept) for k in ("policy", "reference")
    )
    kl = np.where(mask, policy - ref, 0).sum(1)
    scores = np.where(scored, 0.5 * model + 2.0 * verified, 0.0)
    advantages = by_group(scores - 0.05 * kl, scored, "leave_one_out", normalize=True)
    expected = np.where(mask & scored[:, None], advantages[:, None], 0)
    np.testing.assert_array_equal(kept["mask"], mask & scored[:, None])
    np.testing.assert_allclose(kept["advantages"], expected, atol=2e-3)

    told = rloo.metrics
    for name, values in (("reward_model", model), ("wide", verified[scored])):
        assert told[f"rewards/{name}/mean"] == pytest.approx(values.mean(), rel=1e-4)
        spread = values.std(ddof=1)
        assert told[f"rewards/{name}/std"] == pytest.approx(spread, rel=1e-4)
    assert told["rewards/unscored"] == pytest.approx(np.mean(words == 3), abs=1e-6)
    assert told["reward"] == pytest.approx(scores[scored].mean(), rel=1e-4)
    assert "kl" not in told  # none in the loss


# -- one step on a fresh rollout -------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    return prepared(
        epochs=1,
        minibatches=1,
        advantage="returns_baseline",
        discount=0.9,
        kl_coef=0.05,
        kl_placement="reward",
        kl_estimator="k1",
    )


def test_reinforce_with_a_baseline_and_a_kl_in_the_reward(fresh):
    mask, kept = fresh.drawn["mask"], fresh.kept
    policy, ref = (
        response_logps(fresh.models[k], kept) for k in ("policy", "reference")
    )
    penalty = 0.05 * np.where(mask, policy - ref, 0)
    everything = np.ones(len(mask), bool)
    expected = by_token(
        *(fresh.rewards[:, 0], everything, mask, penalty, 0.9), baseline=True
    )
    np.testing.assert_allclose(kept["advantages"], expected, atol=1e-3)


def test_one_step_has_the_value_of_the_advantages_and_their_gradient(fresh):
    kept = fresh.kept
    mask, advantages = kept["mask"], kept["advantages"]
    value = -advantages[mask].mean()
    assert fresh.metrics["loss"] == pytest.approx(value, abs=1e-5)
    assert abs(value) < 1e-5 and fresh.metrics["grad_norm"] > 1e-3
    assert fresh.metrics["val/ratio"] == pytest.approx(1, abs=1e-5)

    def surrogate(model):
        logits = model.logits(kept["ids"], kept["positions"], kept["segments"])
        logps = jax.nn.log_softmax(logits / TAU)[:, -NEW - 1 : -1]
        picked = jnp.take_along_axis(logps, kept["tokens"][..., None], -1)[..., 0]
        return -jnp.where(mask, advantages * picked, 0).sum() / mask.sum()

    grads = tree.named(jax.jit(jax.grad(surrogate))(fresh.models["policy"]))
    for name, grad in grads.items():
        scale = np.abs(grad).max() + 1e-6
        difference = np.abs(fresh.step[name] - np.asarray(grad)).max()
        assert difference < 1e-4 * scale + 1e-5, name


# -- every kind of advantage -----------------------------------------------------------


@pytest.mark.parametrize("penalized", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        *(dict(advantage="group", scale_rewards=s) for s in ("group", "batch", "none")),
        *(
            dict(advantage="leave_one_out", normalize_advantages=n)
            for n in (False, True)
        ),
        dict(advantage="returns"),
        dict(advantage="returns", discount=0.8),
        dict(advantage="returns_baseline"),
    ],
    ids=str,
)
def test_every_kind_of_advantage(changes, penalized):
    rng = np.random.default_rng(4)
    rows, scores = 5 * G, rng.normal(size=5 * G)
    scored = rng.random(rows) < 0.8
    scored[:G] = False
    scores[~scored] = 0.0
    mask = np.arange(6)[None] < rng.integers(1, 7, rows)[:, None]
    penalty = np.where(mask, 0.3 * rng.normal(size=mask.shape), 0)
    config = defaults.stage("group_policy", group_size=G, **changes)
    args = [jnp.asarray(x, jnp.float32) for x in (scores, penalty)]
    got = group_policy._advantages(
        *(args[0], jnp.asarray(scored), jnp.asarray(mask)),
        args[1] if penalized else None,
        config,
    )
    penalty = penalty * penalized
    if config.advantage.startswith("returns"):
        baseline = config.advantage == "returns_baseline"
        discount = config.discount
        want = by_token(scores, scored, mask, penalty, discount, baseline=baseline)
    else:
        want = by_group(
            *(scores - penalty.sum(1), scored, config.advantage),
            config.scale_rewards,
            config.normalize_advantages,
        )
        want = np.where(mask, want[:, None], 0)
    kept = mask & scored[:, None]  # what is unscored is cleared afterwards
    np.testing.assert_allclose(np.asarray(got)[kept], want[kept], rtol=1e-4, atol=1e-4)
