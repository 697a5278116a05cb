r"""Qwen3-30B-A3B on a pod, 128 experts of which 8 work on a token: pretraining to GRPO.

    stagecraft plan --config=recipes/pods/qwen3_30b_a3b --topology=v5p:8x8x8

PLAN
"""

from experiments.recipes.pods import graph


def get_config(arg=""):
    return graph.build(
        arg,
        vocab=151936,
        width=2048,
        layers=48,
        heads=32,
        kv_heads=4,
        head_dim=128,
        ff_width=6144,
        tied=False,
        norm_eps=1e-6,
        rope_theta=1e6,
        experts=128,
        experts_per_token=8,
        expert_width=768,
    )
