"""From the names in a config to one function of the arrays that a stage offers.

A loss asks for arrays by the names of its parameters. One without a default is
required; one whose default is None is passed when the batch has it; every other
parameter is a hyper-parameter. Several losses add up, each with its weight.

What a stage offers, and where its losses may lie, are dicts {name: axes}: "B 2" is an
f32[B, 2], "B bool" a mask of rows, "" a scalar.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from stagecraft import losses, masked, schema
from stagecraft.errors import UserError
from stagecraft.losses.types import Metrics
from stagecraft.stages.kind import Kind

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
        by_sequence: names of losses that hold one number a sequence, on each of its
            tokens, so that they must be averaged over sequences.
    """

    apply: Callable[[Mapping[str, Array]], tuple[dict[str, Array], Metrics]]
    needs: frozenset[str]
    places: frozenset[str]
    across_rows: tuple[str, ...]
    by_sequence: tuple[str, ...]


class _Part(NamedTuple):
    """One loss, its parameters sorted, and its weight in the sum."""

    name: str | Callable
    function: Callable
    required: tuple[str, ...]
    optional: tuple[str, ...]
    keywords: tuple[str, ...]
    arguments: dict
    weight: float


def combine(config: ConfigDict, kind: Kind) -> Loss:
    """Builds the loss that a stage's config names, and tries it on abstract arrays.

    Args:
        config: the stage's resolved config: objective, objective_weights,
            objective_args.
        kind: the stage's `Kind`: the losses that it knows by name, the arrays it offers
            and the places a loss may lie at.

    Raises:
        UserError: for an unknown name, weights that do not match, arguments that no
            loss takes or allows, arrays that this stage does not offer, or a loss of
            another shape.
    """
    names = _names(config.objective)
    weights = tuple(config.objective_weights) or (1.0,) * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"objective_weights={weights}: {len(weights)} weights for the "
            f"{len(names)} losses of objective={_label(config.objective)}; give one "
            "each"
        )
    offers, places = kind.offers, kind.places
    arguments = dict(config.objective_args)
    parts = [
        _bind(name, find(name, kind.losses), weight, arguments, offers)
        for name, weight in zip(names, weights, strict=True)
    ]
    for key in arguments:
        if not any(key in part.arguments for part in parts):
            _refuse_argument(key, parts, config)
    traced = [_rehearse(part, offers, places) for part in parts]
    needs = frozenset(n for p in parts for n in p.required + p.optional)
    main = next(iter(places))

    def apply(offered):
        for name in SIGNIFICANT:
            if name in offered and name not in needs:
                raise UserError(
                    f"objective={_label(config.objective)}: the records carry "
                    f"{name!r}, which it does not take; drop the key from the file, or "
                    "choose an objective that does"
                )
        total, metrics = {}, {}
        for part in parts:
            arrays = {k: offered[k] for k in part.required}
            arrays |= {k: offered[k] for k in part.optional if k in offered}
            loss, part_metrics = part.function(**arrays, **part.arguments)
            for place, values in _by_place(loss, main).items():
                values = part.weight * values
                total[place] = total[place] + values if place in total else values
            metrics = part_metrics | metrics
        return total, metrics

    return Loss(
        apply,
        needs,
        places=frozenset().union(*traced),
        across_rows=_named(parts, losses.ACROSS_ROWS),
        by_sequence=_named(parts, losses.BY_SEQUENCE),
    )


def _bind(
    name: str | Callable,
    function: Callable,
    weight: float,
    arguments: dict,
    offers: Mapping[str, str],
) -> _Part:
    """Sorts a loss's parameters into arrays of the stage and hyper-parameters."""
    required, optional, keywords = [], [], []
    takes_any = False
    for p in inspect.signature(function).parameters.values():
        given = p.kind is p.KEYWORD_ONLY and p.name in arguments
        if p.kind is p.VAR_KEYWORD:
            takes_any = True
        elif p.name in offers and p.default is p.empty:
            required.append(p.name)
        elif p.name in offers and p.default is None:
            optional.append(p.name)
        elif p.default is not p.empty or p.kind is p.VAR_POSITIONAL or given:
            keywords.append(p.name)
        else:
            raise UserError(
                f"objective={_label(name)}: asks for {p.name}; this stage offers "
                f"{', '.join(offers)}"
            )
    own = {k: v for k, v in arguments.items() if takes_any or k in keywords}
    arrays = tuple(required), tuple(optional)
    return _Part(name, function, *arrays, tuple(keywords), own, weight)


