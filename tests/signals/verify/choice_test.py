"""The letter that a completion chooses."""

import pytest

from stagecraft.signals.verify import choice


@pytest.mark.parametrize(
    "completion, chosen",
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("B) a dog", "B"),
        ("B. A dog", "B"),
        ("Answer: B", "B"),
        ("The answer is **B** because A is wrong.", "B"),
        (r"so \boxed{B}", "B"),
        ("<answer>b</answer>", "B"),
        ("Answer: A\nNo. Answer: C", "C"),
        ("<think>A? B?</think>C", "C"),
        ("<think>A", ""),
        ("A dog", ""),
        ("I think so", ""),
        ("a dog", ""),
        ("Answer: Cats", ""),
        ("Answer: a dog", ""),
        ("Answer: A or B", ""),
        ("Answer: A, B, C, D", ""),
        ("A B C D", ""),
        ("A\nB\nC\nD", ""),
        ("A) B) C) D)", ""),
        ("Which is it: (A) one (B) two", ""),
        ("", ""),
    ],
)
def test_one_letter_is_read(completion, chosen):
    verify = choice.choice(letters="ABCD")
    rewards = verify([completion] * 4, list("ABCD"))
    assert rewards == [float(letter == chosen) for letter in "ABCD"]


def test_answers_of_records():
    verify = choice.choice(letters="abcd")
    assert verify(["B"] * 5, [1, "B", "(b)", "B. Paris", None]) == [1, 1, 1, 1, None]
    for answer in (4, -1, "E", "Paris", 1.0):
        with pytest.raises(ValueError, match="is none of abcd"):
            verify(["B"], [answer])
