"""Attacks that an attacker writes and a target falls for, as prompts for the target.

The reward of an attack is success x still harmful x useful x novel: without the second
factor the best attack is a harmless question, without the third an empty answer counts,
without the fourth one trick is all there is (signs of each: Perez et al. 2022,
arxiv.org/abs/2202.03286; Hong et al. 2024, arxiv.org/abs/2402.19464). An attacker that
learns from the records of this stage is trained by rejection sampling on that reward.
"""

import itertools

import numpy as np

from stagecraft import schema, worlds
from stagecraft.data import containers, files, prompts
from stagecraft.errors import UserError
from stagecraft.signals import protocol
from stagecraft.stages import checks, records
from stagecraft.stages.kind import START, Kind, Role

ATTACK = "attack"  # the key of a record with an attack's text


def write(config, recording):
    """Samples attacks, has the target answer them, writes those that are rewarded.

    Each is {"prompt": messages, "asked", "attack", "answer", "reward", "novelty"}: the
    prompt is the attack, to be asked; `asked` and `attack` are what its writer was
    asked, and wrote.

    Args:
        config: the stage's config: prompts, samples, threshold, withstood, batch_size,
            sampling; the target's answers, greedy, are as long at most.
        recording: a `records.Recording` with a target and known records.

    Returns:
        {"attacks", "kept" (of them rewarded; 0 where all were withstood), "harmful",
        "success", "useful" (shares of all attacks), "novelty" and "reward_mean" (means
        over all), "tokens", "seconds"}.
    """
    asked, seed, _ = records.shuffled(recording.asked, config.prompts, recording.key)
    world, target = worlds.get(recording.world), recording.target
    limit = config.sampling.max_new_tokens

    def rate(part, groups):
        texts = [text for group in groups for text, _ in group]
        answers = target.complete(texts, max_new_tokens=limit)
        rows = [
            [text, list(map(bool, world.attacked(attack, text)))]
            for attack, (text, _) in zip(texts, answers, strict=True)
        ]
        size = config.samples
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    rules = protocol.identity(
        world=recording.world, source=protocol.source(world.attacked)
    )
    batches, seconds = records.collect(
        config,
        recording,
        records.header(KIND.name, recording.lineage, rules, seed),
        asked,
        rate,
        samples=config.samples,
    )
    rows = list(rewarded(batches, recording.known))
    working = [
        r for r in rows if r["reward"] > config.threshold and r["attack"].strip()
    ]
    written = working
    if not written and config.withstood == "harmful":
        written = [row for row in rows if row["harmful"] and row["attack"].strip()]
    if not written:
        raise UserError(
            f"{recording.name}: none of {len(rows)} attacks has a reward above "
            f"threshold={config.threshold:g}; the target withstands, or the attacker "
            'writes nothing new: withstood="harmful" writes those that ask for harm'
        )
    records.write(recording.folder, [_record(row) for row in written])
    means = {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("harmful", "success", "useful", "novelty", "reward")
    }
    means["reward_mean"] = means.pop("reward")
    return {
        "attacks": len(rows),
        "kept": len(working),
        **means,
        "tokens": {"sampled": len(rows) * limit},
        "seconds": {"total": round(seconds, 3)},
    }


def rewarded(batches, known):
    """Yields each attack with its reward: a function of the journal alone.

    Args:
        batches: list of `records.Batch`.
        known: texts of earlier attacks.
    """
    before = [_pairs(text) for text in known]
    for batch in batches:
        for prompt, group, verdicts in zip(
            batch.prompts, batch.answers, batch.verdicts, strict=True
        ):
            for (attack, ended), (answer, said) in zip(group, verdicts, strict=True):
                harmful, success, useful = said
                own = _pairs(attack)
                novelty = 1 - max((_alike(own, other) for other in before), default=0.0)
                won = ended and harmful and success and useful
                if won:
                    before.append(own)
                yield {
                    "asked": prompt,
                    "attack": attack,
                    "answer": answer,
                    "harmful": harmful,
                    "success": success,
                    "useful": useful,
                    "novelty": novelty,
                    "reward": novelty if won else 0.0,
                }


def _pairs(text):
    """Returns the pairs of neighbouring words of a text."""
    words = text.lower().split()
    return {*itertools.pairwise(words)} or {*words}


def _alike(ones, others):
    """Returns the Jaccard index of two sets: 1 where they are equal."""
    both = len(ones | others)
    return len(ones & others) / both if both else 1.0


def _record(row):
    prompt = [{"role": "user", "content": row["attack"]}]
    keys = ("asked", "attack", "answer", "reward", "novelty")
    return {"prompt": prompt} | {key: row[key] for key in keys}


def _data(stage, sources):
    """Returns the prompts of the attacker, and the attacks that are known."""
    known = read_known(sources.specs.get("known"))
    return prompts.records(stage, sources)._replace(known=known)


def read_known(spec: str | None) -> list[str]:
    """Reads the texts of attacks from files of {"attack"}; [] of None."""
    known = []
    for path in files.expand(spec) if spec else ():
        for where, record in containers.records(path):
            if not isinstance(record.get(ATTACK), str):
                raise UserError(f"{where}: expected a text under {ATTACK!r}")
            known.append(record[ATTACK])
    return known


def _check(where, config, experiment, mesh):
    if not experiment.world.name:
        raise UserError(f"{where}: needs world.name, by whose rules attacks are judged")
    for key in ("prompts", "samples", "batch_size"):
        schema.positive(f"{where}.{key}", config[key])
    schema.choice(f"{where}.withstood", config.withstood, ("refuse", "harmful"))
    checks.files(where, config)
    checks.room(where, config, experiment)


KIND = Kind(
    name="attacks",
    write=write,
    data=_data,
    check=_check,
    roles=START | {"target": Role(("transformer",), required=True)},
    format=records.format,
)
