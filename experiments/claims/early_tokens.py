r"""Alignment changes the first tokens of an answer most.

DPO's greedy answers to held-out prompts are read by the SFT model it started from: the
log of the mean divergence at the first three tokens over that at all later ones. The
effect is a factor of two. Any training might do so, since a model is least certain of
how to begin; the control is SFT gone on with, on the same demonstrations.

[claim]
number = 17
claim = "Token shifts of alignment come early in an answer"
source = "Lin et al. 2023, arxiv.org/abs/2312.01552, section 2"
primary = "early.dpo"
effect = 0.693
control = "more SFT from the same model shifts early tokens as much more"
control_primary = "early.more_sft"
checks = ["shift.dpo > 0.01", "shift.more_sft > 0.001"]
seconds = 40
"""

from experiments import common, objectives, quickstart
from stagecraft import defaults
from stagecraft.anatomy import texts, token_shift


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    sft = quickstart.get_config("tiny" if arg.tiny else "").stages.sft
    c = defaults.experiment()
    c.world.name = "countries"
    places = objectives.finished(c, arg.base)
    c.stages.more_sft = common.like(sft, start_from=places["sft"])
    return common.tiny(c) if arg.tiny else c


def measure(base, own):
    """How early the answers of both differ from their common parent's."""
    parent, figures = base.model("sft"), {"early": {}, "shift": {}}
    for run, name in ((base, "dpo"), (own, "more_sft")):
        said = texts.of_stage(run, name)
        row = token_shift.measure(run.model(name), parent, said.batch)
        figures["early"][name] = row["early"] or 0.0
        figures["shift"][name] = row["divergence"]
    return figures
