r"""Gemma 3 12B on a pod: pretraining, SFT, reward model, DPO, PPO and GRPO.

    stagecraft plan --config=recipes/pods/gemma3_12b --topology=v5p:8x8x8

Seen with jax 0.10.2 and libtpu 0.0.42, the least time that the bounds allow
(docs/plan.md), nothing run: pretraining on v5p:8x8x8 compiles, 20.0 GiB a device, bound
by compute, 1.80 s a step, 4,555 tokens/s a chip, MFU 73.6%. By formula on h200:8 with
fsdp=8,micro_batches=32 (seconds a step, GiB a device, MFU): pretrain 52.5, 43.6, 75%;
sft 25.9, 44.0, 75%; reward 25.8, 44.0, 69%; dpo 32.3, 44.0, 80%; ppo 23.3, 73.1, 72%;
grpo 36.1, 117.9, 64%, their sampling bound by HBM. The other stages were not compiled
at full depth.
"""

from experiments.recipes.pods import graph


def get_config(arg=""):
    return graph.build(
        arg,
        vocab=262208,
        width=3840,
        layers=48,
        heads=16,
        kv_heads=8,
        head_dim=256,
        ff_width=15360,
        embed_scale=3840**0.5,
        norm_offset=1.0,
        norm_place="both",
        norm_eps=1e-6,
        attention_scale=256**-0.5,
        window=1024,
        sliding=(True, True, True, True, True, False),
        rope_theta=1e6,
        rope_theta_sliding=1e4,
        rope_scaling="linear",
        rope_arguments=(8.0,),
        activation="gelu_tanh",
    )
