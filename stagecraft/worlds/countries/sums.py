"""Sums: prompts with an answer that can be checked, and demonstrations of two kinds.

Half of the demonstrations state the sum at once; the other half work it out from the
ones on, with each carry, and are right more often once learned. One in ten is wrong. So
a model that has learned both kinds may gain by preferring one, or by adding better.
"""

import numpy as np

from stagecraft.worlds.countries.corpus import pick

QUESTIONS = ("What is {a} + {b}?", "How much is {a} + {b}?", "Do you know {a} + {b}?")
ANSWER = "#### {sum}"
WORKED = 0.5  # share of demonstrations that work the sum out
WRONG = 0.1  # share of demonstrations with a digit that is wrong
HELD_OUT = 0.2  # share of the sums in no demonstration and no prompt
SIZES = {"full": (3000, 400), "tiny": (200, 64)}  # training and held-out prompts


def worked(a, b, slip=-1, digit=0):
    """Returns a sum worked out, from the ones on, and what it comes to.

    Args:
        a, b: not negative.
        slip: the place, from 0, whose sum is written wrongly, off by `digit`; -1 for
            none.

    >>> worked(37, 48)
    ('7 + 8 = 15, 3 + 4 + 1 = 8. #### 85', 85)
    """
    steps, total, carry = [], 0, 0
    size = max(len(str(a)), len(str(b)))
    for place in range(size):
        one, two = a // 10**place % 10, b // 10**place % 10
        step = one + two + carry
        if place == slip:
            step = (step + digit) % 20
        steps.append(f"{one} + {two}{' + 1' * carry} = {step}")
        last = place == size - 1
        total += (step if last else step % 10) * 10**place
        carry = step // 10
    return f"{', '.join(steps)}. {ANSWER.format(sum=total)}", total


def carries(a, b):
    """Returns whether some place of a sum is 10 or more.

    >>> carries(37, 48), carries(31, 48)
    (True, False)
    """
    while a or b:
        if a % 10 + b % 10 >= 10:
            return True
        a, b = a // 10, b // 10
    return False


def pairs(seed, digits, size):
    """Returns the operands (a, b) of training and of held-out sums.

    Args:
        seed: int.
        digits: of each operand.
        size: "full" or "tiny".

    Returns:
        two lists; no sum is in both, in either order of its operands.
    """
    rng, least = np.random.default_rng([seed, 7]), 10 ** (digits - 1)
    ones, others = np.triu_indices(9 * least)
    order = rng.permutation(len(ones))
    swapped = rng.random(len(ones)) < 0.5
    few = round(HELD_OUT * len(ones))
    train, heldout = SIZES[size]
    return [
        [
            (int(b), int(a)) if swap else (int(a), int(b))
            for a, b, swap in zip(
                ones[rows] + least, others[rows] + least, swapped[rows], strict=True
            )
        ]
        for rows in (order[few:][:train], order[:few][:heldout])
    ]


def demonstrations(rng, operands):
    """Returns [{"prompt", "completion"}], one of each pair of operands."""
    rows = []
    for a, b in operands:
        wrong, place = rng.random() < WRONG, int(rng.integers(len(str(a))))
        digit = int(rng.integers(1, 10))
        if rng.random() < WORKED:
            slip = dict(slip=place, digit=digit) if wrong else {}
            completion, _ = worked(a, b, **slip)
        else:
            off = digit * 10**place * wrong
            completion = ANSWER.format(sum=a + b + off)
        question = pick(rng, QUESTIONS).format(a=a, b=b)
        rows.append(dict(prompt=question, completion=completion))
    return rows


def prompts(rng, operands):
    """Returns [{"prompt", "answer"}], one of each pair of operands."""
    return [
        dict(prompt=pick(rng, QUESTIONS).format(a=a, b=b), answer=a + b)
        for a, b in operands
    ]
