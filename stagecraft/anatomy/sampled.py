"""Answers that finished stages sample to held-out prompts, and what they are worth.

Answers come `measure.draws` times a prompt, each draw from a seed of its own. A figure
is the mean over draws; "draws" beside a stage's figures holds their number and each
figure's standard error, "n" the number of prompts.
"""

import hashlib
import logging
import time
from pathlib import Path

import numpy as np

from stagecraft.anatomy import roles
from stagecraft.models import scores
from stagecraft.text import diversity

ROWS = 128  # prompts answered at once
# Seconds of sampling from which on a line says how far it is.
_PATIENCE = 10.0
_log = logging.getLogger("stagecraft.anatomy")


class Answers:
    """Sampled answers to the held-out prompts, and the models they are held against.

    Args:
        run: a `runs.Run`.
        prompts: texts, or lists of messages.
        length: most tokens of an answer.
        rows: prompts answered at once.

    Attributes:
        samples: {stage: what `sample` returned, a draw each}; a stage may be another
            run's.
    """

    def __init__(self, run, prompts, length, rows=ROWS):
        self.run, self.prompts, self.length, self.rows = run, prompts, length, rows
        self.samples, self._bases, self._rewards = {}, {}, {}

    def of(self, name, language=None, draws=None):
        """Returns the draws of a stage, `measure.draws` of them by default."""
        draws = draws or self.run.config.measure.draws
        samples = self.samples.setdefault(name, [])
        while len(samples) < draws:
            language, started = language or self.base(name), time.monotonic()
            seed = draw_seed(self.run.config.seed, name, len(samples))
            samples.append(
                sample(language, self.prompts, seed=seed, max_new_tokens=self.length)
            )
            seconds = time.monotonic() - started
            if seconds > _PATIENCE:
                where = (name, len(samples), draws, len(self.prompts), seconds)
                _log.info("%s: draw %d of %d, %d answers in %.0f s", *where)
        return samples[:draws]

    def base(self, name):
        """Returns the model of a stage that others are compared with, loaded once."""
        if name not in self._bases:
            self._bases[name] = self.run.language(name, self.rows)
        return self._bases[name]

    def rewards(self, name, samples):
        """Returns a reward model's score of each answer of one draw: f32[B]."""
        if name not in self._rewards:
            self._rewards[name] = self.run.model(name)
        asked, answers = samples["prompts"], samples["ids"]
        rows = [prompt + ids for prompt, ids in zip(asked, answers, strict=True)]
        return scores.of_rows(self._rewards[name], rows)

    def shared_figures(self, samples, base, reward):
        """Measures one draw: habits, length, entropy, KL to the base, mean reward.

        Args:
            samples: what `sample` returned.
            base, reward: the SFT and the reward model it is held against, or None.
        """
        row = habits(samples["answers"])
        row |= length_and_entropy(samples["ids"], samples["logps"])
        if base:
            row["kl"] = kl(samples, self.base(base))
        if reward:
            row["reward_mean"] = float(np.mean(self.rewards(reward, samples)))
        return row


