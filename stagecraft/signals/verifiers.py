"""Rewards by functions of text: a verifier scores completions.

A verifier is called as TRL calls its reward functions: with keywords, those that its
signature names or, where it takes **kwargs, all of them. Each is a list of one entry a
completion:

    prompts         texts, or lists of messages where the record holds one
    completions     texts; where the prompt is a list of messages, lists of one message
    completion_ids  token ids, the stop token included
    ended           whether the completion stopped by itself
    COLUMN          any other key of the prompts' records ("answer", ...)

and `trainer_state.global_step`, the updates done so far. It returns a list of numbers.
None means that a completion is not its task: the other verifiers' rewards are summed
without it. A completion on which it raises, or for which it returns something that is
no finite number, is logged, left out of training and counted; the run goes on, unless
the very first batch fails whole. On several processes each calls it with its share of
the completions.

Those that ship go by a name without a colon (`verify.table`), with settings among the
stage's `verifier_args`.
"""

import inspect
import logging
import math
from types import SimpleNamespace

import numpy as np

from stagecraft import processes, schema, sharding
from stagecraft.errors import UserError
from stagecraft.signals import protocol
from stagecraft.signals.verify import table

SHOWN = 3  # failures of one call that are logged in full
ABSTAINED, FAILED = math.nan, math.inf  # in place of a reward
ARGUMENTS = ("prompts", "completions", "completion_ids", "ended", "trainer_state")


