"""From log-probabilities of a judge's labels to a probability, a bias, a score.

A judge that is asked about the pair (1, 2) in both orders gives log-probabilities of
its labels, l[order, slot], in nats. With u = l[., first slot] - l[., second slot] and

    P(slot 1 | order) = sigmoid(u[order]),   u = (q + b, -q + b)

for a gap in quality q and a bias b towards the first slot, the mean of the logits
(u[0] - u[1]) / 2 is q exactly, and b = (u[0] + u[1]) / 2. The mean of the probabilities
(Lee et al. 2023, arxiv.org/abs/2309.00267, section 2.1.1) shrinks q towards 0 instead.
"""

import math
from collections.abc import Sequence

import numpy as np

COMBINE = ("logit", "probability")


def of_pair(logps: Sequence, combine: str = "logit") -> float:
    """Returns the probability that the first answer of a pair is the better one.

    Args:
        logps: [orders, 2] in nats, by slot; in the second order, if there is one, the
            second answer is in the first slot.
        combine: "logit" or "probability": what is averaged over the orders.

    >>> round(of_pair([[-1.2, -2.0]]), 6)
    0.689974
    >>> sides = [[math.log(p), math.log(1 - p)] for p in (0.9, 0.4)]
    >>> [round(of_pair(sides, how), 4) for how in COMBINE]
    [0.7861, 0.75]
    """
    answers = _answer_logits(logps)
    if combine == "logit":
        return sigmoid(float(answers.mean()))
    return float(np.mean([sigmoid(float(one)) for one in answers]))


def of_principles(logps: Sequence, combine: str = "logit") -> float:
    """Returns the mean of `of_pair` over the principles that a pair was judged by.

    Args:
        logps: [principles, orders, 2] as of `of_pair`.
        combine: "logit" or "probability": what is averaged.

    >>> sides = [[[math.log(p), math.log(1 - p)]] for p in (0.9, 0.5)]
    >>> [round(of_principles(sides, how), 4) for how in COMBINE]
    [0.75, 0.7]
    """
    if combine == "logit":
        return sigmoid(float(np.mean([_answer_logits(one).mean() for one in logps])))
    return float(np.mean([of_pair(one, combine) for one in logps]))


def slot_bias(logps: Sequence) -> float:
    """Returns the bias towards the first slot in nats, from both orders of a pair.

    Args:
        logps: [2, 2] as in `of_pair`.

    >>> sides = [[math.log(p), math.log(1 - p)] for p in (0.9, 0.4)]
    >>> round(slot_bias(sides), 4)
    0.8959
    """
    return float(_difference(logps).mean())


def _answer_logits(logps):
    """Returns the logit of the first answer in each order."""
    slots = _difference(logps)
    return slots * np.array([1.0, -1.0])[: len(slots)]


def _difference(logps):
    table = np.asarray(logps, np.float64)
    return table[:, 0] - table[:, 1]


def of_group(logps: Sequence) -> list[float]:
    """Returns the probability of each of K answers to be the best.

    Args:
        logps: [K, K] in nats: in order r, slot s holds answer (r + s) modulo K. Each
            answer is in each slot once, so that what a judge adds to a slot falls out
            of the mean of the logits.

    >>> [round(p, 3) for p in of_group([[0.0, -1.0], [-1.0, 0.0]])]
    [0.731, 0.269]
    """
    table = np.asarray(logps, np.float64)
    count = len(table)
    table = table - np.logaddexp.reduce(table, axis=1, keepdims=True)
    slots = (np.arange(count)[None] - np.arange(count)[:, None]) % count
    mean = np.take_along_axis(table, slots, axis=1).mean(axis=0)
    return np.exp(mean - np.logaddexp.reduce(mean)).tolist()


def expectation(logps: Sequence[float]) -> float:
    """Returns the expected score of labels that stand for 1, 2, ..., K.

    E = sum s p(s), the labels' probabilities taken to add up to 1.

    >>> p = [0, 0, 0, 0, .1, .2, .4, .2, .1, 0]
    >>> round(expectation([math.log(x) if x else -math.inf for x in p]), 12)
    7.0
    """
    table = np.asarray(logps, np.float64)
    weights = np.exp(table - np.logaddexp.reduce(table))
    return float(weights @ np.arange(1, len(table) + 1))


def as_reward(score: float, count: int) -> float:
    """Returns a score of 1 to K as a reward of -1 to 1: 2 (E - 1) / (K - 1) - 1.

    >>> round(as_reward(7.0, 10), 6)
    0.333333
    """
    return 2 * (score - 1) / (count - 1) - 1


def mass(logps: Sequence[float]) -> float:
    """Returns the probability of all labels together.

    >>> round(mass([-1.2, -2.0]), 6)
    0.436529
    """
    return float(np.exp(np.logaddexp.reduce(np.asarray(logps, np.float64))))


def clamped(probability: float, clamp: float) -> float:
    """Returns a probability no nearer to 0 or 1 than `clamp`.

    Bai et al. 2022 (arxiv.org/abs/2212.08073), section 4.1, take .4 for judges that
    reason first, whose probabilities lie near 0 and 1.

    >>> clamped(0.97, 0.4), clamped(0.97, 0.0)
    (0.6, 0.97)
    """
    return min(max(probability, clamp), 1 - clamp)


def sigmoid(logit: float) -> float:
    """Returns 1 / (1 + e^-x), for any x.

    >>> sigmoid(-1000.0), sigmoid(0.0)
    (0.0, 0.5)
    """
    share = math.exp(-abs(logit))
    return share / (1 + share) if logit < 0 else 1 / (1 + share)
