"""GRPO from a Hugging Face folder to one: a whole run of ours beside TRL's GRPOTrainer.

One folder is read by both; the conversations go through its chat template on both
sides, in the order in which our run takes them, and one function of the completions'
text rewards both. TRL samples, and our run is given what it sampled. All that follows
is each side's own: twenty SGD steps (ten rollouts, two epochs each) with the KL to the
reference in the loss, of all weights or of the same fresh adapter. Under an adapter the
reference is the base, its adapter off, on either side.
"""

import json
import re

import numpy as np
import peft
import pytest
import safetensors.torch
import transformers
import trl

from stagecraft import defaults, experiment, metrics, run
from stagecraft.data import stage_data
from stagecraft.models import peft as folders
from stagecraft.stages import kinds, rollout
from stagecraft.text import tokenizer as tokenizers
from tests.peers import bridge, from_folder_test
from tests.peers.grpo_training_test import (
    GROUP,
    METRICS,
    NEW,
    PROMPTS,
    TEMPERATURE,
    C,
    make_recording,
    ours,
)
from tests.peers.ppo_from_folder_test import tokenizer

pytestmark = pytest.mark.peers

EPOCHS = 2
ROLLOUTS = bridge.STEPS // EPOCHS
PROMPT = 8  # the width of `grpo_training_test.ours`
LORA = dict(rank=4, alpha=8.0, targets="all")


def pay(prompts, completions, **_):
    """Something of the words' numbers and of their count, in sixteenths.

    So a group's mean is exact: no rounding error decides who is above it.
    """
    found = []
    for said in completions:
        text = said if isinstance(said, str) else said[0]["content"]
        words = [int(number) for number in re.findall(r"w(\d+)", text)]
        found.append((sum(word % 7 for word in words) + len(words)) / 16)
    return found


def configured(folder, path, adapter):
    """The experiment: one stage from the folder."""
    c = defaults.experiment()
    c.mesh.data = 1
    optimizer = dict(bridge.SGD, lr=0.05)
    c.stages.child = defaults.stage(
        "group_policy",
        **dict(start_from=f"hf:{folder}", steps=ROLLOUTS, batch_size=PROMPTS),
        **dict(data=dict(files=str(path), prompt_length=PROMPT)),
        verifiers=f"{__name__}:{pay.__name__}",
        **dict(group_size=GROUP, epochs=EPOCHS, aggregation="grpo", kl_coef=0.05),
        **dict(every=dict(log=1), lora=LORA if adapter else {}),
        sampling=dict(max_new_tokens=NEW, temperature=TEMPERATURE),
        optimizer=dict(**optimizer, schedule="constant", warmup_steps=0, clip_norm=0.0),
    )
    return c


def in_our_order(c, root, texts):
    """The prompts' texts in the order in which our run will take them."""
    full = experiment.resolve(c)
    stage = full.stages.child
    own = tokenizers.load(str(stage.start_from).removeprefix("hf:"))
    data = stage_data.build(stage, own, root, full, kinds.of(stage).data)
    iterator = data.dataset.iterator()
    return [texts[i] for _ in range(ROLLOUTS) for i in next(iterator)["index"]]


def trained(folder, texts, out, lr, adapter):
    """TRL's trainer after its steps."""
    settings = {}
    if adapter is not None:
        config = peft.PeftConfig.from_pretrained(adapter)
        config.inference_mode = False
        settings = dict(peft_config=config)
    trainer = make_recording(trl.GRPOTrainer)(
        model=from_folder_test.opened("policy", folder),
        args=bridge.arguments(
            *(trl.GRPOConfig, out, dict(bridge.SGD, lr=lr)),
            **dict(rows=PROMPTS * GROUP, num_generations=GROUP),
            **dict(max_completion_length=NEW, temperature=TEMPERATURE),
            **dict(loss_type="grpo", beta=0.05, use_bias_correction_kl=False),
            **dict(num_iterations=EPOCHS, shuffle_dataset=False),
        ),
        train_dataset=bridge.datasets.Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}]} for text in texts]
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        reward_funcs=pay,
        **settings,
    )
    if adapter is not None:
        weights = safetensors.torch.load_file(adapter / folders.WEIGHTS)
        peft.set_peft_model_state_dict(trainer.model, weights)
    trainer.train()
    return trainer


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_twenty_steps(adapter, parity_rng, parity_seed, tmp_path, monkeypatch):
    folder, path = tmp_path / "base", tmp_path / "prompts.jsonl"
    bridge.make_peer(C, parity_seed, pads=False).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    texts = [
        " ".join(f"w{i}" for i in parity_rng.integers(3, C.vocab_size - 2, count))
        for count in parity_rng.integers(2, PROMPT - 1, PROMPTS * ROLLOUTS)
    ]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    c = configured(folder, path, adapter)
    begun = None
    if adapter:
        begun = from_folder_test.first_adapter(c, folder, tmp_path / "first")
    asked = in_our_order(c, tmp_path, texts)
    lr = c.stages.child.optimizer.lr
    trainer = trained(folder, asked, tmp_path / "trl", lr, begun)
    rollouts = [ours(found) for found in trainer.rollouts]
    ended = np.concatenate([one["ended"] for one in rollouts])
    assert len(rollouts) == ROLLOUTS and 0 < ended.sum() < len(ended)

    made, fed = rollout.make, iter(rollouts)

    def make(*args, **kwargs):
        def sample(policy, raw, key):
            # What our run would have asked is what TRL asked, row by row.
            one = next(fed)
            asked = np.where(raw["prompt_mask"], raw["prompt_ids"], bridge.PAD)
            asked = np.repeat(asked, GROUP, axis=0)
            np.testing.assert_array_equal(asked, one["ids"][:, :PROMPT])
            return one

        return made(*args, **kwargs)._replace(sample=sample)

    monkeypatch.setattr(rollout, "make", make)
    root = tmp_path / "run"
    run.run(c, root)
    rows = metrics.read(root / "child" / "metrics.jsonl")
    rows = [row for row in rows if "reward" in row]
    assert len(rows) == ROLLOUTS
    losses = np.reshape(trainer.losses, (ROLLOUTS, EPOCHS)).mean(1)
    np.testing.assert_allclose([row["loss"] for row in rows], losses, atol=1e-4)
    assert np.ptp(trainer.losses) > 1e-2
    logs = [log for log in trainer.state.log_history if "reward" in log]
    for name in METRICS:
        wanted = [log[name] for log in logs]
        found = [row[name] for row in rows]
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=name)
    kl = np.reshape([log["kl"] for log in trainer.state.log_history[:-1]], (-1, EPOCHS))
    np.testing.assert_allclose([row["kl"] for row in rows], kl.mean(1), atol=1e-4)
    assert kl[0, 0] < 1e-4 < 1e-3 < kl[-1, -1]  # the reference stays, the policy not

    from_folder_test.leaves(
        *(root, trainer.model, "policy", folder, adapter, parity_rng)
    )
