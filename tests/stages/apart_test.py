"""Rollouts apart from training: the same numbers, or those of older weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import experiment, run, sharding, train, tree
from stagecraft.data.dataset import Dataset
from stagecraft.data.stage_data import StageData
from stagecraft.models.transformer import Transformer
from stagecraft.pods import hlo
from stagecraft.pods.shapes import Vocabulary
from stagecraft.runs import Run
from stagecraft.stages import apart
from tests import tiny
from tests.graphs import graph
from tests.stages import cases

STEPS = 4
KEY = jax.random.key(3)


def meshes(data=2, tensor=1):
    """Two devices that train, and two others that sample."""
    devices = jax.devices()
    return (
        sharding.make_mesh(2, 1, 1, devices=devices[:2]),
        sharding.make_mesh(data, 1, tensor, devices=devices[2:4]),
    )


def steps(kind, training, rollout=None, **changes):
    """Tokens, metrics and weights of two steps."""
    tokens = []
    with jax.set_mesh(training):
        made, raw, _ = cases.stage(kind, training, rollout_mesh=rollout, **changes)
        state = made.init(jax.random.key(0))
        for number in range(2):
            batch = made.prepare(state, raw, jax.random.key(number))
            tokens.append(np.asarray(batch["rollout"]["tokens"]))
            state, metrics = made.update(state, batch)
    values = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
    return tokens, {k: float(v) for k, v in metrics.items()}, values


@pytest.mark.parametrize(
    ("kind", "changes", "sizes"),
    [
        ("policy", {}, (2, 1)),
        ("group_policy", dict(lora=dict(rank=2)), (1, 2)),
    ],
)
def test_where_rollouts_are_sampled_changes_no_number(kind, changes, sizes):
    training, rollout = meshes(*sizes)
    tokens, metrics, weights = steps(kind, training, **changes)
    others, other_metrics, other_weights = steps(kind, training, rollout, **changes)
    for one, other in zip(tokens, others, strict=True):
        assert np.array_equal(one, other)
    # What rounding alone makes of one log-probability, a few nats, in two programs.
    gaps = [
        each.pop("val/rollout_logp_gap_max", 0) for each in (metrics, other_metrics)
    ]
    assert max(gaps) < 1e-5
    assert sizes != (2, 1) or gaps[0] == gaps[1]
    assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    if sizes == (2, 1):  # laid out alike: bit for bit
        assert other_metrics == metrics
        assert all(np.array_equal(other_weights[k], weights[k]) for k in weights)
    for name, value in weights.items():
        np.testing.assert_allclose(other_weights[name], value, atol=1e-6)


@pytest.mark.parametrize("kind", ["policy", "group_policy"])
def test_weights_that_are_gathered_once_sample_the_same(kind):
    mesh, rollouts, sent = sharding.make_mesh(2, 2, 2), [], []
    for weights in ("sharded", "gathered"):
        with jax.set_mesh(mesh):
            made, raw, _ = cases.stage(kind, mesh, rollout_weights=weights)
            state = made.init(jax.random.key(0))
            rollouts.append(made.prepare(state, raw, KEY)["rollout"])
            text = made.programs(raw)["sample"].lower().compile().as_text()
        exchanged = hlo.read(text, mesh.size).collectives
        gathers = [one for one in exchanged if one.kind == "all-gather"]
        sent.append(sum(one.times * one.bytes for one in gathers))
    assert sent[1] < sent[0]  # prompts and tokens after them share the weights
    for name, array in rollouts[0].items():
        np.testing.assert_array_equal(array, rollouts[1][name], err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="bfloat16"),
        dict(dtype="bfloat16", positions="learned", norm="layer", qkv_bias=True),
        dict(dtype="bfloat16", experts=4, experts_per_token=2, expert_width=16),
    ],
)
def test_gathered_weights_compute_the_same(changes):
    """Bit for bit: matrices are cast as their products would, and nothing else is."""
    mesh = sharding.make_mesh(2, 4, 1)
    make = functools.partial(Transformer, tiny.config(**changes))
    model = sharding.init_sharded(make, mesh)(jax.random.key(0))
    model = jax.tree.map(lambda x: 1.001 * x, model)  # which no bfloat16 is
    ids = jax.random.randint(KEY, (8, 6), 8, 64)
    rows = (ids, jnp.tile(jnp.arange(6), (8, 1)), jnp.ones_like(ids))

    def logits(model, whole):
        return (apart.gathered(model) if whole else model).logits(*rows)

    with jax.set_mesh(mesh):
        split, whole = (jax.jit(logits, static_argnums=1)(model, w) for w in (0, 1))
    np.testing.assert_array_equal(split, whole)


def test_weights_that_stay_are_moved_once():
    training, rollout = meshes()
    between = apart.Between(training, rollout)
    one, other = jnp.zeros(3), jnp.ones(3)
    first = between.weights({"frozen": one, "trained": one})
    second = between.weights({"frozen": one, "trained": other})
    assert second["frozen"] is first["frozen"]
    assert second["trained"].tolist() == [1.0] * 3
    assert second["trained"].sharding.device_set == set(rollout.devices.flat)


def test_a_run_samples_on_the_devices_of_its_config(tmp_path):
    scorer = dict(verifiers="length", verifier_args=dict(most=4))
    stage = scorer | dict(rollout_mesh=dict(devices=2))
    config = experiment.resolve(graph("group_policy", devices=2, **stage))
    this = Run(tmp_path, config, Vocabulary(64))
    records = StageData(records=[{"prompt": ""}])
    stage, mesh = config.stages.it, this.mesh("it")
    context = run.context(this, stage, mesh, {}, records)
    assert list(context.mesh.devices.flat) == jax.devices()[:2]
    assert list(context.rollout_mesh.devices.flat) == jax.devices()[6:]


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """A stage trained by the loop on rollouts one update old, and what it saw.

    Returns:
        its folder; at each step the tokens it learned from, and the tokens that the
        weights of then sample for that step and for the next.
    """
    training, rollout = meshes()
    folder, seen = tmp_path_factory.mktemp("stale"), []
    with jax.set_mesh(training):
        optimizer = cases.OPTIMIZER | dict(lr=1.0)
        made, raw, config = cases.stage(
            "policy",
            training,
            rollout_mesh=rollout,
            staleness=1,
            steps=STEPS,
            optimizer=optimizer,
            every=dict(log=1),
        )
        data = Dataset([(raw, 16)], seed=0)
        _, step_key = jax.random.split(KEY)

        def sampled(state, step):
            key = jax.random.fold_in(step_key, step)
            batch = made.prepare(state, data.batch_at(step), key)
            return np.asarray(batch["rollout"]["tokens"])

        def prepare(state, raw, key, begun=None):
            batch = made.prepare(state, raw, key, begun)
            tokens, step = np.asarray(batch["rollout"]["tokens"]), int(state.step)
            seen.append((tokens, sampled(state, step), sampled(state, step + 1)))
            return batch

        watched = made._replace(prepare=prepare)
        train.train(watched, config, data, folder, name="ppo", key=KEY)
    return folder, seen


def test_a_rollout_is_of_the_weights_before_the_last_update(stale):
    _, seen = stale
    assert np.array_equal(seen[0][0], seen[0][1])  # nothing was sampled before
    for before, after in zip(seen, seen[1:], strict=False):
        tokens, now, _ = after
        assert np.array_equal(tokens, before[2])
        assert not np.array_equal(tokens, now)


def test_the_log_says_how_old_rollouts_are(stale):
    lines = (stale[0] / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert [row["sampling/staleness"] for row in rows] == [0, 1, 1, 1]
    # Nothing was learned between the first rollout and its update.
    assert rows[0]["sampling/importance_max"] == pytest.approx(1, abs=1e-4)
    assert rows[0]["sampling/truncated"] == 0
    assert rows[1]["sampling/importance_max"] > 1.01


@pytest.mark.parametrize("kind", ["policy", "group_policy"])
def test_what_old_tokens_count_is_what_numpy_says(kind):
    training, rollout = meshes()
    cap = 1.05
    more = dict(epochs=1, minibatches=1)
    if kind == "group_policy":
        more |= dict(kl_coef=0.0, aggregation="dapo")
    with jax.set_mesh(training):
        made, raw, config = cases.stage(
            kind,
            training,
            rollout_mesh=rollout,
            staleness=1,
            importance_cap=cap,
            optimizer=cases.OPTIMIZER | dict(lr=0.5),
            **more,
        )
        state = made.init(jax.random.key(0))
        begun = made.ahead(state, raw, jax.random.key(2))
        batch = made.prepare(state, raw, jax.random.key(1))
        state, _ = made.update(state, batch)
        batch = made.prepare(state, raw, jax.random.key(2), begun)
        arrays = cases.host(batch["rollout"])
        policy = state.model["policy"] if kind == "policy" else state.model
        temperature, new = config.sampling.temperature, arrays["tokens"].shape[1]
        old = cases.token_logps(policy, arrays, temperature)[:, -new:]
        behaviour = cases.models(training)["policy"]
        behaviour = cases.token_logps(behaviour, arrays, temperature)[:, -new:]
        _, metrics = made.update(state, batch)
    mask = arrays["mask"]
    ratio = np.exp(old - behaviour)
    assert 0.05 < (ratio[mask] > cap).mean() < 0.95
    weights = np.minimum(ratio, cap)
    np.testing.assert_allclose(arrays["importance"][mask], weights[mask], rtol=1e-4)
    assert (arrays["importance"][~mask] == 1).all()
    assert metrics["sampling/staleness"] == 1
    for name, value in {
        "importance_mean": ratio[mask].mean(),
        "importance_max": ratio[mask].max(),
        "truncated": (ratio[mask] > cap).mean(),
    }.items():
        assert metrics[f"sampling/{name}"] == pytest.approx(value, rel=1e-3), name
    # Nothing has moved since `prepare`: the policy loss of a token is -A.
    loss = -(weights * arrays["advantages"])[mask].mean()
    name = "loss/policy_avg" if kind == "policy" else "policy_loss"
    assert metrics[name] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("kind", ["policy", "group_policy"])
def test_programs_of_two_meshes_are_those_that_run(kind):
    training, rollout = meshes(1, 2)
    with jax.set_mesh(training):
        made, raw, _ = cases.stage(kind, training, rollout_mesh=rollout, staleness=1)
        programs = made.programs(raw)
        sample = programs["sample"]
        assert "func.func public @main" in sample.lower().as_text()
        for leaf in jax.tree.leaves(sample.arguments[:2]):
            assert leaf.sharding.device_set == set(rollout.devices.flat)
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, jax.random.key(1))
        _, expected, _ = programs["update"].arguments
    assert jax.tree.structure(batch) == jax.tree.structure(expected)
    for x, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (shape.shape, shape.dtype)
        assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)
