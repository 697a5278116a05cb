"""Every training objective: arrays in, unreduced losses and metrics out.

No function here sees a model or a config, and none takes a mean: the one reduction is
masked and belongs to the step that calls them. Hyper-parameters are keyword-only.

Each file ends with its losses, and `__all__`, what is offered here as `losses.NAME`.
`TOKENS`, `REWARDS`, `PAIRS`, `UNPAIRED` and `POLICY` map the names that a config may
use to functions, aliases included. `python -m stagecraft.losses docs/objectives.md`
writes the table of that page from them.

B batch, T tokens, K completions; log-probabilities in nats. Column 0 of a pair is the
chosen response.
"""

# ruff: noqa: E402, F403
from collections.abc import Callable
from types import ModuleType

from stagecraft.losses import (
    group,
    next_token,
    policy,
    preference,
    reference_free,
    reward,
    unpaired,
)


def _table(*modules: ModuleType) -> dict[str, Callable]:
    """Returns {name: loss} of some files, in the order of their lists."""
    table = {loss.__name__: loss for module in modules for loss in module.LOSSES}
    for module in modules:
        table |= getattr(module, "ALIASES", {})
    return table


TOKENS = _table(next_token)  # log-probabilities of tokens
REWARDS = _table(reward)  # scores of ranked completions
PAIRS = _table(preference, reference_free)  # log-probabilities of pairs
UNPAIRED = _table(unpaired)  # log-probabilities of single completions
POLICY = _table(policy, group)  # sampled tokens and their advantages

# All of them by what they are losses of.
TABLES = {
    "tokens of text": TOKENS,
    "rewards of completions": REWARDS,
    "pairs of completions": PAIRS,
    "single judged completions": UNPAIRED,
    "sampled tokens": POLICY,
}
ACROSS_ROWS = preference.ACROSS_ROWS
BY_SEQUENCE = group.BY_SEQUENCE

# Last, since some functions have the name of their file.
from stagecraft.losses.advantage import *
from stagecraft.losses.aggregate import *
from stagecraft.losses.group import *
from stagecraft.losses.kl import *
from stagecraft.losses.next_token import *
from stagecraft.losses.pairs import *
from stagecraft.losses.policy import *
from stagecraft.losses.preference import *
from stagecraft.losses.reference_free import *
from stagecraft.losses.reward import *
from stagecraft.losses.unpaired import *
