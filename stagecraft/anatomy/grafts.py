"""Which part of a change does it: weights of a later model grafted into an earlier one.

A is the model before, B the one after, D = B - A. A graft A + B_S takes the weights of
some players S from B and all others from A (2506.20746). A behaviour m is continuous:
a mean log-odds, or minus a divergence, never a count of right answers.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stagecraft import tree
from stagecraft.errors import UserError
from stagecraft.models.config import ModelConfig, per_layer

MOST = 10  # players whose coalitions are all evaluated: 2^10
GROUPS = 6  # of layers, where there are more
EMBED, FINAL, NEW = "embeddings", "final norm", "new tokens"
# A norm's scale acts on what reads behind it: the two are one player.
KINDS = {
    "query and key": ("query", "key", "query_norm", "key_norm"),
    "value and norm": ("value", "attention_norm"),
    "attention output": ("out", "attention_post_norm"),
    "gate, up and norm": ("gate", "up", "router", "experts", "ff_norm"),
    "down": ("down", "ff_post_norm"),
}


class Part(NamedTuple):
    """A part of one array: `name` of it, and an index of its first axis.

    `index` is a sequence of rows; None for all.
    """

    name: str
    index: tuple[int, ...] | None


Players = Mapping[str, Sequence[Part]]
Behaviour = Callable[[Any], tuple[float, float]]  # tree -> (m, its standard error)


def layer_players(names: Iterable[str], config: ModelConfig, new_tokens=()) -> Players:
    """Divides a model's weights by layer.

    Args:
        names: of its arrays, stacked over layers.
        config: its `ModelConfig`.
        new_tokens: ids whose embeddings are a player of their own: those that a stage
            was the first to train, which every answer needs.

    Returns:
        {player: parts}: embeddings, new tokens, each layer, or `GROUPS` groups of
        neighbours, and the final norm with an output embedding of its own.
    """
    edges = np.linspace(0, config.layers, min(config.layers, GROUPS) + 1).astype(int)
    groups = [range(a, b) for a, b in itertools.pairwise(edges)]
    players = {_layers_name(group): [] for group in groups}
    for name in names:
        if name.startswith("layers/"):
            for group in groups:
                if rows := _rows(name, config, group):
                    players[_layers_name(group)].append(Part(name, rows))
    return _with_tables(players, names, config, new_tokens)


def kind_players(names: Iterable[str], config: ModelConfig, new_tokens=()) -> Players:
    """Divides a model's weights by kind of matrix; arguments as of `layer_players`.

    Queries and keys are halves of one form, and scales of norms go with what reads
    them, so that no graft mixes scales.
    """
    players = {player: [] for player in KINDS}
    for name in names:
        if name.startswith("layers/"):
            players[_kind(name)].append(Part(name, None))
    players = {player: parts for player, parts in players.items() if parts}
    return _with_tables(players, names, config, new_tokens)


def _kind(name):
    steps = name.split("/")
    words = {step.removesuffix("_bias") for step in steps}
    if "experts" in words and "down" in words:
        return "down"
    for player, own in KINDS.items():
        if words & set(own):
            return player
    raise ValueError(f"{name}: belongs to no kind")


def _layers_name(group):
    first, last = group[0], group[-1]
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _rows(name, config, group):
    """Rows of a stacked array that are layers of a group."""
    numbers = range(config.layers)
    if (stack := name.split("/")[1]) in ("dense", "sparse"):
        sparse = per_layer(config.sparse, config.layers)
        numbers = [i for i in numbers if sparse[i] == (stack == "sparse")]
    return tuple(row for row, number in enumerate(numbers) if number in group)


def _with_tables(players, names, config, new_tokens):
    old = tuple(i for i in range(config.vocab_size) if i not in {*new_tokens})
    tables = [name for name in names if name in ("embed", "unembed")]
    players[EMBED] = [Part(name, old if new_tokens else None) for name in tables]
    players[EMBED] += [Part(name, None) for name in names if name == "positions"]
    if new_tokens:
        players[NEW] = [Part(name, tuple(new_tokens)) for name in tables]
    players[FINAL] = [Part(name, None) for name in names if name.startswith("norm/")]
    return players


def graft(before: Any, after: Any, parts: Iterable[Part]) -> Any:
    """Returns `before` with some parts of `after`; without parts bit by bit `before`.

    Args:
        before, after: trees of one structure.
        parts: what to take from `after`.
    """
    chosen: dict[str, list] = {}
    for part in parts:
        chosen.setdefault(part.name, []).append(part.index)
    ones, others = tree.named(before), tree.named(after)

    def take(name, array):
        out = array
        for index in chosen.get(name, ()):
            if index is None:
                return others[name]
            rows, out = np.asarray(index), np.array(out)
            out[rows] = np.asarray(others[name])[rows]
        return array if out is array else jnp.asarray(out)

    leaves = [take(name, array) for name, array in ones.items()]
    return jax.tree.unflatten(jax.tree.structure(before), leaves)


def norms(before: Any, after: Any, players: Players) -> dict[str, float]:
    """Returns the share of ||D||^2 that lies in each player."""
    ones, others = tree.named(before), tree.named(after)
    moved = {}
    for player, parts in players.items():
        moved[player] = 0.0
        for name, index in parts:
            rows = slice(None) if index is None else np.asarray(index)
            a, b = (np.asarray(t[name], np.float64)[rows] for t in (ones, others))
            moved[player] += float(np.sum((b - a) ** 2))
    total = sum(moved.values())
    return {k: v / total if total else 0.0 for k, v in moved.items()}


# -- who did it ------------------------------------------------------------------------


def shapley(value: Callable[[frozenset], float], players: Sequence[str]) -> dict:
    """Returns each player's exact Shapley value.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)); they add
    up to v(all) - v(none).

    Args:
        value: of a coalition.
        players: at most `MOST`.
    """
    n, players = len(players), list(players)
    if n > MOST:
        raise ValueError(f"{n} players have 2^{n} coalitions")
    values = {
        frozenset(some): value(frozenset(some))
        for size in range(n + 1)
        for some in itertools.combinations(players, size)
    }
    out = {}
    for player in players:
        out[player] = sum(
            math.factorial(len(some))
            * math.factorial(n - len(some) - 1)
            / math.factorial(n)
            * (values[some | {player}] - values[some])
            for some in values
            if player not in some
        )
    return out


def attribute(
    behaviour: Behaviour,
    before: Any,
    after: Any,
    players: Players,
    *,
    loss: Callable[[Any], float] | None = None,
) -> dict:
    """Attributes a change of behaviour to players.

    Args:
        behaviour: tree -> (m, its standard error).
        before, after: A and B.
        players: a division of all weights.
        loss: nats a token on texts of A, which says whether a graft still is a language
            model.

    Returns:
        before, after: m(A), m(B). players: {player: {
            sufficiency: (m(A + B_S) - m(A)) / (m(B) - m(A)), of the player alone;
            necessity: (m(B) - m(B + A_S)) / (m(B) - m(A));
            shapley: its Shapley value over the same, which add up to 1;
            norm_share: of ||D||^2; density: shapley / norm_share, 1 where a change is
            everywhere alike useful, None for a share of 0;
            loss, loss_excess: of A + B_S, and how far above the chord from A's to B's
            at its norm share; beyond .1 nats the graft broke the model}}.

    Raises:
        UserError: the behaviour changed by less than 3 standard errors.
    """
    a, error_a = behaviour(before)
    b, error_b = behaviour(after)
    change, error = b - a, math.hypot(error_a, error_b)
    if abs(change) < 3 * error or not change:
        raise UserError(
            f"the behaviour changes from {a:.4g} to {b:.4g}, less than three standard "
            f"errors ({error:.2g}): too little to ask which weights did it; give more "
            "prompts"
        )
    names = list(players)
    memory = {frozenset(): a, frozenset(names): b}

    def value(some):
        if some not in memory:
            parts = [part for name in names if name in some for part in players[name]]
            memory[some] = behaviour(graft(before, after, parts))[0]
        return (memory[some] - a) / change

    shares, own = shapley(value, names), norms(before, after, players)
    losses = (loss(before), loss(after)) if loss else None
    rows = {}
    for name in names:
        row = {
            "sufficiency": value(frozenset([name])),
            "necessity": 1 - value(frozenset(names) - {name}),
            "shapley": shares[name],
            "norm_share": own[name],
            "density": shares[name] / own[name] if own[name] else None,
        }
        if losses:
            chord = (1 - own[name]) * losses[0] + own[name] * losses[1]
            row["loss"] = loss(graft(before, after, players[name]))
            row["loss_excess"] = row["loss"] - chord
        rows[name] = row
    return {"before": a, "after": b, "standard_error": error, "players": rows}


# -- along the line --------------------------------------------------------------------

STEPS = tuple(np.round(np.linspace(-0.5, 2, 11), 4).tolist())


def path(measure: Callable[[Any], float], before: Any, after: Any, steps=STEPS) -> dict:
    """Measures models on the line A + lambda D.

    Args:
        measure: tree -> a loss.
        before, after: A and B.
        steps: of lambda; beyond 1 the change is extrapolated.

    Returns:
        steps, values; barrier: the most that a loss between the two lies above the
        chord from A's to B's, 0 where none does.
    """
    values = [measure(_between(before, after, step)) for step in steps]
    ends = measure(before), measure(after)
    above = [
        value - ((1 - step) * ends[0] + step * ends[1])
        for step, value in zip(steps, values, strict=True)
        if 0 < step < 1
    ]
    return {"steps": list(steps), "values": values, "barrier": max(0.0, *above)}


def _between(before, after, step):
    return jax.tree.map(lambda a, b: a + step * (b - a), before, after)


# -- by subspace -----------------------------------------------------------------------

WRITES = ("attention/out", "ff/down")  # add to the residual stream, width last


def project(before: Any, after: Any, basis: np.ndarray) -> Any:
    """Grafts what the writing matrices changed within a subspace of the residual.

    Args:
        before, after: A and B.
        basis: f[D, k], orthonormal.

    Returns:
        A with D P in each matrix of `WRITES` (and of experts), P the projector on the
        basis; every other array is A's.
    """
    ones, others = tree.named(before), tree.named(after)
    projector = (basis @ basis.T).astype(np.float32)

    def take(name, array):
        writes = name.endswith(WRITES) or name.endswith("experts/down")
        if not writes:
            return array
        a, b = np.asarray(array), np.asarray(others[name])
        return jnp.asarray(a + (b - a) @ projector)

    leaves = [take(name, array) for name, array in ones.items()]
    return jax.tree.unflatten(jax.tree.structure(before), leaves)
