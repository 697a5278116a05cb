"""Packed rows are TRL's own, row for row, and their loss is that of each document."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses
from stagecraft.data import packing
from stagecraft.models import heads
from tests.data.packed import pack
from tests.peers import bridge
from tests.peers.bridge import datasets, torch

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.peers


def theirs(documents, length, strategy):
    """TRL's rows: lists of ids, of masks and of document lengths (none if wrapped)."""
    made = datasets.Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in documents],
            "completion_mask": [[int(m) for m in mask] for _, mask in documents],
        }
    )
    # Of itself it packs a thousand documents at a time.
    packed = trl.pack_dataset(
        made, length, strategy, map_kwargs={"batch_size": len(documents)}
    )[:]
    return packed["input_ids"], packed["completion_mask"], packed.get("seq_lengths")


def ours(documents, length, strategy):
    """The same three lists of ours."""
    arrays = pack(documents, length, strategy=strategy)
    real = arrays["segments"] > 0
    ids, mask, segments = (
        [arrays[k][i, real[i]] for i in range(len(real))]
        for k in ("ids", "mask", "segments")
    )
    sizes = [np.bincount(row)[1:].tolist() for row in segments]
    return (
        [row.tolist() for row in ids],
        [row.astype(int).tolist() for row in mask],
        sizes,
    )


def drawn(rng, count, longest):
    sizes = rng.integers(0, longest + 1, count)  # some are empty
    documents = [rng.integers(3, 1000, n).tolist() for n in sizes]
    return [(ids, (rng.random(len(ids)) < 0.5).tolist()) for ids in documents]


def assert_same(documents, length, strategy):
    ids, mask, sizes = theirs(documents, length, strategy)
    got_ids, got_mask, got_sizes = ours(documents, length, strategy)
    assert got_ids == ids
    assert got_mask == mask
    if strategy != "wrapped":  # which forgets where documents begin
        assert got_sizes == sizes


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_the_documented_example(strategy):
    documents = [
        (list(range(a, b)), [True] * (b - a))
        for a, b in [(1, 6), (6, 8), (8, 11), (11, 12)]
    ]
    want = {
        "bfd": [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]],
        "bfd_split": [[1, 2, 3, 4], [8, 9, 10, 5], [6, 7, 11]],
        "wrapped": [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]],
    }[strategy]
    assert theirs(documents, 4, strategy)[0] == ours(documents, 4, strategy)[0] == want
    assert_same(documents, 4, strategy)


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_random_documents(strategy, parity_rng):
    for _ in range(12):
        length = int(parity_rng.integers(1, 40))
        count = int(parity_rng.integers(2, 200))
        longest = int(parity_rng.integers(1, 60))
        documents = drawn(parity_rng, count, longest)
        if any(ids for ids, _ in documents):
            assert_same(documents, length, strategy)


def test_many_short_documents(parity_rng):
    """Many rows with the same room: which of them comes first shows here."""
    assert_same(drawn(parity_rng, 3000, 9), 16, "bfd")


LONGEST = 12


def losses_of(model, arrays, *, mixed=False):
    """Sum of the next-token losses of packed rows, and how many there are."""

    @jax.jit
    def total(model, ids, mask, segments, positions):
        targets, target_mask = losses.shift(ids, mask, segments)
        seen = (segments > 0).astype(jnp.int32) if mixed else segments
        hidden = model.hidden(ids, positions, seen)
        logps = heads.token_logps(hidden, model.output_embedding(), targets).logps
        loss, _ = losses.next_token(logps)
        return jnp.where(target_mask, loss, 0).sum(), target_mask.sum()

    names = ("ids", "mask", "segments", "positions")
    return [float(x) for x in total(model, *(arrays[k] for k in names))]


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_the_loss_of_packed_rows_is_that_of_each_document(strategy, parity_rng):
    c = bridge.CONFIG
    peer = bridge.make_peer(c, seed=int(parity_rng.integers(1000)))
    model = bridge.convert(peer, c)
    documents = [
        (ids, [False, *(parity_rng.random(len(ids) - 1) < 0.7).tolist()])
        for ids in (bridge.words(parity_rng, 2, LONGEST) for _ in range(20))
    ]
    arrays = pack(documents, 24, strategy=strategy)
    if strategy == "wrapped":  # a document cut in two is two
        documents = []
        for row in range(len(arrays["ids"])):
            for segment in range(1, arrays["segments"][row].max() + 1):
                at = arrays["segments"][row] == segment
                documents.append((arrays["ids"][row, at], arrays["mask"][row, at]))
    want = count = 0
    for ids, mask in documents:
        ids = torch.tensor(np.asarray(ids), dtype=torch.long)[None]
        labels = torch.where(torch.tensor(np.asarray(mask))[None], ids, -100)
        targets = int((labels[:, 1:] != -100).sum())
        if targets:
            with torch.no_grad():
                want += peer(input_ids=ids, labels=labels).loss.item() * targets
            count += targets
    padded = {k: bridge.padded(v, 24) for k, v in arrays.items()}
    got, found = losses_of(model, padded)
    assert found == count
    np.testing.assert_allclose(got / count, want / count, atol=1e-5)
    # Were documents to see each other, it would show.
    assert abs(losses_of(model, padded, mixed=True)[0] - want) / count > 1e-3
