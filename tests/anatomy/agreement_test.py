"""Agreement of raters, against published examples and what sampling shows."""

import numpy as np
import pytest

from stagecraft.anatomy.agreement import cohen, krippendorff, over_items, rate


def test_a_rate_of_nothing_says_nothing():
    assert rate(0, 0) == (0, 0, None, 0.0, 1.0)
    assert rate(8, 10)[:3] == (8, 10, 0.8)
    assert rate(8, 10)[3:] == pytest.approx((0.4902, 0.9433), abs=5e-5)


def test_cohen():
    # 20 both yes, 5 and 10 apart, 15 both no.
    ones = ["yes"] * 25 + ["no"] * 25
    others = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen(ones, others) == pytest.approx(0.4)
    # One says yes nine times in ten, the other five: .6 agree, and .5 by chance.
    uneven = ["yes"] * 9 + ["no"], ["yes"] * 5 + ["no"] * 5
    assert cohen(*uneven) == pytest.approx(0.2)
    # What one of them left out does not count.
    assert cohen([*ones, None, "yes"], [*others, "no", None]) == pytest.approx(0.4)
    assert cohen(["yes"] * 4, ["yes"] * 4) is None and cohen([None], ["no"]) is None
    assert cohen(["a", "b"], ["b", "a"]) == -1


# Three raters, fifteen items, as in the usual example with gaps.
GAPS = (
    (None, None, None, None, None, 3, 4, 1, 2, 1, 1, 3, 3, None, 3),
    (1, None, 2, 1, 3, 3, 4, 3, None, None, None, None, None, None, None),
    (None, None, 2, 1, 3, 4, 4, None, 2, 1, 1, 3, 3, None, 4),
)


def test_krippendorff():
    items = list(zip(*GAPS, strict=True))
    assert krippendorff(items) == pytest.approx(0.6913580)
    # Names of labels, the order of raters and of items do not matter.
    named = [[label and "abcd"[label - 1] for label in reversed(i)] for i in items]
    assert krippendorff(named[::-1]) == pytest.approx(0.6913580)
    assert krippendorff([[1, 1], [1, 1]]) is None and krippendorff([[1, None]]) is None
    # Ordinal labels that miss by one agree better than those that miss by three.
    near, far = ([[1, 2], [2, 2], [3, 4], [4, 4]], [[1, 4], [2, 2], [3, 2], [4, 4]])
    order = (1, 2, 3, 4)
    assert krippendorff(near, order) > krippendorff(far, order)
    assert krippendorff(items, order) == pytest.approx(by_hand(items, order))


def by_hand(items, order):
    """Ordinal alpha by loops over pairs of labels."""
    units = [[x for x in item if x is not None] for item in items]
    units = [unit for unit in units if len(unit) > 1]
    flat = [x for unit in units for x in unit]
    counts = {value: flat.count(value) for value in order}

    def distance(a, b):
        low, high = sorted((a, b))
        between = sum(counts[v] for v in order if low <= v <= high)
        return (between - (counts[a] + counts[b]) / 2) ** 2

    observed = sum(
        distance(unit[i], unit[j]) / (len(unit) - 1)
        for unit in units
        for i in range(len(unit))
        for j in range(len(unit))
        if i != j
    ) / len(flat)
    pairs = [(a, b) for i, a in enumerate(flat) for j, b in enumerate(flat) if i != j]
    expected = sum(distance(a, b) for a, b in pairs) / len(pairs)
    return 1 - observed / expected


def test_the_interval_over_items_holds_alpha():
    rng = np.random.default_rng(1)
    truth = rng.integers(3, size=80)
    wrong = rng.random((80, 2)) < 0.2
    labels = np.where(wrong, rng.integers(3, size=(80, 2)), truth[:, None]).tolist()
    low, high = over_items(labels, draws=300)
    assert low < krippendorff(labels) < high and high - low < 0.4
    assert over_items([[1, 1]] * 5, draws=20) is None
