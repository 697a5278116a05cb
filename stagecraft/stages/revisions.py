"""A model's answers, revised by itself under a constitution: supervised CAI.

Each prompt is answered; then, as often as `revisions` says, a principle is drawn, the
model is asked to criticise its last answer by it, and to write it again (Bai et al.
2022, arxiv.org/abs/2212.08073, section 3). Critique and revision request are of one
principle; an answer that is revised again stands alone, without what was said of the
one before. With `revisions=0` the answers are written as they are: helpful samples.
"""

import collections
from typing import NamedTuple

import numpy as np

from stagecraft import metrics, schema, worlds
from stagecraft.data import prompts
from stagecraft.errors import UserError
from stagecraft.signals import constitution, protocol
from stagecraft.signals import world as world_rater
from stagecraft.stages import checks, records
from stagecraft.stages.kind import START, Kind
from stagecraft.text import chat, diversity

TOO_LONG = ("", False)  # what stands for a reply that there was no room for


class Step(NamedTuple):
    """One revision of an answer.

    Attributes:
        principle: id of the one whose critique was asked for; `reviser` of the other,
            the same unless they are drawn apart.
        critique: the text; "" without one.
        revision: the text; `ended` whether it ended by itself.
    """

    principle: str
    reviser: str
    critique: str
    revision: str
    ended: bool


def write(config, recording):
    """Samples answers, criticises and revises them, writes {"prompt","completion",...}.

    Args:
        config: the stage's config: constitution, revisions, critique, paired, reviser,
            keep, prompts, batch_size, sampling, revising.
        recording: a `records.Recording`.

    Returns:
        {"demonstrations", "dropped", "dropped_by_reason", "revisions", "principles",
        "tokens", "seconds"}; `revisions` has figures of each revision in turn, from the
        first answers on, `principles` of each principle.
    """
    asked, seed, _ = records.shuffled(recording.asked, config.prompts, recording.key)
    whole = constitution.Constitution(())
    if config.revisions:
        whole = constitution.read(config.constitution, "constitution")
    principles = whole.revising()
    world = recording.world and worlds.get(recording.world)
    by_world = config.reviser == "world"
    rater = protocol.identity(
        constitution=[list(one) for one in principles],
        examples=[list(one) for one in whole.examples],
        reviser=world_rater.source(world) if by_world else config.reviser,
    )
    reviser = _Reviser(config, recording, whole, seed, world)
    header = records.header(KIND.name, recording.lineage, rater, seed)
    rows, seconds = _revised(reviser, asked, header)
    source = {
        "signal": "constitution",
        "generator": recording.lineage.parents["start_from"]["id"],
        "constitution": rater,
    }
    kept, dropped = _kept(rows, config.keep, source, principles)
    if not kept:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        raise UserError(f"{recording.name}: none of the answers was kept ({reasons})")
    records.write(recording.folder, kept)
    measured = getattr(world, "revision_figures", None)
    calls = 1 + config.revisions * (1 + config.critique) * (not by_world)
    return {
        "demonstrations": len(kept),
        "dropped": dropped.total(),
        "dropped_by_reason": dict(sorted(dropped.items())),
        "revisions": _by_revision(rows, measured),
        "principles": _by_principle(rows, measured),
        "tokens": {"sampled": calls * len(asked) * config.sampling.max_new_tokens},
        "seconds": {"total": round(seconds, 3)},
    }


