"""The weights' figures against numpy by hand, on small trees with known updates."""

import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft.anatomy import weights
from stagecraft.errors import UserError


@pytest.fixture
def trees():
    rng = np.random.default_rng(0)
    before = {
        "embed": rng.normal(size=(10, 4)),
        "layers": {
            "attention": {
                "query": rng.normal(size=(3, 4, 2, 2)),  # [L, D, H, C]
                "out": rng.normal(size=(3, 2, 2, 4)),
                "query_norm": {"scale": np.ones((3, 2))},
            },
            "ff": {"down": rng.normal(size=(3, 6, 4))},
        },
        "norm": {"scale": np.ones(4)},
    }
    before = _map(np.float32, before)
    rng = np.random.default_rng(1)
    after = _map(lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype("f4"), before)
    after["norm"]["scale"] = before["norm"]["scale"]
    return before, after


def _map(function, tree):
    if isinstance(tree, dict):
        return {key: _map(function, value) for key, value in tree.items()}
    return function(tree)


def _flat(*leaves):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    return [tree]


def test_relative_change_is_the_ratio_of_frobenius_norms(trees):
    before, after = trees
    found = weights.compare(before, after)
    a, b = _flat(*_leaves(before)), _flat(*_leaves(after))
    expected = np.linalg.norm(b - a) / np.linalg.norm(a)
    assert found["relative_change"] == pytest.approx(expected, rel=1e-6)
    assert found["unchanged_fp32"] == pytest.approx(4 / a.size)  # the last norm


def test_dense_and_sparse_layers_are_told_apart():
    """Each expert is a matrix of its own; biases are none."""
    rng = np.random.default_rng(0)
    before = {
        "layers": {
            "dense": {"ff": {"up": np.ones((2, 4, 6)), "up_bias": np.ones((2, 6))}},
            "sparse": {"experts": {"down": np.ones((1, 3, 6, 4))}},
        }
    }
    before = _map(np.float32, before)
    after = _map(lambda x: (x + rng.normal(size=x.shape)).astype("f4"), before)
    found = weights.compare(before, after)
    assert {k: len(v) for k, v in found["by_layer"].items()} == {
        **{"dense up": 2, "dense up_bias": 2, "sparse expert_down": 1}
    }
    assert found["by_kind"]["expert_down"]["full_rank"] == 4
    assert "full_rank" not in found["by_kind"]["up_bias"]


def test_by_kind_pools_leaves_of_one_kind(trees):
    before, after = trees
    found = weights.compare(before, after)["by_kind"]
    assert set(found) == {"embed", "query", "output", "norm", "down"}
    q, q2 = (t["layers"]["attention"]["query"] for t in trees)
    assert found["query"]["relative_change"] == pytest.approx(
        np.linalg.norm(_flat(q2 - q)) / np.linalg.norm(_flat(q)), rel=1e-6
    )
    norms = [
        _flat(t["layers"]["attention"]["query_norm"]["scale"], t["norm"]["scale"])
        for t in trees
    ]
    assert found["norm"]["relative_change"] == pytest.approx(
        np.linalg.norm(norms[1] - norms[0]) / np.linalg.norm(norms[0]), rel=1e-6
    )
    assert "effective_rank" not in found["norm"]


def test_by_layer_splits_stacked_leaves_and_only_those(trees):
    before, after = trees
    found = weights.compare(before, after)["by_layer"]
    assert set(found) == {"query", "output", "norm", "down"}
    for layer in range(3):
        a, b = (t["layers"]["ff"]["down"][layer] for t in trees)
        assert found["down"][layer] == pytest.approx(
            np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-6
        )


