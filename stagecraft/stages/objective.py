"""From the names in a config to one function of the arrays that a stage offers.

A loss asks for arrays by the names of its parameters. One without a default is
required; one whose default is None is passed when the batch has it; everything else is
a hyper-parameter. Several losses add up, each with its weight.

What a stage offers, and where its losses may lie, are dicts {name: axes}: "B 2" is an
f32[B, 2], "B bool" a mask of rows, "" a scalar.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, schema
from stagecraft.errors import UserError

# Arrays that change what a record means: a loss that cannot take them would be wrong.
SIGNIFICANT = ("preference", "margin")

SIZES = {"B": 4, "T": 3, "K": 2}  # of the arrays that a loss is tried on


class Loss(NamedTuple):
    """One or several losses as a single function.

    Attributes:
        apply: ({name: array}) -> ({place: unreduced loss}, {metric: values}); values
            are an array, or a pair (array, mask).
        needs: names of the arrays that some loss takes, optional ones included.
        places: names of the places where the loss has terms.
        across_rows: names of losses that look at the whole batch at once, so that it
            must not be split into micro-batches.
    """

    apply: Callable
    needs: frozenset
    places: frozenset
    across_rows: tuple


class _Part(NamedTuple):
    label: str
    function: Callable
    required: tuple
    optional: tuple
    arguments: dict
    weight: float


def combine(stage, offers, places):
    """The loss that a stage's config names, tried once on shapes without numbers.

    Args:
        stage: the stage's resolved config: objective, objective_weights,
            objective_args; its kind tells which table of `stagecraft.losses` names are
            looked up in.
        offers: {name: axes} of the arrays that the stage can pass.
        places: {name: axes} of where a loss may lie; the first is that of a loss that
            returns a bare array.

    Returns:
        a `Loss`. Raises UserError for a name nobody knows, weights that do not match,
        arguments no loss takes or allows, arrays this stage does not offer, or a loss
        of another shape.
    """
    names = _names(stage.objective)
    weights = tuple(stage.objective_weights) or (1.0,) * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"objective_weights={weights}: {len(weights)} weights for the "
            f"{len(names)} losses of objective={_label(stage.objective)}; give one each"
        )
    table = losses.TABLES[stage.kind]
    functions = [find(name, table) for name in names]
    parts = _parts(names, functions, weights, dict(stage.objective_args), offers)
    found = frozenset().union(*(_rehearse(part, offers, places) for part in parts))
    main = next(iter(places))

    def apply(offered):
        for name in SIGNIFICANT:
            if name in offered and name not in needs:
                raise UserError(
                    f"objective={_label(stage.objective)}: the records carry "
                    f"{name!r}, which it does not take; drop the key from the file, or "
                    "choose an objective that does"
                )
        total, told = {}, {}
        for part in parts:
            arrays = {k: offered[k] for k in part.required}
            arrays |= {k: offered[k] for k in part.optional if k in offered}
            found, metrics = part.function(**arrays, **part.arguments)
            found = found if isinstance(found, dict) else {main: found}
            for place, values in found.items():
                values = part.weight * values
                total[place] = total[place] + values if place in total else values
            told = metrics | told
        return total, told

    needs = frozenset(n for p in parts for n in p.required + p.optional)
    across = tuple(p.label for p in parts if p.label in losses.ACROSS_ROWS)
    return Loss(apply, needs, found, across)


def _rehearse(part, offers, places):
    """The places of one loss, found by tracing it: nothing is computed or compiled."""
    arrays = {k: _abstract(offers[k]) for k in part.required + part.optional}
    label = _label(part.label)
    try:
        found = jax.eval_shape(lambda a: part.function(**a, **part.arguments), arrays)
    except UserError as error:
        raise UserError(f"objective_args.{error}") from None
    except Exception as error:  # perhaps somebody else's code: say what it was given
        given = ", ".join(f"{k} {_told(offers[k])}" for k in arrays)
        line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"objective={label}: fails on {given} ({type(error).__name__}: {line})"
        ) from error
    if not isinstance(found, tuple) or len(found) != 2:
        raise UserError(f"objective={label}: expected it to return (loss, metrics)")
    loss = found[0] if isinstance(found[0], dict) else {next(iter(places)): found[0]}
    for place, values in loss.items():
        if place not in places:
            raise UserError(
                f"objective={label}: has a loss at {place!r}; this kind of stage has "
                f"{', '.join(places)}"
            )
        if jnp.shape(values) != _abstract(places[place]).shape:
            raise UserError(
                f"objective={label}: its loss has {jnp.ndim(values)} axes at {place}; "
                f"expected {_told(places[place])}, not reduced"
            )
    return loss.keys()


def _abstract(axes):
    """The array of such axes, as shape and dtype."""
    *letters, last = axes.split() or [""]
    mask = last == "bool"
    shape = [SIZES.get(a) or int(a) for a in (*letters, last) if a not in ("", "bool")]
    return jax.ShapeDtypeStruct(shape, jnp.bool_ if mask else jnp.float32)


def _told(axes):
    letters = [a for a in axes.split() if a != "bool"]
    return f"{'bool' if 'bool' in axes else 'f32'}[{', '.join(letters)}]"


def measured(metrics, masks):
    """Metrics ready to be merged: {name: Mean or Max}.

    Args:
        metrics: {name: array, or (array, mask)}, as losses return them.
        masks: {rank: mask} that arrays of each rank are counted under.
    """
    out = {}
    for name, value in metrics.items():
        value, mask = value if isinstance(value, tuple) else (value, None)
        if mask is None and jnp.ndim(value) not in masks:
            raise UserError(
                f"metric {name!r}: has {jnp.ndim(value)} axes; expected "
                f"{' or '.join(str(rank) for rank in masks)}, not reduced"
            )
        mask = masks[jnp.ndim(value)] if mask is None else mask
        kind = masked.Max if name.endswith("_max") else masked.Mean
        out[name] = kind.of(value, mask)
    return out


def find(name, table):
    """A loss by its name in a table, as "package.module:function", or itself."""
    if callable(name):
        return name
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"objective={name!r}: cannot import it ({error}); "
                "expected 'package.module:function'"
            ) from error
    if name in table:
        return table[name]
    kinds = [kind for kind, other in losses.TABLES.items() if name in other]
    if kinds:
        raise UserError(
            f"objective={name!r}: is for stages of kind {' or '.join(kinds)}; this "
            f"kind has {', '.join(table)}"
        )
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"objective={name!r}: no such loss; {hint}this kind of stage has "
        f"{', '.join(table)}; your own is 'package.module:function'"
    )


def _names(objective):
    if callable(objective):
        return [objective]
    names = [n.strip() for n in objective.split(",") if n.strip()]
    if not names:
        raise UserError("objective: is empty; name a loss")
    return names


def _parts(names, functions, weights, arguments, offers):
    parts, taken, keywords = [], set(), set()
    for name, function, weight in zip(names, functions, weights, strict=True):
        parameters = inspect.signature(function).parameters.values()
        required, optional, own, free = [], [], [], False
        for p in parameters:
            if p.kind is p.VAR_KEYWORD:
                free = True
            elif p.name in offers and (p.default is p.empty or p.default is None):
                (required if p.default is p.empty else optional).append(p.name)
            elif p.default is p.empty and p.kind is not p.VAR_POSITIONAL:
                if p.kind is not p.KEYWORD_ONLY or p.name not in arguments:
                    raise UserError(
                        f"objective={_label(name)}: asks for {p.name}; this stage "
                        f"offers {', '.join(offers)}"
                    )
                own.append(p.name)
            else:
                own.append(p.name)
        mine = {k: v for k, v in arguments.items() if free or k in own}
        taken |= set(mine)
        keywords |= set(own)
        parts.append(
            _Part(name, function, tuple(required), tuple(optional), mine, weight)
        )
    for key in arguments:
        if key not in taken:
            raise UserError(schema.unknown(f"objective_args.{key}", key, keywords))
    return parts


def _label(name):
    return repr(name) if isinstance(name, str) else getattr(name, "__name__", str(name))
