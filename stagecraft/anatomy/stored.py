"""Weights as they lie on disk, one matrix at a time.

A stage's checkpoint and a Hugging Face folder give the same matrices under the same
names, in the numbers that are stored: no model is built, nothing is folded or centred.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from stagecraft import checkpoint, sharding, tree
from stagecraft.errors import UserError
from stagecraft.lineage import StageRecord
from stagecraft.models import huggingface, locate, lora, peft, saved
from stagecraft.models.config import ModelConfig, per_layer

# Reward and value models keep their decoder under this name, next to a scalar head.
_BODY = "body/"
_STACK = "layers/"  # leaves below it carry the layers on axis 0
_TABLES = ("embed", "unembed", "positions")  # a row for each token or position
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


class Matrix(NamedTuple):
    """One matrix, or one vector, of a model on disk.

    Attributes:
        name: its path in the tree, with the layer's number: layers/0/attention/query.
        kind: query, output, gate, norm, ...: see `kind_of`.
        layer: its number; None outside of the layers.
        shape: (out, in), as it acts on a column: the rows of a query matrix are what
            it writes, its columns what it reads. Tables are (tokens, width). (n,) for
            norm scales, biases and scalar heads.
        dtype: as stored, a name of `tensors.DTYPES`.
        read: () -> f32 array of that shape, in memory or mapped from the file.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class Weights(NamedTuple):
    """A model on disk.

    Attributes:
        name: what it is called in messages and on pages.
        config: its `ModelConfig`.
        matrices: {name: Matrix}, the first layers first.
        id: a digest; equal ids have equal weights.
    """

    name: str
    config: ModelConfig
    matrices: dict[str, Matrix]
    id: str


def kind_of(name: str) -> str:
    """Returns which matrix of a layer a parameter is, from its path in the tree.

    >>> [kind_of(f"layers/0/attention/{n}") for n in ("query", "query_norm/scale")]
    ['query', 'norm']
    >>> [kind_of(f"layers/sparse/0/experts/2/{n}") for n in ("gate", "router")]
    ['expert_gate', 'router']
    """
    if "norm" in name:
        return "norm"
    last = name.rsplit("/", 1)[-1]
    if "experts/" in name and last != "router":
        return f"expert_{last}"
    return "output" if last == "out" else last


def weights_of(source: locate.Source, name: str = "") -> Weights:
    """Opens the weights of a stage or a folder; nothing but headers is read.

    Args:
        source: a finished stage, here or of another run, or a Hugging Face folder,
            each with an adapter or without.
        name: what to call it; by default as the source is.

    Raises:
        UserError: the stage is missing or not finished, or the folder is damaged.
    """
    info = source.info()
    config, id_ = ModelConfig(**info["model"]), source.id()
    # A device of this process: several may each read all of it.
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    if source.where == "folder":
        matrices = _of_folder(source.folder, config, mesh)
    elif source.where == "adapter":
        matrices = _of_peft(source.folder, config, mesh)
    elif StageRecord.read_finished(source.folder).lora is not None:
        matrices = _of_adapter(source.folder, mesh)
    else:
        matrices = _of_stage(source.folder, info, mesh)
    label = name or source.name
    return Weights(label, config, matrices, id_ or str(source.folder.resolve()))


def of_tree(parameters, config: ModelConfig, name: str = "") -> Weights:
    """Returns the `Weights` of a model in memory, as `weights_of` does of one on disk.

    Args:
        parameters: a `Transformer`, a `ScalarModel`, or a tree of arrays by their
            names.
    """
    leaves = tree.named(parameters)
    matrices = _matrices(
        {key: (leaf.shape, np.dtype(leaf.dtype).name) for key, leaf in leaves.items()},
        config,
        lambda key, index: np.asarray(leaves[key][index]),
    )
    return Weights(name, config, matrices, tree.digest(parameters))


def _of_stage(folder, info, mesh):
    shapes = tree.named(saved.abstract(info, mesh))
    arrays = checkpoint.open_model(folder)
    return _matrices(
        {key: (leaf.shape, leaf.dtype.name) for key, leaf in shapes.items()},
        ModelConfig(**info["model"]),
        lambda key, index: arrays(key)[index].read().result(),
    )


def _matrices(leaves, config, read):
    """Cuts stacked arrays into matrices; `read` is (name, index) -> one of them."""
    matrices = {}
    for key, (shape, dtype) in leaves.items():
        for index, name, layer in _places(key, shape, config):
            inner = shape[len(index) :]
            kind = kind_of(name)
            matrices[name] = Matrix(
                *(name, kind, layer, _shape(kind, name, inner), _DTYPES[dtype]),
                functools.partial(_read_ours, read, key, index, kind, name),
            )
    return dict(sorted(matrices.items(), key=_order))


def _read_ours(read, key, index, kind, name):
    return _as_matrix(kind, name, np.asarray(read(key, index), np.float32))


def _of_folder(folder, config, mesh):
    plan = huggingface.examine(folder, mesh)
    shapes = {name: leaf.shape for name, leaf in tree.named(plan.abstract).items()}
    matrices = {}
    for layout in plan.layouts:
        tensor = plan.tensors[layout.key]
        shape = shapes[layout.ours]
        places = {index: rest for index, *rest in _places(layout.ours, shape, config)}
        name, layer = places[layout.index]
        inner, kind = shape[len(layout.index) :], kind_of(name)
        matrices[name] = Matrix(
            *(name, kind, layer, _shape(kind, name, inner), tensor.dtype),
            functools.partial(_read_theirs, tensor, layout, inner, kind, name),
        )
    return dict(sorted(matrices.items(), key=_order))


