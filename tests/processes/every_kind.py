"""A stage of each kind that `experiment.py` leaves out, LoRA and a judge, all small."""

from pathlib import Path

from experiments import common, objectives, quickstart
from stagecraft import defaults
from tests.processes import experiment

LORA = dict(rank=2, alpha=4.0)
OFTEN = dict(log=1, eval=0, save=1, sample=0)


def beside(name):
    return str(Path(__file__).with_name(name))


def get_config(arg=""):
    """arg: base=WORKDIR, where experiment.py has run."""
    arg = common.parse_arg(arg, base="")
    c = defaults.experiment()
    recipe = quickstart.get_config("tiny")
    for key in ("world", "tokenizer", "model"):
        c[key] = recipe[key]
    places = objectives.finished(c, arg.base)
    c.measure.probes, c.measure.prompts, c.measure.bounds = False, 2, ()
    # So much that its answers end.
    c.stages.sft = common.like(
        recipe.stages.sft,
        start_from=places["sft"],
        steps=100,
        optimizer=dict(lr=1e-2, warmup_steps=0),
        every=dict(log=50, eval=0, save=0, sample=0),
    )
    pairs, sft = dict(files=places["pairs"], length=64), "sft"
    prompts = dict(files="world:prompts.jsonl")
    short, long = (dict(max_new_tokens=n) for n in (6, 24))
    trained = dict(
        batch_size=4,
        steps=2,
        optimizer=dict(lr=1e-3, warmup_steps=0),
        every=OFTEN,
    )
    asked = dict(data=prompts, prompts=16, batch_size=8, sampling=short)
    scored = dict(verifiers=f"{experiment.KEY}:brief")
    of_kind = {
        "reward": dict(data=pairs, lora=LORA, **trained),
        "preference": dict(data=pairs, lora=LORA, **trained),
        "unpaired_preference": dict(data=pairs, **trained),
        "online_preference": dict(data=prompts, sampling=short, **scored, **trained),
        "policy": dict(
            data=prompts, sampling=short, reward_from="reward", lora=LORA, **trained
        ),
        "selection": dict(samples=2, keep="best", **scored, **asked),
        "revisions": dict(
            constitution=beside("principles.toml"), revising=long, keep="all"
        )
        | asked
        | dict(sampling=long),
        "attacks": dict(target_from=sft, threshold=-1.0, **asked),
    }
    for kind, settings in of_kind.items():
        c.stages[kind] = defaults.stage(kind, start_from=sft, **settings)
    # It knows nothing: its labels have next to no probability.
    judge = dict(template=beside("judge.toml"), min_mass=0.0)
    asked |= dict(rater="judge", judge_from=sft, judge=judge)
    c.stages.judged = defaults.stage("comparisons", start_from=sft, **asked)
    return c
