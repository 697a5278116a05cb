r"""Pushed too hard, a policy's true quality falls while its reward goes on rising.

The control pushes as hard against the gold score itself. If gold falls there too, what
fails is the optimisation and not the proxy. Measured as well, on ppo_hard once more
with its gold watched: the curve of gold over the square root of the KL, and the same of
the best of n of the SFT model's own answers (`anatomy/overoptimisation.py`).

[claim]
number = 10
claim = "Push RL too hard and the model over-optimises the reward: quality falls"
source = "Gao et al. 2022, arxiv.org/abs/2210.10760"
primary = "ppo.gold_mean - ppo_hard.gold_mean"
effect = 0.3
control = "pushed as hard against gold itself, gold falls as well"
control_primary = "ppo.gold_mean - gold_hard.gold_mean"
checks = ["ppo_hard.reward_mean > ppo.reward_mean", "ppo_hard.kl > 4"]
seconds = 400
"""

import contextlib

import numpy as np

from experiments import common, objectives, quickstart
from stagecraft import defaults, metrics, worlds
from stagecraft.anatomy import overoptimisation as over
from stagecraft.anatomy import sampled, texts
from stagecraft.data import readers
from stagecraft.errors import UserError
from stagecraft.models import scores

GOLD = "experiments.claims.over_optimised:gold"
PROMPTS, ANSWERS = 32, 64  # of best of n
STARTED = 1024  # answers that say where a path begins
SIZES = (2, 4, 8, 16, 32, 64)


def gold(prompts, completions, **_):
    """The world's own score of each completion, as a reward."""
    score = worlds.get("countries").gold
    return [score(p, text) for p, text in zip(prompts, completions, strict=True)]


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    recipe = quickstart.get_config("tiny" if arg.tiny else "").stages
    c = defaults.experiment()
    c.world.name = "countries"
    places = objectives.finished(c, arg.base)
    c.stages.gold_hard = common.like(
        recipe.ppo_hard, start_from=places["sft"], reward_from="", verifiers=GOLD
    )
    c.stages.watched = watched(recipe.ppo_hard, places)
    return common.tiny(c) if arg.tiny else c


def watched(stage, places, **changes):
    """A stage of PPO once more, its gold logged at every step and never trained on.

    Args:
        stage: as of the quickstart.
        places: where its SFT and reward models lie (`objectives.finished`).
        **changes: keys that differ.
    """
    sources = dict(start_from=places["sft"], reward_from=places["reward"])
    seen = dict(verifiers=GOLD, reward_weights=(1.0, 0.0))
    return common.like(stage, **sources, **seen, **changes)


def measure(base, own):
    """Both curves, where the path is long enough for one."""
    path = over.path(
        metrics.read(own.root / "watched" / "metrics.jsonl"), "reward_model", "gold"
    )
    start = started(base)
    figures = {"rl": _figures(path.distance, path.gold, over.RL, start)}
    parabola = _figures(path.distance, path.gold, over.BEST_OF_N, start)
    figures["rl"] |= {"left_out_of_parabola": parabola.get("left_out")}
    start, distance, best = best_of_n(base)
    return figures | {"best_of_n": _figures(distance, best, over.BEST_OF_N, start)}


def _figures(distance, quality, form, start):
    # A tiny run's path is too short for any curve.
    with contextlib.suppress(UserError):
        return over.fit(distance, quality, form, start)._asdict()
    return {}


def started(run):
    """Returns the gold of the SFT model's answers to the prompts of PPO's training.

    A step of PPO has a tenth as many answers, and the curve is steepest where few of
    its steps are.

    Args:
        run: a finished quickstart, inside its mesh.
    """
    records = readers.prompts(f"{run.root}/world/prompts.jsonl")
    prompts = [one.prompt for one in records]
    prompts = (prompts * (1 + STARTED // len(prompts)))[:STARTED]
    answers, score = _sampled(run, prompts), worlds.get(run.config.world.name).gold
    scores = [score(p, *a) for p, a in zip(prompts, answers["answers"], strict=True)]
    return float(np.mean(scores))


def _sampled(run, prompts):
    language = run.language("sft", sampled.ROWS)
    return sampled.sample(language, prompts, seed=run.config.seed, max_new_tokens=34)


def best_of_n(run):
    """Samples the SFT model and picks by the reward model.

    Args:
        run: a finished quickstart, inside its mesh.

    Returns:
        gold of all answers; sqrt(KL) and gold of the best of each of `SIZES`. The KL is
        that of answers which all differ: a bound, since some are the same.
    """
    prompts = texts.heldout(run)[:PROMPTS]
    asked = [prompt for prompt in prompts for _ in range(ANSWERS)]
    answers = _sampled(run, asked)
    rows = [
        prompt + ids
        for prompt, ids in zip(answers["prompts"], answers["ids"], strict=True)
    ]
    shape = len(prompts), ANSWERS
    likes = np.reshape(scores.of_rows(run.model("reward"), rows), shape)
    score = worlds.get(run.config.world.name).gold
    true = [score(p, *one) for p, one in zip(asked, answers["answers"], strict=True)]
    true = np.reshape(true, shape)
    distance = np.sqrt([over.best_of_kl(n) for n in SIZES])
    return float(true.mean()), distance, [over.best_of(likes, true, n) for n in SIZES]
