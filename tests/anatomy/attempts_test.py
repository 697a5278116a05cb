"""pass@k, the guessing curve and Cover@tau: golden numbers, and by counting."""

import itertools
import math

import numpy as np
import pytest

from stagecraft.anatomy import attempts, heldout_figures
from stagecraft.signals.verifiers import find


@pytest.mark.parametrize(
    "n, c, k, want",
    [(10, 3, 1, 0.3), (10, 3, 5, 0.916667), (16, 1, 8, 0.5), (10, 3, 8, 1.0)],
)
def test_golden_numbers(n, c, k, want):
    assert attempts.pass_at(k, n, [c])[0] == pytest.approx(want, abs=1e-6)


def test_it_is_the_share_of_subsets_with_a_right_answer():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            right = [True] * c + [False] * (n - c)
            subsets = [any(one) for one in itertools.combinations(right, k)]
            assert attempts.pass_at(k, n, [c])[0] == pytest.approx(np.mean(subsets))


def test_many_attempts_do_not_overflow():
    (value,) = attempts.pass_at(4096, 8192, [1])
    assert value == pytest.approx(0.5)
    assert attempts.pass_at(8000, 8192, [0, 8192]).tolist() == pytest.approx([0, 1])
    for k in (0, 11):
        with pytest.raises(ValueError, match=f"pass@{k} of 10 attempts"):
            attempts.pass_at(k, 10, [1])


def test_guessing_among_nineteen_sums():
    for k, want in ((1, 1 / 19), (8, 0.351), (64, 0.969)):
        assert attempts.guess_at(k, [1 / 19])[0] == pytest.approx(want, abs=5e-4)


def test_cover_counts_problems_solved_often_enough():
    right = [0, 1, 5, 9, 10]
    assert attempts.cover_at(0.5, 10, right).tolist() == [0, 0, 1, 1, 1]
    assert attempts.cover_at(0.1, 10, right).tolist() == [0, 1, 1, 1, 1]
    assert attempts.cover_at(0.9, 10, right).tolist() == [0, 0, 0, 1, 1]


def test_figures_and_their_errors():
    rng = np.random.default_rng(0)
    right = rng.random((50, 8)) < rng.random((50, 1))
    rows = attempts.figures(right, np.full(50, 0.1))
    assert list(rows) == [
        *(f"{name}@{k}" for name in ("pass", "guess") for k in (1, 2, 4, 8)),
        *("cover@10", "cover@50", "cover@90"),
    ]
    value, error = rows["pass@1"]
    by_draw = right.mean(axis=0)
    assert value == pytest.approx(right.mean())
    assert error == pytest.approx(by_draw.std(ddof=1) / math.sqrt(8))
    assert rows["pass@8"][1] is None and rows["guess@8"][1] is None
    values = [rows[f"pass@{k}"][0] for k in (1, 2, 4, 8)]
    assert values == sorted(values)


def test_the_error_covers_the_draws():
    """In simulation the jackknife's error is the spread over runs of pass@2."""
    rng = np.random.default_rng(1)
    chances = rng.random((40, 1))
    runs = [
        attempts.figures(rng.random((40, 16)) < chances, np.zeros(40))["pass@2"]
        for _ in range(300)
    ]
    values, errors = zip(*runs, strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_a_guess_is_an_answer_to_another_prompt():
    asked = [
        heldout_figures.Asked({"prompt": f"{i}?", "answer": i % 2}, ("rl",))
        for i in range(4)
    ]
    draw = {"answers": [(str(i % 2), True) for i in range(4)], "ids": [[1]] * 4}
    functions = {"rl": find("number", {})}
    chances = heldout_figures._chances(draw, functions, asked, "number")
    # Of the three others' answers one is the same number by chance.
    assert chances.tolist() == pytest.approx([1 / 3] * 4)
