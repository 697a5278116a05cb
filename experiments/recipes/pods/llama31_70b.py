r"""Llama 3.1 70B on a pod: pretraining, SFT, reward model, DPO, PPO and GRPO.

    stagecraft plan --config=recipes/pods/llama31_70b:fsdp=256 --topology=v6e:16x16

PLAN
"""

from experiments.recipes.pods import graph


def get_config(arg=""):
    return graph.build(
        arg,
        vocab=128256,
        width=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        ff_width=28672,
        tied=False,
        qk_norm=False,
        rope_theta=5e5,
        rope_scaling="llama3",
        rope_arguments=(8.0, 1.0, 4.0, 8192),
    )
