"""Stages of the quickstart, a few steps each, and one with a reward from text."""

from experiments import quickstart
from stagecraft import defaults


def brief(completions, **_):
    """More for fewer letters."""
    return [1 / (1 + len(text)) for text in completions]


def get_config(arg=""):
    c = quickstart.get_config("tiny")
    for name in ("sft_scratch", "ppo", "ppo_hard", "reward"):
        del c.stages[name]
    c.measure.draws, c.measure.prompts = 1, 4
    for stage in c.stages.values():
        if "steps" in stage:
            stage.steps, stage.every.save, stage.every.sample = 4, 2, 2
            stage.every.eval = 2
        else:
            stage.prompts, stage.batch_size = 16, 16
    c.stages.grpo = defaults.stage(
        "group_policy",
        start_from="sft",
        data=dict(files="world:prompts.jsonl"),
        verifiers="tests.processes.experiment:brief",
        sampling=dict(max_new_tokens=6),
        batch_size=4,
        group_size=4,
        steps=2,
        optimizer=dict(lr=1e-3, warmup_steps=0),
        every=dict(log=1, eval=0, save=1, sample=0),
    )
    return c
