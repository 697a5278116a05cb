"""Verdicts in a file, and what their rater goes by.

A line that holds a verdict is as a comparisons stage writes it: "chosen" and
"rejected", perhaps "probability" (that chosen is better), "first" (which of the two
was in the first slot), "logps" (both orders' log-probabilities of the labels), "gold"
and "own" ("chosen" or "rejected": the better one by what the rater is held against, and
the one that it wrote itself), "pair" (a number) and "persuasion" (whether the worse
answer of that pair says that it is the better one). Pairs without a verdict are in a
file beside it.
"""

import json
import math
from pathlib import Path

from stagecraft import worlds
from stagecraft.anatomy.bias import Rated
from stagecraft.errors import UserError
from stagecraft.signals import template

SIDES = ("chosen", "rejected")


def read(path: str | Path, world: str = "") -> list[Rated]:
    """Reads the verdicts in a file.

    Args:
        path: a .jsonl file of records, of a comparisons stage or of `ask`; pairs
            without a verdict are read from NAME_unrated.jsonl beside it.
        world: name of an embedded world, whose gold score the rater is held against.

    Returns:
        what `bias.measure` takes.

    Raises:
        UserError: a line that is no verdict, or nothing but ties.
    """
    path = Path(path)
    rows = [_rated(where, row, world) for where, row in _lines(path)]
    beside = unrated(path)
    if beside.exists():
        rows += [_rated(where, row, world) for where, row in _lines(beside)]
    if not rows:
        raise UserError(f"{path}: holds no pair; nothing to measure")
    if all(row.probability in (None, 0.5) for row in rows):
        raise UserError(
            f"{path}: holds ties alone, or no verdict: nothing says what its rater "
            "goes by"
        )
    return rows


def unrated(path: Path) -> Path:
    """Returns the file of the pairs that the rater of a file gave no verdict on."""
    return path.with_name(f"{path.stem}_unrated.jsonl")


def _lines(path):
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not a line of JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object, as {{...}}")
            yield where, row


def _rated(where, row, world):
    """Returns a line as a `Rated`, its first slot first."""
    if "answers" in row and "chosen" not in row:  # a pair without a verdict
        answers = tuple(map(str, row["answers"]))
        reason = str(row.get("reason", "unscored"))
        return Rated((*answers, "", "")[:2], None, reason, **_asked(row))
    texts = [_text(where, row, side) for side in SIDES]
    first = _side(where, row, "first") or 0
    p = row.get("probability", row.get("preference", 1.0))
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UserError(f"{where}: probability={p!r}: expected a number from 0 to 1")
    gold = _side(where, row, "gold")
    if world:
        gold = _by_world(world, row.get("prompt"), texts)
    places = [
        None if x is None else x ^ first for x in (gold, _side(where, row, "own"))
    ]
    return Rated(
        (texts[first], texts[1 - first]),
        1 - p if first else float(p),
        logps=_logps(where, row),
        gold=places[0],
        own=places[1],
        **_asked(row),
    )


def _asked(row):
    return {"pair": row.get("pair"), "persuades": bool(row.get("persuasion"))}


def _text(where, row, side):
    value = row.get(side)
    if isinstance(value, list):
        value = "\n".join(str(m.get("content")) for m in value if isinstance(m, dict))
    if not isinstance(value, str):
        raise UserError(f"{where}: {side}: is missing, or neither text nor messages")
    return value


def _side(where, row, key):
    """Returns 0 of "chosen", 1 of "rejected", None without the key."""
    if row.get(key) is None:
        return None
    if row[key] not in SIDES:
        raise UserError(f"{where}: {key}={row[key]!r}: expected 'chosen' or 'rejected'")
    return SIDES.index(row[key])


def _logps(where, row):
    table = row.get("logps") or ()
    fit = isinstance(table, list | tuple) and all(
        isinstance(order, list)
        and len(order) == 2
        and all(isinstance(x, int | float) and math.isfinite(x) for x in order)
        for order in table
    )
    if not fit or len(table) > 2:
        raise UserError(
            f"{where}: logps: expected one or two orders of two log-probabilities"
        )
    return tuple(map(tuple, table))


def _by_world(world, prompt, texts):
    """Returns the answer that a world's gold score prefers; None for a tie."""
    scores = [worlds.get(world).gold(template.as_text(prompt), text) for text in texts]
    return None if scores[0] == scores[1] else int(scores[1] > scores[0])
