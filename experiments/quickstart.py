r"""Every stage on the embedded world, on two cores, in minutes.

    pretrain -> sft -> comparisons -> reward -> ppo, ppo_hard
                 |          |------> dpo
    sft_scratch: the same demonstrations, without pretraining

    stagecraft run --config=experiments/quickstart.py --workdir=runs/a
    stagecraft run --config=experiments/quickstart.py:tiny --workdir=runs/t   # seconds

The world (stagecraft/worlds/countries) writes real facts as web-like text, answers
about half of its countries, prompts about the same half, and a strict scorer that no
stage trains on. The comparisons are the SFT model's own answers, labelled by rules
with noise.
"""

from experiments import common
from stagecraft import defaults


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False)
    c = defaults.experiment()
    c.world.name = "countries"
    c.world.size = "tiny" if arg.tiny else "full"
    c.tokenizer.files = "world:text.jsonl"
    c.tokenizer.vocab_size = 512 if arg.tiny else 1024
    c.model.max_length = 128
    if arg.tiny:
        c.model.update(common.tiny_model())

    c.stages.pretrain = defaults.stage(
        "language_model",
        data=dict(format="text", files="world:text.jsonl", length=64),
        steps=600,
        batch_size=32,
        optimizer=dict(lr=5e-3, warmup_steps=20),
        every=dict(save=200, sample=300),
    )
    answers = dict(
        format="demonstrations",
        files="world:demonstrations.jsonl",
        heldout="world:heldout_demonstrations.jsonl",
        replay="world:text.jsonl",
        replay_share=1 / 3,
        length=64,
        packing="none",
    )
    c.stages.sft = defaults.stage(
        "language_model",
        start_from="pretrain",
        data=answers,
        steps=150,
        batch_size=48,
        optimizer=dict(lr=5e-4, warmup_steps=10),
    )
    c.stages.sft_scratch = defaults.stage(
        "language_model",
        data=answers,
        steps=150,
        batch_size=48,
        optimizer=dict(lr=3e-3, warmup_steps=10),
    )
    sampling = dict(max_new_tokens=34)
    c.stages.comparisons = defaults.stage(
        "comparisons",
        start_from="sft",
        data=dict(files="world:prompts.jsonl"),
        prompts=3000,
        sampling=sampling,
    )
    pairs = dict(files="stage:comparisons", length=64)
    c.stages.reward = defaults.stage(
        "reward",
        start_from="sft",
        data=pairs,
        steps=80,
        batch_size=32,
        optimizer=dict(lr=3e-4, warmup_steps=5),
    )
    c.stages.dpo = defaults.stage(
        "preference",
        start_from="sft",
        objective_args=dict(beta=0.1),
        data=pairs,
        steps=89,
        batch_size=32,
        optimizer=dict(lr=1e-4, warmup_steps=5),
    )
    ppo = dict(
        start_from="sft",
        reward_from="reward",
        data=dict(files="world:prompts.jsonl"),
        sampling=sampling,
        batch_size=64,
        epochs=2,
        minibatches=2,
        value_lr_scale=3.0,
        optimizer=dict(lr=1e-4, warmup_steps=0, schedule="linear", weight_decay=0.0),
        every=dict(log=1, save=5),
    )
    c.stages.ppo = defaults.stage("policy", steps=15, kl_coef=0.05, **ppo)
    c.stages.ppo_hard = defaults.stage("policy", steps=40, kl_coef=0.0, **ppo)
    c.stages.ppo_hard.optimizer.lr = 3e-4
    return common.tiny(c) if arg.tiny else c
