"""Hugging Face folders: models read from them and written as them.

Both stream: one tensor of the folder at a time is on its way between the disk and the
sharded arrays, each device its own slice of it, so that the host never holds the model.
The names and axes of tensors are in `families.py`.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stagecraft import process, schema, sharding, storage, tree
from stagecraft.errors import UserError
from stagecraft.models import families, layouts, saved, tensors
from stagecraft.models.config import ModelConfig
from stagecraft.models.transformer import ScalarModel, Transformer

_log = logging.getLogger("stagecraft.models")
# The dtypes we write: transformers' name and the format's.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_SIZE = 5 * 10**9
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
HEAD = "lm_head.weight"
# Our reward models have a bias, theirs do not: config.json carries it.
BIAS = "stagecraft_reward_bias"
# Tensors that are no weights, or not weights of the text decoder.
IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$"
    r"|^(model\.)?(vision_tower|multi_modal_projector)\."
)


# Reading


def read_json(folder: str | Path, name: str) -> dict:
    """Reads a JSON file of the folder, or raises a UserError that names it."""
    path = Path(folder) / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def info(folder: str | Path) -> dict:
    """Reads a folder's module and model, as `saved.info` does for a stage.

    Returns:
        {"module": "transformer" or "scalar", "model": fields of `ModelConfig`}.
    """
    hf = read_json(folder, "config.json")
    try:
        config = families.read_config(hf).validate()
    except UserError as error:
        line = str(error).removeprefix("config.json: ")
        raise UserError(f"{Path(folder) / 'config.json'}: {line}") from None
    scalar = any(
        "ForSequenceClassification" in a for a in hf.get("architectures") or ()
    )
    if scalar:  # such a folder has no output embedding, whatever its config says
        config = dataclasses.replace(config, tied=True)
    elif config.tied and _is_torn(Path(folder), config):
        config = dataclasses.replace(config, tied=False)
    return {
        "module": "scalar" if scalar else "transformer",
        "model": dataclasses.asdict(config),
    }


def _is_torn(folder, config):
    """Tells whether a folder holds two tables where its config.json has one for both.

    transformers then reads both, whatever the config says.
    """
    family = families.FAMILIES[config.family]
    try:
        present = _plain_names(tensors.read_folder(folder), family)
    except UserError:
        return False  # `examine` says what is wrong with the files
    names = (family.top["embed"][0], HEAD)
    if not present.keys() >= {*names} or tensors.equal(*map(present.get, names)):
        return False
    say(
        f"{folder}: {HEAD} differs from {names[0]}, though config.json ties them: read "
        "as two tables, as transformers does (tie_word_embeddings=false would say so)"
    )
    return True


@functools.cache
def say(line: str) -> None:
    """Prints a line about a folder, once."""
    _log.warning(line)


def config(folder: str | Path) -> ModelConfig:
    """Returns the `ModelConfig` of a folder."""
    return ModelConfig(**info(folder)["model"])


def digest(folder: str | Path) -> str:
    """Returns the SHA-256 of the folder's config and weights, its id in a lineage."""
    hasher = hashlib.sha256()
    paths = [Path(folder) / "config.json", *tensors.files(Path(folder))]
    for path in paths:
        hasher.update(path.name.encode())
        with open(path, "rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()


class Plan(NamedTuple):
    """A checked folder, ready to be read.

    Attributes:
        abstract: the module as shapes with shardings.
        layouts: of its tensors.
        tensors: {key: Tensor}.
    """

    abstract: Any
    layouts: list[layouts.Layout]
    tensors: dict[str, tensors.Tensor]


def examine(
    folder: str | Path, mesh: Mesh, *, module: str | None = None, **changes
) -> Plan:
    """Checks from a folder's config and headers that its tensors are complete.

    Args and errors as of `load`, of whose work it is the first part.
    """
    folder = Path(folder)
    model_info = info(folder)
    if module not in (None, model_info["module"]):
        needs = {
            "transformer": "...ForCausalLM",
            "scalar": "...ForSequenceClassification",
        }
        raise UserError(
            f"{folder}: config.json: architectures: expected a {needs[module]}, this "
            f"is a {needs[model_info['module']]}"
        )
    model_info["model"] |= changes
    read = tensors.read_folder(folder)
    if others := tensors.unread(folder):
        file = tensors.files(folder)[0].name
        say(f"{folder}: reads {file}, as transformers does; {others[0]} is not read")
    return plan(folder, model_info, read, mesh)


def plan(where: str | Path, model_info: dict, read: dict, mesh: Mesh) -> Plan:
    """Checks that tensors are those of a model.

    Args:
        where: their folder or file, for messages.
        model_info: as `info` returns it.
        read: {name: Tensor}.
        mesh: of the parameters.
    """
    abstract = saved.abstract(model_info, mesh)
    shapes = tree.named(abstract)
    weights = {k: v for k, v in shapes.items() if k != "bias"}
    model = ModelConfig(**model_info["model"])
    family = families.FAMILIES[model.family]
    wanted = layouts.of_model(family, model, weights)
    present = _plain_names(read, family)
    return Plan(
        abstract, wanted, _checked_tensors(where, family, present, wanted, shapes)
    )


def load(
    folder: str | Path, mesh: Mesh, *, module: str | None = None, **changes
) -> Transformer | ScalarModel:
    """Reads a model, each device its own part.

    Args:
        folder: with config.json and *.safetensors.
        mesh: of the parameters, which are float32 whatever the folder's dtype.
        module: "transformer" or "scalar", where only one will do.
        **changes: fields of `ModelConfig` that are the run's: dtype, remat.

    Returns:
        a `Transformer`, or a `ScalarModel` from a ...ForSequenceClassification.

    Raises:
        UserError: the folder is incomplete, or does not fit its config.json.
    """
    bias = read_json(folder, "config.json").get(BIAS, 0.0)
    return filled(examine(folder, mesh, module=module, **changes), mesh, bias=bias)


def filled(plan: Plan, mesh: Mesh, *, bias: float = 0.0) -> Any:
    """Reads the tensors of a plan; a reward model gets this bias."""
    abstract = plan.abstract
    empty = sharding.init_sharded(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract), mesh
    )
    arrays = tree.named(empty())
    names = list(arrays)
    for layout in plan.layouts:
        # Popped, so that the array is written in place and not copied.
        stack = arrays.pop(layout.ours)
        arrays[layout.ours] = _fill(stack, plan.tensors[layout.key], layout)
    if "bias" in arrays:
        arrays["bias"] = jax.device_put(jnp.float32(bias), arrays["bias"].sharding)
    leaves = [arrays[name] for name in names]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _checked_tensors(folder, family, present, wanted, shapes):
    """Returns {key: Tensor}: all are present, with the right shapes."""
    wanted = {layout.key: layout for layout in wanted}
    head = None if "unembed" in shapes else present.pop(HEAD, None)
    if head is not None and "embed" in shapes:
        # A tied table may be there twice, or under the second name alone.
        present.setdefault(family.top["embed"][0], head)
    for key in wanted:
        if key not in present:
            raise UserError(
                f"{folder}: lacks {key}, which its config.json calls for"
                + _nearest(key, present.keys() - wanted.keys(), "there is")
            )
    for key in present:
        if key not in wanted:
            raise UserError(
                f"{folder}: holds {key}, which no {family.name} of its config.json has"
                + _nearest(key, wanted, "it has")
            )
    for key, layout in wanted.items():
        tensor = present[key]
        if tensor.dtype not in tensors.DTYPES:
            raise UserError(
                f"{tensor.path}: holds {key} as {tensor.dtype}; expected one "
                f"of {', '.join(tensors.DTYPES)} (quantised weights are not read)"
            )
        expected = layout.axes.shape(_sizes(layout, shapes))
        if tensor.shape != expected:
            raise UserError(
                f"{folder}: {key} has shape {list(tensor.shape)}; its config.json "
                f"calls for {list(expected)}"
            )
    return present


