"""Rewards by functions of text: a verifier says what a completion is worth.

A verifier is called as TRL calls its reward functions,

    verifier(prompts, completions, **columns) -> list of numbers, None for "cannot say"

with lists of one entry a completion: `completions` are texts, `columns` the other keys
of the prompts' records ("answer", ...), as far as the function names them or takes
**kwargs; `ended` says which completions stopped by themselves. A completion on which it
raises, or returns something not finite, is named in the log, left out and counted; the
run lives.
"""

import importlib
import inspect
import logging
import math

import numpy as np

from stagecraft.errors import UserError

SHOWN = 3  # how many failures of one call are told in full


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
        """Rewards of completions.

        Args:
            index: i32[R], the record of each row's prompt.
            tokens: i32[R, N]; mask: bool[R, N], through the stop token; ended: bool[R].

        Returns:
            f64[R, S], one column a verifier; NaN where it could not say.
        """
        records = [self.records[i] for i in index]
        kept = [row[seen] for row, seen in zip(tokens, mask, strict=True)]
        texts = [
            self.tokenizer.decode([int(t) for t in (row[:-1] if end else row)])
            for row, end in zip(kept, ended, strict=True)
        ]
        ended = [bool(e) for e in ended]
        return np.array(scores_of(self.functions, records, texts, ended), float).T


def scores_of(functions, records, texts, ended):
    """Each verifier's rewards of each text: S lists of floats, NaN for "cannot say".

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
    given, failed = _accepted(function, columns), ""
    try:
        found = list(function(prompts, texts, **given))
        if len(found) != len(texts):
            raise ValueError(f"{len(found)} rewards for {len(texts)} completions")
    except Exception:  # somebody else's code: find out which rows it was
        found = []
        for row in range(len(texts)):
            one = {k: [v[row]] for k, v in given.items()}
            try:
                (value,) = function([prompts[row]], [texts[row]], **one)
            except Exception as error:
                value, failed = math.nan, f" ({type(error).__name__}: {error})"
            found.append(value)
    values = [_number(value) for value in found]
    bad = [row for row, value in enumerate(values) if math.isnan(value)]
    for row in bad[:SHOWN]:
        logging.warning(
            "verifier %s could not score a completion%s: prompt %.80r, completion "
            "%.80r; %d of %d rows left out",
            *(name, failed, prompts[row], texts[row], len(bad), len(texts)),
        )
    return values


def _number(value):
    """A finite float, or NaN for whatever else a verifier returned."""
    try:
        value = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def _accepted(function, columns):
    """The columns that a function names, or all if it takes **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return columns
    names = {p.name for p in parameters}
    return {k: v for k, v in columns.items() if k in names}


def find(spec):
    """[(name, function)] from "package.module:function, ...", or a function itself."""
    if callable(spec):
        return [(getattr(spec, "__name__", "verifier"), spec)]
    found = []
    for part in filter(None, (p.strip() for p in spec.split(","))):
        module, colon, attribute = part.partition(":")
        try:
            if not colon:
                raise ValueError("no colon in it")
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"verifiers={part!r}: cannot import it ({error}); expected "
                "'package.module:function'"
            ) from error
        name, taken = attribute, {n for n, _ in found}
        found.append((name if name not in taken else part, function))
    return found
