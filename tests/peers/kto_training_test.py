"""KTO beside TRL's KTOTrainer: twenty steps on the same judged completions."""

import pytest
import trl

from stagecraft.stages import unpaired_preference
from stagecraft.stages.stage import Context
from tests.peers import bridge

pytestmark = pytest.mark.peers

ROWS, LENGTH = 4, 24
METRICS = [
    *("kl", "entropy", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
]
WEIGHTS = {"desirable_weight": 1.0, "undesirable_weight": 1.3}


def judged(rng):
    """Completions of unequal lengths; every batch has some of either label."""
    return [
        {
            "prompt": bridge.spelled(bridge.words(rng, 3, 8)),
            "completion": bridge.spelled(bridge.words(rng, 2, 12)),
            "label": bool(i % ROWS != 1),
        }
        for i in range(ROWS * bridge.BATCHES)
    ]


@pytest.mark.parametrize(
    "optimizer", [bridge.SGD, bridge.ADAMW], ids=lambda o: o["name"]
)
def test_twenty_steps(optimizer, parity_rng, parity_seed, tmp_path):
    c = bridge.CONFIG
    policy = bridge.make_peer(c, parity_seed)
    # Surer of its wrong guesses: the policy's distance to it is above 0.
    reference = bridge.make_peer(c, parity_seed + 1, std=0.25)
    trainer = bridge.recording(trl.KTOTrainer)(
        model=bridge.clone(policy),
        ref_model=bridge.clone(reference),
        args=bridge.arguments(
            trl.KTOConfig, tmp_path, optimizer, rows=ROWS, beta=0.1, **WEIGHTS
        ),
        train_dataset=bridge.datasets.Dataset.from_list(judged(parity_rng)),
        processing_class=bridge.tokenizer(),
    )
    trainer.train()
    assert max(log.get("kl", 0) for log in trainer.state.log_history) > 0.1

    batches = []
    for batch in trainer.batches:
        arrays = (batch[k] for k in ("input_ids", "attention_mask", "completion_mask"))
        ours = bridge.rows(*arrays, LENGTH)
        batches.append(ours | {"label": batch["label"].numpy()})
    config = bridge.config(
        "unpaired_preference",
        optimizer,
        objective="kto",
        objective_args=dict(beta=0.1, **WEIGHTS),
        batch_size=ROWS,
    )
    parents = {
        "start": bridge.convert(policy, c),
        "reference": bridge.convert(reference, c),
    }
    losses, metrics, final = bridge.train(
        lambda mesh: unpaired_preference.make(config, Context(mesh, c, parents)),
        batches,
    )
    bridge.assert_losses(losses, trainer.losses)
    bridge.assert_metrics(metrics, trainer, METRICS)
    bridge.assert_weights(final, trainer.model, c, bridge.weights(policy, c))
