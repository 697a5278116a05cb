"""Pairs of a model's own answers, and a rater's verdict on which is better."""

import collections

from stagecraft import schema
from stagecraft.data import prompts
from stagecraft.errors import UserError
from stagecraft.signals import protocol, raters
from stagecraft.signals.protocol import Sources, Verdict
from stagecraft.stages import checks, records
from stagecraft.stages.kind import REWARD, START, Kind


def write(config, recording):
    """Samples two answers a prompt, has them rated, writes {"prompt","chosen",...}.

    Args:
        config: the stage's config: rater, prompts, batch_size, sampling, soft_labels.
        recording: a `records.Recording`.

    Returns:
        {"pairs", "dropped", "dropped_by_reason", "tokens", "seconds"}.
    """
    asked, seed, rng = records.shuffled(recording.asked, config.prompts, recording.key)
    sources = Sources(recording.world, recording.reward)
    rater = raters.make(config, sources, rng)

    def rate(part, groups):
        pairs = [tuple(group) for group in groups]
        # A reward model reads answers as they were sampled; others judge the words.
        more = records.tools_of(part) if rater is recording.reward else {}
        verdicts = rater.rate([record["prompt"] for record in part], pairs, **more)
        return protocol.checked(verdicts, len(pairs), schema.plain(config.rater))

    batches, seconds = records.collect(
        config,
        recording,
        records.header(KIND.name, recording.lineage, rater.identity, seed),
        asked,
        rate,
        samples=2,
        rng=rng,
    )
    pairs, dropped = _pairs(batches, config.soft_labels)
    if not pairs:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        raise UserError(
            f"{recording.name}: the rater dropped all {len(asked)} pairs "
            f"({reasons}); identical answers come of sampling.temperature=0 or a model "
            "that has one answer"
        )
    records.write(recording.folder, pairs)
    limit = config.sampling.max_new_tokens
    return {
        "pairs": len(pairs),
        "dropped": dropped.total(),
        "dropped_by_reason": dict(sorted(dropped.items())),
        "tokens": {"sampled": 2 * len(asked) * limit},
        "seconds": {"total": round(seconds, 3)},
    }


def _pairs(batches, soft_labels):
    """Returns the records of rated pairs, and how many others there are by reason."""
    pairs, dropped = [], collections.Counter()
    for batch in batches:
        for prompt, pair, said, tools in zip(*batch, strict=True):
            verdict = Verdict(*said)
            # The same words twice teach nothing, whatever the rater says of them.
            if protocol.same_text(pair):
                dropped[protocol.IDENTICAL] += 1
            elif verdict.probability is None:
                dropped[verdict.reason] += 1
            else:
                record = _record(prompt, pair, verdict.probability, soft_labels)
                pairs.append(record | ({"tools": tools} if tools else {}))
    return pairs, dropped


def _record(prompt, pair, probability, soft_labels):
    chosen, rejected = pair if probability >= 0.5 else pair[::-1]
    record = {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]}
    if soft_labels:
        record["preference"] = max(probability, 1 - probability)
    # An answer that was cut off must not be learned as one that ended.
    for side, (_, ended) in (("chosen", chosen), ("rejected", rejected)):
        if not ended:
            record[f"{side}_ended"] = False
    return record


def _check(where, config, experiment, mesh):
    for key in ("prompts", "batch_size"):
        schema.positive(f"{where}.{key}", config[key])
    if (config.rater == "reward") != bool(config.reward_from):
        raise UserError(
            f"{where}.rater={config.rater!r} with reward_from={config.reward_from!r}: "
            "rater='reward' and reward_from go together"
        )
    raters.check(where, config, experiment.world.name)
    checks.files(where, config)
    checks.room(where, config, experiment)


KIND = Kind(
    name="comparisons",
    write=write,
    data=prompts.records,
    check=_check,
    roles=START | REWARD,
    format=records.format,
)