def test_an_update_to_one_layer_shows_in_that_layer_alone():
    before = {"layers": {"up": np.ones((4, 3, 5), np.float32)}}
    after = {"layers": {"up": before["layers"]["up"].copy()}}
    after["layers"]["up"][2] += 0.5
    found = weights.compare(before, after)
    assert found["by_layer"]["up"] == pytest.approx([0, 0, 0.5, 0])
    assert found["relative_change"] == pytest.approx(0.25)
    assert found["unchanged_fp32"] == 0.75


def test_unchanged_after_a_bfloat16_cast_counts_rounding():
    before = {"up": np.ones((2, 4), np.float32)}
    step = np.array([[0, 2**-10, 2**-9, 2**-6], [5e-6, 2**-7, -(2**-11), 1]], "f4")
    found = weights.compare(before, {"up": before["up"] + step})
    # Above 1 a bfloat16 steps by 2^-7: half a step still rounds away, below 1 too.
    assert found["unchanged_bf16"] == 5 / 8
    assert found["unchanged_fp32"] == 1 / 8
    assert found["unchanged_1e5"] == 2 / 8


def test_the_body_of_a_scalar_model_is_compared_and_its_head_is_not(trees):
    before, after = trees
    wrapped = {"body": after, "head": np.ones(4, np.float32), "bias": np.zeros(())}
    assert weights.compare(before, wrapped) == weights.compare(before, after)
    both = weights.compare({"body": before, "head": np.ones(4)}, wrapped)
    assert both["by_kind"]["head"]["relative_change"] == 0


def test_jax_arrays_and_half_precision_are_read_as_float32(trees):
    before, after = trees
    before = _map(lambda x: jnp.asarray(x, jnp.bfloat16), before)
    found = weights.compare(before, _map(jnp.asarray, after))
    assert 0.05 < found["relative_change"] < 0.15


def test_spectrum_of_known_matrices():
    rng = np.random.default_rng(2)
    u = np.linalg.qr(rng.normal(size=(40, 6)))[0]
    v = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    flat = weights.spectrum(u @ v)  # six equal singular values
    assert flat["effective_rank"] == pytest.approx(6, rel=1e-6)
    assert flat["stable_rank"] == pytest.approx(6, rel=1e-6)
    assert flat["full_rank"] == 6
    one = weights.spectrum(np.outer(np.arange(1, 5), np.arange(1, 9)))
    assert one["effective_rank"] == pytest.approx(1, abs=1e-6)
    sigma = np.array([3.0, 2.0, 1.0])
    p = sigma**2 / np.sum(sigma**2)
    mixed = weights.spectrum(u[:, :3] * sigma)
    assert mixed["effective_rank"] == pytest.approx(np.exp(-np.sum(p * np.log(p))))
    assert mixed["stable_rank"] == pytest.approx(14 / 9)
    assert weights.spectrum(np.zeros((3, 2)))["effective_rank"] == 0


def test_ranks_fold_heads_into_their_own_side():
    # Rank one as [D, H*C] and as [H*C, D], but not when folded the other way.
    rng = np.random.default_rng(3)
    wide = np.outer(rng.normal(size=8), rng.normal(size=6)).astype("f4")
    update = {
        "layers": {
            "query": wide.reshape(1, 8, 2, 3),
            "out": np.ascontiguousarray(wide.T).reshape(1, 2, 3, 8),
        }
    }
    zero = _map(lambda x: 0 * x, update)
    found = weights.compare(zero, update)["by_kind"]
    for name in ("query", "output"):
        assert found[name]["effective_rank"] == pytest.approx(1, abs=1e-5)
        assert found[name]["full_rank"] == 6
        assert found[name]["relative_change"] == 0  # from nothing: no relative size


def test_trees_of_different_models_are_refused():
    with pytest.raises(UserError, match="share no parameter"):
        weights.compare({"a": np.ones(2)}, {"b": np.ones(2)})
    with pytest.raises(UserError, match=r"embed is \[2, 3\] in one tree and \[4, 3\]"):
        weights.compare({"embed": np.ones((2, 3))}, {"embed": np.ones((4, 3))})
