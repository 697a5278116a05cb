"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors.

Their A is [R, in] and their B [out, R], named after the module they adapt; that module
and its axes are in `families.py`. A module of theirs that is n weights of ours (GPT-2's
c_attn) becomes one adapter of n times the rank, whose B is zero between the parts.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stagecraft import hub, process, sharding, storage
from stagecraft.errors import UserError
from stagecraft.models import families, huggingface, layouts, lora, tensors
from stagecraft.models.config import ModelConfig, check_mesh
from stagecraft.models.transformer import ScalarModel, Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BIAS = huggingface.BIAS  # of a scalar head: theirs has none
ROOT = "base_model.model."
# Options of a PEFT config that change the numbers and that we do not implement.
LACKING = {
    "use_dora": "DoRA",
    "lora_bias": "biases of B",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "adapted parameters",
    "alora_invocation_tokens": "activated adapters",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal adapters",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron layers",
}
# Initialisations that change the base's weights too.
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(folder: str | Path) -> bool:
    """Tells whether a folder holds an adapter and not a model by itself."""
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        return False
    if not (folder / "config.json").exists():
        return True
    whole = [p for p in folder.glob("*.safetensors") if p.name != WEIGHTS]
    if whole and (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder}: holds a model ({whole[0].name}) and an adapter ({WEIGHTS}); "
            "only one can be meant: move the other's files away"
        )
    return not whole


# Writing


def save(
    adapter: lora.Adapter,
    config: ModelConfig,
    folder: str | Path,
    mesh: Mesh,
    *,
    base: str | Path,
    overwrite: bool = False,
    extra: Callable[[Path], None] | None = None,
) -> families.Family:
    """Writes an adapter as PEFT does, completely or not at all.

    Args:
        config: the `ModelConfig` of its base.
        mesh: of the adapter.
        base: for base_model_name_or_path, the model PEFT is to load it onto.
        overwrite: replace an existing folder.
        extra: (folder) -> None, writes further files: the tokenizer's.

    Returns:
        the `families.Family` whose names it has.
    """
    folder = huggingface.free(folder, overwrite)
    family = families.matching(config)
    host = jax.tree.map(np.asarray, sharding.replicate(adapter, mesh)).parts
    bias = float(host.pop("bias")[...]) if "bias" in host else 0.0
    arrays, modules = {}, {}
    shapes = {name: _shape(part) for name, part in host.items()}
    for layout in layouts.of_model(family, config, shapes):
        part = host[layout.ours]
        if isinstance(part, lora.LoraPair):
            modules.setdefault(layout.key.removesuffix(".weight"), []).append(layout)
        else:
            sizes = dict(zip(layout.axes.ours, part.shape, strict=True))
            arrays[layout.key] = part[...].reshape(layout.axes.shape(sizes))
    for module, pieces in modules.items():
        a, b = _joined(pieces, host, shapes)
        arrays |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    embed = family.top["embed"][0]
    if config.tied and embed in arrays and "head" not in host:
        # PEFT trains a copy of one module and leaves the other: both are written.
        arrays["lm_head.weight"] = arrays[embed]
    peft_config = _config(adapter.settings, family, modules, config)
    full = {name.split(".")[-2] for name in arrays if "lora_" not in name}
    peft_config |= {"modules_to_save": sorted(full) or None}
    peft_config |= {"task_type": "SEQ_CLS" if "head" in host else "CAUSAL_LM"}
    peft_config |= {"base_model_name_or_path": str(base)}
    peft_config |= {BIAS: bias} if bias else {}
    with storage.new_folder(folder, replace=overwrite) as temporary:
        if process.is_first():
            shapes = {ROOT + name: array.shape for name, array in arrays.items()}
            tensors.write_file(
                temporary / WEIGHTS,
                shapes,
                lambda n: arrays[n.removeprefix(ROOT)],
                "F32",
            )
            text = json.dumps(peft_config, indent=2, sort_keys=True) + "\n"
            (temporary / CONFIG).write_text(text, encoding="utf-8")
        if extra is not None:
            extra(temporary)
    return family


