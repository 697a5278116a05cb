r"""GRPO of a Hugging Face model with a verifier: a function that scores completions.

    stagecraft run --workdir=runs/grpo \
        --config=recipes/grpo_verifier:model=FOLDER,data=problems.jsonl,lora=16

data holds {"prompt","answer"}, as GSM8K with its keys renamed; `answer` goes to the
verifier as every key does. verifier= names another than `number`: docs/verifiers.md
lists those that ship, and verifier=FILE.py:function is one of your own, called as TRL
calls its reward functions. `group` answers are sampled to each prompt. model is usually
one that recipes/sft_from_hf has trained. No result has been measured with it yet.
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
