"""Pairs of a model's own answers, and a rater's verdict on which is better."""

import collections

from stagecraft import schema
from stagecraft.data import prompts
from stagecraft.errors import UserError
from stagecraft.signals import protocol, raters
from stagecraft.signals.protocol import Sources, Verdict
from stagecraft.stages import checks, records
from stagecraft.stages.kind import JUDGE, REWARD, START, Kind

UNRATED = "records_unrated.jsonl"  # pairs without a verdict, and why


def write(config, recording):
    """Samples two answers a prompt, has them rated, writes {"prompt","chosen",...}.

    Args:
        config: the stage's config: rater, prompts, batch_size, sampling, soft_labels.
        recording: a `records.Recording`.

    Returns:
        {"pairs", "dropped", "dropped_by_reason", "tokens", "seconds"}; the tokens are
        those sampled and, where a judge counts them, those that it read and wrote.
    """
    asked, seed, rng = records.shuffled(recording.asked, config.prompts, recording.key)
    sources = Sources(
        recording.world, recording.reward, recording.judge, recording.folder
    )
    rater, name = raters.make(config, sources, rng), schema.plain(config.rater)
    failures = protocol.Failures(name, config.judge.max_failed)

    def rate(part, groups):
        pairs = [tuple(group) for group in groups]
        # A reward model reads answers as they were sampled; others judge the words.
        more = records.tools_of(part) if rater is recording.reward else {}
        verdicts = rater.rate([record["prompt"] for record in part], pairs, **more)
        verdicts = protocol.checked(verdicts, len(pairs), name)
        failures.see(verdict.reason for verdict in verdicts)
        return verdicts

    batches, seconds = records.collect(
        config,
        recording,
        records.header(KIND.name, recording.lineage, rater.identity, seed),
        asked,
        rate,
        samples=2,
        rng=rng,
    )
    # Who wrote the answers, and who compared them.
    source = {
        "signal": name,
        "generator": recording.lineage.parents["start_from"]["id"],
        "judge": rater.identity,
    }
    pairs, dropped, unrated = _pairs(batches, config.soft_labels, source)
    if not pairs:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        raise UserError(
            f"{recording.name}: the rater dropped all {len(asked)} pairs "
            f"({reasons}); identical answers come of sampling.temperature=0 or a model "
            "that has one answer"
        )
    records.write(recording.folder, pairs)
    records.write(recording.folder, unrated, UNRATED)
    limit = config.sampling.max_new_tokens
    return {
        "pairs": len(pairs),
        "dropped": dropped.total(),
        "dropped_by_reason": dict(sorted(dropped.items())),
        "tokens": {"sampled": 2 * len(asked) * limit} | _judged(pairs + unrated),
        "seconds": {"total": round(seconds, 3)},
    }


def _pairs(batches, soft_labels, source):
    """Returns the records of rated pairs, {reason: count} of others, and their records.

    Pairs of the same words are among neither records.
    """
    pairs, dropped, unrated = [], collections.Counter(), []
    for batch in batches:
        for prompt, pair, said, tools in zip(*batch, strict=True):
            verdict = Verdict(*said)
            # The same words twice teach nothing, whatever the rater says of them.
            if protocol.same_text(pair):
                dropped[protocol.IDENTICAL] += 1
            elif verdict.probability is None:
                dropped[verdict.reason] += 1
                answers = [text for text, _ in pair]
                record = {"prompt": prompt, "answers": answers}
                record |= {"reason": verdict.reason} | source
                unrated.append(record | (verdict.evidence or {}))
            else:
                record = _record(prompt, pair, verdict, soft_labels) | source
                record |= verdict.evidence or {}
                pairs.append(record | ({"tools": tools} if tools else {}))
    return pairs, dropped, unrated


def _judged(rows):
    """Returns the tokens of a judge's questions, and how many each attends to."""
    asked = [(row["tokens"], len(row["logps"])) for row in rows if "tokens" in row]
    total = sum(tokens for tokens, _ in asked)
    if not total:
        return {}
    # The orders of a pair are of the same length, but for what a template adds.
    seen = sum(tokens * (tokens / orders + 1) / 2 for tokens, orders in asked)
    return {"judged": total, "judged_context": seen / total}


def _record(prompt, pair, verdict, soft_labels):
    probability = verdict.probability
    first = probability >= 0.5
    chosen, rejected = pair if first else pair[::-1]
    record = {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]}
    likely = max(probability, 1 - probability)
    if soft_labels:
        record["preference"] = likely
    # Which of the two was sampled first: `logps` are in that order, then in the other.
    record |= {"probability": likely, "first": "chosen" if first else "rejected"}
    # An answer that was cut off must not be learned as one that ended.
    for side, (_, ended) in (("chosen", chosen), ("rejected", rejected)):
        if not ended:
            record[f"{side}_ended"] = False
    return record


def _check(where, config, experiment, mesh):
    for key in ("prompts", "batch_size"):
        schema.positive(f"{where}.{key}", config[key])
    checks.rater(where, config)
    raters.check(where, config, experiment.world.name)
    checks.files(where, config)
    checks.room(where, config, experiment)


KIND = Kind(
    name="comparisons",
    write=write,
    data=prompts.records,
    check=_check,
    roles=START | REWARD | JUDGE,
    format=records.format,
)
