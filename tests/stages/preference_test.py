"""Options of the preference stage: references that move or are kept, weights, terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import checkpoint, defaults, losses, masked, sharding, train, tree
from stagecraft.data.dataset import Dataset
from stagecraft.stages import preference, stage
from tests.stages import cases


def sums(model, raw, alpha=1.0):
    """f64[B, 2]: log-probs of completions, the longer one's tail times alpha."""
    logps, mask = cases.token_logps(model, raw), raw["mask"]
    shared = mask.sum(-1).min(1)
    out = np.zeros(mask.shape[:2])
    for row, side in np.ndindex(*out.shape):
        own = logps[row, side][mask[row, side]]
        out[row, side] = own[: shared[row]].sum() + alpha * own[shared[row] :].sum()
    return out


def arrays(module):
    return {k: np.asarray(v) for k, v in tree.named(module).items()}


# -- everything at once: two losses, soft labels, LD-DPO, WPO, TR-DPO, an average ------

OPTIONS = dict(
    objective="sigmoid,sft",
    objective_weights=(1.0, 0.5),
    objective_args=dict(beta=0.2),
    ld_alpha=0.25,
    weighting="wpo",
    sync_every=2,
    sync_alpha=0.6,
    ema_decay=0.9,
)


@pytest.fixture(scope="module")
def run():
    """Three steps; what went in and came out of each."""
    shared, steps = cases.single(), []
    with jax.set_mesh(shared):
        made, raw, _ = cases.stage("preference", shared, **OPTIONS)
        soft = np.random.default_rng(8).random(16).astype(np.float32)
        raw |= {"preference": soft, "index": np.arange(16)}
        state = made.init(jax.random.key(0))
        for _ in range(3):
            before = jax.tree.map(jnp.copy, state)
            batch = made.prepare(state, raw, None)
            state, metrics = made.update(state, batch)
            steps.append((before, cases.host(batch), cases.told(metrics)))
        steps.append((state, None, None))
    return made, raw, steps


def test_the_loss_of_all_options_together(run):
    _, raw, steps = run
    mask = raw["mask"]
    for before, _, metrics in steps[:3]:
        policy = sums(before.model, raw, 0.25)
        reference = sums(before.extra["reference"], raw, 0.25)
        margin = 0.2 * np.subtract(*(policy - reference).T)
        right = raw["preference"]
        pair = right * np.log1p(np.exp(-margin)) + (1 - right) * np.log1p(
            np.exp(margin)
        )
        logps = cases.token_logps(before.model, raw)
        squares = np.log(np.exp(2 * cases.distributions(before.model, raw)).sum(-1))
        surprise = np.where(mask, logps - squares, 0).sum(-1) / mask.sum(-1)
        weight = np.exp(surprise.sum(1))
        assert weight.std() > 0.01
        chosen = -logps[:, 0][mask[:, 0]].mean()
        expected = (weight * pair).mean() + 0.5 * chosen
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
        assert metrics["rewards/margins"] == pytest.approx(margin.mean(), abs=1e-4)
        assert metrics["logps/chosen"] == pytest.approx(policy[:, 0].mean(), rel=1e-4)


def test_the_reference_moves_every_second_step(run):
    _, raw, steps = run
    references = [arrays(state.extra["reference"]) for state, _, _ in steps]
    models = [arrays(state.model) for state, _, _ in steps]
    for name, start in references[0].items():
        np.testing.assert_array_equal(references[1][name], start)
        moved = start + 0.6 * (models[2][name].astype(np.float64) - start)
        np.testing.assert_allclose(references[2][name], moved, atol=1e-6)
        np.testing.assert_array_equal(references[3][name], references[2][name])
    assert any((references[2][n] != references[0][n]).any() for n in references[0])
    for before, batch, _ in steps[:3]:  # and is what a batch is scored by
        expected = sums(before.extra["reference"], raw, 0.25)
        np.testing.assert_allclose(batch["ref_logps"], expected, atol=1e-4)


def test_the_average_of_the_weights(run):
    _, _, steps = run
    average = arrays(steps[0][0].extra["ema"])
    for name, start in arrays(steps[0][0].model).items():
        np.testing.assert_array_equal(average[name], start)
    for state, _, _ in steps[1:]:
        now = arrays(state.extra["ema"])
        for name, new in arrays(state.model).items():
            expected = 0.9 * average[name] + 0.1 * new
            np.testing.assert_allclose(now[name], expected, atol=1e-6)
        average = now
    last = steps[-1][0]
    assert train.deployable(last) is last.extra["ema"]


