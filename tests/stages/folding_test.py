"""Rows in pairs: every token is where it says, and none is lost."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import sharding
from stagecraft.stages import folding, rollout
from tests.stages import cases


def rows(count=8, length=12, seed=0):
    """Rows with padding on both sides."""
    rng = np.random.default_rng(seed)
    begins = rng.integers(0, 4, count)
    ends = rng.integers(5, length + 1, count)
    column = np.arange(length)
    real = (column >= begins[:, None]) & (column < ends[:, None])
    ids = np.where(real, rng.integers(8, 64, (count, length)), 0)
    positions = np.where(real, column - begins[:, None], 0)
    return dict(
        ids=ids.astype(np.int32),
        segments=real.astype(np.int32),
        positions=positions.astype(np.int32),
    )


def widest(batch, blocks=1):
    every = np.arange(len(batch["ids"]))[None]
    return int(folding.widest(jnp.asarray(batch["segments"]), every, 1, blocks))


def folded(batch, width):
    return batch | {"fold": folding.empty(len(batch["ids"]), width)}


def test_each_row_is_whole_in_one_pair():
    batch = rows()
    width = widest(batch)
    fold = folding.fold(folded(batch, width))
    assert fold.ids.shape == (4, width)
    lengths = batch["segments"].sum(1)
    texts = [
        tuple(r[s > 0]) for r, s in zip(batch["ids"], batch["segments"], strict=True)
    ]
    seen = []
    for ids, segments, positions in zip(
        fold.ids, fold.segments, fold.positions, strict=True
    ):
        for part in (1, 2):
            inside = np.asarray(segments) == part
            seen.append(tuple(np.asarray(ids)[inside]))
            assert (np.asarray(positions)[inside] == np.arange(inside.sum())).all()
        assert (np.asarray(ids)[np.asarray(segments) == 0] == 0).all()
    assert sorted(seen) == sorted(texts)
    # The longest is with the shortest, so the widest pair is no wider than it must be.
    ranked = np.sort(lengths)
    assert width == max(ranked + ranked[::-1])


def test_values_come_back_to_their_columns():
    batch = rows()
    length = batch["ids"].shape[1]
    fold = folding.fold(folded(batch, widest(batch) + 3))
    every = np.broadcast_to(np.arange(length, dtype=np.int32), batch["ids"].shape)
    real = batch["segments"] > 0
    for name in ("ids", "positions"):
        values = fold.at(getattr(fold, name), jnp.asarray(every))
        np.testing.assert_array_equal(
            np.where(real, values, 0), np.where(real, batch[name], 0)
        )
    wide = fold.at(jnp.stack([fold.ids, -fold.ids], -1), jnp.asarray(every))
    assert wide.shape == (*batch["ids"].shape, 2)
    np.testing.assert_array_equal(np.where(real, wide[..., 1], 0), -batch["ids"])


def test_a_model_says_the_same_of_rows_in_pairs():
    batch, policy = rows(), cases.models(cases.single())["policy"]
    columns = slice(-5, -1)
    apart = rollout.outputs(policy.hidden, batch, columns)
    pairs = rollout.outputs(policy.hidden, folded(batch, widest(batch)), columns)
    real = batch["segments"][:, columns] > 0
    np.testing.assert_allclose(pairs[real], apart[real], atol=2e-5)


def test_pairs_are_of_one_device():
    batch, mesh = rows(16), sharding.make_mesh(4, 1, 2)
    width = widest(batch, 4)
    assert width >= widest(batch)
    with jax.set_mesh(mesh):
        fold = jax.jit(folding.fold)(sharding.shard_batch(folded(batch, width), mesh))
    texts = [
        tuple(r[s > 0]) for r, s in zip(batch["ids"], batch["segments"], strict=True)
    ]
    for number in range(4):
        here = slice(2 * number, 2 * number + 2)
        ids, segments = np.asarray(fold.ids)[here], np.asarray(fold.segments)[here]
        seen = [
            tuple(i[s == part])
            for i, s in zip(ids, segments, strict=True)
            for part in (1, 2)
        ]
        assert sorted(seen) == sorted(texts[4 * number : 4 * number + 4])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_widest_pair_is_of_all_batches(micro_batches, seed):
    batch = rows(16, seed=seed)
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(16), (3, 1)), axis=1).reshape(6, 8)
    lengths, widths = batch["segments"].sum(1), []
    for part in order:
        for micro in range(micro_batches):
            ranked = np.sort(lengths[part[micro::micro_batches]])
            widths.append(max(ranked + ranked[::-1]))
    segments = jnp.asarray(batch["segments"])
    assert folding.widest(segments, order, micro_batches, 1) == max(widths)


def test_pairs_of_every_batch_have_room():
    lengths = np.array([10, 10, 1, 1])
    segments = (np.arange(40) < lengths[:, None]).astype(np.int32)
    samples = dict(ids=segments, segments=segments)
    config = types.SimpleNamespace(minibatches=2, micro_batches=1)

    def width(order):
        fold = folding.make(config, cases.single(), lambda rows, key: jnp.array(order))
        return fold(samples, jax.random.key(0))["fold"].shape[-1]

    # All together a long one meets a short one; in batches of two, two long ones meet.
    assert width([[0, 2], [1, 3]]) == 16
    assert width([[0, 1], [2, 3]]) == 24
    config.minibatches = 4  # nothing to pair in a batch of one
    assert "fold" not in folding.make(config, cases.single(), None)(samples, None)