def _plain_names(read, family):
    """Renames tensors to transformers' names for a text model with a head."""
    out = {}
    for name, tensor in read.items():
        for inner in ("model.language_model.", "language_model.model."):
            if name.startswith(inner):
                name = "model." + name.removeprefix(inner)
        name = name.removeprefix("language_model.")
        if not IGNORED.search(name):
            out[name] = tensor
    root = family.top["embed"][0].partition(".")[0] + "."
    if any(name.startswith(root) for name in out):
        return out
    heads = ("lm_head.", "score.")
    return {n if n.startswith(heads) else root + n: x for n, x in out.items()}


def _nearest(name, names, verb):
    near = schema.nearest(name, names)
    return f"; the nearest {verb} is {near}" if near else ""


def _sizes(layout, shapes):
    """{letter: size} of a layout, from our array's shape."""
    shape = shapes[layout.ours].shape[len(layout.index) :]
    return dict(zip(layout.axes.ours, shape, strict=True))


def _fill(stack, tensor, layout):
    """Our array with one tensor of theirs in its layout."""
    sizes = _sizes(layout, {layout.ours: stack})
    program, sharding = _reader(
        layout.axes, tuple(sizes.items()), len(layout.index), stack.sharding
    )
    mapped = tensor.open()
    mapped = mapped[layout.axes.region(mapped.shape)]
    if mapped.dtype == np.float64:
        mapped = mapped.astype(np.float32)
    theirs = jax.make_array_from_callback(
        mapped.shape, sharding, lambda index: np.ascontiguousarray(mapped[index])
    )
    stack, finite = program(stack, theirs, np.asarray(layout.index, np.int32))
    if not finite:
        raise UserError(
            f"{tensor.path}: {layout.key} holds values that are not finite (NaN or "
            "infinity); a model cannot start from it"
        )
    return stack


