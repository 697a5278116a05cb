r"""GRPO of a Hugging Face model with a verifier: a function that scores completions.

    stagecraft run --workdir=runs/grpo \
        --config=recipes/grpo_verifier:model=FOLDER,data=problems.jsonl,lora=16

data holds {"prompt","answer"}, as GSM8K with its keys renamed; `answer` goes to the
verifier as every key does. verifier=package.module:function names your own, called as
TRL calls its reward functions: `correct` below is one. `group` answers are sampled to
each prompt. model is usually one that recipes/sft_from_hf has trained. No result has
been measured with it yet.
"""

import re

from experiments import common
from stagecraft import defaults

HERE = "experiments.recipes.grpo_verifier"


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        **common.RECIPE,
        verifier=f"{HERE}:correct",
        group=8,
        answer=256,
        steps=100,
        batch=8,
    )
    c, start = common.begin(arg)
    if not arg.data and arg.tiny:  # the world's prompts have no answers beside them
        arg.verifier = f"{HERE}:brief"
    c.stages.grpo = defaults.stage(
        "group_policy",
        start_from=start,
        verifiers=arg.verifier,
        data=dict(files=common.files(arg, "data", "world:prompts.jsonl")),
        sampling=dict(max_new_tokens=arg.answer),
        group_size=arg.group,
        batch_size=arg.batch,
        every=dict(log=1, save=10),
        **common.tuned(arg, "ppo", arg.steps),
    )
    return common.tiny(c) if arg.tiny else c


def correct(completions, answer, **_):
    """1 where the last number of a completion is the last of its answer, else 0."""
    return [
        float(bool(_numbers(answer_)) and _numbers(text)[-1:] == _numbers(answer_)[-1:])
        for text, answer_ in zip(map(_text, completions), answer, strict=True)
    ]


def brief(completions, **_):
    """The shorter a completion, the more: a verifier that needs no answer."""
    return [-len(_text(one)) / 100 for one in completions]


def _text(completion):
    """The text of a completion, which is a list of messages where its prompt is one."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def _numbers(text):
    texts = re.findall(r"-?[\d,]*\.?\d+", str(text))
    return [float(number.replace(",", "")) for number in texts]
