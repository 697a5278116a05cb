"""Where a model's parameters lie in a Hugging Face folder, tensor by tensor."""

import functools
import math
import re
from typing import NamedTuple

from stagecraft.models.translation import per_layer


class Axes(NamedTuple):
    """How the axes of a tensor of theirs and of an array of ours go together.

    Attributes:
        theirs: for each of their dimensions, (part, parts, letters of ours in it).
        ours: letters of our dimensions.
    """

    theirs: tuple
    ours: tuple

    def shape(self, sizes, *, split=False):
        """Their tensor's shape; `split` into our letters, of the one part alone."""
        if split:
            return tuple(sizes[x] for _, _, letters in self.theirs for x in letters)
        return tuple(
            parts * math.prod(sizes[x] for x in letters)
            for _, parts, letters in self.theirs
        )

    def region(self, shape):
        """The slices of their tensor, of this shape, that are ours."""
        return tuple(
            slice(part * size // parts, (part + 1) * size // parts)
            for (part, parts, _), size in zip(self.theirs, shape, strict=True)
        )


class Place(NamedTuple):
    """One tensor of theirs, or a part of it, in one array of ours.

    Attributes:
        ours: our parameter's name.
        key: their tensor's name.
        index: where it lies on our leading axes: layer, expert.
        axes: how the rest goes.
    """

    ours: str
    key: str
    index: tuple
    axes: Axes


@functools.cache
def parse(text):
    """`Axes` of a line such as "d (0/3 h c) -> d h c"."""
    theirs, ours = text.split(" -> ")
    dims = []
    for group in re.findall(r"\([^)]*\)|\S+", theirs):
        words, part, parts = group.strip("()").split(), 0, 1
        if "/" in words[0]:
            part, parts = map(int, words.pop(0).split("/"))
        dims.append((part, parts, tuple(w for w in words if w != "1")))
    return Axes(tuple(dims), tuple(ours.split()))


def places(family, config, shapes):
    """Where every parameter of a model lies in a folder of its family.

    Args:
        family: a `Family`.
        config: the `ModelConfig`.
        shapes: {our name: array or shape struct}; of a scalar model without its bias.

    Returns:
        list of `Place`, in the order of the layers.
    """
    sparse = per_layer(config.sparse or (True,), config.layers)
    stacks = {
        "dense": [i for i, x in enumerate(sparse) if not x],
        "sparse": [i for i, x in enumerate(sparse) if x],
        "all": range(config.layers),
    }
    out = []
    for name, array in shapes.items():
        short = name.removeprefix("body/")
        if not short.startswith("layers/"):
            key, text = family.top[short]
            out.append((-1 if short in ("embed", "positions") else config.layers, name))
            out[-1] += (key, (), parse(text))
            continue
        first, _, rest = short.removeprefix("layers/").partition("/")
        mixed = first in ("dense", "sparse")
        within = rest if mixed else f"{first}/{rest}"
        key, text = family.layer[within]
        axes = parse(text)
        for row, layer in enumerate(stacks[first if mixed else "all"]):
            full = family.layers.replace("{l}", str(layer)) + key
            if "{e}" not in key:
                out.append((layer, name, full, (row,), axes))
                continue
            inner = Axes(axes.theirs, axes.ours[1:])
            for e in range(array.shape[1]):
                one = full.replace("{e}", str(e))
                out.append((layer, name, one, (row, e), inner))
    return [Place(*rest) for _, *rest in sorted(out, key=lambda place: place[0])]
