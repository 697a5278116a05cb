"""A rater of your own: rater="package.module:function" or "FILE.py:function".

Either a function of one pair, (prompt, (answer, answer), rng) -> 0, 1 or None, where an
answer is (text, ended) and None means that the pair is dropped; or, batched, a function
(prompts, pairs) -> list of `Verdict`s; or an object whose method `rate` is one.
"""

import inspect

from stagecraft import schema
from stagecraft.errors import UserError
from stagecraft.signals import protocol
from stagecraft.signals.protocol import IDENTICAL, UNSCORED, Verdict, same_text

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


class Chooser:
    """A rater by a function that chooses one answer of a pair.

    Args:
        choose: (prompt, pair, rng) -> 0, 1 or None.
        rng: a numpy Generator.
        identity: see `protocol.Rater`.
        name: of the rater in the config, for messages.
    """

    def __init__(self, choose, rng, identity, name):
        self.choose, self.rng, self.identity, self.name = choose, rng, identity, name

    def rate(self, prompts, pairs):
        return [self._verdict(p, pair) for p, pair in zip(prompts, pairs, strict=True)]

    def _verdict(self, prompt, pair):
        choice = self.choose(prompt, pair, self.rng)
        if choice is None:
            return Verdict(reason=IDENTICAL if same_text(pair) else UNSCORED)
        if choice not in (0, 1):
            raise UserError(
                f"rater={self.name!r}: returned {choice!r}; expected 0 or 1, the "
                "better answer, or None"
            )
        return Verdict(0.0 if choice else 1.0)


class Batched:
    """A rater by a function (prompts, pairs) -> list of `Verdict`s."""

    def __init__(self, rate, identity):
        self.rate, self.identity = rate, identity


def check(where, config, world):
    """Refuses what cannot be imported, and soft labels of a function that chooses."""
    if not _is_batched(_imported(config.rater)):
        protocol.refuse_soft_labels(where, config)


def make(config, sources, rng):
    """Returns the rater that config.rater names."""
    rater, name = _imported(config.rater), schema.plain(config.rater)
    identity = protocol.identity(rater=name, source=protocol.source(rater))
    if not _is_batched(rater):
        return Chooser(rater, rng, identity, name)
    if hasattr(rater, "rate"):
        rater = rater() if isinstance(rater, type) else rater
        return Batched(rater.rate, getattr(rater, "identity", identity))
    return Batched(rater, identity)


def _imported(spec):
    return schema.imported("rater", spec)


def _is_batched(rater):
    if hasattr(rater, "rate"):
        return True
    try:
        parameters = inspect.signature(rater).parameters.values()
    except (TypeError, ValueError):  # compiled code may have no signature
        return False
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    return len(positional) == 2 and positional[1].kind != positional[1].VAR_POSITIONAL
