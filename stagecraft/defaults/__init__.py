"""Every key an experiment may set, with its default and its meaning: the one place.

The keys of `model` lie in `models/config.py`, since they make the decoder.

`experiment()` and `stage(kind)` return complete configs; an experiment file sets
only the keys it is about. Library code reads keys without defaults of its own, since
all of them are always there. "" stands for none in texts, 0 for never or off in
numbers.
"""

from stagecraft import schema
from stagecraft.defaults.kinds import KINDS
from stagecraft.defaults.shared import (
    KEYS_WITHOUT_EFFECT,
    every,
    experiment,
    judge,
    lora,
    model,
    optimizer,
    planted,
)
from stagecraft.errors import UserError

__all__ = [
    "KEYS_WITHOUT_EFFECT",
    "KINDS",
    "every",
    "experiment",
    "judge",
    "lora",
    "model",
    "optimizer",
    "planted",
    "stage",
]


def stage(kind, **changes):
    """Returns the complete config of a stage of one kind.

    Args:
        kind: one of `KINDS`.
        **changes: keys to set; nested ones as dicts, optimizer=dict(lr=1e-3).

    >>> stage("preference", steps=5, optimizer=dict(lr=1e-5)).optimizer.lr
    1e-05
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}: no such stage; there are {', '.join(KINDS)}")
    return schema.merge(KINDS[kind](), changes)
