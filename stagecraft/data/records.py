"""What the readers of files return: one type for each use of a record."""

from typing import Any, NamedTuple


class Conversation(NamedTuple):
    """A conversation to imitate.

    Attributes:
        messages: its turns.
        tools: JSON schemas of what the assistant may call, or None.
    """

    messages: list
    tools: list | None = None


class Comparison(NamedTuple):
    """Answers to one prompt, compared.

    Attributes:
        prompt: messages.
        answers: a list of messages for each answer, the best first; two or more.
        preference: probability that the first is better than the second; None where
            the record has none.
        margin: by how much it is better; None likewise.
        tools: JSON schemas of what the assistant may call, or None.
    """

    prompt: list
    answers: tuple
    preference: float | None = None
    margin: float | None = None
    tools: list | None = None


class Judgement(NamedTuple):
    """One answer and whether it is desirable.

    Attributes:
        prompt, completion: messages.
        label: True for desirable.
        tools: as of a `Comparison`.
    """

    prompt: list
    completion: list
    label: bool
    tools: list | None = None


class Prompt(NamedTuple):
    """A prompt and where it came from.

    Attributes:
        prompt: a text or messages.
        where: "FILE:LINE".
        record: the whole record, its other keys (an answer to verify against) included.
        tools: as of a `Comparison`.
    """

    prompt: Any
    where: str
    record: dict
    tools: list | None = None
