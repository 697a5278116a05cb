"""What people are asked about: a prompt with two answers, or with more to rank."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from stagecraft import storage
from stagecraft.data import readers
from stagecraft.errors import UserError
from stagecraft.stages import records
from stagecraft.stages.records import Journal

MOST = 9  # answers of an item: one key each


class Item(NamedTuple):
    """A prompt with its answers.

    Attributes:
        prompt: a text or messages.
        answers: two or more of (text, whether it ended by itself).
    """

    prompt: str | list
    answers: list

    @property
    def id(self) -> str:
        """Returns what names the item in the journal."""
        return storage.digest([self.prompt, [text for text, _ in self.answers]])[:16]


def sample(
    run, stage, prompts, folder, *, count, answers, seed, settings
) -> list[Item]:
    """Samples answers of a finished stage to each prompt, or reads them again.

    What was sampled before a stop is not sampled again.

    Args:
        run: a `runs.Run`, inside its mesh.
        stage: name of a finished stage that writes text.
        prompts: texts or messages, taken in turn in a shuffled order.
        folder: of the labelling.
        count: prompts to answer; those whose answers are all alike are left out.
        answers: to each prompt; of those that are alike one is shown.
        seed: of the order and the sampling.
        settings: fields of `sampling.SamplingParams`.
    """
    rng, order = np.random.default_rng(seed), []
    while len(order) < count:
        order += rng.permutation(len(prompts)).tolist()
    asked = [prompts[i] for i in order[:count]]
    header = {
        "journal": records.VERSION,
        "kind": "answers",
        "model": run.source(stage).id(),
        "prompts": storage.digest(asked),
        "samples": answers,
        "seed": seed,
        "sampling": settings,
    }
    rows, items = 32, {}
    language, chat = run.language(stage, answers * rows), run.chat_format(stage)

    def answer(number, part):
        texts = [prompt for prompt in part for _ in range(answers)]
        given = language.complete(texts, chat=chat, seed=seed + number, **settings)
        groups = range(0, len(given), answers)
        return {"answers": [given[i : i + answers] for i in groups]}

    with Journal(Path(folder) / "answers.jsonl", header) as journal:
        for start in range(0, len(asked), rows):
            part = asked[start : start + rows]
            entry, _ = journal.once(answer, start, part)
            for prompt, group in zip(part, entry["answers"], strict=True):
                distinct = {text: (text, ended) for text, ended in reversed(group)}
                item = Item(prompt, list(distinct.values())[::-1])
                if len(distinct) > 1:
                    items[item.id] = item
    if not items:
        raise UserError(
            f"{stage}: all answers to each of {len(asked)} prompts are alike; give a "
            "--temperature above 0"
        )
    return list(items.values())


def read(spec: str) -> list[Item]:
    """Reads items from files of pairs; which answer they call better is not shown.

    Args:
        spec: files of {"prompt", "chosen", "rejected"} or {"prompt", "ranked"}.
    """
    items = {}
    for one in readers.comparisons(spec):
        answers = [
            (a[-1]["content"], a[-1].get("ended", True)) for a in one.answers[:MOST]
        ]
        item = Item(one.prompt, answers)
        if all(len(answer) == 1 for answer in one.answers):
            items[item.id] = item
    if not items:
        raise UserError(
            f"{spec}: no pair to show; expected answers of one turn, as in "
            '{"prompt": "...", "chosen": "...", "rejected": "..."}'
        )
    return list(items.values())
