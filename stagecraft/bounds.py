"""Bounds on the figures of one run, such as "ppo.gold_mean > sft.gold_mean + 0.4".

A bound is "KEY SIGN VALUE": a dotted key of the summary, one of <= >= < >, and a
number, a key, KEY + NUMBER, KEY - NUMBER or NUMBER * KEY.
"""

import operator
import re

from stagecraft import schema
from stagecraft.errors import UserError

_SIGNS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_SHOWN = {"<=": "≤", ">=": "≥"}
_BOUND = re.compile(r"\S+ (<=|>=|<|>) \S+( [-+*] \S+)?")


def parse(bound: str) -> tuple[str, str, list[str]]:
    """Parses a bound: key, sign, words of the value; UserError for anything else.

    >>> parse("ppo.gold_mean > sft.gold_mean + 0.4")
    ('ppo.gold_mean', '>', ['sft.gold_mean', '+', '0.4'])
    """
    if not _BOUND.fullmatch(bound):
        raise UserError(
            f"measure.bounds: {bound!r}: expected 'KEY SIGN VALUE' as in "
            "'sft.cloze_accuracy >= 0.93' or 'ppo.gold_mean > sft.gold_mean + 0.4'"
        )
    key, sign, *value = bound.split()
    return key, sign, value


def check(summary: dict, texts: tuple[str, ...]) -> dict[str, dict]:
    """Checks bounds against the figures of a run.

    Args:
        summary: nested dicts of numbers, as in summary.json.
        texts: bounds that `parse` reads.

    Returns:
        {key: {"must", "short", "holds"}}, `short` with numbers in place of keys. A
        bound on a stage that was not run is left out; one about a figure that its
        stage does not have fails, and `short` names that figure.

    >>> check({"a": {"x": 2.0}, "b": {"x": 1.0}}, ["a.x > b.x + 0.5"])
    {'a.x': {'must': '> b.x + 0.5', 'short': '> 1.5', 'holds': True}}
    """
    bounds = {}
    for text in texts:
        key, sign, words = parse(text)
        left, right = lookup(summary, key), _value(summary, words)
        if left is None or right is None:
            missing = _missing(summary, [key, *words])
            if missing:
                bounds[key] = {"must": text, "short": missing, "holds": False}
            continue
        must = f"{_SHOWN.get(sign, sign)} {' '.join(words)}"
        short = f"{_SHOWN.get(sign, sign)} {right:.3g}"
        holds = bool(_SIGNS[sign](left, right))
        if key in bounds:
            must = f"{bounds[key]['must']}, {must}"
            short = f"{bounds[key]['short']}, {short}"
            holds = holds and bounds[key]["holds"]
        bounds[key] = {"must": must, "short": short, "holds": holds}
    return bounds


def lookup(summary: dict, key: str):
    """Returns the value under a dotted key; None where there is none."""
    value = summary
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _missing(summary, words):
    """Returns a line about the first figure that a finished stage lacks, or ""."""
    for word in words:
        stage, _, figure = word.partition(".")
        if stage in summary and figure and lookup(summary, word) is None:
            near = schema.nearest(figure, summary[stage])
            hint = f"; did you mean {stage}.{near}?" if near else ""
            return f"no figure {word}{hint}"
    return ""


def _value(summary, words):
    terms = [_number(summary, word) for word in words[::2]]
    if any(term is None for term in terms):
        return None
    if len(terms) == 1:
        return terms[0]
    one, two = terms
    return {"+": one + two, "-": one - two, "*": one * two}[words[1]]


def _number(summary, word):
    try:
        return float(word)
    except ValueError:
        return lookup(summary, word)
