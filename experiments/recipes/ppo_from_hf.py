r"""RLHF of a Hugging Face model: a reward model from pairs, then PPO on prompts.

    stagecraft run --workdir=runs/ppo \
        --config=recipes/ppo_from_hf:model=FOLDER,data=pairs.jsonl,prompts=prompts.jsonl

data holds {"prompt","chosen","rejected"}, prompts {"prompt"}. model is usually one that
recipes/sft_from_hf has trained (model=runs/sft/sft). `answer` is the longest answer in
tokens. The critic starts from the reward model. No result has been measured with it
yet; that of the same stages on the embedded world is in docs/results.md.
"""

from experiments import common
from stagecraft import defaults


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        **common.RECIPE,
        prompts="",
        length=1024,
        answer=128,
        steps=100,
        reward_steps=100,
        batch=32,
        heldout=0.02,
    )
    c, start = common.begin(arg)
    pairs = common.files(arg, "data", "") or common.world_pairs(c, start)
    c.stages.reward = defaults.stage(
        "reward",
        start_from=start,
        data=dict(files=pairs, length=arg.length, heldout_share=arg.heldout),
        batch_size=16,
        **common.tuned(arg, "reward", arg.reward_steps),
    )
    c.stages.ppo = defaults.stage(
        "policy",
        start_from=start,
        reward_from="reward",
        data=dict(files=common.files(arg, "prompts", "world:prompts.jsonl")),
        sampling=dict(max_new_tokens=arg.answer),
        batch_size=arg.batch,
        every=dict(log=1, save=10),
        **common.tuned(arg, "ppo", arg.steps),
    )
    return common.tiny(c) if arg.tiny else c
