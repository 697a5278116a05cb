"""A judge by rule with biases of known size: rater="planted".

It is asked as a model is, and says with logit

    gold (g1 - g2) + length (w1 - w2) / 10 + style (s1 - s2) + agreement (a1 - a2)
        + first + noise z

that the answer in the first slot is better: g is the world's gold score, w the words
of an answer, s whether it holds an exclamation mark, a whether it repeats a wrong
belief that the prompt states, z a standard normal drawn from the question itself, so
that the same question has the same answer.
"""

import hashlib
import math

import numpy as np

from stagecraft import schema, storage, worlds
from stagecraft.errors import UserError
from stagecraft.signals import labels, protocol
from stagecraft.signals.protocol import IDENTICAL, Verdict, same_text

READS = ("planted", "judge.combine", "judge.orders")
MARK = "!"  # what its style is


class Planted:
    """A rater with planted biases.

    Args:
        gold: (prompt, text, ended) -> float.
        sycophantic: (prompt, text) -> whether a wrong belief is repeated, None where
            the prompt holds none.
        config: the group `planted` of a stage's config.
        combine: as in `labels.of_pair`.
        orders: 2 asks about each pair in both, 1 in the given one alone.
        name: of the world, for the identity.
    """

    def __init__(self, gold, sycophantic, config, combine="logit", orders=2, name=""):
        self.gold, self.sycophantic, self.config = gold, sycophantic, config
        self.combine, self.orders = combine, orders
        self.identity = protocol.identity(
            rater="planted",
            world=name or protocol.source(gold),
            combine=combine,
            orders=orders,
            planted=schema.plain(config),
        )

    def rate(self, prompts, pairs):
        """Returns a verdict for each pair, with the evidence that a judge has."""
        return [self._verdict(p, pair) for p, pair in zip(prompts, pairs, strict=True)]

    def _verdict(self, prompt, pair):
        if same_text(pair):
            return Verdict(reason=IDENTICAL)
        orders = (pair, pair[::-1])[: self.orders]
        logits = [self._logit(prompt, *order) for order in orders]
        logps = [[_log_sigmoid(x), _log_sigmoid(-x)] for x in logits]
        evidence = {"logps": logps, "mass": [1.0] * len(logps), "tokens": 0}
        return Verdict(labels.of_pair(logps, self.combine), evidence=evidence)

    def _logit(self, prompt, one, two):
        c = self.config
        logit = c.gold * (self.gold(prompt, *one) - self.gold(prompt, *two))
        logit += c.length * (len(one[0].split()) - len(two[0].split())) / 10
        logit += c.style * ((MARK in one[0]) - (MARK in two[0])) + c.first
        if c.agreement:
            agrees = [bool(self.sycophantic(prompt, text)) for text, _ in (one, two)]
            logit += c.agreement * (agrees[0] - agrees[1])
        if c.noise:
            text = storage.to_json([prompt, one[0], two[0]])
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            logit += c.noise * np.random.default_rng(seed).normal()
        return float(logit)


def _log_sigmoid(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def check(where, config, world):
    """Refuses an experiment without a world, whose gold score it reads."""
    schema.choice(f"{where}.judge.combine", config.judge.combine, labels.COMBINE)
    schema.choice(f"{where}.judge.orders", config.judge.orders, (1, 2))
    _world(world)


def make(config, sources, rng):
    """Returns the rater with the biases of config.planted."""
    own = config.judge
    how = dict(combine=own.combine, orders=own.orders, name=sources.world)
    world = _world(sources.world)
    return Planted(world.gold, world.sycophantic, config.planted, **how)


def _world(name):
    if not name:
        raise UserError("rater='planted' needs world.name, whose gold score it reads")
    return worlds.get(name)