def _shape(part):
    """Returns the shape of the parameter that a part of an adapter adapts, or is."""
    if isinstance(part, lora.LoraPair):
        lead = part.a.ndim - len(part.a.get_metadata()["axes"])
        shape = (*part.a.shape[:-1], *part.b.shape[lead + 1 :])
    else:
        shape = part.shape
    return jax.ShapeDtypeStruct(shape, np.float32)


class _Sides(NamedTuple):
    """One of our weights as inputs and outputs of a module of theirs.

    Attributes:
        size: (in, out) of the module.
        region: the slice of its out that is ours.
        read, written: the shapes of our dimensions on either side.
    """

    size: tuple
    region: slice
    read: tuple
    written: tuple


def _sides(layout, shapes):
    path = "/".join(layout.ours.split("/")[-2:])
    contracted = next(count for where, count in lora.TARGETS.values() if where == path)
    shape = shapes[layout.ours].shape[len(layout.index) :]
    sizes = layout.axes.shape(dict(zip(layout.axes.ours, shape, strict=True)))
    letters = [dimension[2] for dimension in layout.axes.theirs]
    source = letters.index(layout.axes.ours[:contracted])
    region = layout.axes.region(sizes)[1 - source]
    size = (sizes[source], sizes[1 - source])
    return _Sides(size, region, shape[:contracted], shape[contracted:])


def _joined(pieces, host, shapes):
    """Joins our parts to A [R, in] and B [out, R] of one module of theirs."""
    rank = host[pieces[0].ours].a.shape[-1]
    inside, out = _sides(pieces[0], shapes).size
    a = np.empty((len(pieces) * rank, inside), np.float32)
    b = np.zeros((out, len(pieces) * rank), np.float32)
    for number, layout in enumerate(pieces):
        pair, rows = host[layout.ours], slice(number * rank, (number + 1) * rank)
        a[rows] = pair.a[layout.index].reshape(inside, rank).T
        region = _sides(layout, shapes).region
        b[region, rows] = pair.b[layout.index].reshape(rank, -1).T
    return a, b


def _config(settings, family, modules, config):
    """Returns the keys of adapter_config.json that describe the adapter."""
    short = _short(family)
    if config.experts:  # whose modules may have the same names
        short = str
    ranks, alphas = {}, {}
    for module, pieces in modules.items():
        if len(pieces) > 1:
            more = len(pieces) ** (0.5 if settings.rslora else 1)
            ranks[short(module)] = len(pieces) * settings.rank
            alphas[short(module)] = more * settings.alpha
    return {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": sorted({short(module) for module in modules}),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": family.layer["attention/out"][1].endswith(") d -> h c d"),
        "bias": "none",
        "inference_mode": True,
    }


def _short(family):
    """Returns (module) -> the end of its name that is unique within a layer."""
    modules = {key.rpartition(".")[0] for key, _ in family.layer.values()}
    ends = [module.rpartition(".")[2] for module in modules]

    def short(module):
        parts = module.split(".")
        return ".".join(parts[-1:] if ends.count(parts[-1]) < 2 else parts[-2:])

    return short


# Reading


def base_of(folder: str | Path) -> Path:
    """Returns the folder of the model that an adapter belongs to."""
    folder = Path(folder)
    name = str(huggingface.read_json(folder, CONFIG).get("base_model_name_or_path"))
    for path in (Path(name), folder / name, hub.find(name)):
        if path and (path / "config.json").exists():
            return path
    command = f", or: hf download {name}" if hub.is_id(name) else ""
    raise UserError(
        f"{folder / CONFIG}: base_model_name_or_path={name!r}: no folder of a model is "
        "there, nor in the hub's cache; an adapter needs the model it was trained on: "
        f"name its folder{command}"
    )


def info(folder: str | Path) -> dict:
    """Reads module and model of an adapted model, as `huggingface.info` does.

    An adapter that holds the tables of another vocabulary was trained after a resize of
    its base's embedding: the adapted model has that vocabulary.
    """
    model_info = huggingface.info(base_of(folder))
    if huggingface.read_json(folder, CONFIG).get("task_type") == "SEQ_CLS":
        model_info["module"] = "scalar"
    model = model_info["model"]
    rows = _rows(folder, ModelConfig(**model))
    if rows != model["vocab_size"]:
        huggingface.say(
            f"{folder}: holds tables of {rows} ids, its base {model['vocab_size']}: it "
            "was trained after a resize, and the model has its tables"
        )
    model["vocab_size"] = rows
    return model_info