class _Reviser:
    """Draws principles, and asks the model or the world's rules."""

    def __init__(self, config, recording, whole, seed, world):
        self.config, self.recording, self.seed = config, recording, seed
        self.principles, self.examples = whole.revising(), whole.examples
        self.world = world

    def answers(self, number, part):
        """Returns the journal's entry of first answers to a batch of prompts."""
        asked = [record["prompt"] for record in part]
        answers = self.recording.language.complete(
            asked, seed=self.seed + number, **self.config.sampling
        )
        return {"batch": number, "prompts": asked, "answers": answers}

    def critiques(self, number, step, asked, texts):
        """Returns the entry of principles and critiques of a batch of answers."""
        rng = np.random.default_rng([self.seed, number, step])
        count = len(self.principles)
        choices = rng.integers(count, size=(2, len(asked))).tolist()
        if self.config.paired:
            choices[1] = choices[0]
        ids = [[self.principles[i].id for i in row] for row in choices]
        entry = {"batch": number, "revision": step, "principles": ids}
        if not self.config.critique or self.config.reviser != "model":
            return entry | {"critiques": [["", True]] * len(asked)}
        requests = [self.principles[i].critique for i in choices[0]]
        turns = [self._turns(*row) for row in zip(asked, texts, requests, strict=True)]
        return entry | {"critiques": self._complete(turns, number, 2 * step)}

    def revisions(self, number, step, asked, texts, critiques):
        """Returns the entry of revisions, from that of critiques."""
        if self.config.reviser == "world":
            rng = np.random.default_rng([self.seed, number, step, 1])
            revised = [
                [self.world.revise(prompt, text, rng), True]
                for prompt, text in zip(asked, texts, strict=True)
            ]
            return {"batch": number, "revision": step, "revisions": revised}
        by_id = {one.id: one for one in self.principles}
        turns = []
        for i, (prompt, text) in enumerate(zip(asked, texts, strict=True)):
            first, second = (by_id[row[i]] for row in critiques["principles"])
            if self.config.critique:
                said = critiques["critiques"][i][0]
                row = self._turns(prompt, text, first.critique, said, second.revision)
            else:
                row = self._turns(prompt, text, second.revision)
            turns.append(row)
        revised = self._complete(turns, number, 2 * step + 1)
        return {"batch": number, "revision": step, "revisions": revised}

    def _turns(self, prompt, *texts):
        turns = [turn for example in self.examples for turn in example]
        turns += chat.as_messages(prompt)
        for i, text in enumerate(texts):
            turns.append({"role": ("assistant", "user")[i % 2], "content": text})
        return turns

    def _complete(self, turns, number, call):
        """Returns a reply to each conversation; `TOO_LONG` to those without room."""
        language, settings = self.recording.language, dict(self.config.revising)
        room = language.model.config.max_length - settings["max_new_tokens"]
        lengths = [len(language.encode(row, chat_format=True)) for row in turns]
        fit = [i for i, length in enumerate(lengths) if length <= room]
        seed = self.seed + 7919 * (call + 1) + number
        replies = language.complete([turns[i] for i in fit], seed=seed, **settings)
        out = [TOO_LONG] * len(turns)
        for i, reply in zip(fit, replies, strict=True):
            out[i] = reply
        return out


def _revised(reviser, asked, header):
    """Returns [(prompt, (answer, ended), [`Step`])], and the seconds they took."""
    config, recording = reviser.config, reviser.recording
    size = config.batch_size
    parts = [asked[i : i + size] for i in range(0, len(asked), size)]
    rows, seconds = [], 0.0
    progress = metrics.Progress(recording.name, len(parts), unit="answers")
    try:
        with records.Journal(recording.folder / records.JOURNAL, header) as journal:
            for number, part in enumerate(parts):
                said, replayed = journal.once(reviser.answers, number, part)
                seconds += said["seconds"]
                batch, texts = said["prompts"], [text for text, _ in said["answers"]]
                steps = [[] for _ in batch]
                for step in range(config.revisions):
                    critiques, _ = journal.once(
                        reviser.critiques, number, step, batch, texts
                    )
                    new, replayed = journal.once(
                        reviser.revisions, number, step, batch, texts, critiques
                    )
                    seconds += critiques["seconds"] + new["seconds"]
                    texts = [text for text, _ in new["revisions"]]
                    for own, *one in zip(
                        steps,
                        *critiques["principles"],
                        critiques["critiques"],
                        new["revisions"],
                        strict=True,
                    ):
                        first, second, critique, revision = one
                        own.append(Step(first, second, critique[0], *revision))
                rows += zip(batch, map(tuple, said["answers"]), steps, strict=True)
                if not replayed:
                    progress.step(number + 1, {}, len(part))
    finally:
        progress.close()
    return rows, seconds


