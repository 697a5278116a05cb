"""GRPO beside TRL's GRPOTrainer: its samples and rewards, our updates."""

import dataclasses

import numpy as np
import pytest
import trl

from stagecraft.stages import group_policy, rollout
from stagecraft.stages.stage import Context
from tests.peers import bridge

pytestmark = pytest.mark.peers

PROMPTS, GROUP, PROMPT, NEW = 2, 4, 8, 12
TEMPERATURE = 0.7
SGD = dict(bridge.SGD, lr=0.05)
# So few words that some completions end by chance, and some do not.
C = dataclasses.replace(bridge.CONFIG, vocab_size=16)
METRICS = ["reward", "frac_reward_zero_std", "completions/mean_length"]


def pay(completion_ids, **_):
    """Something of the tokens' numbers and of their count, in sixteenths.

    So a group's mean is exact: samples paid alike have advantage 0 on both sides, and
    no rounding error decides whether they count as good or bad.
    """
    return [
        float(np.sum(np.asarray(ids) % 7) + len(ids)) / 16 for ids in completion_ids
    ]


def make_recording(trainer_class):
    """Also keeps each rollout as it was scored, groups whole, and its rewards."""

    class Recording(bridge.recording(trainer_class)):
        def _generate_and_score_completions(self, inputs):
            found = super()._generate_and_score_completions(inputs)
            if not hasattr(self, "rollouts"):
                self.rollouts = []
            self.rollouts.append({k: np.asarray(v) for k, v in found.items()})
            return found

        def _calculate_rewards(self, *args, **kwargs):
            found = super()._calculate_rewards(*args, **kwargs)
            self.paid = [*getattr(self, "paid", []), found.numpy()]
            return found

    Recording.__name__ = trainer_class.__name__
    return Recording


def ours(found):
    """A rollout as our stage takes it, from TRL's left-padded prompts and tokens."""
    mask = bridge.padded(found["completion_mask"].astype(bool), NEW, False)
    tokens = bridge.padded(found["completion_ids"], NEW).astype(np.int32)
    tokens = np.where(mask, tokens, 0)
    ids, seen = found["prompt_ids"], found["prompt_mask"].astype(bool)
    left = ((0, 0), (PROMPT - ids.shape[1], 0))
    ids, seen = np.pad(ids, left), np.pad(seen, left)
    seen = np.concatenate([seen, mask], 1)
    return {
        "ids": np.concatenate([np.where(seen[:, :PROMPT], ids, 0), tokens], 1).astype(
            np.int32
        ),
        "segments": seen.astype(np.int32),
        "positions": ((seen.cumsum(1) - 1) * seen).astype(np.int32),
        "tokens": tokens,
        "mask": mask,
        "behaviour_logps": np.zeros(mask.shape, np.float32),
        "ended": (mask & (tokens == bridge.END)).any(1),
    }


CASES = {  # TRL's settings and ours
    "grpo, one step": ({"loss_type": "grpo"}, {"aggregation": "grpo"}),
    "grpo, kl in the loss, one step": (
        {"loss_type": "grpo", "beta": 0.05, "use_bias_correction_kl": False},
        {"aggregation": "grpo", "kl_coef": 0.05},
    ),
    "dapo, corrected kl in the loss, two steps": (
        {
            "loss_type": "dapo",
            "beta": 0.05,
            "use_bias_correction_kl": True,
            "num_iterations": 2,
            "epsilon_high": 0.28,
        },
        {
            "aggregation": "dapo",
            "kl_coef": 0.05,
            "kl_bias_correction": True,
            "epochs": 2,
            "objective_args": {"clip": 0.2, "clip_high": 0.28},
        },
    ),
    "dr_grpo, unscaled, two steps": (
        {"loss_type": "dr_grpo", "scale_rewards": "none", "num_iterations": 2},
        {"aggregation": "dr_grpo", "scale_rewards": "none", "epochs": 2},
    ),
}


