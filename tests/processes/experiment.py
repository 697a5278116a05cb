"""Three stages of the quickstart, a few steps each, and one with a reward from text."""

from experiments import quickstart
from stagecraft import defaults

KEPT = ("pretrain", "sft", "comparisons")


def brief(completions, **_):
    """More for fewer letters."""
    return [1 / (1 + len(text)) for text in completions]


def get_config(arg=""):
    del arg
    c = quickstart.get_config("tiny")
    for name in set(c.stages) - set(KEPT):
        del c.stages[name]
    c.measure.probes, c.measure.prompts, c.measure.bounds = False, 2, ()
    for name in ("pretrain", "sft"):
        c.stages[name].steps = 3
        c.stages[name].every = dict(log=1, eval=0, save=2, sample=0)
    c.stages.comparisons.update(prompts=16, batch_size=16)
    c.stages.grpo = defaults.stage(
        "group_policy",
        start_from="sft",
        data=dict(files="world:prompts.jsonl"),
        verifiers=f"{KEY}:brief",
        sampling=dict(max_new_tokens=6),
        batch_size=4,
        group_size=4,
        steps=2,
        optimizer=dict(lr=1e-3, warmup_steps=0),
        every=dict(log=1, eval=0, save=1, sample=0),
    )
    return c


KEY = "tests.processes.experiment"