def _kept(rows, keep, source, principles):
    """Returns the records, and {reason: count} of the revisions that are in none."""
    requests = {text for one in principles for text in (one.critique, one.revision)}
    kept, dropped = [], collections.Counter()
    for prompt, (initial, ended), steps in rows:
        # Without a revision the answer itself is what is learned.
        steps = steps or [Step("", "", "", initial, ended)]
        for number, step in enumerate(steps):
            if keep == "last" and number < len(steps) - 1:
                continue
            if reason := _unfit(step, requests):
                dropped[reason] += 1
                continue
            record = {"prompt": prompt, "completion": step.revision}
            record |= {"initial": initial, "initial_ended": ended}
            record["revisions"] = [one._asdict() for one in steps[: number + 1]]
            kept.append(record | source)
    return kept, dropped


def _unfit(step, requests):
    """Returns why a revision is not to be learned; "" where it is."""
    if (step.revision, step.ended) == TOO_LONG:
        return "too_long"
    if not step.ended:
        return "cut_off"
    if not step.revision.strip():
        return "empty"
    echo = step.revision == step.critique
    return "echo" * (echo or any(text in step.revision for text in requests))


def _by_revision(rows, measured):
    """Returns figures of the first answers and of each revision in turn."""
    out = []
    for number in range(len(rows[0][2]) + 1):
        part = [
            (
                prompt,
                *(
                    first
                    if not number
                    else (steps[number - 1].revision, steps[number - 1].ended)
                ),
            )
            for prompt, first, steps in rows
        ]
        texts = [text for _, text, _ in part]
        figures = {
            "ended": float(np.mean([ended for *_, ended in part])),
            "words": float(np.mean([len(text.split()) for text in texts])),
            "distinct_2": diversity.distinct_2(texts),
        }
        if number:
            before = [_before(row, number - 1) for row in rows]
            same = [one == two for one, two in zip(before, texts, strict=True)]
            figures["unchanged"] = float(np.mean(same))
        if measured:
            steps = [row[2][number - 1].critique if number else "" for row in rows]
            figures |= measured([p for p, *_ in part], texts, steps)
        out.append(figures)
    return out


def _before(row, number):
    _, (initial, _), steps = row
    return steps[number - 1].revision if number else initial


def _by_principle(rows, measured):
    """Returns {id: figures} of the revisions whose critique was by that principle."""
    groups = collections.defaultdict(list)
    for row in rows:
        for number, step in enumerate(row[2]):
            groups[step.principle].append((row[0], _before(row, number), step))
    out = {}
    for name, part in sorted(groups.items()):
        asked, before, steps = zip(*part, strict=True)
        revised = [step.revision for step in steps]
        same = [one == two for one, two in zip(before, revised, strict=True)]
        figures = {"count": len(part), "unchanged": float(np.mean(same))}
        figures["ended"] = float(np.mean([step.ended for step in steps]))
        if measured:
            critiques = [step.critique for step in steps]
            figures |= measured(asked, revised, critiques)
        out[name] = figures
    return out


def _check(where, config, experiment, mesh):
    for key in ("prompts", "batch_size"):
        schema.positive(f"{where}.{key}", config[key])
    schema.positive(f"{where}.revisions", config.revisions, zero=True)
    schema.choice(f"{where}.keep", config.keep, ("last", "all"))
    schema.choice(f"{where}.reviser", config.reviser, ("model", "world"))
    key = f"{where}.constitution"
    if not config.revisions:
        read = ("constitution", "critique", "paired", "reviser", "keep")
        checks.unread(where, config, dict.fromkeys(read, "revisions=0"))
    elif not constitution.read(config.constitution, key).revising():
        raise UserError(
            f"{key}={config.constitution!r}: no principle has a critique and a revision"
        )
    if config.reviser == "world":
        because = {"critique": "reviser='world'", "paired": "reviser='world'"}
        checks.unread(where, config, because)
        name = experiment.world.name
        if not name or not hasattr(worlds.get(name), "revise"):
            raise UserError(
                f"{where}.reviser='world': needs world.name, of a world that revises"
            )
    if not config.critique:
        checks.unread(where, config, {"paired": "critique=False"})
    checks.files(where, config)
    checks.room(where, config, experiment)


KIND = Kind(
    name="revisions",
    write=write,
    data=prompts.records,
    check=_check,
    roles=START,
    format=records.format,
)
