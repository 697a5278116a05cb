r"""PPO raises what people prefer; with rewards that mean nothing it does not.

The control trains a reward model on labels drawn by a coin, of as many pairs of the
same model's answers, and runs the same PPO against it: whatever PPO does to answers by
pushing them at all, it does there too.

[claim]
number = 7
claim = "PPO raises the reward without drifting far from where it started"
source = "Bai et al. 2022, arxiv.org/abs/2204.05862, section 4.3"
primary = "ppo.gold_mean - sft.gold_mean"
effect = 0.4
control = "PPO against a reward model of labels drawn by a coin raises gold as much"
control_primary = "shuffled.gold_mean - sft.gold_mean"
checks = ["ppo.kl <= 8", "reward.pair_accuracy >= 0.6"]
seconds = 120
"""

from experiments import common, objectives, quickstart
from stagecraft import defaults


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    recipe = quickstart.get_config("tiny" if arg.tiny else "").stages
    c = defaults.experiment()
    c.world.name = "countries"
    places = objectives.finished(c, arg.base)
    c.stages.coin = defaults.stage(
        "comparisons",
        start_from=places["sft"],
        data=dict(files="world:prompts.jsonl"),
        prompts=4000,
        rater="planted",
        planted=dict(gold=0.0, noise=4.0),
        judge=dict(orders=1),
        sampling=dict(recipe.comparisons.sampling),
    )
    pairs = dict(files="stage:coin", length=64)
    c.stages.coin_reward = common.like(
        recipe.reward, start_from=places["sft"], data=pairs
    )
    c.stages.shuffled = common.like(
        recipe.ppo, start_from=places["sft"], reward_from="coin_reward"
    )
    return common.tiny(c) if arg.tiny else c