def _theirs(axes, leading, sharding):
    """Returns the sharding of a tensor of theirs that is split as ours is."""
    spec = (*sharding.spec, *[None] * (leading + len(axes.ours)))
    ours = dict(zip(axes.ours, spec[leading:], strict=False))
    spec = P(*(ours[x[0]] if x else None for _, _, x in axes.theirs))
    return NamedSharding(sharding.mesh, spec)


@functools.lru_cache(maxsize=256)
def _reader(axes, sizes, leading, sharding):
    """Makes (stack, theirs, index) -> (stack, finite), and the sharding of theirs."""
    sizes = dict(sizes)
    split = [x for _, _, letters in axes.theirs for x in letters]
    order = [split.index(x) for x in axes.ours]

    def write(stack, array, index):
        finite = jnp.isfinite(array).all()
        array = array.reshape(axes.shape(sizes, split=True)).transpose(order)
        array = array.astype(stack.dtype).reshape((1,) * leading + array.shape)
        start = [*index] + [0] * len(order)
        return jax.lax.dynamic_update_slice(stack, array, start), finite

    outputs = (sharding, NamedSharding(sharding.mesh, P()))
    program = jax.jit(write, donate_argnums=0, out_shardings=outputs)
    return program, _theirs(axes, leading, sharding)


# Writing


