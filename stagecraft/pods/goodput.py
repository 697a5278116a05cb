"""How much of a job's time trains it, when machines fail and saves cost time.

A failure ends all processes of a run (docs/pods.md). What was done since the last save
is done again, after a restart. With M the mean time between failures of the whole job,
exponentially distributed, a save every t seconds that costs d, and a restart of r, the
expected time of t seconds of training is

    M exp(r / M) (exp((t + d) / M) - 1)

(Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart
dumps", equation 20), and the best t is about sqrt(2 d M) (Young 1974; Daly's equation
37 has the next terms).
"""

import math
from typing import NamedTuple

# Hours of one chip between two failures that end a job: 419 in 54 days on 16,384 H100s
# (Llama Team 2024, arxiv.org/abs/2407.21783, section 3.3.4).
CHIP_HOURS = 16384 * 54 * 24 / 419
# Seconds that training waits for the copy of a gigabyte a device; what follows runs
# beside it. Measured: docs/pods.md.
COPY = 0.05
RESTART = 600.0  # seconds from a failure to the first step after it


class Saving(NamedTuple):
    """How a stage should be saved.

    Attributes:
        failures: seconds between two of the whole job.
        save: seconds that training waits for one.
        best: seconds between two that lose the least.
        goodput: share of the time that trains, at that.
        given: the same at the interval of the config.
        most: the longest seconds between two at which it is 95%; 0 where none is.
    """

    failures: float
    save: float
    best: float
    goodput: float
    given: float
    most: float


def share(interval: float, save: float, restart: float, failures: float) -> float:
    """Returns the share of the time that trains, from 0 to 1; times in seconds.

    >>> round(share(600, 1, 600, 3 * 3600), 3)
    0.918
    """
    if (interval + save) / failures > 500:
        return 0.0
    lost = math.exp(restart / failures) * math.expm1((interval + save) / failures)
    return interval / (failures * lost)


def best_interval(save: float, failures: float) -> float:
    """Returns the seconds between two saves that lose the least, by Daly's series."""
    if save >= 2 * failures:
        return failures
    root = math.sqrt(save / (2 * failures))
    return math.sqrt(2 * save * failures) * (1 + root / 3 + root**2 / 9) - save


def longest_interval(
    goal: float, save: float, restart: float, failures: float
) -> float:
    """Returns the longest seconds between saves that reach a share; 0 for none."""
    low = best_interval(save, failures)
    if share(low, save, restart, failures) < goal:
        return 0.0
    high = low
    while share(high, save, restart, failures) >= goal:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        reached = share(middle, save, restart, failures) >= goal
        low, high = (middle, high) if reached else (low, middle)
    return low


def saving(
    state_bytes: float,
    minutes: float,
    chips: int,
    *,
    chip_hours: float = CHIP_HOURS,
    restart: float = RESTART,
) -> Saving:
    """Returns how a stage should be saved.

    Args:
        state_bytes: of the checkpoint that one device holds.
        minutes: between two saves, as the config has them.
        chips: of the job.
        chip_hours: of one chip between two failures.
        restart: seconds from a failure to the first step after it.
    """
    failures = 3600 * chip_hours / chips
    save = COPY * state_bytes / 1e9
    best = max(best_interval(save, failures), 1.0)
    return Saving(
        failures=failures,
        save=save,
        best=best,
        goodput=share(best, save, restart, failures),
        given=share(60 * minutes, save, restart, failures),
        most=longest_interval(0.95, save, restart, failures),
    )
