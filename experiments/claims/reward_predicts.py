r"""A reward model predicts preferences nearly as well as its raters agree with gold.

Both accuracies are of order by gold among pairs of the SFT model's answers to held-out
prompts, so that neither is seen in training. A rater of this world is wrong now and
then; what its labels reach is the ceiling. The control asks whether a reward model is
needed at all: the better of "longer wins" and "shorter wins", picked with the answers
in hand, on the same pairs.

[claim]
number = 6
claim = "A reward model learns to predict human preferences"
source = "Stiennon et al. 2020, arxiv.org/abs/2009.01325"
primary = "reward.pair_accuracy / reward.label_accuracy"
effect = 0.9
control = "the length of answers alone orders them as well"
control_primary = "length.pair_accuracy / reward.label_accuracy"
checks = ["reward.label_accuracy >= 0.7"]
seconds = 10
"""

import numpy as np

from stagecraft import worlds
from stagecraft.anatomy import sampled


def measure(base, own):
    """How well the length of answers orders them, whichever way is better."""
    config, world = base.config, worlds.get(base.config.world.name)
    role = config.measure.split
    entities = getattr(worlds.split(config), role)
    prompts = world.probes.heldout_prompts(config.seed, entities, role)
    answers = sampled.Answers(base, prompts, world.probes.ANSWER)
    one, other = answers.of("sft", draws=2)
    lengths = [[len(ids) for ids in draw["ids"]] for draw in (one, other)]
    longer = np.subtract(*lengths)
    shares = [
        world.probes.pair_order(prompts, one["answers"], other["answers"], order)
        for order in (longer, -longer)
    ]
    known = [share for share in shares if share is not None]
    return {"length": {"pair_accuracy": float(max(known, default=0.5))}}
