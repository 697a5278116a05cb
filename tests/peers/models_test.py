"""Losses and rewards read off transformers' own models, on the same weights.

The logits themselves are compared in llama_test.py.
"""

import jax
import numpy as np
import pytest
import torch
from trl.experimental.utils import get_reward

from stagecraft import tree
from stagecraft.models.scores import scores
from stagecraft.stages import language_model
from stagecraft.stages.stage import Context
from tests.peers import bridge

pytestmark = pytest.mark.peers

C = bridge.CONFIG


def labelled(rng, count, length):
    """Rows of prompt and completion, unequal in length, as our stage takes them."""
    ids = np.full((count, length), bridge.PAD, np.int64)
    seen, trained = np.zeros((2, count, length), bool)
    for row in range(count):
        start, size = rng.integers(1, 6), rng.integers(1, length - 6)
        ids[row, : start + size] = rng.integers(3, C.vocab_size, start + size)
        seen[row, : start + size] = True
        trained[row, start : start + size] = True
    return bridge.rows(ids, seen, trained, length)


def as_labels(batch):
    """What transformers takes: ids, attention mask, and labels of -100 elsewhere."""
    ids = torch.as_tensor(batch["ids"]).long()
    return dict(
        input_ids=ids,
        attention_mask=torch.as_tensor(batch["segments"]),
        labels=ids.masked_fill(~torch.as_tensor(batch["mask"]), -100),
    )


def gradients(peer):
    """The peer's gradients under our names."""
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(parameter.grad)
    return bridge.weights(peer, C)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_next_token_loss_and_gradient(micro_batches, parity_rng, parity_seed):
    """Also in four parts of unequal length: theirs are told the whole's tokens."""
    peer = bridge.make_peer(C, parity_seed)
    start = bridge.convert(peer, C)
    batch = labelled(parity_rng, 4, 20)
    inputs = as_labels(batch)
    targets = (inputs["labels"][:, 1:] != -100).sum()
    expected = 0.0
    for part in range(micro_batches):
        rows = slice(part * 4 // micro_batches, (part + 1) * 4 // micro_batches)
        part = {k: v[rows] for k, v in inputs.items()}
        loss = peer(**part, num_items_in_batch=targets).loss
        loss.backward()
        expected += loss.item()
    if micro_batches == 1:  # which is the plain mean
        assert peer(**inputs).loss.item() == pytest.approx(expected, abs=1e-6)

    config = bridge.config(
        "language_model",
        dict(bridge.SGD, lr=1.0),
        batch_size=4,
        micro_batches=micro_batches,
    )
    before = {k: np.asarray(v) for k, v in tree.named(start).items()}
    losses, _, after = bridge.train(
        lambda mesh: language_model.make(config, Context(mesh, C, {"start": start})),
        [batch],
    )
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    for name, gradient in gradients(peer).items():
        step = before[name] - after[name]
        np.testing.assert_allclose(step, gradient, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def scalar(parity_seed):
    """transformers' reward model and ours, with one set of weights."""
    peer = bridge.make_peer(C, parity_seed, scalar=True)
    return peer, bridge.convert(peer, C)


def our_scores(model, batch):
    keys = ("ids", "mask", "segments", "positions")
    return np.asarray(jax.jit(scores)(model, *(batch[k] for k in keys)))


def ended(rng, count, length):
    """Right-padded rows that end in END, every token but padding trained."""
    ids = np.full((count, length), bridge.PAD, np.int64)
    for row, size in enumerate(rng.integers(2, length, count)):
        ids[row, :size] = rng.integers(bridge.FIRST_WORD, C.vocab_size, size)
        ids[row, size - 1] = bridge.END
    return bridge.rows(ids, ids != bridge.PAD, ids != bridge.PAD, length)


def test_the_reward_is_read_at_the_last_real_token(scalar, parity_rng):
    peer, model = scalar
    batch = ended(parity_rng, 5, 12)
    inputs = as_labels(batch)
    with torch.no_grad():
        expected = peer(inputs["input_ids"], inputs["attention_mask"]).logits[:, 0]
    assert expected.std() > 0.1
    np.testing.assert_allclose(our_scores(model, batch), expected, atol=1e-5)


def test_a_padding_token_that_is_also_the_end_misleads_the_peer_and_not_us(
    scalar, parity_rng
):
    """With pad and end the same, theirs reads one token early; our masks do not."""
    peer, model = scalar
    batch = ended(parity_rng, 5, 12)
    padding = batch["segments"] == 0
    right = our_scores(model, batch)
    batch["ids"] = np.where(padding, bridge.END, batch["ids"])
    inputs = as_labels(batch)
    peer.config.pad_token_id = bridge.END
    try:
        with torch.no_grad():
            theirs = peer(inputs["input_ids"], inputs["attention_mask"]).logits[:, 0]
    finally:
        peer.config.pad_token_id = bridge.PAD
    np.testing.assert_allclose(our_scores(model, batch), right, atol=1e-5)
    assert np.abs(theirs.numpy() - right).max() > 0.05
    early = batch | {"mask": batch["mask"] & (batch["ids"] != bridge.END)}
    np.testing.assert_allclose(our_scores(model, early), theirs, atol=1e-5)


def test_the_reward_of_a_response_to_a_left_padded_query(scalar, parity_rng):
    """TRL's get_reward looks for padding after the context only: so do masks."""
    peer, model = scalar
    context, new, count = 7, 9, 6
    ids = np.full((count, context + new), bridge.PAD, np.int64)
    responses = np.zeros((count, context + new), bool)
    sizes = [*parity_rng.integers(1, new, count - 1), new]  # one fills the window
    for row, size in enumerate(sizes):
        start = int(parity_rng.integers(0, context))
        ids[row, start : context + size] = parity_rng.integers(
            bridge.FIRST_WORD, C.vocab_size, context + size - start
        )
        responses[row, context : context + size] = True
    with torch.no_grad():
        _, expected, lengths = get_reward(
            peer, torch.as_tensor(ids), bridge.PAD, context
        )
        _, astray, _ = get_reward(peer, torch.as_tensor(ids), bridge.PAD, 0)
    assert lengths.tolist() == [context + size - 1 for size in sizes]
    assert (astray - expected).abs().max() > 0.05  # why the context's length matters
    seen = ids != bridge.PAD
    batch = dict(
        ids=ids.astype(np.int32),
        mask=responses,
        segments=seen.astype(np.int32),
        positions=((seen.cumsum(1) - 1) * seen).astype(np.int32),
    )
    np.testing.assert_allclose(our_scores(model, batch), expected, atol=1e-5)
