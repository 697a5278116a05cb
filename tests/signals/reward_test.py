"""A reward model as a rater: probabilities of its scores, and which model it is."""

import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.signals import reward
from stagecraft.signals.protocol import Sources, Verdict
from stagecraft.signals.reward import RewardModel

WORDS = types.SimpleNamespace(digest="words")


class Scored(RewardModel):
    """A reward model whose scores are its answers."""

    def scores(self, prompts, answers):
        assert len(prompts) == len(answers)
        return [float(text) for text, _ in answers]


def rate(*pairs):
    pairs = [tuple((str(value), True) for value in pair) for pair in pairs]
    return Scored(None, WORDS).rate([f"p{i}" for i in range(len(pairs))], pairs)


def test_probabilities_are_bradley_terrys():
    scores = np.random.default_rng(0).normal(scale=4, size=(200, 2))
    for (one, two), verdict in zip(scores, rate(*scores), strict=True):
        assert verdict.probability == pytest.approx(1 / (1 + np.exp(two - one)))
        assert verdict.strength == abs(one - two)
        # The better answer's is exact: nothing is lost by taking it from 1 twice.
        exact = 1 / (1 + math.exp(-abs(two - one)))
        assert max(verdict.probability, 1 - verdict.probability) == exact
    far = rate((1, 1), (900, -900), (-900, 900))
    assert [verdict.probability for verdict in far] == [0.5, 1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_no_verdict(bad):
    none = Verdict(reason="unscored")
    assert rate((bad, 1), (1, bad), (bad, bad)) == [none] * 3


def test_a_model_is_known_by_its_lineage_or_by_its_parameters():
    def identity(values, tokenizer=WORDS, lineage=""):
        return RewardModel({"w": jnp.array(values)}, tokenizer, lineage).identity

    assert identity([1.0]) == identity([1.0]) != identity([2.0])
    assert identity([1.0], lineage="a") == identity([2.0], lineage="a")
    others = types.SimpleNamespace(digest="others")
    ids = [identity([1.0]), identity([1.0], others), identity([1.0], lineage="a")]
    assert len({*ids, identity([1.0], lineage="b")}) == 4


def test_the_runs_own_reward_model_is_taken():
    asked = dict(rater="reward", reward_from="scores", soft_labels=True)
    model, config = Scored(None, WORDS), defaults.stage("comparisons", **asked)
    assert reward.make(config, Sources(reward=model), None) is model
    reward.check("s.it", config, "")
