"""One number, written out: the verifier of arithmetic.

A completion states at most one number, the literal right after its last marker, or at
its very beginning where it has none; it is compared exactly, as a decimal. So nothing
is gained by listing numbers, by repeating the question (an expression is no number), or
by hiding the right one inside a longer one.
"""

import re
from decimal import Decimal

from stagecraft.signals.verify import answers

_CURRENCY = r"\\?[$€£¥]"
# What may open a number: space, Markdown, brackets, a currency, LaTeX.
_OPENING = r"(?:[\s*_`\"'(\[{:=]|\\[(\[]|\\(?:text|mathrm)\{|\$(?=\\))*+"
_NUMBER = re.compile(
    rf"{_OPENING}(?P<sign>[-+−](?:{_CURRENCY})?|{_CURRENCY}[-+−]?|)"
    r"(?P<digits>(?>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?"
    r"|\.[0-9]+))"
)
# What makes it a part of something else: a longer number, an expression, a list.
_GOES_ON = re.compile(
    r"\w*\d"  # 1e5, 1_000
    r"|[^\w\n]*\d"  # 12+30, 5,6, 4 5 6, 2024-05-01
    r"|\s*(?:or|and|to|x|plus|minus|times|over|by)\s*\d"
    r"|\s*\n[^\w\n]*[0-9][0-9.,]*[^\w\n]*(?:\n|$)"  # a list, one number a line
    r"|\s*[*×·^][ *]*[A-Za-z(\\]"  # 5*x
    r"|\s*\\(?!text|mathrm|quad)[A-Za-z]",  # 5\sqrt{2}
    re.IGNORECASE,
)


def read(text, pattern) -> Decimal | None:
    """Returns the one number that a text states; None where it states none.

    Args:
        text: a text.
        pattern: of its markers, see `answers.marks`.

    >>> pattern = answers.marks()
    >>> read("so #### $1,234.50", pattern), read("#### 12+30", pattern)
    (Decimal('1234.50'), None)
    """
    rest, _ = answers.after_last(pattern, text)
    match = _NUMBER.match(rest)
    if match is None or _GOES_ON.match(rest, match.end()):
        return None
    minus = "-" if {"-", "−"} & set(match["sign"]) else ""
    return Decimal(minus + match["digits"].replace(",", ""))


def expected(answer, pattern) -> Decimal:
    """Returns the number of a record's answer: a number, or a text that states one."""
    number = None
    if isinstance(answer, str):
        number = read(answer, pattern)
    elif isinstance(answer, (int, float)) and not isinstance(answer, bool):
        number = Decimal(str(answer))
        number = number if number.is_finite() else None
    if number is None:
        raise ValueError(f"answer={str(answer)[:60]!r} states no number")
    return number


def number(*, marker: str = ""):
    """1 where the completion states the number of `answer`, else 0.

    Args:
        marker: what stands before the answer; "" for #### , "Answer:", "answer is",
            <answer> and \\boxed{.
    """
    pattern = answers.marks(marker)

    def verify(completions, answer):
        return [
            None if gold is None else _right(one, expected(gold, pattern))
            for one, gold in zip(completions, answer, strict=True)
        ]

    def _right(completion, gold):
        text = answers.reply(completion)
        return float(text is not None and read(text, pattern) == gold)

    return verify
