"""Keys of a Hugging Face config.json, to fields of `ModelConfig` and back.

Each `Pair` translates a few keys in both directions; a family's table lists the pairs
it needs. Both spellings of a key are read where transformers 5 renamed it, and both are
written, for older readers.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from stagecraft.errors import UserError
from stagecraft.models.config import ModelConfig, per_layer

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
# Fields that say how to compute, which are the run's and not the folder's; and all that
# do not say what to compute.
HOW = ("dtype", "remat", "attention", "strict_kernels", "balance_coef")
THE_RUNS = (*HOW, "init_std", "family")
SLIDING, FULL = "sliding_attention", "full_attention"


class Keys(dict):
    """A config.json that names a missing key in a UserError."""

    def __missing__(self, key):
        raise UserError(f"config.json: has no {key!r}")


class Pair(NamedTuple):
    """A translation of a few keys.

    Attributes:
        read: (Keys, fields so far) -> more fields of `ModelConfig`.
        write: (ModelConfig) -> keys of config.json.
    """

    read: Callable[[Keys, dict], dict]
    write: Callable[[ModelConfig], dict]


def renamed(**names: str) -> Pair:
    """Renames keys: width="hidden_size"."""
    return Pair(
        lambda hf, c: {ours: hf[theirs] for ours, theirs in names.items()},
        lambda c: {theirs: getattr(c, ours) for ours, theirs in names.items()},
    )


def optional(**names: str) -> Pair:
    """Renames numbers that are null where they are off, and 0 in our config."""
    return Pair(
        lambda hf, c: {o: float(hf.get(t) or 0.0) for o, t in names.items()},
        lambda c: {t: getattr(c, o) or None for o, t in names.items()},
    )


def agreed(values: dict[str, Any]) -> Any:
    """Returns the one value that several keys of config.json give; None for none.

    Readers, and versions of one reader, differ in which key they take, so that keys
    that say different things are refused.

    Args:
        values: {key, as a message names it: value}; empty values say nothing.
    """
    given = {key: value for key, value in values.items() if value}
    first = next(iter(given), None)
    for key, value in given.items():
        if value != given[first]:
            raise UserError(
                f"config.json: {first}={given[first]!r}, but {key}={value!r}; only one "
                "can be meant: take the other out"
            )
    return given.get(first)


def either(ours: str, *names: str) -> Pair:
    """Translates a key with several names: reads those present, writes all."""

    def read(hf, c):
        value = agreed({name: hf[name] for name in names if name in hf})
        return {ours: hf[names[0]] if value is None else value}

    return Pair(read, lambda c: dict.fromkeys(names, getattr(c, ours)))


def same(**names: str) -> Pair:
    """Refuses a second name of a key that says something else than the first."""

    def read(hf, c):
        for name, other in names.items():
            agreed({key: hf[key] for key in (name, other) if key in hf})
        return {}

    return Pair(read, lambda c: {})


def implied(**values) -> Pair:
    """Sets fields that no key spells; a value may be a function of earlier fields."""

    def read(hf, c):
        return {k: v(c) if callable(v) else v for k, v in values.items()}

    return Pair(read, lambda c: {})


def flag(theirs: str, *ours: str) -> Pair:
    """Translates one key of theirs to several fields of ours."""
    return Pair(
        lambda hf, c: dict.fromkeys(ours, bool(hf[theirs])),
        lambda c: {theirs: getattr(c, ours[0])},
    )


def refused(key: str, feature: str, allowed: tuple = (None, False)) -> Pair:
    """Refuses a key whose feature our decoder lacks."""

    def read(hf, c):
        if hf.get(key) not in allowed:
            raise UserError(
                f"config.json: {key}={hf[key]!r} asks for {feature}, which is not "
                f"implemented; expected {' or '.join(map(repr, allowed))}"
            )
        return {}

    return Pair(read, lambda c: {})


def heads(*, fill_width: bool = False) -> Pair:
    """Translates head counts and sizes, which may be left out.

    Args:
        fill_width: heads fill the width, and their size has no key.
    """

    def read(hf, c):
        count = hf["num_attention_heads"]
        named = None if fill_width else hf.get("head_dim")
        return {
            "heads": count,
            "kv_heads": hf.get("num_key_value_heads") or count,
            "head_dim": named or hf["hidden_size"] // count,
        }

    def write(c):
        out = {"num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads}
        return out if fill_width else out | {"head_dim": c.head_dim}

    return Pair(read, write)


def activation(key: str = "hidden_act", *, tanh: str = "gelu_pytorch_tanh") -> Pair:
    """Translates the feed-forward's nonlinearity.

    Args:
        key: its key in config.json.
        tanh: their name of GELU's approximation by tanh.
    """

    def read(hf, c):
        name = hf.get(key) or hf["hidden_act"]
        if name not in ACTIVATIONS:
            raise UserError(
                f"config.json: {key}={name!r} is an activation that is not "
                f"implemented; known: {', '.join(ACTIVATIONS)}"
            )
        return {"activation": ACTIVATIONS[name]}

    def write(c):
        return {key: tanh if c.activation == "gelu_tanh" else c.activation}

    return Pair(read, write)


def query_scale() -> Pair:
    """Translates Gemma's attention scale: the number whose root divides the scores."""

    def read(hf, c):
        scale = float(hf["query_pre_attn_scalar"]) ** -0.5
        return {"attention_scale": 0.0 if scale == c["head_dim"] ** -0.5 else scale}

    def write(c):
        scalar = c.attention_scale**-2 if c.attention_scale else c.head_dim
        is_integer = math.isclose(scalar, round(scalar), rel_tol=1e-6)
        return {"query_pre_attn_scalar": round(scalar) if is_integer else scalar}

    return Pair(read, write)


