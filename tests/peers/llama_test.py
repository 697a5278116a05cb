"""The same weights in transformers' Llama and Qwen 3 give the same logits."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from tests.peers import bridge

pytestmark = pytest.mark.peers

BASE = dataclasses.replace(bridge.CONFIG, vocab_size=96, layers=3)
CASES = {
    "llama": {},
    "llama, untied, as many key heads": {"tied": False, "kv_heads": 4},
    "llama, one key head, wide heads": {"kv_heads": 1, "head_dim": 16},
    "qwen3": {"qk_norm": True},
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request, parity_seed):
    config = dataclasses.replace(BASE, **request.param)
    peer = bridge.make_peer(config, parity_seed)
    model = bridge.convert(peer, config)
    return jax.jit(lambda *args: model.logits(*args)), peer


def theirs(peer, ids, **kwargs):
    with torch.no_grad():
        tensors = {k: torch.as_tensor(v) for k, v in kwargs.items()}
        return peer(input_ids=torch.as_tensor(ids), **tensors).logits.numpy()


def tokens(rng, *shape):
    return rng.integers(0, BASE.vocab_size, shape)


def test_plain(pair, parity_rng):
    ours, peer = pair
    ids = tokens(parity_rng, 3, 17)
    positions = np.tile(np.arange(17), (3, 1))
    expected = theirs(peer, ids)
    assert np.abs(expected).max() > 1  # logits of a size at which 1e-4 means something
    got = ours(ids, positions, np.ones_like(ids))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_left_padded(pair, parity_rng):
    ours, peer = pair
    ids = tokens(parity_rng, 4, 15)
    mask = (np.arange(15) >= np.array([0, 4, 9, 14])[:, None]).astype(np.int64)
    positions = np.cumsum(mask, axis=1) - mask
    expected = theirs(peer, ids, attention_mask=mask, position_ids=positions)
    got = np.asarray(ours(ids, positions, mask))
    assert np.isfinite(got).all()
    real = mask.astype(bool)
    np.testing.assert_allclose(got[real], expected[real], atol=1e-4)


def test_padding_on_either_side_changes_nothing(pair, parity_rng):
    """The same rows alone, behind four pads and before four: one set of logits."""
    ours, peer = pair
    ids = tokens(parity_rng, 3, 12)
    plain = theirs(peer, ids)
    one = np.ones_like(ids)
    np.testing.assert_allclose(ours(ids, one.cumsum(1) - 1, one), plain, atol=1e-4)
    for name, sides, columns in [
        ("left", ((0, 0), (4, 0)), np.s_[:, 4:]),
        ("right", ((0, 0), (0, 4)), np.s_[:, :12]),
    ]:
        wide, mask = np.pad(ids, sides, constant_values=bridge.PAD), np.pad(one, sides)
        positions = np.cumsum(mask, axis=1) - mask
        padded = theirs(peer, wide, attention_mask=mask, position_ids=positions)
        np.testing.assert_allclose(padded[columns], plain, atol=1e-4, err_msg=name)
        got = np.asarray(ours(wide, positions, mask))
        np.testing.assert_allclose(got[columns], plain, atol=1e-4, err_msg=name)


def test_packed_documents_equal_separate_ones(pair, parity_rng):
    ours, peer = pair
    documents = [tokens(parity_rng, 1, n) for n in (5, 9, 1, 7)]
    ids = np.concatenate(documents, axis=1)
    segments = np.concatenate(
        [np.full_like(d, i + 1) for i, d in enumerate(documents)], axis=1
    )
    positions = np.concatenate([np.arange(d.shape[1]) for d in documents])[None]
    got = ours(ids, positions, segments)
    expected = np.concatenate([theirs(peer, d) for d in documents], axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-4)
