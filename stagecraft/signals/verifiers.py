"""Rewards by functions of text: a verifier scores completions.

A verifier is called as TRL calls its reward functions,

    verifier(prompts, completions, **columns) -> list of numbers, None for "cannot say"

with lists of one entry a completion: `completions` are texts, `columns` the other keys
of the prompts' records ("answer", ...), as far as the function names them or takes
**kwargs; `ended` says which completions stopped by themselves. A completion on which it
raises, or returns something not finite, is logged, left out and counted; the run goes
on.
"""

import inspect
import logging
import math

import numpy as np

from stagecraft import schema
from stagecraft.signals import protocol

SHOWN = 3  # failures of one call that are logged in full


class Verifiers:
    """Several verifiers over the prompts of one stage.

    Args:
        functions: list of (name, function).
        records: list of dicts, the prompts' records in the order of the dataset.
        tokenizer: a `text.tokenizer.Tokenizer`.
    """

    def __init__(self, functions, records, tokenizer):
        self.functions, self.records = functions, records
        self.names = [name for name, _ in functions]
        self.tokenizer = tokenizer

    def __call__(self, index, tokens, mask, ended):
        """Returns the rewards of completions.

        Args:
            index: i32[R], the record of each row's prompt.
            tokens: i32[R, N]; mask: bool[R, N], through the stop token; ended: bool[R].

        Returns:
            f64[R, S], one column a verifier; NaN where it gave no reward.
        """
        records = [self.records[i] for i in index]
        rows = [row[seen] for row, seen in zip(tokens, mask, strict=True)]
        texts = [
            self.tokenizer.decode([int(t) for t in (row[:-1] if end else row)])
            for row, end in zip(rows, ended, strict=True)
        ]
        ended = [bool(e) for e in ended]
        return np.array(scores_of(self.functions, records, texts, ended), float).T


def scores_of(functions, records, texts, ended):
    """Returns each verifier's rewards of each text: S lists of floats, NaN for none.

    Args:
        functions: list of (name, function).
        records: list of dicts, the prompt's record of each text.
        texts: list of str; ended: list of bool.
    """
    columns = {
        key: [r.get(key) for r in records]
        for key in sorted({k for r in records for k in r} - {"prompt"})
    }
    columns["ended"] = ended
    prompts = [r["prompt"] for r in records]
    return [_score(n, f, prompts, texts, columns) for n, f in functions]


def _score(name, function, prompts, texts, columns):
    accepted, failed = _accepted(function, columns), ""
    try:
        rewards = list(function(prompts, texts, **accepted))
        if len(rewards) != len(texts):
            raise ValueError(f"{len(rewards)} rewards for {len(texts)} completions")
    except Exception:  # the user's code: ask again row by row, to see which rows fail
        rewards = []
        for row in range(len(texts)):
            one = {k: [v[row]] for k, v in accepted.items()}
            try:
                (value,) = function([prompts[row]], [texts[row]], **one)
            except Exception as error:
                value, failed = math.nan, f" ({type(error).__name__}: {error})"
            rewards.append(value)
    values = [_number(value) for value in rewards]
    bad = [row for row, value in enumerate(values) if math.isnan(value)]
    for row in bad[:SHOWN]:
        logging.warning(
            "verifier %s could not score a completion%s: prompt %.80r, completion "
            "%.80r; %d of %d rows left out",
            name,
            failed,
            prompts[row],
            texts[row],
            len(bad),
            len(texts),
        )
    return values


def _number(value):
    """Returns a finite float, or NaN for anything else that a verifier returned."""
    try:
        value = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def _accepted(function, columns):
    """Returns the columns that a function names, or all if it takes **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return columns
    names = {p.name for p in parameters}
    return {k: v for k, v in columns.items() if k in names}


def find(spec):
    """Returns [(name, function)] of "package.module:function, ..." or a function."""
    if callable(spec):
        return [(getattr(spec, "__name__", "verifier"), spec)]
    functions = []
    for part in schema.listed(spec):
        function = schema.imported("verifiers", part)
        name, names = part.partition(":")[2], {n for n, _ in functions}
        functions.append((part if name in names else name, function))
    return functions


def identity(functions):
    """Returns [[name, source]] of verifiers, which tells them from others."""
    return [[name, protocol.source(function)] for name, function in functions]