def draw_seed(seed: int, name: str, draw: int) -> int:
    """Returns the seed of one draw of a stage's answers, of 31 bits.

    It depends on nothing but the run's seed, the stage's name and the draw, so that a
    stage's answers are the same whatever other stages there are, and no two stages
    share their random numbers. Of a stage of another run, the folder's name counts.
    """
    where = f"outside/{Path(name).name}" if "/" in name else name
    digest = hashlib.sha256(f"{seed}/{where}/{draw}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def over_draws(figures, draws, prompts):
    """Returns {figure: mean}, and beside it the number of draws and the errors.

    Args:
        figures: {figure: (mean, standard error or None)}.
        draws, prompts: how many.
    """
    errors = {key: error for key, (_, error) in figures.items() if error is not None}
    means = {key: mean for key, (mean, _) in figures.items()}
    counts = {"n": dict.fromkeys(means, prompts)}
    return means | {"draws": {"count": draws, "standard_error": errors}} | counts


def sft_model(run, name: str) -> str | None:
    """Returns the SFT stage that a stage is compared with: the nearest above it.

    It is the first stage on the way up `start_from` that learns to predict text,
    past any rounds of preference or policy training in between: a stage of this run,
    or the folder of another run's. None where no such stage answers in turns.
    """
    stages = run.config.stages
    parent = stages[name].start_from
    while parent:
        if parent in stages:
            kind, above = stages[parent].kind, stages[parent].start_from
        else:
            source = run.source(parent)
            record = source.record()
            if record is None or not record.finished:
                return None
            kind, above = record.kind, source.above(record)
        if roles.of(kind).supervised:
            return parent if run.chat_format(parent) else None
        parent = above
    return None


def habits(answers):
    """Returns how sampled answers end, and how they differ, in a world or without one.

    Args:
        answers: list of (text, ended).

    >>> habits([("a b a b", True), ("c", False)])["distinct_2"]
    0.6666666666666666
    """
    texts, ended = zip(*answers, strict=True)
    return {
        "eos_rate": float(np.mean(ended)),
        "words": float(np.mean([len(text.split()) for text in texts])),
        "distinct": len({*texts}) / len(texts),
        "distinct_2": diversity.distinct_2(texts),
    }


def length_and_entropy(ids, logps) -> dict[str, float]:
    """Returns the length and entropy of sampled answers.

    Args:
        ids: token ids of each answer, the end token included where there is one.
        logps: log-probability of each whole answer, at the sampling temperature 1.

    Returns:
        length: mean tokens; entropy: nats a token. The mean of -log p over the
        model's own samples is an unbiased estimate of the entropy of its answers, and
        is divided over their tokens.

    >>> length_and_entropy([[5, 6], [7, 8, 9, 10]], [-1.0, -2.0])
    {'length': 3.0, 'entropy': 0.5}
    """
    tokens = sum(map(len, ids))
    nats = 0.0 - float(np.sum(logps))
    return {"length": tokens / len(ids), "entropy": nats / tokens if tokens else 0.0}


def sample(language, prompts, *, seed: int, max_new_tokens: int) -> dict[str, list]:
    """Samples one answer a prompt at temperature 1.

    Returns:
        prompts, ids: token ids; answers: (text, ended); logps: nats of whole answers.
    """
    rows = [language.encode(prompt, chat_format=True) for prompt in prompts]
    stops = language.stop_ids(chat_format=True)
    samples = language.sample_ids(
        rows, seed=seed, max_new_tokens=max_new_tokens, temperature=1.0, stop_ids=stops
    )
    return {
        "prompts": rows,
        # The stop token is part of the answer, and of its probability.
        "ids": [ids for ids, _, _ in samples],
        "answers": [
            (language.tokenizer.decode(ids[:-1] if ended else ids), ended)
            for ids, ended, _ in samples
        ],
        "logps": [logp for _, _, logp in samples],
    }


def kl(samples, reference):
    """Returns the KL to a reference over own samples, nats a sequence."""
    rows = list(zip(samples["prompts"], samples["ids"], strict=True))
    reference_logps = reference.logprob_ids(rows)
    return float(np.mean(np.subtract(samples["logps"], reference_logps)))


# -- what they are held against -------------------------------------------------------


def reward_stages(run):
    """Returns the finished reward models of a run, in the graph's order."""
    stages = run.config.stages
    return [
        name
        for name in run.stages
        if run.finished(name) and roles.of(stages[name].kind).model == "scalar"
    ]


def scored_model(config, name):
    """Returns the stage whose answers a reward model scores: the nearest above."""
    base = config.stages[name].start_from
    while (
        base in config.stages and roles.of(config.stages[base].kind).model == "scalar"
    ):
        base = config.stages[base].start_from
    return base


def reward_stage(run, name: str) -> str | None:
    """Returns the reward model whose scores are the `reward_mean` of a stage.

    It is the one the stage was trained on, `reward_from`: a stage of this run, or a
    folder. For a stage that was trained on none it is the first reward stage of the
    graph that starts from the same SFT model. None where there is no such model.
    """
    config = run.config
    stage = config.stages[name]
    if "reward" in roles.of(stage.kind).roles and stage.reward_from:
        gone = run.source(stage.reward_from).where == "nowhere"
        return None if gone else stage.reward_from
    base = sft_model(run, name) or name
    same = (one for one in reward_stages(run) if scored_model(config, one) == base)
    return next(same, None)
