r"""SFT changes the weights little, held against more pretraining on the same schedule.

How far weights move is first of all the sum of the learning rates: under Adam each
step is about as long as its rate, whatever the data. So the claim is asked against
continued pretraining from the same model, with SFT's rates, steps, rows and lengths:
that arm is the control. The primary is the log of the ratio of both relative changes;
the effect is a factor of two.

[claim]
number = 3
claim = "Supervised fine-tuning makes a small change of the weights"
source = "Mukherjee et al. 2025, arxiv.org/abs/2505.11711, and what many take it for"
primary = "log(weights.continued.relative_change / weights.sft.relative_change)"
effect = 0.693
control = "continued pretraining on the same schedule moves the weights no further"
checks = ["weights.sft.relative_change > 0.01"]
seconds = 30
"""

from experiments import common, objectives, quickstart
from stagecraft import defaults
from stagecraft.anatomy import stored, weights


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    sft = quickstart.get_config("tiny" if arg.tiny else "").stages.sft
    c = defaults.experiment()
    c.world.name = "countries"
    places = objectives.finished(c, arg.base)
    c.stages.continued = defaults.stage(
        "language_model",
        start_from=places["pretrain"],
        data=dict(format="text", files="world:text.jsonl", length=64),
        steps=sft.steps,
        batch_size=sft.batch_size,
        optimizer=dict(sft.optimizer),
    )
    return common.tiny(c) if arg.tiny else c


def measure(base, own):
    """How far the control moved the weights of the model that SFT started from."""
    before = stored.weights_of(base.source("pretrain"))
    after = stored.weights_of(own.source("continued"))
    return {"weights": {"continued": weights.summary(before, after)}}
