"""The raters by their names in a config; any other name is a function of the user's."""

from stagecraft import schema
from stagecraft.errors import UserError
from stagecraft.signals import constitution, function, judge, planted, reward, world

RATERS = {
    "world": world,
    "reward": reward,
    "judge": judge,
    "constitution": constitution,
    "planted": planted,
}
EVERY = ("judge.max_failed",)  # failures are counted, whoever rates


def check(where, config, world):
    """Refuses what a comparisons stage's rater cannot work with.

    Args:
        where: the stage in the config, for messages: "stages.comparisons".
        config: the stage's config.
        world: name of the experiment's world, "" without one.
    """
    _module(config.rater).check(where, config, world)


def make(config, sources, rng):
    """Returns the `protocol.Rater` that config.rater names.

    Args:
        config: the stage's config.
        sources: a `protocol.Sources`.
        rng: a numpy Generator for the rater's own noise.
    """
    return _module(config.rater).make(config, sources, rng)


def reads(name):
    """Returns the keys of a comparisons stage that not every rater reads, but this one.

    A group's name stands for all of its keys.
    """
    return (*EVERY, *getattr(_module(name), "READS", ()))


def _module(name):
    if name in RATERS:
        return RATERS[name]
    if isinstance(name, str) and ":" not in name:
        near = schema.nearest(name, RATERS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise UserError(
            f"rater={name!r}: expected {', '.join(map(repr, RATERS))} or "
            f"'package.module:function' or 'FILE.py:function'{hint}"
        )
    return function
