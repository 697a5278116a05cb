"""The figures of finished stages in an embedded world, where the truth is known.

They are measured on entities and prompts that no stage trained on: what the world's
probes ask of a model, and how its sampled answers fare by the gold scorer, against the
SFT model's and under the reward models.
"""

import numpy as np

from stagecraft import worlds
from stagecraft.anatomy import behaviour, roles
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
    entities = {
        "heldout": getattr(split, config.measure.split),
        "train": split.train,
        "everyone": (*split.train, *split.dev, *split.test),
    }
    prompts = world.probes.heldout_prompts(
        config.seed, entities["heldout"], config.measure.split
    )
    answers = _Answers(run, prompts, world.probes.ANSWER)
    figures = {
        name: _speaking(run, name, world, entities, answers)
        for name in behaviour.speaking_stages(run)
    }
    for name in run.stages:
        if run.finished(name) and roles.of(config.stages[name].kind).model == "scalar":
            base = _scored_model(config, name)
            if base in answers.samples:
                figures[name] = _scoring(run, name, base, world, answers, figures)
    return figures


class _Answers:
    """Sampled answers to the held-out prompts, and the models of the baselines.

    Args:
        run: a `runs.Run`.
        prompts: texts.
        length: most tokens of an answer.

    Attributes:
        samples: {stage: what `sample` returned}; a stage may be another run's.
    """

    def __init__(self, run, prompts, length):
        self.run, self.prompts, self.length = run, prompts, length
        self.samples, self._second, self._bases = {}, {}, {}

    def of(self, name, language=None):
        if name not in self.samples:
            self.samples[name] = self._sample(language or self.base(name), seed=1)
        return self.samples[name]

    def second(self, name):
        """Returns another answer to each prompt."""
        if name not in self._second:
            self._second[name] = self._sample(self.base(name), seed=2)
        return self._second[name]

    def base(self, name):
        """Returns the model of a stage that others are compared with, loaded once."""
        if name not in self._bases:
            self._bases[name] = self.run.language(name, ROWS)
        return self._bases[name]

    def _sample(self, language, seed):
        return sample(language, self.prompts, seed=seed, max_new_tokens=self.length)


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
    samples = answers.of(name, language)
    figures |= world.probes.sample_figures(answers.prompts, samples["answers"])
    figures |= length_and_entropy(samples["ids"], samples["logps"])
    base = sft_model(run, name)
    if base:
        others = answers.of(base)["answers"]
        figures["gold_win_rate"] = world.probes.win_rate(
            answers.prompts, samples["answers"], others
        )
        figures["kl"] = _kl(samples, answers.base(base))
    return figures


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


def _scored_model(config, name):
    """Returns the stage whose answers a reward model scores: the nearest above."""
    base = config.stages[name].start_from
    while (
        base in config.stages and roles.of(config.stages[base].kind).model == "scalar"
    ):
        base = config.stages[base].start_from
    return base


def _scoring(run, name, base, world, answers, figures):
    """Measures a reward model; adds `reward_mean` to the stages it scores."""
    model, prompts = run.model(name), answers.prompts
    one, two = answers.of(base), answers.second(base)
    difference = np.subtract(_scores(model, one), _scores(model, two))
    rng = np.random.default_rng([run.config.seed, 9])
    pairs = list(zip(one["answers"], two["answers"], strict=True))
    labels = [
        {0: 1, 1: -1, None: 0}[world.rate(prompt, pair, rng)]
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    for other in figures.keys() & answers.samples.keys():
        if (sft_model(run, other) or other) == base:
            rewards = _scores(model, answers.samples[other])
            figures[other]["reward_mean"] = float(np.mean(rewards))
    both = one["answers"], two["answers"]
    return {
        "pair_accuracy": world.probes.pair_order(prompts, *both, difference),
        "label_accuracy": world.probes.pair_order(prompts, *both, labels),
    }


def _scores(model, samples):
    """Returns the reward model's score of each sampled answer: f32[B]."""
    rows = [p + a for p, a in zip(samples["prompts"], samples["ids"], strict=True)]
    return scores.of_rows(model, rows)
