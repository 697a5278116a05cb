r"""Qwen3-30B-A3B on a pod, 128 experts of which 8 work on a token: pretraining to GRPO.

    stagecraft plan --config=recipes/pods/qwen3_30b_a3b --topology=v5p:8x8x8

Seen with jax 0.10.2 and libtpu 0.0.42 (docs/plan.md), nothing run: pretraining on
v5p:8x8x8 compiles, 37.8 GiB a device, but its experts' products do 4,026 TFLOPs a
device where 229 are needed, since the compiler multiplies every row with every expert:
at best 8.8 s a step, 934 tokens/s a chip, MFU 5.7%. By formula, which assumes products
of the chosen experts alone, h200:8 with fsdp=8,micro_batches=32 takes (seconds a step,
GiB a device, MFU): pretrain 19.7, 81.3, 75%; sft 15.2, 92.9, 40%; reward 15.2, 92.9,
33%; dpo 17.0, 92.9, 43%; grpo 23.7, 92.9, 26%, all but the first bound by gathering
weights; ppo does not fit (176 GiB). The other stages were not compiled.
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
