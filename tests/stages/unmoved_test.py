"""A policy that has not moved: ratio 1, no preference, exactly, also in bfloat16."""

import functools
import math

import jax
import numpy as np
import pytest

from stagecraft import sharding
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.stages import rollout
from stagecraft.stages.kinds import KINDS
from stagecraft.stages.stage import Context
from tests import tiny
from tests.stages import cases

pytestmark = pytest.mark.accelerator

DTYPES = ("float32", "bfloat16")


@functools.cache
def models(dtype):
    """A policy and a reward model that compute in this precision."""
    config = tiny.config(dtype=dtype, layers=2)

    def make(key):
        keys = jax.random.split(key)
        policy = Transformer(config, keys[0])
        return policy, ScalarModel(Transformer(config, keys[1]), keys[1])

    return sharding.init_sharded(make, cases.single())(jax.random.key(3))


def updates(kind, dtype, steps=1, **changes):
    """The metrics of the first updates of a stage whose reference is its start."""
    mesh, config = cases.single(), cases.config(kind, **changes)
    with jax.set_mesh(mesh):
        policy, reward = models(dtype)
        parents = dict(start=policy, reference=policy, reward=reward, value=reward)
        parents["judge"] = policy
        parents = {name: parents[name] for name in KINDS[kind].roles}
        context = Context(mesh, policy.config, parents, stop_ids=(cases.STOP,))
        made, raw = KINDS[kind].make(config, context), cases.BATCH[kind]()
        state, metrics = made.init(jax.random.key(0)), []
        for step in range(steps):
            batch = made.prepare(state, raw, jax.random.key(step))
            state, told = made.update(state, batch)
            metrics.append(cases.told(told))
    return metrics


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [("float32", {}), ("bfloat16", {}), ("bfloat16", dict(micro_batches=2))],
    ids=str,
)
def test_the_first_ratio_of_every_rollout_is_1(dtype, changes):
    for told in updates("policy", dtype, steps=2, **changes):
        assert told["val/ratio_first"] == told["policy/ratio_max_first"] == 1
        assert told["policy/clipfrac_avg_first"] == 0
        # What was set equal was so but for rounding.
        rounding = 1e-5 if dtype == "float32" else 0.05
        assert told["val/old_logp_gap_first"] < rounding
        assert told["policy/ratio_max"] > 1.01  # later minibatches have moved


def test_the_second_minibatch_has_moved():
    (told,) = updates("policy", "float32", epochs=1, minibatches=2)
    assert told["val/ratio_first"] == 1 and told["policy/ratio_max"] > 1.001


@pytest.mark.parametrize("unmoved", [True, False])
def test_the_old_policy_is_the_policy_in_the_first_step_alone(unmoved):
    logps, old = np.float32([[-1.5, -2.0]]), np.float32([[-1.25, -2.5]])
    batch = dict(old_logps=old, mask=np.array([[True, False]]), unmoved=unmoved)
    expected = logps if unmoved else [[-1.25, 0.0]]
    np.testing.assert_array_equal(rollout.old_logps(batch, logps), expected)
    slope = jax.grad(lambda x: rollout.old_logps(batch, x).sum())(logps)
    np.testing.assert_array_equal(slope, [[0.0, 0.0]])


LOG2 = np.float32(math.log(2.0))
FIRST = {
    ("preference", "dpo"): LOG2,
    ("preference", "ipo_sum"): 25.0,  # (0 - 1 / (2 beta))^2
    ("online_preference", "dpo"): LOG2,
    ("unpaired_preference", "kto"): 0.5,
    ("unpaired_preference", "bco"): LOG2,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "objective"), FIRST)
def test_the_first_step_prefers_nothing(kind, objective, dtype):
    first, second = updates(kind, dtype, 2, objective=objective)
    expected = FIRST[kind, objective]
    assert first["loss"] == pytest.approx(expected, rel=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == 0
    assert first.get("rewards/accuracies", 0) == 0  # a tie is not right
    assert first.get("kl", 0) == first.get("delta", 0) == 0
    assert second["loss"] != first["loss"] and second["rewards/margins"] != 0


@pytest.mark.parametrize(("kind", "objective"), FIRST)
def test_adapters_begin_as_their_base_too(kind, objective):
    """Base and adapter are two programs in everything that is computed before."""
    changes = dict(objective=objective, lora=dict(rank=2), micro_batches=2)
    (told,) = updates(kind, "bfloat16", **changes)
    assert told["loss"] == pytest.approx(FIRST[kind, objective], rel=1e-6)
    assert told["rewards/margins"] == told.get("rewards/accuracies", 0) == 0
    assert told.get("kl", 0) == told.get("delta", 0) == 0