def _rows(folder, config):
    """Returns how many ids the adapted model has; refuses tables that do not agree."""
    path = Path(folder) / WEIGHTS
    stored = tensors.read_header(path) if path.exists() else {}
    embed = families.FAMILIES[config.family].top["embed"][0]
    names = [embed, huggingface.HEAD]
    rows = [stored[n].shape[0] for x in names if (n := ROOT + x) in stored]
    if not any(count != config.vocab_size for count in rows):
        return config.vocab_size
    scalar = f"{ROOT}score.weight" in stored
    both = config.tied or scalar or len(rows) == 2
    if len(set(rows)) > 1 or ROOT + embed not in stored or not both:
        raise UserError(
            f"{path}: holds tables of {' and '.join(map(str, rows))} ids, and its base "
            f"has {config.vocab_size}; expected {embed} and {huggingface.HEAD} of one "
            "size: save the adapter with save_embedding_layers=True, or merge it with "
            "PEFT (merge_and_unload) and start from that folder"
        )
    return rows[0]


def _resized(base, rows, mesh):
    """Returns a base with tables of another size, which an adapter replaces."""
    body = getattr(base, "body", base)
    body.config = dataclasses.replace(body.config, vocab_size=rows)
    check_mesh(body.config, mesh)
    for table in (body.embed, body.unembed):
        if table is not None:
            value = table[:rows]
            table.set_value(jnp.pad(value, ((0, rows - len(value)), (0, 0))))
    return base


def digest(folder: str | Path) -> str:
    """Returns the SHA-256 of an adapter's files and of its base."""
    hasher = hashlib.sha256(huggingface.digest(base_of(folder)).encode())
    for name in (CONFIG, WEIGHTS):
        hasher.update((Path(folder) / name).read_bytes())
    return hasher.hexdigest()


def read(
    folder: str | Path, base: Transformer | ScalarModel, mesh: Mesh
) -> lora.Adapter:
    """Reads a PEFT folder.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        base: the model it belongs to.
        mesh: where to put it.

    Returns:
        an `Adapter` of scale 1: each module's own scale is in its B.
    """
    folder = Path(folder)
    config = huggingface.read_json(folder, CONFIG)
    _check(folder, config)
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder}: lacks {WEIGHTS}; pickles are not opened: save the adapter as "
            "safetensors"
        )
    header = tensors.read_header(folder / WEIGHTS)
    stored = {name.removeprefix(ROOT): tensor for name, tensor in header.items()}
    body = getattr(base, "body", base)
    scalar = "score.weight" in stored or isinstance(base, ScalarModel)
    family = families.matching(body.config)
    rank = max([x.shape[0] for n, x in stored.items() if ".lora_A." in n], default=1)
    settings = lora.Settings(rank, float(rank), "all", 0.0, False, embeddings=True)
    blank = lora.abstract(settings, base, mesh, scalar=scalar).parts
    shapes = {n: _shape(part) for n, part in blank.items() if n != "bias"}
    arrays, used = {}, set()
    for layout in layouts.of_model(family, body.config, shapes):
        module = layout.key.removesuffix(".weight")
        names = [f"{module}.lora_{side}.weight" for side in "AB"]
        part = blank[layout.ours]
        if not isinstance(part, lora.LoraPair) and layout.key in stored:
            sizes = dict(zip(layout.axes.ours, part.shape, strict=True))
            _check_shape(stored[layout.key], layout.key, layout.axes.shape(sizes))
            arrays[layout.ours] = _finite(stored[layout.key]).reshape(part.shape)
            used.add(layout.key)
        elif isinstance(part, lora.LoraPair) and names[0] in stored:
            if layout.ours not in arrays:
                arrays[layout.ours] = [np.zeros(x.shape, np.float32) for x in part]
            scale = _scale(config, module)
            _fill_pair(arrays[layout.ours], layout, shapes, stored, names, scale)
            used.update(names)
    used |= _tied(folder, stored, family, body.config)
    for name in stored:
        if name not in used:
            raise UserError(
                f"{folder / WEIGHTS}: holds {ROOT}{name}, which sits on nothing that "
                f"takes an adapter in a {family.name} of its base's config.json"
            )
    if "head" in arrays:
        bias = float(base.bias[...]) if isinstance(base, ScalarModel) else 0.0
        arrays["bias"] = np.float32(config.get(BIAS, bias))
    parts = {name: _filled(blank[name], value) for name, value in arrays.items()}
    adapter = lora.Adapter(parts, settings)
    return jax.device_put(adapter, sharding.shardings(adapter, mesh))


