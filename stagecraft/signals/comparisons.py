"""Pairs of a model's own answers, and a rater's word on which is better.

A rater is any function (prompt, answers, rng) -> 0, 1 or None, where answers are two
(text, ended) and None means that the pair is dropped. The rules of an embedded world
are one; one of your own is "package.module:function"; a reward model is another, whose
word may be kept as a probability.
"""

import importlib
import json
import math

import jax
import numpy as np

from stagecraft import metrics, storage, worlds
from stagecraft.errors import UserError
from stagecraft.signals.reward import RewardModel
from stagecraft.signals.selection import shuffled


def rater(name, world):
    """Finds a rater.

    Args:
        name: "world", or "package.module:function".
        world: name of the experiment's world, "" for none.
    """
    if name == "world":
        if not world:
            raise UserError(
                "rater='world' needs world.name; or name your own rater as "
                "rater='package.module:function'"
            )
        return worlds.get(world).rate
    module, colon, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"rater={name!r}: cannot import it ({error}); expected 'world' or "
            "'package.module:function'"
        ) from error


def write(path, language, prompts, rate, config, key, *, name="comparisons"):
    """Samples two answers a prompt, asks the rater, writes {"prompt","chosen",...}.

    Args:
        path: the records file; written whole at the end.
        language: a `models.language.Language`.
        prompts: texts or message lists; taken in turn, in a shuffled order.
        rate: the rater, a function or a `RewardModel`.
        config: the stage's config: prompts, batch_size, sampling, soft_labels.
        key: random key.
        name: for the progress line.

    Returns:
        {"pairs", "dropped", "tokens"}.
    """
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    asked = [prompts[i] for i in shuffled(len(prompts), config.prompts, rng)]
    rows = max(config.batch_size // 2, 1)
    parts = [asked[i : i + rows] for i in range(0, len(asked), rows)]
    progress = metrics.Progress(name, len(parts))
    lines, dropped = [], 0
    sampled = 0
    try:
        for number, part in enumerate(parts):
            answers = language.complete(
                [p for p in part for _ in range(2)],
                seed=seed + number,
                **dict(config.sampling),
            )
            pairs = [answers[2 * i : 2 * i + 2] for i in range(len(part))]
            verdicts = _verdicts(rate, part, pairs, rng)
            for prompt, two, verdict in zip(part, pairs, verdicts, strict=True):
                better, probability = verdict
                # The same words twice teach nothing, whether or not they ended.
                if better is None or two[0][0] == two[1][0]:
                    dropped += 1
                    continue
                record = {
                    "prompt": prompt,
                    "chosen": two[better][0],
                    "rejected": two[1 - better][0],
                }
                if config.soft_labels:
                    record["preference"] = probability
                # An answer that was cut off must not be learned as one that ended.
                for side, (_, ended) in (
                    ("chosen", two[better]),
                    ("rejected", two[1 - better]),
                ):
                    if not ended:
                        record[f"{side}_ended"] = False
                lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            sampled += 2 * len(part)
            progress.step(number + 1, {"pairs": len(lines)}, 2 * len(part))
    finally:
        progress.close()
    if not lines:
        raise UserError(
            f"{name}: the rater dropped all {len(asked)} pairs; are the answers "
            "identical (temperature 0?) or never to its liking?"
        )
    storage.write_text(path, "".join(lines))
    limit = config.sampling.max_new_tokens
    return {
        "pairs": len(lines),
        "dropped": dropped,
        "tokens": {"sampled": sampled * limit},
    }


def _verdicts(rate, prompts, pairs, rng):
    """(which answer is better or None, the probability that it is) of each pair."""
    if not isinstance(rate, RewardModel):
        return [(rate(p, two, rng), 1.0) for p, two in zip(prompts, pairs, strict=True)]
    twice = [p for p in prompts for _ in range(2)]
    found = rate(twice, [answer for two in pairs for answer in two])
    margins = np.subtract(found[1::2], found[::2])
    return [(int(m > 0), 1 / (1 + math.exp(-abs(m)))) for m in margins.tolist()]
