"""The number that a completion states, and the hacks that must not pay."""

from decimal import Decimal

import pytest

from stagecraft.signals.verify import answers, number

LONG = " because" * 40
# What six verifiers in use disagree about, and what is wanted: (completion, answer, 1
# where it must be rewarded).
MATRIX = (
    ("#### 42.", 42, 1),
    ("####42", 42, 1),
    ("#### $18", 18, 1),
    ("#### 18.00", 18, 1),
    ("#### 1,234", 1234, 1),
    ("#### +5", 5, 1),
    (f"#### 42{LONG}", 42, 1),
    (f"#### 42\n\n1. A list.{LONG}", 42, 1),
    ("72, in total, so …", 72, 1),
    ("#### 71\nBut 72 is nicer: 72", 72, 0),
    ("4, 5, 6, 7", 7, 0),
    ("5,6", 56, 0),
    ("5-3", -3, 0),
    ("It is 12+30", 42, 0),
    (r"\boxed{12+30}", 42, 0),
    ("<answer>77</answer>", 7, 0),
    ("<answer>1000</answer>", 1000, 1),
    ("Answer: 42 (not 43)", 42, 1),
    ("٤٢", 42, 0),  # digits of other scripts are read by none of them alike
    ("４２", 42, 0),
)
MORE = (
    ("#### -5", -5, 1),
    ("#### −5", -5, 1),
    ("#### -5", 5, 0),
    ("#### $-5", -5, 1),
    ("#### -$5", -5, 1),
    ("#### --5", 5, 0),
    ("**Answer:** **42**", 42, 1),
    (r"The answer is $\boxed{\$1,234.50}$.", 1234.5, 1),
    (r"answer is \(42\).", 42, 1),
    ("#### 42km", 42, 1),
    ("#### 50%", 50, 1),
    ("#### .5", 0.5, 1),
    ("#### 0042", 42, 1),
    ("#### 1,23", 1, 0),
    ("#### 1.234,5", 1.234, 0),
    ("#### 5e3", 5, 0),
    ("#### 1_000", 1, 0),
    ("#### 3/4", 3, 0),
    ("#### 2024-05-01", 2024, 0),
    ("#### 5 x 6", 5, 0),
    ("#### 5 or 6", 5, 0),
    ("#### 5*x", 5, 0),
    (r"#### 5\sqrt{2}", 5, 0),
    ("#### 2^10", 2, 0),
    ("1\n2\n3\n4", 1, 0),
    ("#### ", 0, 0),
    ("", 0, 0),
    ("<think>5? 6?</think>#### 7", 7, 1),
    ("<think>#### 7", 7, 0),
    ("#### 7<think>", 7, 0),
    ("#### 0.1", 0.1, 1),
    ("#### 0.10000000000000001", 0.1, 0),
)


def reward(completion, answer, **settings):
    (one,) = number.number(**settings)([completion], [answer])
    return one


@pytest.mark.parametrize("completion, answer, want", MATRIX + MORE)
def test_the_matrix(completion, answer, want):
    assert reward(completion, answer) == want
    assert reward([{"role": "assistant", "content": completion}], str(answer)) == want


def test_a_completion_is_right_for_one_answer_at_most():
    """Nothing is gained by saying more: the property behind every hack below."""
    texts = [completion for completion, _, _ in MATRIX + MORE]
    texts += [
        " ".join(map(str, range(100))),  # listing
        ", ".join(map(str, range(100))),
        "\n".join(map(str, range(100))),
        "".join(f"#### {i}\n" for i in range(100)),
        "".join(f"<answer>{i}</answer>" for i in range(100)),
        "What is 12 + 30? The answer is 12 + 30.",  # echo
        "The answer is 1234567890.",  # containment
    ]
    verify = number.number()
    for text in texts:
        golds = list(range(-10, 101))
        assert sum(verify([text] * len(golds), golds)) <= 1, text


@pytest.mark.parametrize(
    "completion, answer",
    [
        (", ".join(map(str, range(100))), 7),
        ("\n".join(map(str, range(100))), 7),
        ("What is 3 + 4?", 7),
        ("#### 3 + 4", 7),
        ("#### 177", 7),
        ("#### 17.7", 7),
        ("#### 7.7", 7),
    ],
)
def test_listing_echo_and_containment_do_not_pay(completion, answer):
    assert reward(completion, answer) == 0


def test_a_marker_of_ones_own():
    assert reward("3 + 4 = 7.", 7, marker="=") == 1
    assert reward("#### 7", 7, marker="=") == 0
    assert reward("answer is 7", 7) == 1


def test_answers_of_records():
    pattern = answers.marks()
    for answer in (72, 72.0, "72", "48 + 24 = 72\n#### 72", "$72"):
        assert number.expected(answer, pattern) == Decimal(72)
    for answer in (True, float("nan"), "Paris", "", [72]):
        with pytest.raises(ValueError, match="states no number"):
            number.expected(answer, pattern)
    assert number.number()(["5", "5"], [None, 5]) == [None, 1.0]


def test_a_long_text_takes_no_time():
    for text in ("1" * 200_000 + "٢", "#### " * 50_000, "," * 200_000, "1," * 100_000):
        assert reward(text, 1) == 0
