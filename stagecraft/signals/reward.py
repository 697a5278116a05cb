"""A reward model as a scorer of answers and as a rater of pairs: rater="reward"."""

import functools
import math

from stagecraft import tree
from stagecraft.errors import UserError
from stagecraft.models import scores
from stagecraft.signals import protocol
from stagecraft.signals.protocol import UNSCORED, Verdict
from stagecraft.text import chat

READS = ("reward_from",)


class RewardModel:
    """Scores answers to prompts, and rates pairs by the difference of their scores.

    Args:
        model: a `ScalarModel`.
        tokenizer: a `text.tokenizer.Tokenizer`.
        lineage: id of the stage or folder that the model is from; "" where there is
            none, and the parameters' digest stands for it.
    """

    def __init__(self, model, tokenizer, lineage=""):
        self.model, self.tokenizer, self.lineage = model, tokenizer, lineage

    @functools.cached_property
    def identity(self):
        return protocol.identity(
            rater="reward",
            model=self.lineage or tree.digest(self.model),
            tokenizer=self.tokenizer.digest,
        )

    def scores(self, prompts, answers, tools=()) -> list[float]:
        """Returns the score of each (text, ended).

        Args:
            prompts: texts or message lists.
            answers: list of (text, ended).
            tools: for each the tools it was sampled with, or None; () for none.
        """
        tools = tools or [None] * len(prompts)
        rows = [
            self._ids(prompt, *answer, offered)
            for prompt, answer, offered in zip(prompts, answers, tools, strict=True)
        ]
        return scores.of_rows(self.model, rows)

    def rate(self, prompts, pairs, tools=()):
        """Returns the Bradley-Terry probability that the first of each pair is better.

        `strength` is the absolute difference of the scores; `tools` is as of `scores`.
        """
        twice = [prompt for prompt in prompts for _ in range(2)]
        offered = {"tools": [one for one in tools for _ in range(2)]} if tools else {}
        answers = [answer for pair in pairs for answer in pair]
        values = self.scores(twice, answers, **offered)
        return [
            _verdict(second - first)
            for first, second in zip(values[::2], values[1::2], strict=True)
        ]

    def _ids(self, prompt, text, ended, tools):
        answer = {"role": "assistant", "content": text, "ended": ended}
        messages = [*chat.as_messages(prompt), answer]
        return chat.render(messages, self.tokenizer, tools=tools)[0]


def _verdict(margin):
    if not math.isfinite(margin):
        return Verdict(reason=UNSCORED)
    # Of the better one first: 1 - (1 - p) is p exactly for p from .5 to 1.
    better = 1 / (1 + math.exp(-abs(margin)))
    return Verdict(1 - better if margin > 0 else better, strength=abs(margin))


def check(where, config, world):
    """Refuses a stage that names no reward model."""
    if not config.reward_from:
        raise UserError(
            f"{where}.reward_from='': rater='reward' and reward_from go together"
        )


def make(config, sources, rng):
    """Returns the run's reward model."""
    return sources.reward
