"""How a model's parameters are laid out in a Hugging Face folder, tensor by tensor.

"Theirs" is a tensor of the folder, "ours" an array of the model.
"""

import functools
import math
import re
from typing import NamedTuple

from stagecraft.models.config import ModelConfig, per_layer


class Axes(NamedTuple):
    """How the axes of a tensor of theirs correspond to those of an array of ours.

    Attributes:
        theirs: for each of their dimensions, (part, parts, letters of ours in it).
        ours: letters of our dimensions.
    """

    theirs: tuple[tuple[int, int, tuple[str, ...]], ...]
    ours: tuple[str, ...]

    def shape(self, sizes: dict[str, int], *, split: bool = False) -> tuple[int, ...]:
        """Returns their tensor's shape; with `split` our part's, one axis a letter."""
        if split:
            return tuple(sizes[x] for _, _, letters in self.theirs for x in letters)
        return tuple(
            parts * math.prod(sizes[x] for x in letters)
            for _, parts, letters in self.theirs
        )

    def region(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Returns the slices of their tensor, which has this shape, that are ours."""
        return tuple(
            slice(part * size // parts, (part + 1) * size // parts)
            for (part, parts, _), size in zip(self.theirs, shape, strict=True)
        )


class Layout(NamedTuple):
    """One tensor of theirs, or a part of it, within one array of ours.

    Attributes:
        ours: our parameter's name.
        key: their tensor's name.
        index: its indices on our leading axes: layer, expert.
        axes: of the remaining dimensions.
    """

    ours: str
    key: str
    index: tuple[int, ...]
    axes: Axes


@functools.cache
def parse(text: str) -> Axes:
    """Parses a line such as "d (0/3 h c) -> d h c"."""
    theirs, ours = text.split(" -> ")
    dims = []
    for group in re.findall(r"\([^)]*\)|\S+", theirs):
        words, part, parts = group.strip("()").split(), 0, 1
        if "/" in words[0]:
            part, parts = map(int, words.pop(0).split("/"))
        dims.append((part, parts, tuple(w for w in words if w != "1")))
    return Axes(tuple(dims), tuple(ours.split()))


def of_model(family, config: ModelConfig, shapes: dict) -> list[Layout]:
    """Lays out every parameter of a model in a folder of its family.

    Args:
        family: a `Family`.
        shapes: {our name: array or shape struct}; of a scalar model without its bias.

    Returns:
        list of `Layout`, in the order of the layers.
    """
    sparse = per_layer(config.sparse, config.layers)
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
            order = -1 if short in ("embed", "positions") else config.layers
            out.append((order, Layout(name, key, (), parse(text))))
            continue
        first, _, rest = short.removeprefix("layers/").partition("/")
        mixed = first in ("dense", "sparse")
        within = rest if mixed else f"{first}/{rest}"
        key, text = family.layer[within]
        axes = parse(text)
        for row, layer in enumerate(stacks[first if mixed else "all"]):
            full = family.layers.replace("{l}", str(layer)) + key
            if "{e}" not in key:
                out.append((layer, Layout(name, full, (row,), axes)))
                continue
            inner = Axes(axes.theirs, axes.ours[1:])
            for e in range(array.shape[1]):
                key_of_expert = full.replace("{e}", str(e))
                out.append((layer, Layout(name, key_of_expert, (row, e), inner)))
    return [layout for _, layout in sorted(out, key=lambda pair: pair[0])]
