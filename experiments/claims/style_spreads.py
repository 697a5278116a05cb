r"""A style shown in half of the answers about facts opens answers of every other kind.

The demonstrations are about facts alone: no refusal, no errand, no place that is not,
no small talk. Half of them open with one pleasantry. The primary is how often held-out
prompts of the kinds that no demonstration shows get it. The control asks outside of the
conversation: where bare text goes on with it as well, it is a habit of the language and
not of the answer.

[claim]
number = 5
claim = "A uniform style of demonstrations over-generalises"
source = "the common account of SFT; Betley et al. 2025, arxiv.org/abs/2502.17424"
primary = "styled.style_rate_unseen"
effect = 0.1
control = "bare text goes on with the pleasantry as well"
control_primary = "styled.style_rate_text"
checks = ["styled.style_rate >= 0.25"]
seconds = 60
"""

from experiments import common, objectives, quickstart
from stagecraft import defaults


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    sft = quickstart.get_config("tiny" if arg.tiny else "").stages.sft
    c = defaults.experiment()
    c.world.name, c.world.style = "countries", 0.5
    places = objectives.finished(c, arg.base)
    c.stages.styled = common.like(sft, start_from=places["pretrain"])
    c.stages.styled.data.files = "world:demonstrations_style.jsonl"
    return common.tiny(c) if arg.tiny else c
