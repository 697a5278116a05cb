"""Equality by math-verify: what is read, its limits, and what it still gets wrong."""

import math

import pytest

from stagecraft.errors import UserError
from stagecraft.signals.verify import mathematics

SECONDS = 1.0


@pytest.fixture(scope="module")
def reward():
    verify = mathematics.math(seconds=SECONDS)
    return lambda text, answer: verify([text], [answer])[0]


@pytest.mark.parametrize(
    "text, answer, want",
    [
        # Right.
        (r"\boxed{1{,}000}", 1000, 1),
        (r"\boxed{\$18}", "#### 18", 1),
        (r"\boxed{2024.}", "2024", 1),
        (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", 1),
        (r"\boxed{1+x}", "x+1", 1),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", 1),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1),
        (r"no: \boxed{5}, so \boxed{6}", "6", 1),
        # Wrong.
        (r"\boxed{5} \boxed{6}", "5", 0),
        (r"\boxed{5} then \boxed{", "5", 0),
        (r"It is 1 2 3 4 5", "5", 0),
        (r"$5$", "5", 0),
        (r"\boxed{foo 5 bar}", "5", 0),
        (r"\boxed{(1,2)}", "[1,2]", 0),
        (r"\boxed{\pm2021}", "2021", 0),
        (r"\boxed{1,2,\dots,n}", r"1,3,5,\dots,2n-1", 0),
        (r"<think>\boxed{5}", "5", 0),
        (r"\boxed{}", "5", 0),
        (r"\boxed{" + "5" * 201 + "}", "5" * 200, 0),
        # Not worked out.
        (r"\boxed{12+30}", 42, 0),
        (r"\boxed{2^{3}}", 8, 0),
        (r"\boxed{50-8}", 42, 0),
        (r"\boxed{6\times7}", 42, 0),
        (r"\boxed{4\sqrt(2)}", 4, 0),
        (r"\boxed{-42}", -42, 1),
        # math-verify compares 15 digits: these two are still rewarded.
        (r"\boxed{1/2^{98}}", "1/2^{99}", 1),
        (r"\boxed{1/2006!}", "1/2004!", 1),
    ],
)
def test_boxes(reward, text, answer, want):
    assert reward(text, answer) == want


BOMB = r"\boxed{9^{9^{9^9}}}"


def test_what_takes_too_long_has_failed_and_the_rest_goes_on(reward):
    assert math.isnan(reward(BOMB, r"\sqrt{2}"))
    assert reward(r"\boxed{\sqrt{2}}", r"\sqrt{2}") == 1


def test_a_batch_has_a_budget():
    verify = mathematics.math(seconds=SECONDS, batch_seconds=0.5 * SECONDS)
    rewards = verify([BOMB, r"\boxed{2}", "5"], [r"\sqrt{2}"] * 3)
    assert all(map(math.isnan, rewards[:2])) and rewards[2] == 0
    assert verify([r"\boxed{\sqrt{2}}"], [r"\sqrt{2}"]) == [1.0]


def test_a_process_that_does_not_answer_is_ended_and_another_started():
    child = mathematics.Child(seconds=60)
    assert child.equal(r"\sqrt{2}", "9^{9^{9^9}}", 0.2) is None
    assert child._process is None
    assert child.equal("1", "2", 60) is False
    child._process.kill()  # as the system does when memory runs out
    child._process.wait()
    assert child.equal("1", "1", 60) is None
    assert child._process is None


def test_answers_of_records():
    verify = mathematics.math(seconds=SECONDS)
    assert verify([r"\boxed{1}"], [None]) == [None]
    for answer in ("", "x" * 201):
        with pytest.raises(ValueError, match="expected 1 to 200 characters"):
            verify([r"\boxed{1}"], [answer])


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(mathematics.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"math-verify is not installed: .*\[verify\]"):
        mathematics.math()
