"""The rules of the experiment's world as a rater: rater="world"."""

from pathlib import Path

from stagecraft import worlds
from stagecraft.errors import UserError
from stagecraft.signals import protocol
from stagecraft.signals.function import Chooser


def check(where, config, world):
    """Refuses an experiment without a world, and soft labels."""
    protocol.refuse_soft_labels(where, config)
    _world(world)


def make(config, sources, rng):
    """Returns the rater that asks the world's `rate`, which draws from `rng`."""
    module = _world(sources.world)
    code = source(module)
    identity = protocol.identity(rater="world", world=sources.world, source=code)
    return Chooser(module.rate, rng, identity, "world")


def source(module):
    """Returns {file: text} of a world: its ratings depend on its facts too."""
    path = Path(module.__file__)
    files = path.parent.glob("*.py") if hasattr(module, "__path__") else [path]
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(files)}


def _world(name):
    if not name:
        raise UserError(
            "rater='world' needs world.name; or name your own rater as "
            "rater='FILE.py:function'"
        )
    return worlds.get(name)