def test_a_restored_run_goes_on_bit_for_bit(run, tmp_path):
    """With an average and a moving reference, the way train.py saves them."""
    made, raw, steps = run
    state = steps[2][0]
    with jax.set_mesh(cases.single()):
        saver = checkpoint.Checkpoints(tmp_path)
        saver.save(2, *train._split(state), {})
        saver.wait()
        again, _ = train._restore(saver, 2, made.init(jax.random.key(9)))
        saver.close()
        assert tree.digest(again) == tree.digest(state)
        again, metrics = made.update(again, made.prepare(again, raw, None))
        assert tree.digest(again) == tree.digest(steps[3][0])
    assert cases.told(metrics) == steps[2][2]


# -- references that are scored once, or never -----------------------------------------


def dataset(rows=10, **extra):
    found = cases.pairs(rows=rows, seed=3) | extra
    return Dataset([(found | {"index": np.arange(rows, dtype=np.int32)}, 8)], seed=1)


@pytest.fixture(scope="module")
def once():
    """Stages that may score once, with a spy on their reference passes."""
    shared, calls = cases.single(), []
    real = stage.jit

    def watched(function, *args, **settings):
        jitted = real(function, *args, **settings)
        if function.__name__ != "score":
            return jitted

        def counted(model, batch):
            calls.append(batch["ids"].shape)
            return jitted(model, batch)

        return counted

    def make(steps, rows=10):
        config = defaults.stage(
            "preference", optimizer=cases.OPTIMIZER, steps=steps, batch_size=8
        )
        found = cases.models(shared)
        roles = {"start": found["policy"], "reference": found["reference"]}
        context = stage.Context(shared, None, roles, dataset=dataset(rows))
        return preference.make(config, context)

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(shared):
        patch.setattr(stage, "jit", watched)
        yield make, calls


def test_rows_that_come_twice_are_scored_once(once):
    make, calls = once
    made, reference = make(steps=10), cases.models(cases.single())["reference"]
    state, seen = made.init(jax.random.key(0)), set()
    calls.clear()
    for step in range(4):
        raw = dataset().batch_at(step)
        batch = made.prepare(state, raw, None)
        np.testing.assert_allclose(batch["ref_logps"], sums(reference, raw), atol=1e-4)
        seen |= set(raw["index"].tolist())
        assert "index" not in batch
    assert len(calls) == 2  # ten rows in batches of eight, before the first step
    assert len(seen) == 10
    assert made.work(raw)["scored"] == 10 * 2 * 16 // 10


def test_held_out_rows_are_scored_as_they_come(once):
    """Their numbers go on after the training rows'; a row of padding has -1."""
    make, calls = once
    made, reference = make(steps=10), cases.models(cases.single())["reference"]
    state = made.init(jax.random.key(0))
    made.prepare(state, dataset().batch_at(0), None)
    calls.clear()
    held = cases.pairs(rows=8, seed=9)
    for index in (np.arange(10, 18), np.array([*range(6), -1, -1])):
        batch = made.prepare(state, held | {"index": index.astype(np.int32)}, None)
        np.testing.assert_allclose(batch["ref_logps"], sums(reference, held), atol=1e-4)
    assert len(calls) == 2


def test_rows_that_come_once_are_scored_as_they_come(once):
    make, calls = once
    made = make(steps=1)
    state = made.init(jax.random.key(0))
    calls.clear()
    raw = dataset().batch_at(0)
    made.prepare(state, raw, None)
    assert len(calls) == 1
    assert made.work(raw)["scored"] == raw["ids"].size


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo,sft"])
def test_a_loss_without_a_reference_makes_no_pass_of_it(name, once):
    _, calls = once
    calls.clear()
    shared = cases.single()
    without = () if "sft" in name else ("reference",)  # sft logs rewards against it
    made, raw, _ = cases.stage("preference", shared, objective=name, without=without)
    batch = made.prepare(made.init(jax.random.key(0)), raw, None)
    assert ("ref_logps" in batch) == bool(calls) == ("sft" in name)
    assert ("scored" in made.work(raw)) == ("sft" in name)


# -- where terms lie -------------------------------------------------------------------


def evaluated(objective, raw, model, **changes):
    config = defaults.stage("preference", objective=objective, **changes)
    goal, _ = preference.make_objective(config)

    @jax.jit
    def found(model, batch):
        terms, metrics = goal.terms(model, batch)
        places = goal.reductions(batch)
        loss = {k: places[k].sum(v) / places[k].total() for k, v in terms.items()}
        return loss, masked.compute(metrics)

    loss, metrics = found(model, raw)
    return {k: float(v) for k, v in loss.items()}, cases.told(metrics)


