"""Supervised fine-tuning beside TRL's SFTTrainer: twenty steps, loss by loss."""

import numpy as np
import pytest
import trl

from stagecraft.stages import language_model
from stagecraft.stages.stage import Context
from tests.peers import bridge

pytestmark = pytest.mark.peers

ROWS, LENGTH = 4, 24
METRICS = ["entropy", "mean_token_accuracy"]
OPTIMIZERS = pytest.mark.parametrize(
    "optimizer", [bridge.SGD, bridge.ADAMW], ids=lambda o: o["name"]
)


def theirs(data, seed, folder, optimizer, **changes):
    """TRL's trainer after its steps, and the weights it started from as our model."""
    peer = bridge.make_peer(bridge.CONFIG, seed)
    model = bridge.convert(peer, bridge.CONFIG)
    trainer = bridge.recording(trl.SFTTrainer)(
        model=peer,
        args=bridge.arguments(trl.SFTConfig, folder, optimizer, rows=ROWS, **changes),
        train_dataset=bridge.datasets.Dataset.from_list(data),
        processing_class=bridge.tokenizer(),
    )
    trainer.train()
    return trainer, model


def check(trainer, model, batches, optimizer, losses, **changes):
    """Our stage over these batches ends where theirs did, by the same way."""
    c = bridge.CONFIG
    start = {k: np.asarray(v) for k, v in bridge.tree.named(model).items()}
    config = bridge.config("language_model", optimizer, **changes)
    ours, metrics, final = bridge.train(
        lambda mesh: language_model.make(config, Context(mesh, c, {"start": model})),
        batches,
    )
    bridge.assert_losses(ours, losses)
    if len(trainer.losses) == bridge.STEPS:  # theirs are means of means otherwise
        bridge.assert_metrics(metrics, trainer, METRICS)
    bridge.assert_weights(final, trainer.model, c, start)
    return metrics


def completions(rng, count):
    """Prompts and completions of unequal lengths."""
    return [
        {
            "prompt": bridge.spelled(bridge.words(rng, 3, 8)),
            "completion": bridge.spelled(bridge.words(rng, 1, 12)),
        }
        for _ in range(count)
    ]


def padded(batch):
    """Our rows from TRL's padded ones."""
    trained = batch["labels"].numpy() != -100
    return bridge.rows(
        batch["input_ids"].numpy(), batch["attention_mask"].numpy(), trained, LENGTH
    )


@OPTIMIZERS
def test_padded_completions(optimizer, parity_rng, parity_seed, tmp_path):
    data = completions(parity_rng, ROWS * bridge.BATCHES)
    trainer, model = theirs(data, parity_seed, tmp_path, optimizer, max_length=None)
    batches = [padded(batch) for batch in trainer.batches]
    for batch in batches:  # prompts are not trained on, the end of the text is
        assert 0 < batch["mask"].sum() < (batch["segments"] > 0).sum()
        assert (batch["mask"] & (batch["ids"] == bridge.END)).sum() == ROWS
    check(trainer, model, batches, optimizer, trainer.losses, batch_size=ROWS)


def test_adamw_with_its_usual_epsilon(parity_rng, parity_seed, tmp_path):
    """The losses; where a gradient is all rounding error, a weight may go astray."""
    optimizer = dict(bridge.ADAMW, eps=1e-8)
    data = completions(parity_rng, ROWS * bridge.BATCHES)
    trainer, model = theirs(data, parity_seed, tmp_path, optimizer, max_length=None)
    batches = [padded(batch) for batch in trainer.batches]
    config = bridge.config("language_model", optimizer, batch_size=ROWS)
    losses, _, _ = bridge.train(
        lambda mesh: language_model.make(
            config, Context(mesh, bridge.CONFIG, {"start": model})
        ),
        batches,
    )
    bridge.assert_losses(losses, trainer.losses)


def test_accumulated_over_micro_batches_of_unequal_length(
    parity_rng, parity_seed, tmp_path
):
    data = completions(parity_rng, 2 * ROWS * bridge.BATCHES)
    trainer, model = theirs(
        data,
        parity_seed,
        tmp_path,
        bridge.SGD,
        max_length=None,
        gradient_accumulation_steps=2,
    )
    halves = [padded(batch) for batch in trainer.batches]
    pairs = list(zip(halves[::2], halves[1::2], strict=True))
    assert any(a["mask"].sum() != b["mask"].sum() for a, b in pairs)
    batches = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in pairs]
    losses = np.reshape(trainer.losses, (-1, 2)).sum(1).tolist()
    check(
        trainer,
        model,
        batches,
        bridge.SGD,
        losses,
        batch_size=2 * ROWS,
        micro_batches=2,
    )


@OPTIMIZERS
def test_packed_documents(optimizer, parity_rng, parity_seed, tmp_path):
    """Best-fit rows, laid end to end by TRL, row under row by us."""
    # Five batches of four full rows, each of two documents that fill it exactly.
    data = []
    for _ in range(ROWS * bridge.BATCHES):
        cut = int(parity_rng.integers(4, LENGTH - 4))
        for size in (cut, LENGTH - cut):
            ids = bridge.words(parity_rng, size - 1, size - 1)  # and the end
            data.append({"text": bridge.spelled(ids)})
    trainer, model = theirs(
        data,
        parity_seed,
        tmp_path,
        optimizer,
        packing=True,
        packing_strategy="bfd",
        max_length=LENGTH,
        shuffle_dataset=False,
    )
    batches = [packed(batch) for batch in trainer.batches]
    assert all(batch["segments"].max() > 1 for batch in batches)
    check(trainer, model, batches, optimizer, trainer.losses, batch_size=ROWS)


def packed(batch):
    """Our packed rows from TRL's one row of all documents."""
    ids, positions = batch["input_ids"][0].numpy(), batch["position_ids"][0].numpy()
    starts = [*np.flatnonzero(positions == 0), len(ids)]
    ours = {
        k: np.zeros((ROWS, LENGTH), np.int32) for k in ("ids", "segments", "positions")
    }
    row, column, number = 0, 0, 1
    for start, end in zip(starts, starts[1:], strict=False):
        size = end - start
        if column + size > LENGTH:
            row, column, number = row + 1, 0, 1
        place = np.s_[row, column : column + size]
        ours["ids"][place] = ids[start:end]
        ours["positions"][place] = np.arange(size)
        ours["segments"][place] = number
        column, number = column + size, number + 1
    # Every token is learned, but for each document's first: nothing precedes it.
    labels = batch["labels"][0].numpy()
    assert np.array_equal(labels == -100, positions == 0)
    return ours | {"mask": ours["segments"] > 0}