def _refuse_argument(key: str, parts: Iterable[_Part], stage: ConfigDict) -> None:
    where = f"objective_args.{key}"
    if key in stage:
        raise UserError(
            f"{where}: is a key of the stage itself, not of its loss; set {key}= "
            "beside objective="
        )
    known = {keyword for part in parts for keyword in part.keywords}
    raise UserError(schema.unknown(where, key, known))


def _named(parts: Iterable[_Part], functions: tuple[Callable, ...]) -> tuple[str, ...]:
    """Returns the names of those losses that are among `functions`."""
    return tuple(p.function.__name__ for p in parts if p.function in functions)


def _by_place(loss: Array | dict[str, Array], main: str) -> dict[str, Array]:
    return loss if isinstance(loss, dict) else {main: loss}


def _rehearse(
    part: _Part, offers: Mapping[str, str], places: Mapping[str, str]
) -> Iterable[str]:
    """Returns the places of a loss from its trace: nothing is computed or compiled."""
    arrays = {k: _abstract(offers[k]) for k in part.required + part.optional}
    label = _label(part.name)
    try:
        traced = jax.eval_shape(lambda a: part.function(**a, **part.arguments), arrays)
    except UserError as error:
        raise UserError(f"objective_args.{error}") from None
    except Exception as error:  # perhaps a user's own code: say what it was given
        given = ", ".join(f"{k} {_shape_text(offers[k])}" for k in arrays)
        line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"objective={label}: fails on {given} ({type(error).__name__}: {line})"
        ) from error
    if not isinstance(traced, tuple) or len(traced) != 2:
        raise UserError(f"objective={label}: expected it to return (loss, metrics)")
    loss = _by_place(traced[0], next(iter(places)))
    for place, values in loss.items():
        if place not in places:
            raise UserError(
                f"objective={label}: has a loss at {place!r}; this kind of stage has "
                f"{', '.join(places)}"
            )
        if jnp.shape(values) != _abstract(places[place]).shape:
            raise UserError(
                f"objective={label}: its loss has {jnp.ndim(values)} axes at {place}; "
                f"expected {_shape_text(places[place])}, not reduced"
            )
    return loss.keys()


def _abstract(axes: str) -> jax.ShapeDtypeStruct:
    """Returns an array of such axes, as shape and dtype."""
    *letters, last = axes.split() or [""]
    mask = last == "bool"
    shape = [SIZES.get(a) or int(a) for a in (*letters, last) if a not in ("", "bool")]
    return jax.ShapeDtypeStruct(shape, jnp.bool_ if mask else jnp.float32)


def _shape_text(axes: str) -> str:
    letters = [a for a in axes.split() if a != "bool"]
    return f"{'bool' if 'bool' in axes else 'f32'}[{', '.join(letters)}]"


def measured(
    metrics: Metrics, masks: Mapping[int, Array]
) -> dict[str, masked.Mean | masked.Max]:
    """Turns the metrics of losses into states that merge over parts of a batch.

    Args:
        metrics: {name: array, or (array, mask)}, as losses return them.
        masks: {rank: mask} that arrays of each rank are counted under.
    """
    states = {}
    for name, value in metrics.items():
        value, mask = value if isinstance(value, tuple) else (value, None)
        if mask is None and jnp.ndim(value) not in masks:
            raise UserError(
                f"metric {name!r}: has {jnp.ndim(value)} axes; expected "
                f"{' or '.join(str(rank) for rank in masks)}, not reduced"
            )
        mask = masks[jnp.ndim(value)] if mask is None else mask
        state = masked.Max if name.endswith("_max") else masked.Mean
        states[name] = state.of(value, mask)
    return states


def find(name: str | Callable, table: Mapping[str, Callable]) -> Callable:
    """Finds a loss: by name in a table, by module or file, or itself."""
    if callable(name):
        return name
    if ":" in name:
        return schema.imported("objective", name)
    if name in table:
        return table[name]
    for what, other in losses.TABLES.items():
        if name in other:
            raise UserError(
                f"objective={name!r}: is a loss of {what}; this kind of stage has "
                f"{', '.join(table)}"
            )
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"objective={name!r}: no such loss; {hint}this kind of stage has "
        f"{', '.join(table)}; your own is "
        "'package.module:function' or 'FILE.py:function'"
    )


def _names(objective: str | Callable) -> list:
    if callable(objective):
        return [objective]
    names = [n.strip() for n in objective.split(",") if n.strip()]
    if not names:
        raise UserError("objective: is empty; name a loss")
    return names


def _label(name: str | Callable) -> str:
    return repr(name) if isinstance(name, str) else getattr(name, "__name__", str(name))
