"""The loop over stacked layers, all of one kind or in a repeating pattern.

A scan runs one body, so layers that differ are scanned by the period of their pattern:
one turn runs as many layers as the pattern is long, each as its own kind. A pattern
that does not repeat (all dense, then all sparse) is scanned run by run.
"""

import jax
import jax.numpy as jnp


def scan(body_of, carry, stacks, kinds, *, unroll=1, indexed=False):
    """Carries something through layers.

    Args:
        body_of: (kind) -> body; body: (carry, (layer,) or (layer, index)) -> (carry,
            out), the outs of all kinds alike.
        carry: any tree of arrays.
        stacks: layers stacked along axis 0, one tree; or {"dense", "sparse": tree}.
        kinds: a `Kind` for each layer.
        unroll: how many layers one turn of the loop runs.
        indexed: whether the body is told the layer's number.

    Returns:
        carry; the outs, stacked over layers.
    """
    mixed = hasattr(stacks, "keys")
    stacks = dict(stacks) if mixed else {"": stacks}
    segments = plan(kinds)
    outs = []
    for start, pattern, turns in segments:
        names = [_stack_of(kind) if mixed else "" for kind in pattern]
        taken = {}
        for name in dict.fromkeys(names):
            count = turns * names.count(name)
            if len(segments) == 1:
                taken[name] = stacks[name]
            else:
                taken[name], stacks[name] = _cut(stacks[name], count)
        size = len(pattern)
        index = start + jnp.arange(turns * size) if indexed else None
        if size == 1:
            (name,) = names
            xs = (taken[name], index) if indexed else (taken[name],)
            carry, out = jax.lax.scan(
                body_of(pattern[0]), carry, xs, unroll=min(unroll, turns)
            )
        else:
            xs = {name: _by_turn(stack, turns) for name, stack in taken.items()}
            index = _by_turn(index, turns)
            turn = _turn(body_of, pattern, names)
            whole = turns if unroll >= len(kinds) else 1
            carry, out = jax.lax.scan(turn, carry, (xs, index), unroll=whole)
            out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
        outs.append(out)
    if len(outs) == 1:
        return carry, outs[0]
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)


def plan(kinds):
    """How a loop runs through layers: [(first layer, pattern, turns)].

    >>> plan("ababa")
    [(0, ('a', 'b'), 2), (4, ('a',), 1)]
    >>> plan("aaabb")
    [(0, ('a',), 3), (3, ('b',), 2)]
    """
    kinds, count = tuple(kinds), len(kinds)
    period = next(p for p in range(1, count + 1) if kinds[p:] == kinds[: count - p])
    if turns := count // period if count >= 2 * period else 0:
        whole = turns * period
        found = [(0, kinds[:period], turns)]
        return found + [(whole + i, *rest) for i, *rest in _runs(kinds[whole:])]
    return _runs(kinds)


def _runs(kinds):
    """[(first, (kind,), how many in a row)]."""
    found = []
    for index, kind in enumerate(kinds):
        if found and found[-1][1] == (kind,):
            first, pattern, count = found[-1]
            found[-1] = (first, pattern, count + 1)
        else:
            found.append((index, (kind,), 1))
    return found


def _by_turn(stack, turns):
    return jax.tree.map(lambda x: x.reshape(turns, -1, *x.shape[1:]), stack)


def _stack_of(kind):
    return "sparse" if kind.sparse else "dense"


def _turn(body_of, pattern, names):
    """The body of a scan whose turn runs one layer of each place in the pattern."""
    bodies = {kind: body_of(kind) for kind in pattern}

    def turn(carry, xs):
        stacks, index = xs
        pieces = {name: iter(_split(stack)) for name, stack in stacks.items()}
        outs = []
        for place, (kind, name) in enumerate(zip(pattern, names, strict=True)):
            layer = next(pieces[name])
            one = (layer,) if index is None else (layer, index[place])
            carry, out = bodies[kind](carry, one)
            outs.append(out)
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)

    return turn


def _split(stack):
    """The layers of a stack. The gradient of a split is one concatenation."""
    leaves, treedef = jax.tree.flatten(stack)
    count = leaves[0].shape[0]
    split = [jax.lax.split(x, (1,) * count) for x in leaves]
    return [treedef.unflatten([x[i].squeeze(0) for x in split]) for i in range(count)]


def _cut(stack, count):
    """The first layers of a stack, and the others (None where there are none)."""
    leaves, treedef = jax.tree.flatten(stack)
    rest = leaves[0].shape[0] - count
    if not rest:
        return stack, None
    cut = [jax.lax.split(x, (count, rest)) for x in leaves]
    return tuple(treedef.unflatten([x[i] for x in cut]) for i in range(2))
