"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors.

Their A is [R, in] and their B [out, R], named after the module they sit on; which
module that is, and how its axes go, `families.py` says. A module of theirs that is
several weights of ours (GPT-2's c_attn) becomes one adapter of so many times the rank,
its B zero where one part does not touch another.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from stagecraft import process, sharding, storage
from stagecraft.errors import UserError
from stagecraft.models import families, huggingface, lora, places, tensors
from stagecraft.models.transformer import ScalarModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BIAS = huggingface.BIAS  # of a scalar head: theirs has none
ROOT = "base_model.model."
# What a config of theirs may ask for that changes the numbers, and that we lack.
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
# Ways to begin that change the base's weights too.
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(folder):
    """Whether a folder is an adapter and no model by itself."""
    folder = Path(folder)
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


# Writing


def save(adapter, config, folder, mesh, *, base, overwrite=False, extra=None):
    """Writes an adapter as PEFT does, whole or not at all.

    Args:
        adapter: a `lora.Adapter`.
        config: the `ModelConfig` of the model it sits on.
        folder: where to.
        mesh: the mesh the adapter lies on.
        base: for base_model_name_or_path, what PEFT is to load it onto.
        overwrite: replace a folder that is there.
        extra: (folder) -> None, writes further files: the tokenizer's.

    Returns:
        the `families.Family` whose names it has.
    """
    folder = huggingface.free(folder, overwrite)
    family = families.matching(config)
    host = jax.tree.map(np.asarray, sharding.replicate(adapter, mesh)).parts
    bias = float(host.pop("bias")[...]) if "bias" in host else 0.0
    found, modules = {}, {}
    shapes = {name: _shape(part) for name, part in host.items()}
    for place in places.places(family, config, shapes):
        part = host[place.ours]
        if isinstance(part, lora.Low):
            modules.setdefault(place.key.removesuffix(".weight"), []).append(place)
        else:
            sizes = dict(zip(place.axes.ours, part.shape, strict=True))
            found[place.key] = part[...].reshape(place.axes.shape(sizes))
    for module, pieces in modules.items():
        a, b = _joined(pieces, host, shapes)
        found |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    embed = family.top["embed"][0]
    if config.tied and embed in found and "head" not in host:
        # PEFT trains a copy of one module and leaves the other: both are written.
        found["lm_head.weight"] = found[embed]
    told = _config(adapter.settings, family, modules, config)
    whole = {name.split(".")[-2] for name in found if "lora_" not in name}
    told |= {"modules_to_save": sorted(whole) or None}
    told |= {"task_type": "SEQ_CLS" if "head" in host else "CAUSAL_LM"}
    told |= {"base_model_name_or_path": str(base)} | ({BIAS: bias} if bias else {})
    with storage.new_folder(folder, replace=overwrite) as temporary:
        if process.is_first():
            shapes = {ROOT + name: array.shape for name, array in found.items()}
            tensors.write_file(
                temporary / WEIGHTS,
                shapes,
                lambda n: found[n.removeprefix(ROOT)],
                "F32",
            )
            text = json.dumps(told, indent=2, sort_keys=True) + "\n"
            (temporary / CONFIG).write_text(text, encoding="utf-8")
        if extra is not None:
            extra(temporary)
    return family


def _shape(part):
    """The shape of the parameter that a part of an adapter sits on, or is."""
    if isinstance(part, lora.Low):
        lead = part.a.ndim - len(part.a.get_metadata()["axes"])
        shape = (*part.a.shape[:-1], *part.b.shape[lead + 1 :])
    else:
        shape = part.shape
    return jax.ShapeDtypeStruct(shape, np.float32)


class _Sides(NamedTuple):
    """One of our weights as the two sides of a module of theirs.

    Attributes:
        size: (in, out) of the module.
        region: the slice of its out that is ours.
        read, written: the shapes of our dimensions on either side.
    """

    size: tuple
    region: slice
    read: tuple
    written: tuple


def _sides(place, shapes):
    own = "/".join(place.ours.split("/")[-2:])
    contracted = next(count for where, count in lora.TARGETS.values() if where == own)
    shape = shapes[place.ours].shape[len(place.index) :]
    sizes = place.axes.shape(dict(zip(place.axes.ours, shape, strict=True)))
    letters = [dimension[2] for dimension in place.axes.theirs]
    source = letters.index(place.axes.ours[:contracted])
    region = place.axes.region(sizes)[1 - source]
    size = (sizes[source], sizes[1 - source])
    return _Sides(size, region, shape[:contracted], shape[contracted:])


def _joined(pieces, host, shapes):
    """A [R, in] and B [out, R] of one module of theirs."""
    rank = host[pieces[0].ours].a.shape[-1]
    inside, out = _sides(pieces[0], shapes).size
    a = np.empty((len(pieces) * rank, inside), np.float32)
    b = np.zeros((out, len(pieces) * rank), np.float32)
    for number, place in enumerate(pieces):
        low, rows = host[place.ours], slice(number * rank, (number + 1) * rank)
        a[rows] = low.a[place.index].reshape(inside, rank).T
        b[_sides(place, shapes).region, rows] = low.b[place.index].reshape(rank, -1).T
    return a, b


def _config(settings, family, modules, config):
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
    """(module) -> the end of its name that no other module of a layer shares."""
    modules = {key.rpartition(".")[0] for key, _ in family.layer.values()}
    ends = [module.rpartition(".")[2] for module in modules]

    def short(module):
        parts = module.split(".")
        return ".".join(parts[-1:] if ends.count(parts[-1]) < 2 else parts[-2:])

    return short


# Reading


def base_of(folder):
    """The folder of the model that an adapter sits on."""
    folder = Path(folder)
    name = str(huggingface.read_json(folder, CONFIG).get("base_model_name_or_path"))
    for path in (Path(name), folder / name):
        if (path / "config.json").exists():
            return path
    raise UserError(
        f"{folder / CONFIG}: base_model_name_or_path={name!r}: no folder of a model is "
        "there; an adapter needs the model it was trained on: name its folder"
    )


def info(folder):
    """As `huggingface.info`, of the model that an adapter makes."""
    told = huggingface.info(base_of(folder))
    if huggingface.read_json(folder, CONFIG).get("task_type") == "SEQ_CLS":
        told["module"] = "scalar"
    return told


def digest(folder):
    """SHA-256 of an adapter's files and of the model it sits on."""
    hasher = hashlib.sha256(huggingface.digest(base_of(folder)).encode())
    for name in (CONFIG, WEIGHTS):
        hasher.update((Path(folder) / name).read_bytes())
    return hasher.hexdigest()


def read(folder, base, mesh):
    """The `lora.Adapter` of a PEFT folder, for the model it sits on.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        base: a `Transformer` or a `ScalarModel`.
        mesh: where to put it.

    Returns:
        an `Adapter` of scale 1: each module's own is in its B.
    """
    folder = Path(folder)
    config = huggingface.read_json(folder, CONFIG)
    _check(folder, config)
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder}: lacks {WEIGHTS}; pickles are not opened: save the adapter as "
            "safetensors"
        )
    found = tensors.read_header(folder / WEIGHTS)
    found = {name.removeprefix(ROOT): tensor for name, tensor in found.items()}
    body = getattr(base, "body", base)
    scalar = "score.weight" in found or isinstance(base, ScalarModel)
    family = families.matching(body.config)
    rank = max([x.shape[0] for n, x in found.items() if ".lora_A." in n], default=1)
    settings = lora.Settings(rank, float(rank), "all", 0.0, False, embeddings=True)
    blank = lora.abstract(settings, base, mesh, scalar=scalar).parts
    shapes = {n: _shape(part) for n, part in blank.items() if n != "bias"}
    arrays, used = {}, set()
    for place in places.places(family, body.config, shapes):
        module = place.key.removesuffix(".weight")
        names = [f"{module}.lora_{side}.weight" for side in "AB"]
        part = blank[place.ours]
        if not isinstance(part, lora.Low) and place.key in found:
            arrays[place.ours] = _numbers(found[place.key]).reshape(part.shape)
            used.add(place.key)
        elif isinstance(part, lora.Low) and names[0] in found:
            if place.ours not in arrays:
                arrays[place.ours] = [np.zeros(x.shape, np.float32) for x in part]
            scale = _scale(config, module)
            _place(arrays[place.ours], place, shapes, found, names, scale)
            used.update(names)
    used |= _tied(folder, found, family, body.config)
    for name in found:
        if name not in used:
            raise UserError(
                f"{folder / WEIGHTS}: holds {ROOT}{name}, which sits on nothing that "
                f"takes an adapter in a {family.name} of its base's config.json"
            )
    if "head" in arrays:
        own = float(base.bias[...]) if isinstance(base, ScalarModel) else 0.0
        arrays["bias"] = np.float32(config.get(BIAS, own))
    parts = {name: _filled(blank[name], value) for name, value in arrays.items()}
    adapter = lora.Adapter(parts, settings)
    return jax.device_put(adapter, sharding.shardings(adapter, mesh))


