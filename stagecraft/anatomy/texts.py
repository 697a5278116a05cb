"""Texts that models are compared on: answers to prompts, bare texts, judged pairs."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from stagecraft import worlds
from stagecraft.data import readers
from stagecraft.errors import UserError
from stagecraft.models import scores
from stagecraft.models.language import Language, rounded
from stagecraft.stages import records

NEW_TOKENS = 48  # of an answer
PROMPTS = 64  # read of a file, at most


class Texts(NamedTuple):
    """Answers of one model as a batch: i32 or bool [B, T] arrays by name."""

    batch: dict

    @classmethod
    def of(cls, rows: list[tuple[list[int], list[int]]]) -> "Texts":
        """Packs (prompt, answer) ids, a row each."""
        length = rounded(max(len(a) + len(b) for a, b in rows))
        batch = {
            k: np.zeros((len(rows), length), np.int32) for k in ("ids", "segments")
        }
        batch["mask"] = np.zeros((len(rows), length), bool)
        positions = np.arange(length, dtype=np.int32)
        batch["positions"] = np.tile(positions, (len(rows), 1))
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            batch["ids"][i, :end] = [*prompt, *answer]
            batch["mask"][i, len(prompt) : end] = True
            batch["segments"][i, :end] = 1
        return cls({name: jnp.asarray(array) for name, array in batch.items()})


def read_prompts(files: str) -> list:
    """Reads at most `PROMPTS` prompts."""
    prompts = [one.prompt for one in readers.prompts(files)][:PROMPTS]
    if not prompts:
        raise UserError(f"--prompts={files}: holds no prompt")
    return prompts


def answers(language: Language, prompts: Sequence, chat: bool) -> Texts:
    """Answers prompts greedily, as `Texts`."""
    if not chat:
        prompts = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    rows = [language.encode(prompt, chat_format=chat) for prompt in prompts]
    stops = language.stop_ids(chat_format=chat)
    how = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "stop_ids": stops}
    sampled = [ids for ids, _, _ in language.sample_ids(rows, **how)]
    answered = [(row, ids) for row, ids in zip(rows, sampled, strict=True) if ids]
    if len(answered) < 2:
        raise UserError("the model answers nothing to these prompts; give others")
    return Texts.of(answered)


def of_stage(run, name: str) -> Texts:
    """Answers a world's held-out prompts with a stage, greedily.

    Args:
        run: a `runs.Run` with a world, inside its mesh.
        name: a stage that writes text.
    """
    language = run.language(name, PROMPTS)
    return answers(language, heldout(run)[:PROMPTS], run.chat_format(name))


def heldout(run) -> list[str]:
    """Returns the held-out prompts of a run's world."""
    config, world = run.config, worlds.get(run.config.world.name)
    role = config.measure.split
    entities = getattr(worlds.split(config), role)
    return world.probes.heldout_prompts(config.seed, entities, role)


def bare(run, files: str, length: int = 64) -> Texts:
    """Reads the beginnings of bare texts, `PROMPTS` of them.

    Args:
        run: a `runs.Run`.
        files: as `data.files`.
        length: tokens of each, at most.
    """
    rows = []
    for text in itertools.islice(readers.texts(files), PROMPTS):
        first, *rest = run.tokenizer.encode(text)[:length]
        rows.append(([first], rest))
    return Texts.of(rows)


def compared(run, name: str, reward: str) -> tuple[dict, dict]:
    """Reads the pairs that a stage of comparisons wrote, as two halves.

    Args:
        run: a `runs.Run`, inside its mesh.
        name: the stage of comparisons.
        reward: a reward model; its scores, whitened over both halves, are the
            advantages of the answers.

    Returns:
        of each half a batch as of `gradients.gradients`.
    """
    language = run.language(run.config.stages[name].start_from, PROMPTS)
    tokenizer, rows = run.tokenizer, []
    file = str(run.root / name / records.RECORDS)
    for one in readers.comparisons(file)[: 2 * PROMPTS]:
        prompt = language.encode(one.prompt, chat_format=True)
        for (answer,) in one.answers[:2]:
            ids = tokenizer.encode(answer["content"])
            rows.append((prompt, [*ids, tokenizer.end]))
    scored = np.asarray(
        scores.of_rows(run.model(reward), [[*p, *ids] for p, ids in rows])
    )
    advantages = (scored - scored.mean()) / scored.std()
    half = len(rows) // 4 * 2
    return tuple(
        Texts.of(rows[part]).batch
        | {"advantages": jnp.asarray(advantages[part], jnp.float32)}
        for part in (slice(half), slice(half, 2 * half))
    )
