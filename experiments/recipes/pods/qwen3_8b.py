r"""Qwen3 8B on a pod: pretraining, SFT, reward model, DPO, PPO and GRPO.

    stagecraft plan --config=recipes/pods/qwen3_8b --topology=v5e:16x16

PLAN
"""

from experiments.recipes.pods import graph


def get_config(arg=""):
    return graph.build(
        arg,
        vocab=151936,
        width=4096,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ff_width=12288,
        tied=False,
        norm_eps=1e-6,
        rope_theta=1e6,
    )