def test_orpo_learns_the_whole_document_and_the_odds(run):
    raw = cases.pairs()
    raw["mask"][3:5] = False  # two rows without a pair: their prompts count nowhere
    raw["segments"][3:5] = 0
    model = run[2][0][0].model
    loss, metrics = evaluated("orpo", raw, model, objective_args=dict(beta=0.3))
    logps, mask = cases.token_logps(model, raw), raw["mask"]
    real = mask.any(-1).all(1)
    size = np.maximum(mask.sum(-1), 1)
    average = np.where(mask, logps, 0).sum(-1) / size
    odds = average - np.log1p(-np.exp(np.minimum(average, -1e-9)))
    ratio = -np.log1p(np.exp(-(odds[:, 0] - odds[:, 1])))
    assert loss["rows"] == pytest.approx(-0.3 * ratio[real].mean(), rel=1e-4)
    document = raw["segments"][:, 0] > 0
    document[:, 0] = False  # nothing comes before the first token
    nll = -logps[:, 0][document].mean()
    assert loss["document"] == pytest.approx(nll, rel=1e-4)
    assert metrics["nll_loss"] == pytest.approx(nll, rel=1e-4)
    assert metrics["log_odds_ratio"] == pytest.approx(ratio[real].mean(), rel=1e-4)


def test_cpo_learns_the_chosen_completion_alone(run):
    raw, model = cases.pairs(), run[2][0][0].model
    loss, _ = evaluated("cpo", raw, model, objective_args=dict(alpha=0.5))
    logps, mask = cases.token_logps(model, raw), raw["mask"]
    chosen = -logps[:, 0][mask[:, 0]].mean()
    assert loss["chosen"] == pytest.approx(0.5 * chosen, rel=1e-4)
    margin = 0.1 * np.subtract(*np.where(mask, logps, 0).sum(-1).T)
    assert loss["rows"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "derivative"),
    [
        (dict(f_divergence="js"), lambda u: np.log(2 * u / (1 + u))),
        (dict(f_divergence="alpha", alpha=0.3), lambda u: (u**-0.7 - 1) / -0.7),
        (dict(reference_free=True), None),
    ],
)
def test_losses_compare_the_scores_of_the_stage(run, settings, derivative):
    """One score for all losses of a stage; logged rewards are those of log-ratios."""
    raw, model = cases.pairs(), run[2][0][0].model
    policy = sums(model, raw)
    noise = np.random.default_rng(4).normal(size=(16, 2))
    raw["ref_logps"] = (policy + noise).astype(np.float32)
    loss, metrics = evaluated("dpo,nca_pair", raw, model, **settings)
    ratio = policy - raw["ref_logps"]
    scores = policy if derivative is None else derivative(np.exp(ratio))
    chosen, rejected = 0.1 * scores.T

    def softplus(x):
        return np.log1p(np.exp(x))

    nca = softplus(-chosen) + 0.5 * (softplus(chosen) + softplus(rejected))
    want = (softplus(rejected - chosen) + nca).mean()
    assert loss["rows"] == pytest.approx(want, rel=1e-4)
    margin = 0.1 * np.subtract(*ratio.T)
    assert metrics["rewards/margins"] == pytest.approx(margin.mean(), abs=1e-4)


def test_rows_of_padding_are_not_sorted_in(run):
    """AOT over a padded batch equals AOT over its real rows."""
    raw, model = cases.pairs(), run[2][0][0].model
    raw["ref_logps"] = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    empty = {k: np.zeros((4, *v.shape[1:]), v.dtype) for k, v in raw.items()}
    padded = {k: np.concatenate([v, empty[k]]) for k, v in raw.items()}
    for name in ("aot", "aot_unpaired"):
        one, _ = evaluated(name, raw, model)
        other, _ = evaluated(name, padded, model)
        assert one["rows"] == pytest.approx(other["rows"], rel=1e-5)
    assert {*losses.ACROSS_ROWS} == {losses.aot, losses.aot_unpaired}


def test_a_moving_reference_is_sharded_like_the_model():
    shared = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(shared):
        made, _, _ = cases.stage("preference", shared, sync_every=1, ema_decay=0.5)
        state = made.init(jax.random.key(0))
    for name in ("reference", "ema"):
        for one, other in zip(
            jax.tree.leaves(state.model),
            jax.tree.leaves(state.extra[name]),
            strict=True,
        ):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
            assert one is not other
    # An update donates the state, but not what it is a copy of.
    with jax.set_mesh(shared):
        again = made.init(jax.random.key(0))
    held = [
        x.addressable_shards[0].data.unsafe_buffer_pointer()
        for x in jax.tree.leaves((state, again))
    ]
    assert len({*held}) == len(held)
