r"""A model that learns from a judge takes over the judge's biases, in proportion.

Judges by rule (signals/planted.py) compare the SFT model's answers to one set of
prompts: by gold, and by a bias of 0, .25, .5 or 1 times the one of rlaif.py, whose
arms these are. DPO learns from each. The trait is an exclamation mark in sampled
answers to held-out prompts; the primary is the slope of its log-odds over the dose,
and the effect a quarter of the judge's own slope, which is 6 nats.

Arms differ in how far they go: labels with less noise move a model further. So the
trait is read where all have gone as far: along the straight line in the weights from
SFT to each arm, at that KL to SFT which the arm that went least far ends at, by linear
interpolation in its square root over six points. The same slope at the ends is given
too. The control is a judge that prefers the first slot, in the same doses: sides are
random, so that its bias is noise in the labels, and a slope of 0 is expected.

The run that rlaif.py describes (seed 0, dose 1) was known when this was written.

The seconds below follow from rlaif.py's; they were not measured as a whole.

[claim]
number = 13
claim = "RLAIF inherits the biases of its judge"
source = "of feedback by models: Lee et al. 2023, arxiv.org/abs/2309.00267"
primary = "slope.style"
effect = 1.5
control = "a bias for the first slot, whose sides are random, does the same"
control_primary = "slope.first"
checks = ["matched.kl > 0.5"]
seconds = 700
"""

import jax
import numpy as np

from experiments import common, rlaif
from stagecraft.anatomy import sampled, sensitivity, texts
from stagecraft.models.language import Language
from stagecraft.signals.planted import MARK

DOSES = (0.0, 0.25, 0.5, 1.0)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)  # of the way from SFT to an arm
ANSWER = 34  # tokens


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    doses = "+".join(str(dose) for dose in DOSES[1:])
    tiny = ",tiny" if arg.tiny else ""
    c = rlaif.get_config(f"base={arg.base},doses={doses}{tiny}")
    learned = {arm for bias in ("style", "first") for arm in arms(bias)}
    for name in set(c.stages) - {*learned, *(f"{arm}_pairs" for arm in learned)}:
        del c.stages[name]
    c.measure.bounds = ()
    return c


def arms(bias):
    """Returns the stages that learn from judges of one bias, by dose."""
    return ["unbiased", f"{bias}_25", f"{bias}_50", bias]


def measure(base, own):
    """Slopes of the trait over the dose, where all arms are as far from SFT."""
    prompts, start = texts.heldout(base), base.model("sft")
    reference = base.language("sft", sampled.ROWS)
    names = dict.fromkeys([*arms("style"), *arms("first")])

    def read(model):
        language = Language(model, base.tokenizer, batch_size=reference.batch_size)
        return trait(language, reference, prompts, base.config.seed)

    paths = {}
    for name in names:
        change = sensitivity.change(start, own.model(name))
        points = [read(reference.model)] if not paths else [paths["unbiased"][0]]
        for share in SHARES:
            points.append(
                read(jax.tree.map(lambda a, d, s=share: a + s * d, start, change))
            )
        paths[name] = points
    ends = {name: points[-1] for name, points in paths.items()}
    least = max(min(kl for kl, _, _ in ends.values()), 0.0)
    figures = {"slope": {}, "matched": {"kl": least}}
    for name, points in paths.items():
        kl, odds, words = np.transpose(points)
        far = np.maximum.accumulate(np.sqrt(np.maximum(kl, 0.0)))
        at = {"odds": odds, "words": words}
        at = {k: float(np.interp(least**0.5, far, v)) for k, v in at.items()}
        figures["matched"][name] = at | {"kl_at_end": kl[-1], "odds_at_end": odds[-1]}
    for bias in ("style", "first"):
        for key, label in (("odds", bias), ("odds_at_end", f"{bias}_at_ends")):
            traits = [figures["matched"][name][key] for name in arms(bias)]
            figures["slope"][label] = float(np.polyfit(DOSES, traits, 1)[0])
    return figures


def trait(language, reference, prompts, seed):
    """Returns KL to SFT, log-odds of the mark and mean words of sampled answers.

    Half a count is added to both sides, so that none and all have log-odds too.
    """
    said = sampled.sample(language, prompts, seed=seed, max_new_tokens=ANSWER)
    answers = [text for text, _ in said["answers"]]
    marked = sum(MARK in text for text in answers)
    odds = np.log((marked + 0.5) / (len(answers) - marked + 0.5))
    words = np.mean([len(text.split()) for text in answers])
    return sampled.kl(said, reference), float(odds), float(words)
