"""Reward models beside TRL's RewardTrainer: twenty steps, loss by loss."""

import pytest
import trl

from stagecraft.stages import reward
from stagecraft.stages.stage import Context
from tests.peers import bridge

pytestmark = pytest.mark.peers

ROWS, LENGTH = 4, 24
DIFFERENCES = ["accuracy", "margin"]
METRICS = [*DIFFERENCES, "mean_reward", "max_reward", "min_reward"]
SGD = dict(bridge.SGD, lr=0.02)


def comparisons(rng, margins):
    """Pairs of unequal lengths that share a prompt, as words."""
    data = []
    for _ in range(ROWS * bridge.BATCHES):
        prompt = bridge.words(rng, 3, 8)
        row = {
            "chosen": bridge.spelled(prompt + bridge.words(rng, 2, 12)),
            "rejected": bridge.spelled(prompt + bridge.words(rng, 2, 12)),
        }
        if margins:
            row["margin"] = float(rng.uniform(0, 2))
        data.append(row)
    return data


CASES = {
    "plain": ({}, {}, False),
    "margin and centring": (
        {"center_rewards_coefficient": 0.05},
        {"centering": 0.05},
        True,
    ),
}


@pytest.mark.parametrize("optimizer", [SGD, bridge.ADAMW], ids=lambda o: o["name"])
@pytest.mark.parametrize(
    ("settings", "arguments", "margins"), CASES.values(), ids=CASES
)
def test_twenty_steps(
    settings, arguments, margins, optimizer, parity_rng, parity_seed, tmp_path
):
    c = bridge.CONFIG
    peer = bridge.make_peer(c, parity_seed, scalar=True, bias=True)
    model = bridge.convert(peer, c)
    start = bridge.weights(peer, c)
    data = comparisons(parity_rng, margins)
    trainer = bridge.recording(trl.RewardTrainer)(
        model=peer,
        args=bridge.arguments(
            trl.RewardConfig, tmp_path, optimizer, rows=ROWS, **settings
        ),
        train_dataset=bridge.datasets.Dataset.from_list(data),
        processing_class=bridge.tokenizer(),
    )
    trainer.train()

    batches = []
    for batch in trainer.batches:
        ours = bridge.pairs(batch, LENGTH)
        if margins:
            ours["margin"] = batch["margin"].numpy()
        batches.append(ours)
    config = bridge.config(
        "reward", optimizer, batch_size=ROWS, objective_args=arguments
    )
    losses, metrics, final = bridge.train(
        lambda mesh: reward.make(config, Context(mesh, c, {"start": model.body})),
        batches,
        model,
    )
    bridge.assert_losses(losses, trainer.losses)
    # Without centring the loss does not know a bias: Adam steps on its rounding errors.
    free = not arguments and optimizer["name"] == "adamw"
    bridge.assert_metrics(metrics, trainer, DIFFERENCES if free else METRICS)
    ignore = ("bias",) if free else ()
    bridge.assert_weights(final, trainer.model, c, start, ignore=ignore)
