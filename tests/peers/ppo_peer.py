"""TRL's PPOTrainer, what it did left in a file: `python -m tests.peers.ppo_peer`.

TRL 1.12.0 was the last release with a PPOTrainer. It cannot share a process with the
release the other tests import, so it runs in one of its own, with the folder it was
installed into on PYTHONPATH.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

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


def biased(head):
    """A head with a bias, as our critics have and transformers' have not."""
    made = torch.nn.Linear(head.in_features, head.out_features, bias=True)
    with torch.no_grad():
        made.weight.copy_(head.weight)
        made.bias.zero_()
    return made


def read(folder, adapter):
    """The same from Hugging Face folders; the reference is the policy as it starts.

    Args:
        folder: holds policy, reward and value; with `adapter` also policy_adapter and
            value_adapter, PEFT's.
        adapter: train the adapters: the reference is then the policy without its own.
    """

    def opened(name, kind):
        found = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
            folder / name, attn_implementation="eager", dtype=torch.float32
        )
        return found.eval()

    made = {
        "policy": opened("policy", "CausalLM"),
        "reference": None if adapter else opened("policy", "CausalLM"),
        "reward": opened("reward", "SequenceClassification"),
        "value": opened("value", "SequenceClassification"),
    }
    if adapter:
        import peft

        for name in ("policy", "value"):
            made[name] = peft.PeftModel.from_pretrained(
                made[name], folder / f"{name}_adapter", is_trainable=True
            )
        heads = made["value"].base_model.model.score.modules_to_save
        heads["default"] = biased(heads["default"])
    else:
        made["value"].score = biased(made["value"].score)
    return made


def train(made, data, tokenizer, optimizer, folder, *, seed, iterations=1):
    """Iterations of TRL's trainer on these models, which it changes.

    Returns:
        the arrays of each iteration; the loss of each update; the trainer's log.
    """
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    assert trl.__version__ == VERSION, trl.__version__
    data = bridge.datasets.Dataset.from_list([{"input_ids": p} for p in data])
    trainer = PPOTrainer(
        args=bridge.arguments(
            PPOConfig,
            folder,
            optimizer,
            rows=ROWS,
            max_steps=-1,
            seed=seed,
            total_episodes=ROWS * iterations,
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
    seen, losses = [], []
    whiten, backward = ppo_trainer.masked_whiten, trainer.accelerator.backward

    def spy(*args, **kwargs):
        # Called once an iteration, on the finished advantages: all that went before is
        # there.
        around = sys._getframe(1).f_locals
        seen.append({k: around[k].clone() for k in ARRAYS})
        seen[-1]["whitened"] = whiten(*args, **kwargs)
        return seen[-1]["whitened"]

    def keep(loss, **kwargs):
        losses.append(loss.item())
        return backward(loss, **kwargs)

    ppo_trainer.masked_whiten, trainer.accelerator.backward = spy, keep
    trainer.train()
    assert len(seen) == iterations
    seen = [{k: v.numpy() for k, v in one.items()} for one in seen]
    return seen, losses, trainer.state.log_history


def run(seed, optimizer, folder):
    """The arrays of one iteration, its metrics and losses, and the final weights."""
    made, tokenizer = models(seed), bridge.tokenizer(C)
    tokenizer.padding_side = "left"
    seen, losses, log = train(
        *(made, prompts(seed), tokenizer, optimizer, folder), seed=seed
    )
    out = seen[0] | {f"metrics/{k}": v for k, v in log[0].items()}
    out["losses"] = losses
    for name in ("policy", "value"):
        final = bridge.weights(made[name], C)
        out |= {f"final/{name}/{k}": v for k, v in final.items()}
    return out


def run_from(seed, optimizer, folder, iterations, adapter):
    """The same of several iterations, from the folder's models to its out/policy.

    Of the weights, those of the critic are among the arrays: transformers cannot write
    the bias of its head.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.padding_side = "left"
    made = read(folder, adapter)
    data = json.loads((folder / "prompts.json").read_text())
    seen, losses, log = train(
        *(made, data, tokenizer, optimizer, folder / "trl"),
        **dict(seed=seed, iterations=iterations),
    )
    out = {f"{i}/{k}": v for i, one in enumerate(seen) for k, v in one.items()}
    for i in range(iterations):
        out |= {f"{i}/metrics/{k}": v for k, v in log[i].items()}
    if adapter:
        made |= {k: made[k].merge_and_unload() for k in ("policy", "value")}
    made["policy"].save_pretrained(folder / "out" / "policy")
    critic = bridge.weights(made["value"], C)
    out |= {f"critic/{k}": v for k, v in critic.items()}
    return out | {"losses": losses}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("optimizer", choices=["sgd", "adamw"])
    parser.add_argument("folder", type=Path, help="out.npz lies there in the end")
    parser.add_argument("--lr", type=float, help="instead of the optimizer's own")
    parser.add_argument("--iterations", type=int, help="start from the folder's models")
    parser.add_argument("--adapter", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    optimizer = bridge.SGD if given.optimizer == "sgd" else bridge.ADAMW
    if given.lr is not None:
        optimizer = dict(optimizer, lr=given.lr)
    if given.iterations:
        found = run_from(
            *(given.seed, optimizer, given.folder, given.iterations, given.adapter)
        )
    else:
        found = run(given.seed, optimizer, given.folder)
    np.savez(given.folder / "out.npz", **found)


if __name__ == "__main__":
    main()
