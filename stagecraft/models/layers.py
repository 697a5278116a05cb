"""The loop over stacked layers, all alike or in a repeating pattern.

A scan runs one body, so layers that differ are scanned by the period of their pattern:
one turn runs as many layers as the pattern is long, each by its own spec. A pattern
that does not repeat (all dense, then all sparse) is scanned run by run.
"""

import itertools

import jax
import jax.numpy as jnp


def scan(body_of, carry, stacks, specs, *, unroll=1):
    """Runs a body through layers, carrying a tree from each to the next.

    Args:
        body_of: (spec) -> body; body: (carry, layer) -> (carry, out), the outs of all
            specs with the same shapes.
        carry: any tree of arrays.
        stacks: layers stacked along axis 0, one tree; or {"dense", "sparse": tree}.
        specs: a `LayerSpec` for each layer.
        unroll: how many layers one turn of the loop runs.

    Returns:
        carry; the outs, stacked over layers.
    """
    mixed = hasattr(stacks, "keys")
    stacks = dict(stacks) if mixed else {"": stacks}
    segments = plan(specs)
    outs = []
    for pattern, turns in segments:
        names = [_stack_of(spec) if mixed else "" for spec in pattern]
        parts = {}
        for name in dict.fromkeys(names):
            count = turns * names.count(name)
            if len(segments) == 1:
                parts[name] = stacks[name]
            else:
                parts[name], stacks[name] = _cut(stacks[name], count)
        size = len(pattern)
        if size == 1:
            (name,) = names
            carry, out = jax.lax.scan(
                body_of(pattern[0]), carry, parts[name], unroll=min(unroll, turns)
            )
        else:
            xs = {name: _by_turn(stack, turns) for name, stack in parts.items()}
            turn = _turn(body_of, pattern, names)
            unrolled = turns if unroll >= len(specs) else 1
            carry, out = jax.lax.scan(turn, carry, xs, unroll=unrolled)
            out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
        outs.append(out)
    if len(outs) == 1:
        return carry, outs[0]
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)


def plan(specs):
    """Plans how a loop runs through layers: [(pattern, turns)].

    >>> plan("ababa")
    [(('a', 'b'), 2), (('a',), 1)]
    >>> plan("aaabb")
    [(('a',), 3), (('b',), 2)]
    """
    specs, count = tuple(specs), len(specs)
    period = next(p for p in range(1, count + 1) if specs[p:] == specs[: count - p])
    if turns := count // period if count >= 2 * period else 0:
        return [(specs[:period], turns), *_runs(specs[turns * period :])]
    return _runs(specs)


def each(stacks, specs):
    """Returns the layers one by one, [(spec, layer)]; arguments as of `scan`."""
    mixed = hasattr(stacks, "keys")
    stacks = dict(stacks) if mixed else {"": stacks}
    pieces = {name: iter(_split(stack)) for name, stack in stacks.items()}
    return [(spec, next(pieces[_stack_of(spec) if mixed else ""])) for spec in specs]


def _runs(specs):
    """Groups equal neighbours: [((spec,), how many in a row)]."""
    return [((spec,), len([*run])) for spec, run in itertools.groupby(specs)]


def _by_turn(stack, turns):
    return jax.tree.map(lambda x: x.reshape(turns, -1, *x.shape[1:]), stack)


def _stack_of(spec):
    return "sparse" if spec.sparse else "dense"


def _turn(body_of, pattern, names):
    """Makes the body of a scan whose turn runs the layers of one pattern."""
    bodies = {spec: body_of(spec) for spec in pattern}

    def turn(carry, stacks):
        pieces = {name: iter(_split(stack)) for name, stack in stacks.items()}
        outs = []
        for spec, name in zip(pattern, names, strict=True):
            carry, out = bodies[spec](carry, next(pieces[name]))
            outs.append(out)
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)

    return turn


def _split(stack):
    """Splits a stack into layers. The gradient of a split is one concatenation."""
    leaves, treedef = jax.tree.flatten(stack)
    count = leaves[0].shape[0]
    split = [jax.lax.split(x, (1,) * count) for x in leaves]
    return [treedef.unflatten([x[i].squeeze(0) for x in split]) for i in range(count)]


def _cut(stack, count):
    """Cuts a stack into its first layers and the others (None if there are none)."""
    leaves, treedef = jax.tree.flatten(stack)
    rest = leaves[0].shape[0] - count
    if not rest:
        return stack, None
    cut = [jax.lax.split(x, (count, rest)) for x in leaves]
    return tuple(treedef.unflatten([x[i] for x in cut]) for i in range(2))
