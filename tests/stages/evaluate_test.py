"""Held-out loss of several terms: one number, exact over batches of any size."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import masked, sharding, train
from stagecraft.data.dataset import Dataset
from stagecraft.stages.stage import State
from tests.stages import cases


def test_the_whole_loss_is_the_weighted_sum_of_its_means():
    shared = cases.single()
    with jax.set_mesh(shared):
        changes = dict(objective="sigmoid,sft", objective_weights=(1.0, 0.5))
        made, raw, _ = cases.stage("preference", shared, **changes)
        state = made.init(jax.random.key(0))
        halves = [{k: v[i::2] for k, v in raw.items()} for i in range(2)]
        found = [made.evaluate(state, h, None) for h in halves]
        merged = masked.compute(masked.merge(*found))
        whole = masked.compute(made.evaluate(state, raw, None))
        _, metrics = made.update(state, made.prepare(state, raw, None))
    parts = float(merged["loss/rows"] + merged["loss/chosen"])
    assert float(merged["loss"]) == pytest.approx(parts, rel=1e-6)
    for name in ("loss", "loss/rows", "loss/chosen"):
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-5)
    assert float(merged["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_each_held_out_batch_has_a_key_of_its_own_at_every_evaluation():
    """Two evaluations differ in the model alone, two batches in their noise."""
    keys = []

    def evaluate(state, raw, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return {"rows": masked.Mean.of(jnp.asarray(raw["index"] >= 0, jnp.float32))}

    stage = types.SimpleNamespace(evaluate=evaluate)
    heldout = Dataset([({"index": np.arange(6, dtype=np.int32)}, 2)], seed=0)
    for step in (3, 5):
        state = State(jnp.asarray(step), None, None, {})
        assert train.evaluate(stage, state, heldout, 2) == {"eval_rows": 1.0}
    assert len({*keys[:3]}) == 3 and keys[:3] == keys[3:]


class Verifiers:
    """Scores a completion by its first token; cannot score an odd record."""

    names = ("first",)

    def __init__(self):
        self.records = []

    def __call__(self, index, tokens, mask, ended, step):
        self.records += index.tolist()
        rewards = tokens[:, :1].astype(np.float64)
        return np.where(np.asarray(index)[:, None] % 2, np.nan, rewards)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(
    ("kind", "score"),
    [
        ("policy", "objective/scores"),
        ("group_policy", "reward"),
        ("online_preference", "objective/scores"),
    ],
)
def test_held_out_prompts_are_sampled_and_scored(kind, score, sizes):
    """The figures are those of the samples that were drawn, over real rows alone."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    scorer, changes = Verifiers(), dict(missing_eos_penalty=0.0)
    if kind == "group_policy":
        changes |= dict(overlong_cache=0)
    with jax.set_mesh(mesh), cases.watched() as seen:
        made, raw, config = cases.stage(
            kind, mesh, without=("reward", "value"), verifiers=scorer, **changes
        )
        state = made.init(jax.random.key(0))
        index = np.arange(16, dtype=np.int32)
        index[12:] = -1  # fills the last batch up
        raw = raw | {"index": index}
        raw["prompt_mask"][12:] = False
        metrics = made.evaluate(state, raw, jax.random.key(3))
        metrics = cases.told(masked.compute(metrics))
        again = made.evaluate(state, raw, jax.random.key(3))
        assert cases.told(masked.compute(again)) == metrics
    samples = len(seen["rewards"]) // 16
    real = np.repeat(index >= 0, samples)
    scored = real & np.isfinite(seen["rewards"]).all(1)
    assert scored.sum() == 6 * samples and min(scorer.records) == 0
    expected = seen["rewards"][scored].mean()
    assert metrics[score] == pytest.approx(expected, rel=1e-5)
    assert metrics["rewards/first/mean"] == pytest.approx(expected, rel=1e-5)
    assert metrics["rewards/unscored"] == pytest.approx(0.5)
    lengths = seen["drawn"]["mask"].sum(1)[real]
    assert metrics["completions/mean_length"] == pytest.approx(lengths.mean(), rel=1e-6)
    assert metrics["completions/max_length"] == lengths.max()
    ended = seen["drawn"]["ended"][real]
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 - ended.mean())