# Which layers do what


def shortest(values: Iterable[bool]) -> tuple[bool, ...]:
    """Returns the shortest pattern that repeats to these values; () if all are true.

    >>> shortest([True, False, True, False, True])
    (True, False)
    """
    values = tuple(map(bool, values))
    if all(values):
        return ()
    sizes = range(1, len(values) + 1)
    return next(
        values[:n] for n in sizes if per_layer(values[:n], len(values)) == values
    )


def window(
    slides: Callable[[Keys, int], bool] | None = None,
    *,
    switch: bool = False,
    types: bool = True,
    idle: int | None = None,
) -> Pair:
    """Translates sliding windows.

    Args:
        slides: (hf, layer) -> whether it slides, where `layer_types` is absent; None
            for all.
        switch: nothing slides unless `use_sliding_window` is set.
        types: whether `layer_types` is read and written.
        idle: the size to write where no layer slides, if the family needs one.
    """

    def read(hf, c):
        size = hf.get("sliding_window") or 0
        if not size or (switch and not hf.get("use_sliding_window")):
            return {"window": 0, "sliding": ()}
        named = hf.get("layer_types") if types else None
        if named:
            meanings = {SLIDING: True, FULL: False}
            for name in named:
                if name not in meanings:
                    raise UserError(
                        f"config.json: layer_types names {name!r}, which is not "
                        f"implemented; known: {', '.join(meanings)}"
                    )
            if len(named) != c["layers"]:
                raise UserError(
                    f"config.json: layer_types names {len(named)} layers, but "
                    f"num_hidden_layers={c['layers']}; only one can be meant"
                )
            sliding = [meanings[name] for name in named]
        else:
            sliding = [slides is None or slides(hf, i) for i in range(c["layers"])]
        if not any(sliding):
            return {"window": 0, "sliding": ()}
        return {"window": size, "sliding": shortest(sliding)}

    def write(c):
        sliding = per_layer(c.sliding, c.layers)
        if not c.window:
            sliding = (False,) * c.layers
        out = {"sliding_window": c.window or idle}
        if switch:
            out["use_sliding_window"] = bool(c.window)
            # Older readers: layers from this one on slide.
            first = sliding.index(True) if any(sliding) else c.layers
            out["max_window_layers"] = first
        if types:
            out["layer_types"] = [SLIDING if slides else FULL for slides in sliding]
        return out

    return Pair(read, write)


