"""The figures of finished stages in an embedded world, where the truth is known.

They are about entities in no demonstration, prompt or comparison (pretraining's text,
and what SFT replays of it, state their facts): what the world's probes ask of a model,
and how its sampled answers fare by the gold scorer, against the SFT model's and under a
reward model.

Beside a stage's figures "n" holds what each is a mean over, of sampled answers as in
`sampled`.
"""

import numpy as np

from stagecraft import worlds
from stagecraft.anatomy import behaviour, sampled, statistics


def measure(run) -> dict[str, dict]:
    """Measures {stage: {figure: value}} of the finished stages.

    Args:
        run: a `runs.Run` with a world, inside its mesh.
    """
    config = run.config
    world = worlds.get(config.world.name)
    split = worlds.split(config)
    entities = {"heldout": getattr(split, config.measure.split), "train": split.train}
    prompts = world.probes.heldout_prompts(
        config.seed, entities["heldout"], config.measure.split
    )
    answers = sampled.Answers(run, prompts, world.probes.ANSWER)
    figures = {
        name: _speaking(run, name, world, entities, answers)
        for name in behaviour.speaking_stages(run)
    }
    for name in sampled.reward_stages(run):
        base = sampled.scored_model(config, name)
        if base in answers.samples:
            figures[name] = _reward_model(run, name, base, world, answers)
    return figures


def _speaking(run, name, world, entities, answers):
    """Measures the figures of a stage whose model writes text."""
    language, in_turns = run.language(name, sampled.ROWS), run.chat_format(name)
    figures, counts = {}, {}
    for ask, formats, about in world.probes.PROBES:
        if ("chat" if in_turns else "text") in formats:
            asked = _Counted(language)
            value = ask(asked, entities[about])
            value = value if isinstance(value, dict) else {ask.__name__: value}
            figures |= value
            counts |= dict.fromkeys(value, asked.count)
    for knob, ask, formats in world.probes.OF_KNOBS:
        if run.config.world[knob] and ("chat" if in_turns else "text") in formats:
            values, asked = ask(language, entities["heldout"], run.config.measure.split)
            figures |= values
            counts |= asked
    if not in_turns:
        return figures | {"n": counts}
    base, reward = sampled.sft_model(run, name), sampled.reward_stage(run, name)
    if reward:
        figures["reward_mean_by"] = reward
    figures |= _sampled_figures(name, world, answers, language, base, reward)
    return figures | {"n": counts | figures["n"]}


class _Counted:
    """A language that counts what it is asked: the questions of a probe."""

    def __init__(self, language):
        self.language, self.count = language, 0

    def complete(self, prompts, **settings):
        self.count += len(prompts)
        return self.language.complete(prompts, **settings)

    def logprob(self, prefixes, continuations):
        self.count += len(prefixes)
        return self.language.logprob(prefixes, continuations)


def _sampled_figures(name, world, answers, language, base, reward):
    """Measures what a stage's sampled answers are worth.

    Args:
        base, reward: the SFT and the reward model they are held against, or None.
    """
    draws, prompts = answers.of(name, language), answers.prompts
    rows = []
    for draw in draws:
        row = world.probes.sample_figures(prompts, draw["answers"])
        rows.append(row | answers.shared_figures(draw, base, reward))
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
    return sampled.over_draws(figures, len(draws), len(prompts))


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
    return sampled.over_draws(figures, len(draws), len(answers.prompts))
