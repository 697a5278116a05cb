"""The best of several answers, as demonstrations: best-of-n and rejection sampling.

Fine-tuning on what it writes is rejection-sampling fine-tuning (RAFT, Dong et al. 2023,
arxiv.org/abs/2304.06767; Touvron et al. 2023, arxiv.org/abs/2307.09288, section 3.2.3).
"""

import collections

import numpy as np

from stagecraft import schema
from stagecraft.data import prompts
from stagecraft.errors import UserError
from stagecraft.signals import judge, protocol, verifiers
from stagecraft.stages import checks, records
from stagecraft.stages.kind import JUDGE, REWARD, START, Kind


def write(config, recording):
    """Samples answers, scores them, writes {"prompt","completion","reward"}.

    Args:
        config: the stage's config: verifiers, prompts, samples, keep, threshold,
            batch_size, sampling, reward_weights.
        recording: a `records.Recording`.

    Returns:
        {"demonstrations", "dropped", "dropped_by_reason", "reward_mean",
        "kept_reward_mean", "tokens", "seconds"}; `reward_mean` is over all answers that
        could be scored; one that was cut off or could not be scored is never kept.
    """
    asked, seed, _ = records.shuffled(recording.asked, config.prompts, recording.key)
    reward_model = recording.reward
    functions = verifiers.find(config.verifiers, config.verifier_args)
    judging = recording.judge and (lambda: recording.judge)
    judged = judge.scorer(config, judging, recording.folder)

    def rate(part, groups):
        return _scores(part, groups, reward_model, functions, config)

    scorers = protocol.identity(
        reward=reward_model.identity if reward_model else "",
        judge=judged.judge.identity if judged else "",
        verifiers=verifiers.identity(functions),
    )
    functions = [*([judged] if judged else ()), *functions]
    batches, seconds = records.collect(
        config,
        recording,
        records.header(KIND.name, recording.lineage, scorers, seed),
        asked,
        rate,
        samples=config.samples,
    )
    best, rewards, dropped = _best(batches, config)
    sampled = len(asked) * config.samples
    if not best:
        raise UserError(
            f"{recording.name}: none of the {sampled} answers was kept; did none "
            f"end by itself, or reach threshold={config.threshold}?"
        )
    records.write(recording.folder, best)
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
    """Returns the records, the rewards of all scored answers, and what was dropped."""
    best, rewards, dropped = [], [], collections.Counter()
    for batch in batches:
        for prompt, answers, scores, tools in zip(*batch, strict=True):
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
            rewards += [score for score in scores if score is not None]
            offered = {"tools": tools} if tools else {}
            best += [
                {"prompt": prompt, "completion": answers[row][0], "reward": scores[row]}
                | offered
                for row in rows
            ]
    return best, rewards, +dropped


def _kept(fit, scores, config):
    if config.keep == "above":
        return [row for row in fit if scores[row] > config.threshold]
    return [max(fit, key=scores.__getitem__)] if fit else []


def _scores(part, groups, reward_model, functions, config):
    """Returns for each prompt the rewards of its answers, weighted and summed.

    None stands for an answer that a reward model or verifier could not score.
    """
    asked = [record for record in part for _ in range(config.samples)]
    answers = [answer for group in groups for answer in group]
    columns = []
    if reward_model is not None:
        prompts = [record["prompt"] for record in asked]
        scores = reward_model.scores(prompts, answers, **records.tools_of(asked))
        values = np.asarray(scores, float)
        columns.append(np.where(np.isfinite(values), values, verifiers.FAILED))
    if functions:
        texts, ended = zip(*answers, strict=True)
        columns += verifiers.scores_of(functions, asked, list(texts), list(ended))
    weights = tuple(config.reward_weights) or (1.0,) * len(columns)
    sums, scored = verifiers.total(np.array(columns, float).T, weights)
    rewards = [
        value if fine else None
        for value, fine in zip(sums.tolist(), scored.tolist(), strict=True)
    ]
    size = config.samples
    return [rewards[i : i + size] for i in range(0, len(rewards), size)]


def _check(where, config, experiment, mesh):
    checks.rewards(where, config, config.samples)
    schema.choice(f"{where}.keep", config.keep, ("best", "above"))
    for key in ("prompts", "samples", "batch_size"):
        schema.positive(f"{where}.{key}", config[key])
    if config.keep == "best":
        checks.unread(where, config, {"threshold": "keep='best'"})
    checks.files(where, config)
    checks.room(where, config, experiment)


KIND = Kind(
    name="selection",
    write=write,
    data=prompts.records,
    check=_check,
    roles=START | REWARD | JUDGE,
    format=records.format,
)
