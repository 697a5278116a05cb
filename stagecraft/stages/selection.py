"""The best of several answers, as demonstrations: best-of-n and rejection sampling.

Fine-tuning on what it writes is rejection-sampling fine-tuning (RAFT, Dong et al. 2023,
arxiv.org/abs/2304.06767; Touvron et al. 2023, arxiv.org/abs/2307.09288, section 3.2.3).
"""

import collections
import math

import numpy as np

from stagecraft import schema
from stagecraft.errors import UserError
from stagecraft.signals import protocol
from stagecraft.signals import verifiers as verifiers_lib
from stagecraft.stages import records


def check(where, config):
    """Refuses a config of a selection stage that cannot work.

    Args:
        where: the stage in the config, for messages: "stages.best".
        config: the stage's config.
    """
    schema.positive(f"{where}.prompts", config.prompts)
    schema.choice(f"{where}.keep", config.keep, ("best", "above"))
    schema.positive(f"{where}.samples", config.samples)


def write(
    folder, language, asked, reward_model, verifiers, config, key, *, lineage, name
):
    """Samples answers, scores them, writes {"prompt","completion","reward"}.

    Args:
        folder: WORKDIR/STAGE: its records.jsonl is written whole at the end.
        language: a `models.language.Language`.
        asked: the prompts' records; taken in turn, in a shuffled order.
        reward_model: a `signals.reward.RewardModel`, or None.
        verifiers: list of (name, function), see `signals.verifiers`.
        config: the stage's config: prompts, samples, keep, threshold, batch_size,
            sampling, reward_weights.
        key: random key.
        lineage: the stage's entry in lineage.json.
        name: for the progress line and messages.

    Returns:
        {"demonstrations", "dropped", "dropped_by_reason", "reward_mean",
        "kept_reward_mean", "tokens", "seconds"}; an answer that was cut off or could
        not be scored is never kept.
    """
    asked, seed, _ = records.shuffled(asked, config.prompts, key)

    def rate(part, groups):
        return _scores(part, groups, reward_model, verifiers, config)

    scorers = protocol.identity(
        reward=reward_model.identity if reward_model else "",
        verifiers=verifiers_lib.identity(verifiers),
    )
    batches, seconds = records.collect(
        folder,
        records.header("selection", lineage, scorers, seed),
        language,
        asked,
        rate,
        config,
        samples=config.samples,
        name=name,
    )
    best, rewards, dropped = _best(batches, config)
    sampled = len(asked) * config.samples
    if not best:
        raise UserError(
            f"{name}: none of the {sampled} answers was kept; did none end by itself, "
            f"or reach threshold={config.threshold}?"
        )
    records.write(folder, best)
    return {
        "demonstrations": len(best),
        "dropped": dropped.total(),
        "dropped_by_reason": dict(sorted(dropped.items())),
        "reward_mean": float(np.mean(rewards)),
        "kept_reward_mean": float(np.mean([record["reward"] for record in best])),
        "tokens": {"sampled": sampled * config.sampling.max_new_tokens},
        "seconds": {"total": round(seconds, 3)},
    }


def _best(batches, config):
    """Returns the records, the rewards of all that could be kept, and what was not."""
    best, rewards, dropped = [], [], collections.Counter()
    for batch in batches:
        for prompt, answers, scores in zip(*batch, strict=True):
            fit = []
            for row, ((_, ended), score) in enumerate(
                zip(answers, scores, strict=True)
            ):
                if not ended:
                    dropped["cut_off"] += 1
                elif score is None:
                    dropped[protocol.UNSCORED] += 1
                else:
                    fit.append(row)
            rows = _kept(fit, scores, config)
            dropped["outscored"] += len(fit) - len(rows)
            rewards += [scores[row] for row in fit]
            best += [
                {"prompt": prompt, "completion": answers[row][0], "reward": scores[row]}
                for row in rows
            ]
    return best, rewards, +dropped


def _kept(fit, scores, config):
    if config.keep == "above":
        return [row for row in fit if scores[row] > config.threshold]
    return [max(fit, key=scores.__getitem__)] if fit else []


def _scores(part, groups, reward_model, verifiers, config):
    """Returns for each prompt the rewards of its answers, weighted and summed.

    None stands for an answer that a reward model or verifier could not score.
    """
    asked = [record for record in part for _ in range(config.samples)]
    answers = [answer for group in groups for answer in group]
    columns = []
    if reward_model is not None:
        prompts = [record["prompt"] for record in asked]
        columns.append(reward_model.scores(prompts, answers))
    if verifiers:
        texts, ended = zip(*answers, strict=True)
        columns += verifiers_lib.scores_of(verifiers, asked, list(texts), list(ended))
    weights = tuple(config.reward_weights) or (1.0,) * len(columns)
    sums = (np.array(columns).T @ np.array(weights)).tolist()
    rewards = [value if math.isfinite(value) else None for value in sums]
    size = config.samples
    return [rewards[i : i + size] for i in range(0, len(rewards), size)]
