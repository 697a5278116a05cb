r"""Llama 3.1 8B on a pod: pretraining, SFT, reward model, DPO, PPO and GRPO.

    stagecraft plan --config=recipes/pods/llama31_8b --topology=v5e:16x16

Seen with jax 0.10.2 and libtpu 0.0.42, the least time and the highest MFU that the
bounds allow (docs/plan.md), nothing run:

    v6e:16x16                 pretrain  22.0 GiB  1.22 s  13,482 tokens/s a chip
    v5e:16x16, fsdp=64, 2 parts  pretrain  15.9 GiB  5.66 s   2,894 tokens/s a chip

Both compute-bound, MFU 75.6% (remat repeats the forward pass). MaxText publishes 7,207
tokens/s for the first. By formula on h200:8 with fsdp=8,micro_batches=32, the longest
rows of each stage (seconds a step, GiB a device, MFU): pretrain 36.4, 31.2, 75%; sft
17.1, 30.8, 75%; reward 16.5, 30.8, 70%; dpo 20.6, 30.8, 80%; ppo 14.3, 50.2, 76%; grpo
20.6, 47.0, 71%, their sampling bound by HBM. The other stages were not compiled at full
depth.
"""

from experiments.recipes.pods import graph


def get_config(arg=""):
    return graph.build(
        arg,
        vocab=128256,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ff_width=14336,
        tied=False,
        qk_norm=False,
        rope_theta=5e5,
        rope_scaling="llama3",
        rope_arguments=(8.0, 1.0, 4.0, 8192),
    )
