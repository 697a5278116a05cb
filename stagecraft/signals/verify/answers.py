"""What every verifier reads of a completion: its text, its reply, its last answer."""

import re

OPENING, CLOSING = "<think>", "</think>"
# Before an answer, by habit of models and of data sets.
MARKERS = ("####", "answer:", "answer is", "<answer>", r"\boxed{")


def text_of(completion) -> str:
    """Returns the text of a completion, which may be a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def reply(completion) -> str | None:
    """Returns what follows the last </think>; None where thinking did not end.

    >>> reply("<think>5? 6?</think> 6"), reply("<think>5"), reply("6")
    (' 6', None, '6')
    """
    last = text_of(completion).rpartition(CLOSING)[2]
    return None if OPENING in last else last


def marks(marker=""):
    """Returns the pattern of one marker of the user's, or of the usual ones."""
    markers = (marker,) if marker else MARKERS
    return re.compile("|".join(map(re.escape, markers)), re.IGNORECASE)


def after_last(pattern, text) -> tuple[str, bool]:
    """Returns what follows the last marker, or all of a text, and whether it has one.

    >>> after_last(marks(), "#### 4\\nNo: #### 5")
    (' 5', True)
    """
    ends = [match.end() for match in pattern.finditer(text)]
    return (text[ends[-1] :], True) if ends else (text, False)