def _check(folder, config):
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type={config.get('peft_type')!r}: expected 'LORA'"
        )
    lacking = [text for key, text in LACKING.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        lacking.append("trained biases")
    begun = str(config.get("init_lora_weights"))
    if begun.startswith(REBASED):
        lacking.append(f"a base changed by init_lora_weights={begun!r}")
    if lacking:
        raise UserError(
            f"{where}: asks for {', '.join(lacking)}, which we do not read; merge it "
            "with PEFT (merge_and_unload) and start from that folder"
        )


def _scale(config, module):
    """alpha / rank of one module, by the config's patterns."""

    def of(pattern, default):
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default

    alpha = of("alpha_pattern", config.get("lora_alpha", 8))
    rank = of("rank_pattern", config.get("r", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _numbers(tensor):
    found = np.asarray(tensor.open()).astype(np.float32)
    if not np.isfinite(found).all():
        raise UserError(
            f"{tensor.path}: holds values that are not finite (NaN or infinity); a "
            "model cannot start from it"
        )
    return found


def _place(arrays, place, shapes, found, names, scale):
    """Puts A and B of one module of theirs into our stacked arrays."""
    sides = _sides(place, shapes)
    for name in names:
        if name not in found:
            raise UserError(f"{found[names[0]].path}: holds {names[0]} but no {name}")
    a, b = (_numbers(found[name]) for name in names)
    rank = a.shape[0]
    expected = ((rank, sides.size[0]), (sides.size[1], rank))
    for name, array, shape in zip(names, (a, b), expected, strict=True):
        if array.shape != shape:
            raise UserError(
                f"{found[name].path}: {ROOT}{name} has shape {list(array.shape)}; on "
                f"its base it must be {list(shape)}"
            )
    arrays[0][place.index][..., :rank] = a.T.reshape(*sides.read, rank)
    own = scale * b[sides.region].T
    arrays[1][place.index][:rank] = own.reshape(rank, *sides.written)


def _tied(folder, found, family, config):
    """Their output embedding, where one table is both: it must be the same."""
    embed = family.top["embed"][0]
    if not config.tied or not {embed, "lm_head.weight"} & found.keys():
        return set()
    if "lm_head.weight" in found and embed in found:
        if np.array_equal(*(found[n].open() for n in (embed, "lm_head.weight"))):
            return {"lm_head.weight"}
    elif embed in found and "score.weight" in found:
        return set()
    raise UserError(
        f"{folder / WEIGHTS}: trains {embed} and lm_head.weight apart, but its base "
        "has one table for both; merge it with PEFT and untie them"
    )


def _filled(part, value):
    if isinstance(part, lora.Low):
        return lora.Low(*(x.replace(v) for x, v in zip(part, value, strict=True)))
    return part.replace(value)


def load(folder, mesh, **how):
    """The model that an adapter makes of its base, merged; see `huggingface.load`."""
    base = huggingface.load(base_of(folder), mesh, **how)
    return lora.merge(base, read(folder, base, mesh))
