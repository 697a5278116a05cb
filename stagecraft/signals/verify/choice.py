"""One letter of several: multiple choice."""

import re

from stagecraft.signals.verify import answers

LETTERS = "ABCDEFGHIJ"


class _Reader:
    """Reads the one letter that a text chooses.

    Args:
        letters: those there are, in capitals.
        marker: see `answers.marks`.
    """

    def __init__(self, letters, marker):
        one = f"[{re.escape(letters)}]"
        small = f"[{re.escape(letters.lower())}]"
        opening = r"[\s*_`\"'(\[{:$]*"
        closed = r"(?=\s*(?:[)\]}.:,*]|$|</))"
        self.pattern = answers.marks(marker)
        # A small letter, or one at the start of a text, may be a word.
        self.marked = re.compile(rf"{opening}({one}(?!\w)|{small}{closed})")
        self.bare = re.compile(
            rf"{opening}([{re.escape(letters + letters.lower())}]{closed})"
        )
        self.goes_on = re.compile(
            rf"[)\].]*\s*(?:[,/&|;+]|or\b|and\b)\s*[(\[]*{one}(?!\w)"
            rf"|(?:[\s,.;:()\[\]]*{one}(?!\w))+[\s.)\]]*$"
        )

    def read(self, text):
        """Returns a capital; None where a text chooses none, or several."""
        rest, marked = answers.after_last(self.pattern, text)
        match = (self.marked if marked else self.bare).match(rest)
        if match is None or self.goes_on.match(rest, match.end()):
            return None
        return match[1].upper()


def choice(*, letters: str = LETTERS, marker: str = ""):
    """1 where the completion chooses the letter of `answer`, else 0.

    Args:
        letters: those there are; `answer` is one of them, or its place from 0.
        marker: what stands before the answer; "" for the usual ones.
    """
    reader = _Reader(letters.upper(), marker)

    def verify(completions, answer):
        return [
            None if gold is None else _right(one, _expected(gold))
            for one, gold in zip(completions, answer, strict=True)
        ]

    def _expected(gold):
        if isinstance(gold, int) and 0 <= gold < len(letters):
            return letters[gold].upper()
        chosen = reader.read(gold) if isinstance(gold, str) else None
        if chosen is None:
            raise ValueError(f"answer={str(gold)[:60]!r} is none of {letters}")
        return chosen

    def _right(completion, gold):
        text = answers.reply(completion)
        return float(text is not None and reader.read(text) == gold)

    return verify
