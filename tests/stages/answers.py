"""A model that answers from a seed, for stages that write records."""

import jax
import numpy as np

from stagecraft.lineage import LineageEntry
from stagecraft.stages.records import Recording

LINEAGE = LineageEntry(
    kind="comparisons",
    start_from="sft",
    config="c",
    tokenizer="t",
    data={"p.jsonl": "d"},
    parents={"start_from": {"stage": "sft", "id": "s"}},
)
PROMPTS = [{"prompt": f"Größe\u2028{i}?", "answer": i} for i in range(4)]


def recording(folder, language, name, **changes):
    """A `Recording` in a folder, of a model that answers."""
    whole = Recording(folder, name, language, PROMPTS, jax.random.key(0), LINEAGE)
    return whole._replace(**changes)


class Seeded:
    """Answers are a function of the seed and the row; some are cut off, some alike.

    Attributes:
        seeds: one for each call.
    """

    def __init__(self):
        self.seeds = []

    def complete(self, prompts, *, seed=0, **sampling):
        self.seeds.append(seed)
        rng = np.random.default_rng(seed)
        return [
            (f"{prompt} é\n{rng.integers(4)}", bool(rng.integers(5)))
            for prompt in prompts
        ]


def noisy(prompt, pair, rng):
    """A rater whose draws differ in number from pair to pair."""
    assert isinstance(pair, tuple) and all(isinstance(a, tuple) for a in pair)
    if rng.random() < 0.2:
        return None
    return int(rng.normal() + rng.integers(2) > 0)


def last(prompts, completions):
    """A verifier that pays the last digit, and cannot score a 3."""
    digits = [int(completion[-1]) for completion in completions]
    return [None if digit == 3 else digit / 3 for digit in digits]