def rotating() -> Pair:
    """Translates SmolLM3's layers without rotation: 1 rotates, 0 does not."""

    def read(hf, c):
        rotates = hf.get("no_rope_layers")
        if rotates is None:
            every = hf.get("no_rope_layer_interval", 4)
            rotates = [(i + 1) % every != 0 for i in range(c["layers"])]
        return {"rotates": shortest(rotates)}

    def write(c):
        return {"no_rope_layers": [int(x) for x in per_layer(c.rotates, c.layers)]}

    return Pair(read, write)


def sparse() -> Pair:
    """Translates Qwen3-MoE's layers with experts among dense ones."""

    def read(hf, c):
        every, dense = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers")
        values = [
            (i + 1) % every == 0 and i not in (dense or ()) for i in range(c["layers"])
        ]
        return {"sparse": shortest(values)}

    def write(c):
        values = per_layer(c.sparse, c.layers)
        dense = [i for i, is_sparse in enumerate(values) if not is_sparse]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    return Pair(read, write)


# Whole configs


def read(pairs: Iterable[Pair], hf: dict) -> ModelConfig:
    """Reads a `ModelConfig` from the keys of config.json."""
    hf, fields = Keys(hf), {}
    try:
        for pair in pairs:
            fields |= pair.read(hf, fields)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"config.json: a value is not of the type its key takes ({error})"
        ) from error
    return ModelConfig(**fields)


def write(pairs: Iterable[Pair], config: ModelConfig) -> dict:
    """Returns the keys of config.json for a `ModelConfig`."""
    out = {}
    for pair in pairs:
        out |= pair.write(config)
    return out


def check_parts(pairs: Iterable[Pair], outer: dict, inner: dict) -> None:
    """Refuses a config.json whose part about text contradicts the rest of it.

    Args:
        pairs: of the family.
        outer, inner: the keys outside and inside of that part.
    """
    for key in inner.keys() & outer.keys():
        if inner[key] == outer[key]:
            continue
        with_outer = outer | inner | {key: outer[key]}
        configs = (read(pairs, hf) for hf in (with_outer, outer | inner))
        if differences(*map(meaning, configs)):
            raise UserError(
                f"config.json: {key}={outer[key]!r}, but text_config.{key}="
                f"{inner[key]!r}; only one can be meant: take the other out"
            )


def meaning(config: ModelConfig) -> dict:
    """Returns the fields of a config that bear on what the model computes.

    Patterns are spelled out by layer, and what is off has no settings: two configs with
    one meaning are one model.
    """
    c = config
    out = {name: getattr(c, name) for name in c.__dataclass_fields__}
    for name in THE_RUNS:
        out.pop(name, None)
    slides = c.window > 0
    out["sliding"] = per_layer(c.sliding, c.layers) if slides else ()
    rotary = c.positions == "rope"
    out["rotates"] = per_layer(c.rotates, c.layers) if rotary else ()
    out["sparse"] = per_layer(c.sparse, c.layers) if c.experts else ()
    out["attention_scale"] = c.attention_scale or c.head_dim**-0.5
    if not slides:
        out["rope_theta_sliding"] = 0.0
    elif c.rope_scaling == "none":
        out["rope_theta_sliding"] = c.rope_theta_sliding or c.rope_theta
    if not rotary:
        for name in ("theta", "theta_sliding", "share", "scaling", "arguments"):
            del out[f"rope_{name}"]
    if not c.qk_norm:
        del out["qk_norm_over"]
    if not c.experts:
        for name in ("experts_per_token", "expert_width", "experts_renormalize"):
            del out[name]
    elif all(out["sparse"]):
        del out["ff_width"]
    return out


def differences(one: dict, other: dict) -> list[str]:
    """Returns the fields in which two meanings differ, floats up to rounding."""

    def same(a, b):
        if isinstance(a, float) and isinstance(b, (int, float)):
            return math.isclose(a, b, rel_tol=1e-9)
        return a == b

    names = sorted(one.keys() | other.keys())
    return [n for n in names if not same(one.get(n), other.get(n))]