def _read_theirs(tensor, layout, shape, kind, name):
    """Reads a tensor of a folder, or its part, in the axes of ours and then as 2-D."""
    axes = layout.axes
    sizes = dict(zip(axes.ours, shape, strict=True))
    mapped = tensor.open()
    mapped = mapped[axes.region(mapped.shape)]
    letters = [x for _, _, group in axes.theirs for x in group]
    ours = mapped.reshape(axes.shape(sizes, split=True))
    ours = ours.transpose([letters.index(x) for x in axes.ours])
    return np.asarray(_as_matrix(kind, name, ours), np.float32)


def _of_adapter(folder, mesh):
    """W + s A B for what a stage's adapter targets, its base's matrices besides."""
    record = StageRecord.read_finished(folder)
    base = weights_of(locate.base_of(folder, record))
    abstract = saved.abstract({"module": "transformer", "model": record.model}, mesh)
    blank = lora.abstract(
        lora.Settings(**record.lora), abstract, mesh, scalar=record.module == "scalar"
    )
    arrays = checkpoint.open_model(folder)
    adapter = tree.map_names(lambda name, _: arrays(name).read().result(), blank)
    return _adapted(base.matrices, adapter, ModelConfig(**record.model))


def _of_peft(folder, config, mesh):
    base = peft.base_of(folder)
    under = weights_of(locate.locate(f"{locate.PREFIX}{base}"))
    if under.config.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: its adapter changes the number of tokens of {base}; merge it "
            "with PEFT and name the whole model"
        )
    info = huggingface.info(base)
    adapter = peft.read(folder, saved.abstract(info, mesh), mesh)
    return _adapted(under.matrices, adapter, config)


def _adapted(base, adapter, config):
    matrices = dict(base)
    for key, part in adapter.parts.items():
        pair = isinstance(part, lora.LoraPair)
        first = part.a if pair else part
        # A and B carry the layers as the weight does; rank comes last and first.
        lead = first.ndim - len(first.get_metadata()["axes"])
        shape = first.shape
        if pair:
            shape = (*part.a.shape[:-1], *part.b.shape[lead + 1 :])
        for index, name, layer in _places(key, shape, config):
            kind, scale = kind_of(name), adapter.settings.scale
            if pair:
                a, b = (np.asarray(side[...])[index] for side in (part.a, part.b))
                read = functools.partial(_read_merged, base[name].read, a, b, scale)
                matrices[name] = base[name]._replace(read=read, dtype="F32")
                continue
            whole = np.asarray(part[...])[index].astype(np.float32)
            inner = _shape(kind, name, whole.shape)
            matrices[name] = Matrix(
                *(name, kind, layer, inner, "F32"),
                functools.partial(_as_matrix, kind, name, whole),
            )
    return dict(sorted(matrices.items(), key=_order))


def _read_merged(read, a, b, scale):
    rank = a.shape[-1]
    product = a.reshape(-1, rank) @ b.reshape(rank, -1)  # [in, out]
    return read() + np.float32(scale) * product.T


def _places(key, shape, config):
    """Lists (index, name, layer) of the matrices in one array of ours.

    >>> c = ModelConfig(vocab_size=8, layers=2)
    >>> _places("layers/ff/up", (2, 4, 8), c)
    [((0,), 'layers/0/ff/up', 0), ((1,), 'layers/1/ff/up', 1)]
    """
    short = key.removeprefix(_BODY)
    if not short.startswith(_STACK):
        return [((), short, None)]
    first, _, rest = short.removeprefix(_STACK).partition("/")
    numbers = range(config.layers)
    if first in ("dense", "sparse"):
        sparse = per_layer(config.sparse, config.layers)
        numbers = [i for i in numbers if sparse[i] == (first == "sparse")]
    else:
        rest = f"{first}/{rest}"
    folder, _, last = rest.rpartition("/")
    if folder == "experts" and last != "router":
        return [
            ((row, e), f"layers/{number}/experts/{e}/{last}", number)
            for row, number in enumerate(numbers)
            for e in range(shape[1])
        ]
    return [((row,), f"layers/{n}/{rest}", n) for row, n in enumerate(numbers)]


def _order(item):
    layer = item[1].layer
    table = item[1].kind in ("embed", "positions")
    return -1 if table else math.inf if layer is None else layer


def _is_vector(kind, name, shape):
    return len(shape) < 2 or kind == "norm" or name.endswith("bias")


def _shape(kind, name, shape):
    if _is_vector(kind, name, shape):
        return (math.prod(shape),)
    if kind in _TABLES:
        return tuple(shape)
    lead = len(shape) - 1 if kind in ("output", "down", "expert_down") else 1
    return math.prod(shape[lead:]), math.prod(shape[:lead])


def _as_matrix(kind, name, array):
    """Folds heads into the side they belong to: [D, H, C] or [H, C, D] -> [out, in]."""
    if _is_vector(kind, name, array.shape):
        return array.reshape(-1)
    if kind in _TABLES:
        return array
    out, in_ = _shape(kind, name, array.shape)
    return array.reshape(in_, out).T
