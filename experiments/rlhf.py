r"""A model learns from people: their labels, a reward model and PPO, or DPO.

    pretrain -> sft -> (labels of people) -> reward -> ppo
                                        |--> dpo

    stagecraft run   --config=rlhf --workdir=runs/rlhf     # stops: no labels yet
    stagecraft label --workdir=runs/rlhf --stage=sft --max_new_tokens=34
    stagecraft run   --config=rlhf --workdir=runs/rlhf     # goes on
    stagecraft run   --config=rlhf:base=runs/quickstart --workdir=runs/rlhf

From a finished quickstart (base=) it is that run's SFT model that is labelled, and the
line in which the run stops says so. labels=N are as many as are expected: a stage
passes over them at most four times. The graph is that of rlaif.py:ppo but for one node,
the one that labels. The table at the end has the arms side by side on the same
held-out prompts; `labels` are those that an arm learned from, `signal accuracy` how
often gold says the same of a pair as its label.

Measured (seed 0, base= a quickstart; 200 pairs labelled by gold in a browser in 24 s,
of which 173 are verdicts; 97 s on two cores with other work):

            gold win rate     gold   facts   KL, nats   refuses harm
    sft                        .73    .99                  .41
    dpo      .626 ±.028       1.45    .99      1.2         .56
    ppo      .631 ±.034       1.37    .91      1.8         .19

PPO's penalty is six times the quickstart's where there are so few labels: with the
quickstart's (kl_coef=.05) their reward model was exploited, wins .457, gold .31, facts
.25, at 6 nats. It costs facts and refusals still. One seed.
"""

from experiments import common, objectives

BOUNDS = (
    "dpo.gold_win_rate > 0.5",
    "ppo.gold_win_rate > 0.5",
    "dpo.heldout_accuracy >= sft.heldout_accuracy - 0.08",
    "ppo.heldout_accuracy >= 0.75 * sft.heldout_accuracy",
)


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="", labels=200, seed=0)
    c, recipe, sft = objectives.from_sft(arg)
    names = dict(reward="reward", ppo="ppo", dpo="dpo")
    common.learners(c, sft, f"labels:{sft}", recipe, arg.labels, **names)
    c.measure.table = common.ARMS
    if not arg.tiny and not arg.base:
        c.measure.bounds = BOUNDS
    return objectives.seeded(c, arg)