class Verifier:
    """One reward function.

    Args:
        name: of its rewards in metrics and messages.
        function: see the module's docstring.
        settings: what the function was built from, for its identity.
    """

    def __init__(self, name, function, settings=None):
        self.name, self.function, self.settings = name, function, settings or {}
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"verifiers: {name} has no signature; wrap it in a function of "
                "prompts and completions"
            ) from error
        self.any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.parameters = [p for p in parameters if p.kind not in variadic]
        self._scored = False

    def check(self, names):
        """Refuses a function that needs an argument there is none of.

        Args:
            names: of all arguments that there are.
        """
        for p in self.parameters:
            if p.kind is p.POSITIONAL_ONLY:
                raise UserError(
                    f"verifiers: {self.name} takes {p.name!r} by position only; its "
                    "arguments are given by name"
                )
            if p.default is p.empty and p.name not in names:
                raise UserError(
                    f"verifiers: {self.name} needs {p.name!r}; "
                    f"{schema.hint(p.name, names)}there are: {', '.join(names)}"
                )

    def __call__(self, lists, fixed) -> list[float]:
        """Returns a reward for each completion, or `ABSTAINED`, or `FAILED`.

        Of several processes each scores its share of them; all must call this.

        Args:
            lists: {argument: list of one entry a completion}.
            fixed: {argument: value}, the same for all completions.
        """
        rows, (index, count) = len(lists["completions"]), processes.here()
        edges = [rows * number // count for number in range(count + 1)]
        own = slice(*edges[index : index + 2])
        rewards = self._score({k: v[own] for k, v in lists.items()}, fixed)
        every = sharding.joined(np.array(rewards, np.float64), np.diff(edges).tolist())
        return every.tolist()

    def _score(self, lists, fixed):
        self.check([*lists, *fixed])
        wanted = {p.name for p in self.parameters}
        named, fixed = (
            {k: v for k, v in arguments.items() if self.any or k in wanted}
            for arguments in (lists, fixed)
        )
        rewards, errors = self._rewards(named, fixed, len(lists["completions"]))
        if errors and len(errors) == len(rewards) and not self._scored:
            raise UserError(
                f"verifiers: {self.name} failed on all {len(rewards)} completions of "
                f"its first batch: {errors[0]}; {_form(lists)}"
            )
        self._scored = True
        rewards = [_number(reward) for reward in rewards]
        self._log(rewards, errors, lists)
        return rewards

    def _rewards(self, lists, fixed, rows):
        """Returns what the function returned, and {row: what it raised}."""
        try:
            rewards = list(self.function(**lists, **fixed))
            if len(rewards) != rows:
                raise ValueError(f"{len(rewards)} rewards for {rows} completions")
            return rewards, {}
        except Exception:  # the user's code: ask again row by row, to see which fail
            rewards, errors = [], {}
        for row in range(rows):
            one = {k: [v[row]] for k, v in lists.items()}
            try:
                (reward,) = self.function(**one, **fixed)
            except Exception as error:
                errors[row] = f"{type(error).__name__}: {error}"
                reward = FAILED
            rewards.append(reward)
        return rewards, errors

    def _log(self, rewards, errors, lists):
        failed = [row for row, reward in enumerate(rewards) if reward == FAILED]
        for row in failed[:SHOWN]:
            logging.getLogger(__name__).warning(
                "verifier %s could not score a completion%s: prompt %.80r, completion "
                "%.80r; %d of %d rows left out",
                self.name,
                f" ({errors[row]})" if row in errors else "",
                lists["prompts"][row],
                lists["completions"][row],
                len(failed),
                len(rewards),
            )


class Verifiers:
    """Several verifiers over the prompts of one stage.

    Args:
        verifiers: list of `Verifier`s.
        records: list of dicts, the prompts' records in the order of the dataset.
        tokenizer: a `text.tokenizer.Tokenizer`.
    """

    def __init__(self, verifiers, records, tokenizer):
        self.verifiers, self.records = verifiers, records
        self.names = [verifier.name for verifier in verifiers]
        self.tokenizer = tokenizer
        names = [*ARGUMENTS, *_columns(records)]
        for verifier in verifiers:
            verifier.check(names)

    def __call__(self, index, tokens, mask, ended, step=0):
        """Returns the rewards of completions.

        Args:
            index: i32[R], the record of each row's prompt.
            tokens: i32[R, N]; mask: bool[R, N], through the stop token; ended: bool[R].
            step: updates done.

        Returns:
            f64[R, S], one column a verifier; `ABSTAINED` and `FAILED` where it gave no
            reward.
        """
        records = [self.records[i] for i in index]
        rows = [row[seen].tolist() for row, seen in zip(tokens, mask, strict=True)]
        texts = [
            self.tokenizer.decode(row[:-1] if end else row)
            for row, end in zip(rows, ended, strict=True)
        ]
        ended = [bool(e) for e in ended]
        columns = scores_of(self.verifiers, records, texts, ended, rows, step=step)
        return np.array(columns, float).T


def scores_of(verifiers, records, texts, ended, ids=None, *, step=0):
    """Returns each verifier's rewards of each text: S lists of floats.

    Args:
        verifiers: list of `Verifier`s.
        records: list of dicts, the prompt's record of each text.
        texts: list of str; ended: list of bool.
        ids: the token ids of each text, where they are at hand.
        step: updates done.
    """
    prompts = [record["prompt"] for record in records]
    lists = {key: [r.get(key) for r in records] for key in _columns(records)}
    lists |= {
        "prompts": prompts,
        "completions": [
            text if isinstance(prompt, str) else [dict(role="assistant", content=text)]
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        "ended": ended,
    }
    if ids is not None:
        lists["completion_ids"] = ids
    fixed = {"trainer_state": SimpleNamespace(global_step=step)}
    return [verifier(lists, fixed) for verifier in verifiers]


def total(rewards, weights):
    """Returns the weighted sum of all sources, and the rows that have one.

    Args:
        rewards: [R, S], `ABSTAINED` where a source has nothing to say, not finite
            otherwise where it failed.
        weights: S numbers.

    Returns:
        [R], 0 for rows that have no reward; bool[R], False where a source failed or
        all of them abstained.
    """
    xp = rewards.__array_namespace__()
    abstained = xp.isnan(rewards)
    scored = ~xp.isinf(rewards).any(axis=1) & ~abstained.all(axis=1)
    finite = xp.where(xp.isfinite(rewards), rewards, 0.0)
    weighted = finite * xp.asarray(weights, dtype=rewards.dtype)
    return xp.where(scored, weighted.sum(axis=1), 0.0), scored


def _form(lists):
    """Returns in words what completions are, where a function took them as another."""
    if isinstance(lists["prompts"][0], str):
        return (
            "completions are texts here, as the prompts are; where these are lists of "
            'messages, completions are [{"role": "assistant", "content": ...}]'
        )
    return (
        'completions are [{"role": "assistant", "content": ...}] here, as the prompts '
        "are messages; where these are texts, completions are texts"
    )


def _columns(records):
    keys = {key for record in records for key in record}
    return sorted(keys - {"prompt", "completion", *ARGUMENTS})


def _number(reward):
    """Returns a finite float, `ABSTAINED` for None, `FAILED` for anything else."""
    if reward is None:
        return ABSTAINED
    try:
        reward = float(reward)
    except (TypeError, ValueError):
        return FAILED
    return reward if math.isfinite(reward) else FAILED


def find(spec, settings) -> list[Verifier]:
    """Returns the verifiers that a config names.

    Args:
        spec: "number, package.module:function, FILE.py:function", or a function.
        settings: {name: value}, the stage's `verifier_args`: keyword arguments of the
            shipped verifiers that take them.
    """
    parts = [] if callable(spec) else schema.listed(spec)
    shipped = {part: _signature(part) for part in parts if ":" not in part}
    known = sorted({key for parameters in shipped.values() for key in parameters})
    for key in settings:
        if key not in known:
            raise UserError(
                f"verifier_args.{key}: no verifier of {spec!r} takes it; "
                f"{schema.hint(key, known)}known here: {', '.join(known) or 'none'}"
            )
    if callable(spec):
        return [Verifier(getattr(spec, "__name__", "verifier"), spec)]
    verifiers, names = [], set()
    for part in parts:
        name = part.partition(":")[2] or part
        name = part if name in names else name
        names.add(name)
        if part in shipped:
            own = _own(part, shipped[part], settings)
            verifiers.append(Verifier(name, table.VERIFIERS[part](**own), own))
        else:
            verifiers.append(Verifier(name, schema.imported("verifiers", part)))
    return verifiers


def _signature(name):
    """Returns the settings of a shipped verifier: {name: inspect.Parameter}."""
    table.refuse_code(name)
    if name not in table.VERIFIERS:
        raise UserError(
            f"verifiers={name!r}: no such verifier; "
            f"{schema.hint(name, table.VERIFIERS)}there are: "
            f"{', '.join(table.VERIFIERS)}; one of yours is 'package.module:function' "
            "or 'FILE.py:function'"
        )
    return inspect.signature(table.VERIFIERS[name]).parameters


def _own(name, parameters, settings):
    """Returns the settings that one verifier takes, checked."""
    own = {}
    for key, parameter in parameters.items():
        if key in settings:
            zero = parameter.annotation()
            own[key] = schema.coerce(f"verifier_args.{key}", settings[key], zero)
        elif parameter.default is parameter.empty:
            raise UserError(
                f"verifiers={name!r}: needs verifier_args.{key}, "
                f"{schema.kind_of(parameter.annotation())}"
            )
    return own


def identity(verifiers):
    """Returns what tells verifiers from others: [[name, source, settings]]."""
    return [
        [v.name, protocol.source(v.function)]
        + ([v.settings, getattr(v.function, "reads", "")] if v.settings else [])
        for v in verifiers
    ]