@pytest.mark.parametrize("optimizer", [SGD, bridge.ADAMW], ids=lambda o: o["name"])
@pytest.mark.parametrize(("settings", "changes"), CASES.values(), ids=CASES)
def test_twenty_steps(
    settings, changes, optimizer, parity_rng, parity_seed, tmp_path, monkeypatch
):
    policy = bridge.make_peer(C, parity_seed, pads=False)
    start, model = bridge.weights(policy, C), bridge.convert(policy, C)
    policy.save_pretrained(tmp_path / "model")  # TRL loads its reference from there
    trainer = make_recording(trl.GRPOTrainer)(
        model=type(policy).from_pretrained(tmp_path / "model"),
        args=bridge.arguments(
            trl.GRPOConfig,
            tmp_path / "out",
            optimizer,
            rows=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW,
            temperature=TEMPERATURE,
            **settings,
        ),
        train_dataset=bridge.datasets.Dataset.from_list(
            [
                {"prompt": bridge.spelled(bridge.words(parity_rng, 2, PROMPT, C))}
                for _ in range(PROMPTS * bridge.BATCHES)
            ]
        ),
        processing_class=bridge.tokenizer(C),
        reward_funcs=pay,
    )
    trainer.train()
    epochs = settings.get("num_iterations", 1)
    rollouts = [ours(found) for found in trainer.rollouts]
    assert len(rollouts) * epochs == bridge.STEPS
    ended = np.concatenate([r["ended"] for r in rollouts])
    assert 0 < ended.sum() < len(ended)  # both kinds are there

    feed = iter(zip(rollouts, trainer.paid, strict=True))
    now = {}

    def make(config, mesh, *args, **kwargs):
        def sample(policy, raw, key):
            now["drawn"], now["paid"] = next(feed)
            return now["drawn"]

        return rollout.Rollouts(
            sample=sample,
            begin=None,
            finish=None,
            score=lambda samples, index, step: now["paid"],
            programs=None,
            names=("pay",),
            weights=(1.0,),
        )

    monkeypatch.setattr(rollout, "make", make)
    config = bridge.config(
        "group_policy",
        optimizer,
        steps=len(rollouts),
        batch_size=PROMPTS,
        group_size=GROUP,
        sampling=dict(max_new_tokens=NEW, temperature=TEMPERATURE),
        **dict(kl_coef=0.0, missing_eos_penalty=0.0) | changes,
    )
    raw = {
        "prompt_ids": np.zeros((PROMPTS, PROMPT), np.int32),
        "prompt_mask": np.ones((PROMPTS, PROMPT), bool),
    }
    parents = {"start": model, "reference": model}
    found = []

    def made(mesh):
        built = group_policy.make(
            config, Context(mesh, C, parents, stop_ids=(bridge.END,))
        )

        def prepare(state, raw, key):
            batch = built.prepare(state, raw, key)
            found.append(np.asarray(batch["rollout"]["advantages"]))
            return batch

        return built._replace(prepare=prepare)

    losses, metrics, final = bridge.train(made, [raw] * len(rollouts))
    for advantages, theirs in zip(found, trainer.rollouts, strict=True):
        mask = bridge.padded(theirs["completion_mask"].astype(bool), NEW, False)
        expected = np.where(mask, theirs["advantages"][:, None], 0)
        np.testing.assert_allclose(advantages, expected, atol=1e-5)
    theirs = np.reshape(trainer.losses, (-1, epochs)).mean(1)
    np.testing.assert_allclose(losses, theirs, atol=1e-4, rtol=0)
    bridge.assert_weights(final, trainer.model, C, start)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    for key in METRICS:
        expected = [log[key] for log in logs]
        np.testing.assert_allclose(
            [m[key] for m in metrics], expected, atol=1e-4, err_msg=key
        )
    for key in ("entropy", "kl", "clip_ratio/region_mean"):
        if all(key in log for log in trainer.state.log_history[:-1]):
            each = [log[key] for log in trainer.state.log_history[:-1]]
            expected = np.reshape(each, (-1, epochs)).mean(1)
            np.testing.assert_allclose(
                [m[key] for m in metrics], expected, atol=1e-4, err_msg=key
            )