def save(
    module: Transformer | ScalarModel,
    folder: str | Path,
    *,
    dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    ids: dict | None = None,
    generation: dict | None = None,
    extra: Callable[[Path], None] | None = None,
) -> families.Family:
    """Writes a folder that transformers and vLLM open, completely or not at all.

    It is written under a temporary name and then renamed; a folder it replaces stays
    complete until then.

    Args:
        module: a `Transformer`, or a `ScalarModel`, which is written as a
            ...ForSequenceClassification with one label. Their head has no bias: ours
            is written to config.json and read from there.
        folder: where to; must not hold anything, unless `overwrite`.
        dtype: of the weights in the folder.
        shard_size: bytes of weights in a file, at most.
        overwrite: replace an existing folder.
        ids: {name of `IDS`: id}, for config.json; null without, since readers would
            otherwise take the family's own.
        generation: for generation_config.json, where `extra` does not write one; by
            default `ids`.
        extra: (folder) -> None, writes further files: the tokenizer's.

    Returns:
        the `families.Family` it was written as.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)}")
    folder = free(folder, overwrite)
    scalar = isinstance(module, ScalarModel)
    body = module.body if scalar else module
    family = families.matching(body.config)
    with storage.new_folder(folder, replace=overwrite) as temporary:
        _write_weights(module, family, body.config, temporary, dtype, shard_size)
        _write_configs(module, family, body.config, temporary, dtype, ids)
        if not scalar:
            _write_json(temporary / "generation_config.json", generation or ids or {})
        if extra is not None:
            extra(temporary)
    return family


def free(folder: str | Path, overwrite: bool) -> Path:
    """Returns the path of a folder that may be written: empty, or to be replaced."""
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(
            f"{folder}: is there already and not empty; choose another --to, or add "
            "--overwrite to replace it"
        )
    return folder


def _write_weights(module, family, config, folder, dtype, shard_size):
    arrays = tree.named(module)
    arrays.pop("bias", None)
    if isinstance(module, ScalarModel):
        arrays.pop("body/unembed", None)
    pieces = {}
    for layout in layouts.of_model(family, config, arrays):
        pieces.setdefault(layout.key, []).append(layout)
    shapes = {
        key: parts[0].axes.shape(_sizes(parts[0], arrays))
        for key, parts in pieces.items()
    }

    def make(key):
        parts = [
            (layout, _take(arrays[layout.ours], layout, dtype))
            for layout in pieces[key]
        ]
        if len(parts) == 1:
            return parts[0][1]
        joined = np.empty(shapes[key], parts[0][1].dtype)
        for layout, part in parts:
            joined[layout.axes.region(joined.shape)] = part
        return joined

    if process.is_first():
        tensors.write_folder(
            folder, shapes, make, dtype=DTYPES[dtype], shard_size=shard_size
        )
    else:  # every process has a part in gathering each tensor
        for key in shapes:
            make(key)


def _take(stack, layout, dtype):
    """Cuts one tensor of theirs, or its part, out of our array."""
    sizes = _sizes(layout, {layout.ours: stack})
    program = _writer(
        layout.axes, tuple(sizes.items()), len(layout.index), stack.sharding, dtype
    )
    array, finite = program(stack, np.asarray(layout.index, np.int32))
    if not finite:
        raise UserError(
            f"{layout.key}: holds values that {dtype} cannot (NaN, infinity or beyond "
            "its range); "
            + ("use --dtype=bfloat16" if dtype == "float16" else "the model is broken")
        )
    return np.asarray(array)


@functools.lru_cache(maxsize=256)
def _writer(axes, sizes, leading, sharding, dtype):
    """Makes (stack, index) -> (theirs, finite), split as ours is.

    In a program of several processes it is gathered to all, since one of them writes.
    """
    sizes = dict(sizes)
    split = [x for _, _, letters in axes.theirs for x in letters]
    order = [axes.ours.index(x) for x in split]
    shape = [math.prod(sizes[x] for x in letters) for _, _, letters in axes.theirs]

    def take(stack, index):
        start = [*index] + [0] * len(order)
        size = (1,) * leading + stack.shape[leading:]
        array = jax.lax.dynamic_slice(stack, start, size).reshape(size[leading:])
        array = array.transpose(order).reshape(shape).astype(dtype)
        return array, jnp.isfinite(array).all()

    outputs = None
    if isinstance(sharding, NamedSharding):
        everywhere = NamedSharding(sharding.mesh, P())
        outputs = (_theirs(axes, leading, sharding), everywhere)
        if jax.process_count() > 1:
            outputs = everywhere
    return jax.jit(take, out_shardings=outputs)


def _write_configs(module, family, config, folder, dtype, ids):
    ids = dict.fromkeys(IDS) | (ids or {})
    scalar = isinstance(module, ScalarModel)
    suffix = "ForSequenceClassification" if scalar else "ForCausalLM"
    out = {"architectures": [family.classes[scalar] + suffix]}
    out |= families.write_config(family, config)
    out |= {"dtype": dtype, "torch_dtype": dtype} | ids
    if scalar:
        out |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        bias = float(module.bias[...])
        out |= {BIAS: bias} if bias else {}
    _write_json(folder / "config.json", out)


def _write_json(path, value):
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
