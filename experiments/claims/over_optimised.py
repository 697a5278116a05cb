r"""Pushed too hard, a policy's true quality falls while its reward goes on rising.

The control pushes as hard against the gold score itself. If gold falls there too, what
fails is the optimisation and not the proxy.

[claim]
number = 10
claim = "Push RL too hard and the model over-optimises the reward: quality falls"
source = "Gao et al. 2022, arxiv.org/abs/2210.10760"
primary = "ppo.gold_mean - ppo_hard.gold_mean"
effect = 0.3
control = "pushed as hard against gold itself, gold falls as well"
control_primary = "ppo.gold_mean - gold_hard.gold_mean"
checks = ["ppo_hard.reward_mean > ppo.reward_mean", "ppo_hard.kl > 4"]
seconds = 240
"""

from experiments import common, objectives, quickstart
from stagecraft import defaults, worlds


def gold(prompts, completions, **_):
    """The world's own score of each completion, as a reward."""
    score = worlds.get("countries").gold
    return [score(p, text) for p, text in zip(prompts, completions, strict=True)]


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    recipe = quickstart.get_config("tiny" if arg.tiny else "").stages
    c = defaults.experiment()
    c.world.name = "countries"
    places = objectives.finished(c, arg.base)
    c.stages.gold_hard = common.like(
        recipe.ppo_hard,
        start_from=places["sft"],
        reward_from="",
        verifiers="experiments.claims.over_optimised:gold",
    )
    return common.tiny(c) if arg.tiny else c
