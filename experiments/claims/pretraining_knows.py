r"""What a model knows comes from pretraining, not from fine-tuning.

The full chain has read the facts of held-out countries as text, and was shown answers
about other countries alone. The scratch arm never pretrains: it gets demonstrations
about *all* countries, held-out ones too, for as many steps, rows and lengths as the
full chain takes altogether. Both are asked about held-out countries in a phrasing of
the question that scratch was not shown, and in bare text; capability is the mean of the
two. The floor is SFT from scratch on the usual demonstrations, and the range what the
full chain has above it. The primary is the share of the range that scratch lacks. The
control pretrains on text in which the facts are dealt out to the countries anew, and
fine-tunes as usual: if it does as well as the full chain, what counts is the language
and not the facts.

[claim]
number = 1
claim = "Capability comes from pretraining; fine-tuning only brings it out"
source = "Zhou et al. 2023 (LIMA), arxiv.org/abs/2305.11206"
primary = "(capability.full - capability.scratch) / capability.range"
effect = 0.5
control = "pretraining on text with shuffled facts, and the same SFT, does as well"
control_primary = "(capability.shuffled - capability.scratch) / capability.range"
checks = ["capability.range > 0.3"]
seconds = 260
"""

from experiments import common, objectives, quickstart
from stagecraft import defaults, worlds
from stagecraft.anatomy import sampled
from stagecraft.worlds.countries import taught


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    recipe = quickstart.get_config("tiny" if arg.tiny else "").stages
    c = defaults.experiment()
    c.world.name, c.world.taught = "countries", True
    objectives.finished(c, arg.base)
    steps = recipe.pretrain.steps + recipe.sft.steps
    c.stages.scratch = common.like(recipe.sft_scratch, steps=steps)
    c.stages.scratch.data.files = "world:demonstrations_everyone.jsonl"
    # Bare text would state the facts of all countries.
    c.stages.scratch.data.replay, c.stages.scratch.data.replay_share = "", 0.0
    c.stages.shuffled_pretrain = common.like(recipe.pretrain)
    c.stages.shuffled_pretrain.data.files = "world:text_shuffled.jsonl"
    c.stages.shuffled = common.like(recipe.sft, start_from="shuffled_pretrain")
    c.stages.shuffled.data.replay = "world:text_shuffled.jsonl"
    return common.tiny(c) if arg.tiny else c


def measure(base, own):
    """What each arm knows of held-out countries: {"capability", "phrasing", "text"}."""
    config = base.config
    split = worlds.split(config)
    arms = {"full": (base, "sft"), "floor": (base, "sft_scratch")}
    arms |= {name: (own, name) for name in ("scratch", "shuffled")}
    figures = {"capability": {}, "phrasing": {}, "text": {}}
    for arm, (run, stage) in arms.items():
        language = run.language(stage, sampled.ROWS)
        asked = taught.answered(language, split.test, taught.UNSEEN)
        text = taught.stated_elsewhere(language, split.test)
        figures["phrasing"][arm], figures["text"][arm] = asked, text
        figures["capability"][arm] = (asked + text) / 2
    own = figures["capability"]
    own["range"] = own["full"] - own["floor"]
    return figures
