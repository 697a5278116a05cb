"""One iteration of TRL's PPOTrainer, left in a file: `python -m tests.peers.ppo_peer`.

TRL 1.12.0 was the last release with a PPOTrainer. It cannot share a process with the
release the other tests import, so it runs in one of its own, with the folder it was
installed into on PYTHONPATH.
"""

import argparse
import dataclasses
import sys

import numpy as np
import torch
import transformers

from tests.peers import bridge

VERSION = "1.12.0"
ROWS, PROMPT, NEW, EPOCHS = 16, 8, 12, 4
# So few words that some completions end by chance, and some do not.
C = dataclasses.replace(bridge.CONFIG, vocab_size=16)
SETTINGS = dict(
    kl_coef=0.05,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.1,
    gamma=1.0,
    lam=0.95,
    temperature=0.7,
    missing_eos_penalty=1.0,
)
# What is looked at, by the names TRL's training loop gives them.
ARRAYS = (
    *("queries", "postprocessed_responses", "contain_eos_token", "padding_mask"),
    *("padding_mask_p1", "logprobs", "ref_logprobs", "values", "scores", "rewards"),
    *("advantages", "returns"),
)


def models(seed):
    """{"policy", "reference", "reward", "value"}: four different models."""
    return {
        "policy": bridge.make_peer(C, seed, pads=False),
        "reference": bridge.make_peer(C, seed + 1, pads=False),
        "reward": bridge.make_peer(C, seed + 2, scalar=True, bias=True),
        "value": bridge.make_peer(C, seed + 3, scalar=True, bias=True),
    }


def prompts(seed):
    """Ids of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [bridge.words(rng, 2, PROMPT, C) for _ in range(ROWS)]


def run(seed, optimizer, folder):
    """The arrays of one iteration, its metrics and losses, and the final weights."""
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    assert trl.__version__ == VERSION, trl.__version__
    tokenizer = bridge.tokenizer(C)
    tokenizer.padding_side = "left"
    made = models(seed)
    data = bridge.datasets.Dataset.from_list([{"input_ids": p} for p in prompts(seed)])
    trainer = PPOTrainer(
        args=bridge.arguments(
            PPOConfig,
            folder,
            optimizer,
            rows=ROWS,
            max_steps=-1,
            seed=seed,
            total_episodes=ROWS,
            num_ppo_epochs=EPOCHS,
            num_mini_batches=1,
            response_length=NEW,
            local_rollout_forward_batch_size=ROWS,
            num_sample_generations=0,
            stop_token="eos",
            **SETTINGS,
        ),
        processing_class=tokenizer,
        model=made["policy"],
        ref_model=made["reference"],
        reward_model=made["reward"],
        value_model=made["value"],
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    seen, losses = {}, []
    whiten, backward = ppo_trainer.masked_whiten, trainer.accelerator.backward

    def spy(*args, **kwargs):
        # Called once, on the finished advantages: all that went before is there.
        around = sys._getframe(1).f_locals
        seen.update({k: around[k].clone() for k in ARRAYS})
        seen["whitened"] = whiten(*args, **kwargs)
        return seen["whitened"]

    def keep(loss, **kwargs):
        losses.append(loss.item())
        return backward(loss, **kwargs)

    ppo_trainer.masked_whiten, trainer.accelerator.backward = spy, keep
    trainer.train()
    out = {k: v.numpy() for k, v in seen.items()}
    metrics = trainer.state.log_history[0]
    out |= {f"metrics/{k}": v for k, v in metrics.items()}
    out["losses"] = losses
    for name in ("policy", "value"):
        final = bridge.weights(made[name], C)
        out |= {f"final/{name}/{k}": v for k, v in final.items()}
    return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("optimizer", choices=["sgd", "adamw"])
    parser.add_argument("folder", help="where the trainer may write, and out.npz lies")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    optimizer = bridge.SGD if given.optimizer == "sgd" else bridge.ADAMW
    found = run(given.seed, optimizer, given.folder)
    np.savez(f"{given.folder}/out.npz", **found)


if __name__ == "__main__":
    main()
