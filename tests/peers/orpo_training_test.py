"""ORPO beside TRL's ORPOTrainer: twenty steps on the same pairs, no reference."""

import numpy as np
import pytest
from trl.experimental import orpo

from stagecraft.stages import preference
from stagecraft.stages.stage import Context
from tests.peers import bridge

pytestmark = pytest.mark.peers

ROWS, LENGTH = 4, 24
METRICS = [
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "nll_loss", "log_odds_ratio"),
    "log_odds_chosen",
]


def comparisons(rng):
    """Pairs of unequal lengths, as words."""
    return [
        {
            "prompt": bridge.spelled(bridge.words(rng, 3, 8)),
            "chosen": bridge.spelled(bridge.words(rng, 2, 12)),
            "rejected": bridge.spelled(bridge.words(rng, 2, 12)),
        }
        for _ in range(ROWS * bridge.BATCHES)
    ]


def pairs(batch):
    """Our batch of pairs from ORPO's: one tensor a side and kind."""
    sides = [
        bridge.rows(
            batch[f"{side}_input_ids"].numpy(),
            batch[f"{side}_attention_mask"].numpy(),
            batch[f"{side}_labels"].numpy() != -100,
            LENGTH,
        )
        for side in ("chosen", "rejected")
    ]
    return {k: np.stack([side[k] for side in sides], 1) for k in sides[0]}


@pytest.mark.parametrize(
    "optimizer", [bridge.SGD, bridge.ADAMW], ids=lambda o: o["name"]
)
def test_twenty_steps(optimizer, parity_rng, parity_seed, tmp_path):
    c = bridge.CONFIG
    policy = bridge.make_peer(c, parity_seed)
    trainer = bridge.recording(orpo.ORPOTrainer)(
        model=bridge.clone(policy),
        args=bridge.arguments(
            orpo.ORPOConfig, tmp_path, optimizer, rows=ROWS, beta=0.5
        ),
        train_dataset=bridge.datasets.Dataset.from_list(comparisons(parity_rng)),
        processing_class=bridge.tokenizer(),
    )
    trainer.train()
    batches = [pairs(batch) for batch in trainer.batches]
    assert all(batch["mask"].any(-1).all() for batch in batches)

    config = bridge.config(
        "preference",
        optimizer,
        objective="orpo",
        objective_args=dict(beta=0.5),
        batch_size=ROWS,
    )
    model = bridge.convert(policy, c)
    losses, metrics, final = bridge.train(
        lambda mesh: preference.make(
            config, Context(mesh, c, {"start": model, "reference": model})
        ),
        batches,
    )
    bridge.assert_losses(losses, trainer.losses)
    bridge.assert_metrics(metrics, trainer, METRICS)
    bridge.assert_weights(final, trainer.model, c, bridge.weights(policy, c))
