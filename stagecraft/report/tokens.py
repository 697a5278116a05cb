"""Tokens of answers in the colours of their shift: one way for all pages.

`span` is what the macro `coloured` shows of a token, `shift` the single prompt's answer
of a stage, as prompt.json has it.
"""

import math
from typing import Any

from stagecraft.anatomy import changes, token_shift
from stagecraft.metrics import is_number
from stagecraft.report.findings import show
from stagecraft.runs import part

# Stand in where a space or a line's end would not be seen.
_UNSEEN = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥"})


def span(token: dict, reader: str = "its parent") -> dict[str, Any]:
    """Returns a token as it is shown in its text.

    Args:
        token: {"token", "rank", "divergence"}, of `token_shift.measure`, or with more,
            of `readings.read`.
        reader: who ranked it.

    Returns:
        {"text", "after": the end of its line, "label": its class, "control", "rank",
        "about": in words}.
    """
    text, about = token["token"], f"rank {token['rank']} of {reader}"
    if is_number(token.get("probability")):
        about += f" ({share(token['probability'])})"
    if is_number(token.get("divergence")):
        about += f", KL {token['divergence']:.2g} nats"
    if others := alternatives(token):
        about += f"; besides {', '.join(others)}"
    return {
        # An end of a line is seen, and the line ends behind the token's rank.
        "text": text.replace("\n", "↵\n").removesuffix("\n"),
        "after": "\n" if text.endswith("\n") else "",
        "label": token_shift.classify(token["rank"]),
        "control": bool(token.get("control")),
        "rank": token["rank"],
        "about": f"{seen(text)}: {about}",
    }


def seen(text: str) -> str:
    """Returns a token's text in quotes, spaces at its ends and ends of lines visible.

    >>> seen(" a b"), seen("\\n")
    ('“␣a b”', '“↵”')
    """
    left, right = (len(text) - len(s) for s in (text.lstrip(" "), text.rstrip(" ")))
    text = "␣" * left + text[left : max(len(text) - right, left)] + "␣" * right
    return f"“{text[: max(len(text), 1)].translate(_UNSEEN)}”"


def share(value: float) -> str:
    """Returns a probability in percent; an en dash for what is no number.

    >>> share(0.5), share(0.00012), share(None)
    ('50%', '0.012%', '–')
    """
    return f"{100 * value:.3g}%" if is_number(value) else "–"


def alternatives(token: dict) -> list[str]:
    """Lists what the reader would have written in a token's place: “Paris” 40%."""
    rows = token.get("alternatives") or []
    return [f"{seen(text)} {share(value)}" for text, value in rows]


def shift(stage: str, answer: dict) -> dict[str, Any] | None:
    """Returns an answer to the single prompt, token by token.

    Args:
        stage: its name.
        answer: of prompt.json.

    Returns:
        {"title": the finding, "spans", "readers": names, the stage's parent first,
        "rows": [{"span", "text", "cells": [(rank, probability, KL) of each reader],
        "others": what the parent would have written}]}; None where no model read it: in
        older runs, and of a stage from scratch.
    """
    readings = {
        changes.short_names(stage, reader)[1]: rows
        for reader, rows in part(answer, "readings").items()
        if rows and all(map(_is_whole, rows))
    }
    if not readings:
        return None
    readers, every = list(readings), list(readings.values())
    spans = [span(token, readers[0]) for token in every[0]]
    return {
        "title": _finding(stage, readers[0], every[0]),
        "spans": spans,
        "readers": readers,
        "rows": [
            {
                "span": spans[place],
                "text": seen(row[0]["token"]),
                "cells": [_cells(token) for token in row],
                "others": ", ".join(alternatives(row[0])),
            }
            for place, row in enumerate(zip(*every, strict=False))
        ],
    }


def _is_whole(token):
    known = token if isinstance(token, dict) else {}
    return isinstance(known.get("token"), str) and is_number(known.get("rank"))


def _cells(token):
    kl = show(token.get("divergence"))
    return token["rank"], share(token.get("probability")), kl


def _finding(stage, reader, rows):
    labels = [token_shift.classify(token["rank"]) for token in rows]
    shifted, same = labels.count("shifted"), labels.count("unshifted")
    text = f"{stage}: {reader} would have written {same} of {len(rows)} tokens as well"
    if shifted:
        first = labels.index("shifted")
        text += f"; shifted: {shifted}, first {seen(rows[first]['token'])}"
    every = [token.get("divergence") for token in rows]
    known = [kl for kl in every if is_number(kl)]
    if known:
        text += f"; KL {show(math.fsum(known) / len(known))} nats a token"
    return text
