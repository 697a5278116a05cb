r"""Llama 3.1 70B on a pod: pretraining, SFT, reward model, DPO, PPO and GRPO.

    stagecraft plan --topology=v6e:16x16 \
        --config=recipes/pods/llama31_70b:fsdp=256,micro_batches=2

Seen with jax 0.10.2 and libtpu 0.0.42, the least time and the highest MFU that the
bounds allow (docs/plan.md), nothing run: pretraining with fsdp=256,micro_batches=2 on
v6e:16x16 compiles, 27.6 GiB a device, is bound by compute, 10.3 s a step, 1,590
tokens/s a chip, MFU 78%; MaxText publishes 960 tokens/s. Over 256 shards gradients are
summed whole, not scattered (278 GiB of sums a step, 1.7 s of ICI). On v5e:16x16 nothing
fits by formula with rows of 8192 tokens: the residual stream of one row alone takes
10.7 GiB. On h200:8 no stage fits (201 GiB a device to pretrain). The other stages were
not compiled at full depth.
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
