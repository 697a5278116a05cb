"""DPO beside TRL's DPOTrainer: twenty steps on the same pairs, loss by loss."""

import pytest

from stagecraft.stages import preference
from tests.peers import bridge

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.peers

ROWS, LENGTH = 4, 24
METRICS = [
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    *("entropy", "mean_token_accuracy"),
]


def comparisons(rng, count):
    """Pairs of unequal lengths, as words."""
    return [
        {
            "prompt": bridge.spelled(bridge.words(rng, 3, 8)),
            "chosen": bridge.spelled(bridge.words(rng, 2, 12)),
            "rejected": bridge.spelled(bridge.words(rng, 2, 12)),
        }
        for _ in range(count)
    ]


def theirs(rng, seed, folder, optimizer, **changes):
    """TRL's trainer after its steps, and the two models it started from."""
    policy = bridge.make_peer(bridge.CONFIG, seed)
    reference = bridge.make_peer(bridge.CONFIG, seed + 1)
    data = comparisons(rng, ROWS * bridge.BATCHES)
    trainer = bridge.recording(trl.DPOTrainer)(
        model=bridge.clone(policy),
        ref_model=bridge.clone(reference),
        args=bridge.arguments(
            trl.DPOConfig, folder, optimizer, rows=ROWS, max_length=None, **changes
        ),
        train_dataset=bridge.datasets.Dataset.from_list(data),
        processing_class=bridge.tokenizer(),
    )
    trainer.train()
    return trainer, policy, reference


def ours(trainer, policy, reference, optimizer, **changes):
    """Our stage over the batches TRL made."""
    c = bridge.CONFIG
    config = bridge.config("preference", optimizer, batch_size=ROWS, **changes)
    parents = {
        "start": bridge.convert(policy, c),
        "reference": bridge.convert(reference, c),
    }
    return bridge.train(
        lambda mesh: preference.make(config, c, mesh, parents),
        [bridge.pairs(batch, LENGTH) for batch in trainer.batches],
    )


SIGMOID = ("sigmoid", {}, "dpo", {})


@pytest.mark.parametrize(
    "optimizer", [bridge.SGD, bridge.ADAMW], ids=lambda o: o["name"]
)
@pytest.mark.parametrize(
    ("loss_type", "settings", "objective", "arguments"), [SIGMOID], ids=["sigmoid"]
)
def test_twenty_steps(
    loss_type,
    settings,
    objective,
    arguments,
    optimizer,
    parity_rng,
    parity_seed,
    tmp_path,
):
    trainer, policy, reference = theirs(
        parity_rng,
        parity_seed,
        tmp_path,
        optimizer,
        loss_type=[loss_type],
        beta=0.1,
        **settings,
    )
    losses, metrics, final = ours(
        trainer,
        policy,
        reference,
        optimizer,
        objective=objective,
        objective_args=dict(beta=0.1, **arguments),
    )
    bridge.assert_losses(losses, trainer.losses)
    bridge.assert_metrics(metrics, trainer, METRICS)
    start = bridge.weights(policy, bridge.CONFIG)
    bridge.assert_weights(final, trainer.model, bridge.CONFIG, start)
