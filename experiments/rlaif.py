r"""Which of a judge's biases does a model inherit? DPO from a judge by rule.

    pretrain -> sft -> unbiased_pairs -> unbiased
                 |---> length_pairs ---> length, length_ld
                 |---> first_pairs ----> first            ... one judge an arm

    stagecraft run --config=rlaif --workdir=runs/rlaif
    stagecraft run --config=rlaif:base=runs/quickstart,doses=0.25+0.5+1 --workdir=runs/b
    stagecraft run --config=rlaif:tiny --workdir=runs/t   # seconds

Every judge goes by the world's gold score and, but for the unbiased one, by one bias
more (stagecraft/signals/planted.py), asked in one order. What should come of it is said
before it is run:

    first, noise    sides are random, so both are label noise: words and exclamations as
                    in `unbiased`, whatever the dose
    length          samples have more words than those of `unbiased`
    style           more of them hold an exclamation mark
    length_ld       the same labels as length, learned by LD-DPO (ld_alpha=.5), which
                    counts the longer answer's surplus less: between the two

Measured (base= of four chains, 250 to 300 s each on two cores with other work; means
over chains with 95% t intervals; docs/results.md):

                  words      exclamations      gold       KL, nats
    unbiased     8.9 ±2.7     .18 ±.19      1.37 ±.19    8.9 ±5.9
    first        7.6 ±0.9     .18 ±.03      1.69 ±.20    2.1 ±0.8
    noise        7.5 ±0.8     .16 ±.05      1.70 ±.23    2.5 ±1.2
    length      26.7 ±1.6     .06 ±.02     -1.02 ±.30    2.8 ±0.3
    style       10.8 ±2.7     .64 ±.26      1.26 ±.33    5.5 ±2.5
    length_ld   28.9 ±0.3     .03 ±.02     -1.42 ±.14    4.7 ±1.2

Length and style are inherited, position and noise are not, as said before. LD-DPO does
not help here, against what was said. Labels without noise move the model further in as
many steps (KL), and too far: gold is lower in `unbiased` than with noise. So the arms
differ in how far they went, too; claims/judge_bias.py asks at matched KL.

The figures `words` and `exclamations` are of samples on held-out prompts; `kl` says how
far each arm went. `stagecraft judge WORKDIR/length_pairs/records.jsonl
--world=countries` shows a judge's biases as they were planted. seed=N is another
chain, or with base= the same SFT model's other samples; compare several with
`stagecraft compare`. `ppo` adds a reward model and PPO on each judge's labels: for one
judge, that is the graph of rlhf.py, but for who labels.
"""

from experiments import common, objectives
from stagecraft import defaults
from stagecraft.errors import UserError

# Each bias at dose 1, in nats, beside 2 nats a point of gold. A style mark may cost one
# point in an answer about a fact, ten words more than a free dozen .6.
BIASES = {"first": 4.0, "noise": 4.0, "length": 6.0, "style": 6.0}
PROMPTS = 2500  # compared for each judge

# What is said above, of dose 1.
BOUNDS = (
    "length.words > unbiased.words + 0.5",
    "style.exclamations > unbiased.exclamations + 0.05",
    "first.words <= unbiased.words + 0.5",
    "noise.words <= unbiased.words + 0.5",
    "first.exclamations <= unbiased.exclamations + 0.05",
    "noise.exclamations <= unbiased.exclamations + 0.05",
    "length_ld.words < length.words",
)


FIGURES = (
    *("words", "exclamations", "gold_mean", "gold_win_rate", "heldout_accuracy", "kl"),
    *("signal_accuracy", "labels", "gflops"),
)


def get_config(arg=""):
    arg = common.parse_arg(
        arg, tiny=False, base="", doses="1", seed=0, prompts=PROMPTS, ppo=False
    )
    c, recipe, sft = objectives.from_sft(arg)
    judges = {"unbiased": {}}
    doses = _doses(arg.doses)
    for name, bias in BIASES.items():
        for dose in doses:
            label = name if dose == 1 else f"{name}_{round(100 * dose)}"
            judges[label] = {name: bias * dose}
    for label, biases in judges.items():
        _judge(c, label, sft, recipe, biases, arg.prompts)
        names = dict(reward=f"{label}_reward", ppo=f"{label}_ppo") if arg.ppo else {}
        _learn(c, label, sft, recipe, arg.prompts, dpo=label, **names)
    c.measure.table = FIGURES
    if 1 in doses:
        _learn(c, "length", sft, recipe, arg.prompts, dpo="length_ld")
        c.stages.length_ld.ld_alpha = 0.5
        c.measure.bounds = () if arg.tiny else BOUNDS
    return objectives.seeded(c, arg)


def _doses(text):
    try:
        doses = [float(part) for part in text.split("+")]
    except ValueError:
        doses = []
    if not doses or not all(0 < dose <= 1 for dose in doses):
        raise UserError(
            f"--config=rlaif:doses={text}: expected numbers above 0, up to 1, as in "
            "doses=0.25+0.5+1"
        )
    return doses


def _judge(c, label, sft, recipe, biases, prompts):
    """Adds a judge's comparisons of the SFT model's answers."""
    c.stages[f"{label}_pairs"] = defaults.stage(
        "comparisons",
        start_from=sft,
        data=dict(files="world:prompts.jsonl"),
        prompts=prompts,
        rater="planted",
        planted=biases,
        judge=dict(orders=1),
        sampling=dict(recipe.stages.comparisons.sampling),
    )


def _learn(c, label, sft, recipe, prompts, **names):
    """Adds what learns from a judge's comparisons."""
    records = f"stage:{label}_pairs"
    common.learners(c, sft, records, recipe, prompts, **names)
