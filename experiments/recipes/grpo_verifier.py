r"""GRPO of a Hugging Face model with a verifier: a function that scores completions.

    stagecraft run --workdir=runs/grpo \
        --config=recipes/grpo_verifier:model=FOLDER,data=problems.jsonl,lora=16

data holds {"prompt","answer"}, as GSM8K with its keys renamed; `answer` goes to the
verifier as every key does. verifier= names another than `number`: docs/verifiers.md
lists those that ship, and verifier=FILE.py:function is one of your own, called as TRL
calls its reward functions. `group` answers are sampled to each prompt. model is usually
one that recipes/sft_from_hf has trained.

Measured with SmolLM2-135M-Instruct on GSM8K's problems of less than 220 characters, on
two CPU cores, one seed, a function as people write them for TRL that pays 1 where the
completion holds the answer (verifier=rewards.py:trl_style,group=4,answer=48,batch=2,
steps=12,lr=1e-5): it runs and logs rewards/trl_style/mean; 8 completions a step earn 0
to 0.5, 9 of 96 in all, and 48 tokens end almost no answer. That is too short to learn
from: two thirds of the steps have no group that differs.
"""

from experiments import common
from stagecraft import defaults


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        **common.RECIPE,
        verifier="number",
        group=8,
        answer=256,
        steps=100,
        batch=8,
    )
    c, start = common.begin(arg)
    settings = {}
    if not arg.data and arg.tiny:  # the world's prompts have no answers beside them
        arg.verifier, settings = "length", dict(most=20)
    c.stages.grpo = defaults.stage(
        "group_policy",
        start_from=start,
        verifiers=arg.verifier,
        verifier_args=settings,
        data=dict(files=common.files(arg, "data", "world:prompts.jsonl")),
        sampling=dict(max_new_tokens=arg.answer),
        group_size=arg.group,
        batch_size=arg.batch,
        every=dict(log=1, save=10),
        **common.tuned(arg, "ppo", arg.steps),
    )
    return common.tiny(c) if arg.tiny else c