def _check(folder, config):
    """Refuses an adapter_config.json that asks for what we do not implement."""
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type={config.get('peft_type')!r}: expected 'LORA'"
        )
    lacking = [text for key, text in LACKING.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        lacking.append("trained biases")
    init = str(config.get("init_lora_weights"))
    if init.startswith(REBASED):
        lacking.append(f"a base changed by init_lora_weights={init!r}")
    if lacking:
        raise UserError(
            f"{where}: asks for {', '.join(lacking)}, which we do not read; merge it "
            "with PEFT (merge_and_unload) and start from that folder"
        )


def _scale(config, module):
    """Returns alpha / rank of one module, by the config's patterns."""

    def of(pattern, default):
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default

    alpha = of("alpha_pattern", config.get("lora_alpha", 8))
    rank = of("rank_pattern", config.get("r", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _finite(tensor):
    """Reads a tensor as f32, or raises a UserError if a value is not finite."""
    array = np.asarray(tensor.open()).astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(
            f"{tensor.path}: holds values that are not finite (NaN or infinity); a "
            "model cannot start from it"
        )
    return array


def _check_shape(tensor, name, shape):
    if tensor.shape != tuple(shape):
        raise UserError(
            f"{tensor.path}: {ROOT}{name} has shape {list(tensor.shape)}; on its base "
            f"it must be {list(shape)}"
        )


def _fill_pair(arrays, layout, shapes, stored, names, scale):
    """Writes A and B of one module of theirs into our stacked arrays."""
    sides = _sides(layout, shapes)
    for name in names:
        if name not in stored:
            raise UserError(f"{stored[names[0]].path}: holds {names[0]} but no {name}")
    a, b = (_finite(stored[name]) for name in names)
    rank = a.shape[0]
    expected = ((rank, sides.size[0]), (sides.size[1], rank))
    for name, shape in zip(names, expected, strict=True):
        _check_shape(stored[name], name, shape)
    arrays[0][layout.index][..., :rank] = a.T.reshape(*sides.read, rank)
    scaled = scale * b[sides.region].T
    arrays[1][layout.index][:rank] = scaled.reshape(rank, *sides.written)


def _tied(folder, stored, family, config):
    """Returns names that repeat a tied embedding; refuses one that differs from it."""
    embed = family.top["embed"][0]
    if not config.tied or not {embed, "lm_head.weight"} & stored.keys():
        return set()
    if "lm_head.weight" in stored and embed in stored:
        if np.array_equal(stored[embed].open(), stored["lm_head.weight"].open()):
            return {"lm_head.weight"}
    elif embed in stored and "score.weight" in stored:
        return set()
    raise UserError(
        f"{folder / WEIGHTS}: trains {embed} and lm_head.weight apart, but its base "
        "has one table for both; merge it with PEFT and untie them"
    )


def _filled(part, value):
    if isinstance(part, lora.LoraPair):
        return lora.LoraPair(*(x.replace(v) for x, v in zip(part, value, strict=True)))
    return part.replace(value)


def load(folder: str | Path, mesh: Mesh, **how) -> Transformer | ScalarModel:
    """Reads an adapter merged into its base; arguments as of `huggingface.load`."""
    base = huggingface.load(base_of(folder), mesh, **how)
    rows = info(folder)["model"]["vocab_size"]
    if rows != getattr(base, "body", base).config.vocab_size:
        base = _resized(base, rows, mesh)
    return lora.merge(base, read(folder, base, mesh))
