r"""Qwen3 8B on a pod: pretraining, SFT, reward model, DPO, PPO and GRPO.

    stagecraft plan --config=recipes/pods/qwen3_8b --topology=v5e:16x16

Seen with jax 0.10.2 and libtpu 0.0.42, the least time that the bounds allow
(docs/plan.md), nothing run: pretraining on v6e:16x16 compiles, 16.9 GiB a device, bound
by compute, 1.25 s a step, 13,074 tokens/s a chip, MFU 75.0%. By formula on h200:8 with
fsdp=8,micro_batches=32 (seconds a step, GiB a device, MFU): pretrain 37.2, 32.0, 75%;
sft 17.3, 31.6, 75%; reward 16.7, 31.6, 69%; dpo 20.9, 31.6, 80%; ppo 14.5, 51.4, 75%;
grpo 21.1, 51.3, 70%, their sampling bound by HBM. The other stages were not compiled at
full depth.
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
