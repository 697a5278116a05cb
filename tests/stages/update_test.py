"""Every stage's update: the same on any mesh, under any split, and after a restart.

What `every_objective_test` does on the mesh (2, 2, 2) is not done here again.
"""

import jax
import numpy as np
import pytest

from stagecraft import checkpoint, sharding, tree
from stagecraft.stages.stage import State
from tests.stages import cases


def once(kind, mesh, beside=None, **changes):
    """Loss and the change of every parameter, after one step of plain SGD."""
    with jax.set_mesh(mesh):
        made, raw, _ = cases.stage(kind, mesh, **changes)
        raw |= beside or {}
        state = made.init(jax.random.key(0))
        before = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
        batch = made.prepare(state, raw, jax.random.key(1))
        state, metrics = made.update(state, batch)
        after = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
    change = {k: after[k] - before[k] for k in before}
    return float(metrics["loss"]), change, metrics


def assert_same(one, other, tolerance=1e-5):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for name in one[1]:
        scale = np.abs(one[1][name]).max()
        difference = np.abs(one[1][name] - other[1][name]).max()
        # The change itself is lr x gradient, read off float32 weights of order one.
        assert difference <= tolerance * scale + 2e-7, name


@pytest.fixture(scope="module")
def alone():
    """One device's answer, once for all meshes."""
    return {kind: once(kind, cases.single()) for kind in cases.KINDS}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        # data, fsdp, tensor, context, expert
        ("language_model", (1, 2, 2, 2, 1)),
        ("reward", (1, 8, 1)),
        ("preference", (1, 1, 2, 2, 2)),
        ("unpaired_preference", (1, 1, 1, 4, 2)),
        ("online_preference", (2, 2, 2)),
        # 16 rows in 2 minibatches on 8 shards: one row a device. (2, 2, 2): see below.
        *(("policy", sizes) for sizes in ((8, 1, 1), (1, 2, 1, 2, 2))),
        ("group_policy", (1, 8, 1)),
    ],
)
def test_sharded_equals_single(kind, sizes, alone):
    assert_same(alone[kind], once(kind, sharding.make_mesh(*sizes)))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_four_micro_batches_equal_one(kind, alone):
    assert_same(alone[kind], once(kind, cases.single(), micro_batches=4))


def test_pretraining_rows_and_two_optimizers_on_a_mesh():
    """Text of its own rows beside the rollout's, in micro-batches, against one go."""
    text = {f"ptx_{k}": v for k, v in cases.documents().items()}
    changes = dict(
        score_placement="B",
        bootstrap_truncated=True,
        value_optimizer=cases.OPTIMIZER | dict(lr=0.05),
    )
    one = once("policy", cases.single(), text, **changes)
    other = once(
        "policy", sharding.make_mesh(2, 2, 2), text, micro_batches=2, **changes
    )
    assert_same(one, other)
    assert float(one[2]["loss/ptx_avg"]) == pytest.approx(
        float(other[2]["loss/ptx_avg"]), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["language_model", "preference"])
def test_rows_split_over_micro_batches_at_random_equal_the_whole(kind, alone):
    """Rows of very different lengths: a mean of means would come out otherwise."""
    raw = cases.BATCH[kind]()
    order = np.random.default_rng(3).permutation(16)
    raw = {k: v[order] for k, v in raw.items()}
    shared = cases.single()
    with jax.set_mesh(shared):
        made, _, _ = cases.stage(kind, shared, micro_batches=8)
        state = made.init(jax.random.key(0))
        before = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
        batch = made.prepare(state, raw, None)
        if "ref_logps" in batch:
            assert len(batch["ref_logps"]) == 16
        state, metrics = made.update(state, batch)
        change = {
            k: np.asarray(v) - before[k] for k, v in tree.named(state.model).items()
        }
    assert_same(alone[kind], (float(metrics["loss"]), change))


def test_micro_batches_on_a_mesh(alone):
    found = once("language_model", sharding.make_mesh(2, 2, 2), micro_batches=4)
    assert_same(alone["language_model"], found)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_optimizer_state_is_sharded(kind):
    shared = sharding.make_mesh(1, 4, 2)
    with jax.set_mesh(shared):
        made, _, _ = cases.stage(kind, shared, optimizer=dict(warmup_steps=0))
        state = made.init(jax.random.key(0))
    names = [n for n in tree.named(state.opt_state) if n.endswith("ff/up")]
    assert len(names) >= 2  # both moments
    for name in names:
        leaf = tree.named(state.opt_state)[name]
        assert leaf.sharding.spec == jax.P(None, "fsdp", "tensor")
        assert leaf.addressable_shards[0].data.size == leaf.size // 8


@pytest.mark.parametrize("kind", ["reward", "unpaired_preference", "policy"])
def test_a_restored_state_goes_on_bit_for_bit(kind, tmp_path):
    shared = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(shared):
        made, raw, _ = cases.stage(kind, shared, optimizer=dict(warmup_steps=0))
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, jax.random.key(1))
        state, _ = made.update(state, batch)
        saver = checkpoint.Checkpoints(tmp_path)
        saver.save(1, state.model, [state.opt_state, state.extra, state.step], {"x": 1})
        saver.wait()
        fresh = made.init(jax.random.key(9))
        model, rest, data = saver.restore(
            1, fresh.model, [fresh.opt_state, fresh.extra, fresh.step]
        )
        restored = State(rest[2], model, rest[0], rest[1])
        assert data == {"x": 1}
        assert tree.digest(restored) == tree.digest(state)
        for leaf, other in zip(
            jax.tree.leaves(restored), jax.tree.leaves(state), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
        batch = made.prepare(state, raw, jax.random.key(2))
        again = made.prepare(restored, raw, jax.random.key(2))
        _, metrics = made.update(state, batch)
        _, others = made.update(restored, again)
        assert float(metrics["loss"]) == float(others["loss"])
        saver.close()


def test_an_empty_mask_gives_zero_not_nan():
    with jax.set_mesh(cases.single()):
        made, raw, _ = cases.stage("language_model", cases.single())
        raw["mask"][:] = False
        state = made.init(jax.random.key(0))
        _, metrics = made.update(state, made.prepare(state, raw, None))
    assert float(metrics["loss"]) == 0.0
    assert float(metrics["grad_norm"]) == 0.0
