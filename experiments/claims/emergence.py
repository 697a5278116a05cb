r"""With scale an ability is there at once, and nothing smooth tells of it beforehand.

The ladder is five models of growing compute, asked for facts of held-out countries in
bare text: a small one pretrained for 100, 200, 400 and 800 steps, each on a schedule of
its own, and the base chain's. Sharp is the share of facts stated exactly, smooth the
mean probability of the whole answer. The primary is the share of the sharp curve's
variance over the ladder that the smooth one leaves unexplained, at a link of one: where
it is small, the step is in the model and can be seen in its probabilities. The control
has no jump of its own: each fact's probability cut at one half, as greedy decoding cuts
it. Where that leaves as much unexplained, the metric made the step.

Seeds can differ where a curve of means is smooth: some have the ability and some have
not (Zhao et al. 2025, arxiv.org/abs/2502.17356). So the rung of 400 steps is trained
from eight seeds, and `seeds_400.groups` says how much better two groups fit their
shares than one does (difference of BIC; above 6 it is strong evidence). The base
chain's text composes no facts, so abilities that need two at once are not asked for
here; a world with two_hop has such text (docs/data.md). What notebooks/emergence.ipynb
shows of one run (seed 0, one size) was known beforehand.

A rung of 300 steps by itself, from Python's start to its report, takes 51 CPU seconds;
the seconds below follow from it, and were not measured as a whole.

[claim]
number = 12
claim = "Abilities emerge with scale: they are there at once, and nothing foretells it"
source = "Wei et al. 2022, arxiv.org/abs/2206.07682; against it 2304.15004"
primary = "unexplained.sharp"
effect = 0.1
control = "probabilities cut at one half leave as much unexplained"
control_primary = "unexplained.cut"
checks = ["sharp.pretrain > 0.5", "sharp.small_100 < 0.3"]
seconds = 450
"""

import numpy as np

from experiments import common, objectives, quickstart
from stagecraft import defaults, worlds
from stagecraft.anatomy import sampled, statistics
from stagecraft.worlds.countries import probes

STEPS = (100, 200, 400, 800)
SEEDS, STEP = 8, 400  # of the rung that is trained again
SMALL = dict(width=64, heads=2, kv_heads=2, ff_width=192)
LEAST = 0.02  # SD of shares that seeds have at least: two facts in a hundred


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    recipe = quickstart.get_config("tiny" if arg.tiny else "").stages
    c = defaults.experiment()
    c.world.name = "countries"
    objectives.finished(c, arg.base)
    if not arg.tiny:
        c.model.update(SMALL)
    for steps in STEPS:
        c.stages[f"small_{steps}"] = common.like(recipe.pretrain, steps=steps)
    for seed in range(1, 2 if arg.tiny else SEEDS):
        stage = common.like(recipe.pretrain, steps=STEP, seed=seed)
        c.stages[f"small_{STEP}_seed{seed}"] = stage
    return common.tiny(c) if arg.tiny else c


def measure(base, own):
    """Sharp and smooth metrics of each rung, and what one leaves of the other."""
    config = base.config
    countries = worlds.split(config).test
    rungs = {name: (own, name) for name in own.config.stages}
    rungs |= {"pretrain": (base, "pretrain")}
    figures = {"sharp": {}, "smooth": {}, "cut": {}, "nats": {}}
    for name, (run, stage) in rungs.items():
        exact, nats = asked(run.language(stage, sampled.ROWS), countries)
        likely = np.exp(nats)
        row = {"sharp": exact, "smooth": likely, "cut": likely > 0.5, "nats": nats}
        for key, values in row.items():
            figures[key][name] = float(np.mean(values))
    ladder = [*(f"small_{steps}" for steps in STEPS), "pretrain"]
    curves = {k: np.array([row[n] for n in ladder]) for k, row in figures.items()}
    left = {k: unexplained(curves[k], curves["smooth"]) for k in ("sharp", "cut")}
    again = [v for name, v in figures["sharp"].items() if f"_{STEP}" in name]
    groups = statistics.two_groups(again, LEAST) if len(again) > 2 else 0.0
    spread = {"groups": groups, "sd": float(np.std(again, ddof=1))}
    return figures | {"unexplained": left, f"seeds_{STEP}": spread}


def asked(language, countries):
    """Whether each fact is stated exactly, and how likely: bool[N], f64[N] in nats."""
    stems, values = probes.cloze(countries)
    said = language.complete(stems, chat=False, max_new_tokens=10)
    exact = [probes.begins(t, v) for (t, _), v in zip(said, values, strict=True)]
    nats = language.logprob(stems, [f" {value}" for value in values])
    return np.array(exact), np.array(nats)


def unexplained(curve, smooth):
    """Returns the share of a curve's variance that `smooth` leaves; 0 of a flat one."""
    whole = np.sum((curve - curve.mean()) ** 2)
    return float(np.sum((curve - smooth) ** 2) / whole) if whole else 0.0
