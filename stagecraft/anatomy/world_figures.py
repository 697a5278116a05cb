"""The figures of finished stages in an embedded world, where the truth is known.

They are about entities in no demonstration, prompt or comparison (pretraining's text,
and what SFT replays of it, state their facts): what the world's probes ask of a model,
and how its sampled answers fare by the gold scorer, against the SFT model's and under a
reward model.

Sampled answers come `measure.draws` times a prompt, each draw from a seed of its own. A
figure is the mean over draws; "draws" beside a stage's figures holds their number and
each figure's standard error.
"""

import hashlib
from pathlib import Path

import numpy as np

from stagecraft import worlds
from stagecraft.anatomy import behaviour, roles, statistics
from stagecraft.models import scores

ROWS = 128  # held-out prompts answered at once


def measure(run) -> dict[str, dict]:
    """Measures {stage: {figure: value}} of the finished stages.

    Args:
        run: a `runs.Run` with a world, inside its mesh.
    """
    config = run.config
    world = worlds.get(config.world.name)
    split = world.split(config.seed, config.world.size)
    entities = {"heldout": getattr(split, config.measure.split), "train": split.train}
    prompts = world.probes.heldout_prompts(
        config.seed, entities["heldout"], config.measure.split
    )
    answers = _Answers(run, prompts, world.probes.ANSWER)
    figures = {
        name: _speaking(run, name, world, entities, answers)
        for name in behaviour.speaking_stages(run)
    }
    for name in _reward_stages(run):
        base = _scored_model(config, name)
        if base in answers.samples:
            figures[name] = _reward_model(run, name, base, world, answers)
    return figures


class _Answers:
    """Sampled answers to the held-out prompts, and the models they are held against.

    Args:
        run: a `runs.Run`.
        prompts: texts.
        length: most tokens of an answer.

    Attributes:
        samples: {stage: what `sample` returned, a draw each}; a stage may be another
            run's.
    """

    def __init__(self, run, prompts, length):
        self.run, self.prompts, self.length = run, prompts, length
        self.samples, self._bases, self._rewards = {}, {}, {}

    def of(self, name, language=None, draws=None):
        """Returns the draws of a stage, `measure.draws` of them by default."""
        draws = draws or self.run.config.measure.draws
        samples = self.samples.setdefault(name, [])
        while len(samples) < draws:
            language = language or self.base(name)
            seed = draw_seed(self.run.config.seed, name, len(samples))
            samples.append(
                sample(language, self.prompts, seed=seed, max_new_tokens=self.length)
            )
        return samples[:draws]

    def base(self, name):
        """Returns the model of a stage that others are compared with, loaded once."""
        if name not in self._bases:
            self._bases[name] = self.run.language(name, ROWS)
        return self._bases[name]

    def rewards(self, name, samples):
        """Returns a reward model's score of each answer of one draw: f32[B]."""
        if name not in self._rewards:
            self._rewards[name] = self.run.model(name)
        asked, answers = samples["prompts"], samples["ids"]
        rows = [prompt + ids for prompt, ids in zip(asked, answers, strict=True)]
        return scores.of_rows(self._rewards[name], rows)


def draw_seed(seed: int, name: str, draw: int) -> int:
    """Returns the seed of one draw of a stage's answers, of 31 bits.

    It depends on nothing but the run's seed, the stage's name and the draw, so that a
    stage's answers are the same whatever other stages there are, and no two stages
    share their random numbers. Of a stage of another run, the folder's name counts.
    """
    where = f"outside/{Path(name).name}" if "/" in name else name
    digest = hashlib.sha256(f"{seed}/{where}/{draw}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _speaking(run, name, world, entities, answers):
    """Measures the figures of a stage whose model writes text."""
    language, in_turns = run.language(name, ROWS), run.chat_format(name)
    figures = {}
    for ask, formats, about in world.probes.PROBES:
        if ("chat" if in_turns else "text") in formats:
            value = ask(language, entities[about])
            figures |= value if isinstance(value, dict) else {ask.__name__: value}
    if not in_turns:
        return figures
    base, reward = sft_model(run, name), reward_stage(run, name)
    if reward:
        figures["reward_mean_by"] = reward
    return figures | _sampled_figures(name, world, answers, language, base, reward)


def _sampled_figures(name, world, answers, language, base, reward):
    """Measures what a stage's sampled answers are worth.

    Args:
        base, reward: the SFT and the reward model they are held against, or None.
    """
    draws, prompts = answers.of(name, language), answers.prompts
    rows = []
    for draw in draws:
        row = world.probes.sample_figures(prompts, draw["answers"])
        row |= length_and_entropy(draw["ids"], draw["logps"])
        if base:
            row["kl"] = _kl(draw, answers.base(base))
        if reward:
            row["reward_mean"] = float(np.mean(answers.rewards(reward, draw)))
        rows.append(row)
    figures = {
        key: statistics.over_draws([row[key] for row in rows]) for key in rows[0]
    }
    if base:
        others = [other["answers"] for other in answers.of(base)]
        table = [
            [world.probes.win_rate(prompts, draw["answers"], one) for one in others]
            for draw in draws
        ]
        figures["gold_win_rate"] = statistics.over_both(np.array(table))
    return _sampled(figures, len(draws))


def _sampled(figures, draws):
    """Returns {figure: mean}, and beside it the number of draws and the errors.

    Args:
        figures: {figure: (mean, standard error or None)}.
    """
    errors = {key: error for key, (_, error) in figures.items() if error is not None}
    means = {key: mean for key, (mean, _) in figures.items()}
    return means | {"draws": {"count": draws, "standard_error": errors}}


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


def _kl(samples, reference):
    """Returns the KL to a reference over own samples, nats a sequence."""
    rows = list(zip(samples["prompts"], samples["ids"], strict=True))
    reference_logps = reference.logprob_ids(rows)
    return float(np.mean(np.subtract(samples["logps"], reference_logps)))


# -- reward models ---------------------------------------------------------------------


def _reward_stages(run):
    """Returns the finished reward models of a run, in the graph's order."""
    stages = run.config.stages
    return [
        name
        for name in run.stages
        if run.finished(name) and roles.of(stages[name].kind).model == "scalar"
    ]


def _scored_model(config, name):
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
    same = (one for one in _reward_stages(run) if _scored_model(config, one) == base)
    return next(same, None)


def _reward_model(run, name, base, world, answers):
    """Measures how a reward model and a noisy rater order pairs of draws."""
    rng = np.random.default_rng([run.config.seed, 9])
    draws = answers.of(base, draws=max(run.config.measure.draws, 2))
    rewards = [answers.rewards(name, draw) for draw in draws]
    shape = len(draws), len(draws)
    tables = {
        "pair_accuracy": np.full(shape, np.nan),
        "label_accuracy": np.full(shape, np.nan),
    }
    for i, j in zip(*np.triu_indices(len(draws), 1), strict=True):
        both = draws[i]["answers"], draws[j]["answers"]
        labels = [
            {0: 1, 1: -1, None: 0}[world.rate(prompt, pair, rng)]
            for prompt, *pair in zip(answers.prompts, *both, strict=True)
        ]
        for key, order in (
            ("pair_accuracy", np.subtract(rewards[i], rewards[j])),
            ("label_accuracy", labels),
        ):
            share = world.probes.pair_order(answers.prompts, *both, order)
            tables[key][i, j] = np.nan if share is None else share
    figures = {
        key: statistics.over_pairs(table)
        for key, table in tables.items()
        if np.isfinite(table).any()
    }
    return _sampled(figures, len(draws))
