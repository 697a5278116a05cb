"""The best of several answers, as demonstrations: best-of-n and rejection sampling.

Fine-tuning on what it writes is rejection-sampling fine-tuning (RAFT, Dong et al. 2023,
arxiv.org/abs/2304.06767; Touvron et al. 2023, arxiv.org/abs/2307.09288, section 3.2.3).
"""

import json
import math

import jax
import numpy as np

from stagecraft import metrics, storage
from stagecraft.errors import UserError
from stagecraft.signals import verifier

REWARD_MODEL = "reward_model"


def write(path, language, records, reward_model, verifiers, config, key, *, name):
    """Samples answers, scores them, writes {"prompt","completion","reward"}.

    Args:
        path: the records file; written whole at the end.
        language: a `models.language.Language`.
        records: the prompts' records; taken in turn, in a shuffled order.
        reward_model: a `signals.reward.RewardModel`, or None.
        verifiers: list of (name, function), see `signals.verifier`.
        config: the stage's config: prompts, samples, keep, threshold, batch_size,
            sampling, reward_weights.
        key: random key.
        name: for the progress line.

    Returns:
        {"demonstrations", "dropped", "reward_mean", "kept_reward_mean", "tokens"}; an
        answer that was cut off or could not be scored is never kept.
    """
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    order = shuffled(len(records), config.prompts, np.random.default_rng(seed))
    size = max(config.batch_size // config.samples, 1)
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    progress = metrics.Progress(name, len(parts))
    lines, every, best = [], [], []
    try:
        for number, part in enumerate(parts):
            asked = [records[i] for i in part for _ in range(config.samples)]
            prompts = [r["prompt"] for r in asked]
            answers = language.complete(
                prompts, seed=seed + number, **dict(config.sampling)
            )
            scored = _scores(asked, answers, reward_model, verifiers, config)
            for start in range(0, len(asked), config.samples):
                rows = range(start, start + config.samples)
                fit = [r for r in rows if answers[r][1] and math.isfinite(scored[r])]
                every += [scored[r] for r in fit]
                for row in _kept(fit, scored, config):
                    best.append(scored[row])
                    record = {
                        "prompt": prompts[row],
                        "completion": answers[row][0],
                        "reward": scored[row],
                    }
                    lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            progress.step(number + 1, {"kept": len(lines)}, len(asked))
    finally:
        progress.close()
    sampled = len(order) * config.samples
    if not lines:
        raise UserError(
            f"{name}: none of the {sampled} answers was kept; did none end by itself, "
            f"or reach threshold={config.threshold}?"
        )
    storage.write_text(path, "".join(lines))
    return {
        "demonstrations": len(lines),
        "dropped": sampled - len(lines),
        "reward_mean": float(np.mean(every)),
        "kept_reward_mean": float(np.mean(best)),
        "tokens": {"sampled": sampled * config.sampling.max_new_tokens},
    }


def shuffled(rows, count, rng):
    """`count` row numbers in a random order, all of them before any comes again."""
    order = []
    while len(order) < count:
        order += rng.permutation(rows).tolist()
    return order[:count]


def _kept(fit, scored, config):
    if config.keep == "above":
        return [row for row in fit if scored[row] > config.threshold]
    return [max(fit, key=scored.__getitem__)] if fit else []


def _scores(records, answers, reward_model, verifiers, config):
    """The weighted sum of all rewards of each answer; NaN where one could not say."""
    prompts, columns = [r["prompt"] for r in records], []
    if reward_model is not None:
        columns.append(reward_model(prompts, answers))
    if verifiers:
        texts, ended = zip(*answers, strict=True)
        columns += verifier.scores_of(verifiers, records, list(texts), list(ended))
    weights = tuple(config.reward_weights) or (1.0,) * len(columns)
    return (np.array(columns).T @ np.array(weights)).tolist()
