"""DPO beside TRL's DPOTrainer: twenty steps on the same pairs, loss by loss."""

import jax
import numpy as np
import pytest
import torch
import trl

from stagecraft import losses
from stagecraft.stages import preference
from stagecraft.stages.stage import Context
from tests.peers import bridge
from tests.peers.bridge import SGD

pytestmark = pytest.mark.peers

C = bridge.CONFIG
ROWS, LENGTH = 4, 24
METRICS = [
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    *("entropy", "mean_token_accuracy"),
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


def theirs(policy, reference, data, folder, optimizer, **changes):
    """TRL's trainer after its steps, on copies of the two models."""
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
    return trainer


def ours(batches, policy, reference, optimizer, dataset=None, **changes):
    """Our stage over the same batches: losses, metrics, final weights."""
    config = bridge.config("preference", optimizer, batch_size=ROWS, **changes)
    parents = {
        "start": bridge.convert(policy, C),
        "reference": bridge.convert(reference, C),
    }
    return bridge.train(
        lambda mesh: preference.make(
            config, Context(mesh, C, parents, dataset=dataset)
        ),
        batches,
    )


# TRL's loss type and settings; ours have the same names.
CASES = {
    "sigmoid": ({"beta": 0.1}, SGD),
    # Squares around 1 / (2 beta): losses of order one, and steeper than the others.
    "ipo": ({"beta": 0.5}, dict(SGD, lr=0.02)),
    "robust": ({"beta": 0.1, "label_smoothing": 0.1}, SGD),
}


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps(name, adam, parity_rng, parity_seed, tmp_path):
    settings, optimizer = CASES[name]
    optimizer = bridge.ADAMW if adam else optimizer
    policy, reference = (bridge.make_peer(C, parity_seed + i) for i in (0, 1))
    data = comparisons(parity_rng)
    trainer = theirs(
        *(policy, reference, data, tmp_path, optimizer),
        loss_type=[name],
        **settings,
    )
    found, metrics, final = ours(
        [bridge.pairs(batch, LENGTH) for batch in trainer.batches],
        *(policy, reference, optimizer),
        objective=name,
        objective_args=settings,
    )
    bridge.assert_losses(found, trainer.losses)
    bridge.assert_metrics(metrics, trainer, METRICS)
    bridge.assert_weights(final, trainer.model, C, bridge.weights(policy, C))


def test_a_policy_that_is_its_reference(parity_rng, parity_seed, tmp_path):
    """Loss log 2, margins 0, a tie is no success; and every figure TRL logs is ours."""
    policy = bridge.make_peer(C, parity_seed)
    data = comparisons(parity_rng)
    trainer = theirs(policy, policy, data, tmp_path, SGD, beta=0.1)
    batches = [bridge.pairs(batch, LENGTH) for batch in trainer.batches]
    settings = dict(objective="sigmoid", objective_args=dict(beta=0.1))
    found, metrics, _ = ours(batches, policy, policy, SGD, **settings)
    bridge.assert_losses(found, trainer.losses)
    assert found[0] == pytest.approx(np.log(2), abs=1e-6)
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert metrics[0]["rewards/accuracies"] == 0
    logged = trainer.state.log_history[0].keys()
    own = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens"}
    assert logged - own == set(METRICS)
    bridge.assert_metrics(metrics, trainer, METRICS)


def test_its_gradient_is_half_of_beta(parity_rng):
    logps = parity_rng.normal(-30, 5, (4, 2)).astype(np.float32)
    gradient = jax.grad(lambda x: losses.dpo(x, logps, beta=0.3)[0].sum())(logps)
    np.testing.assert_allclose(gradient, [[-0.15, 0.15]] * 4, atol=1e-6)
    # And torch's, of the same formula.
    x = torch.tensor(logps, requires_grad=True)
    ratio = x - torch.tensor(logps)
    margin = 0.3 * (ratio[:, 0] - ratio[:, 1])
    (-torch.nn.functional.logsigmoid(margin)).sum().backward()
    np.testing.assert_allclose(gradient, x.grad, atol=1e-6)


class Rows:
    """What a stage needs of a dataset to score its rows once."""

    def __init__(self, batches):
        self.batches, self.rows = batches, ROWS * len(batches)

    def epoch(self, batch_size):
        assert batch_size == ROWS
        return iter(self.batches)


def test_reference_scored_once_or_every_time(parity_rng, parity_seed, tmp_path):
    policy, reference = (bridge.make_peer(C, parity_seed + i) for i in (0, 1))
    data = comparisons(parity_rng)
    trainer = theirs(
        *(policy, reference, data, tmp_path, SGD),
        beta=0.1,
        precompute_ref_log_probs=True,
    )
    assert "ref_chosen_logps" in trainer.batches[0]
    batches = []
    for step, batch in enumerate(trainer.batches):
        first = step % bridge.BATCHES * ROWS
        index = np.arange(first, first + ROWS, dtype=np.int32)
        batches.append(bridge.pairs(batch, LENGTH) | {"index": index})
    settings = dict(objective="sigmoid", objective_args=dict(beta=0.1))
    dataset = Rows(batches[: bridge.BATCHES])
    once, _, _ = ours(batches, policy, reference, SGD, dataset, **settings)
    bridge.assert_losses(once, trainer.losses)
    live, _, _ = ours(batches, policy, reference, SGD, **settings)
    np.testing.assert_allclose(once, live, atol=1e-6)
