"""Keys of a Hugging Face config.json, to fields of `ModelConfig` and back.

Each `Pair` translates a few keys in both directions; a family's table lists the pairs
it needs. Both spellings of a key are read where transformers 5 renamed it, and both are
written, for older readers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from stagecraft.errors import UserError
from stagecraft.models.config import ModelConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
# Fields that say how to compute or to train, and not what.
THE_RUNS = (
    *("dtype", "remat", "attention", "strict_kernels"),
    *("balance_coef", "init_std", "family"),
)
SLIDING, FULL = "sliding_attention", "full_attention"


class Keys(dict):
    """A config.json whose missing keys are named."""

    def __missing__(self, key):
        raise UserError(f"config.json: has no {key!r}")


class Pair(NamedTuple):
    """One translation.

    Attributes:
        read: (Keys, fields so far) -> more fields of `ModelConfig`.
        write: (ModelConfig) -> keys of config.json.
    """

    read: Callable
    write: Callable


def renamed(**names):
    """Values that only change their name: width="hidden_size"."""
    return Pair(
        lambda hf, c: {ours: hf[theirs] for ours, theirs in names.items()},
        lambda c: {theirs: getattr(c, ours) for ours, theirs in names.items()},
    )


def optional(**names):
    """Numbers whose absence they write as null and we as 0."""
    return Pair(
        lambda hf, c: {o: float(hf.get(t) or 0.0) for o, t in names.items()},
        lambda c: {t: getattr(c, o) or None for o, t in names.items()},
    )


def either(ours, *names):
    """A value that went by several names: the first there is, and all are written."""

    def read(hf, c):
        found = next((name for name in names if name in hf), names[0])
        return {ours: hf[found]}

    return Pair(read, lambda c: dict.fromkeys(names, getattr(c, ours)))


def implied(**values):
    """Fields that a family has without saying so; a value may be made from others."""

    def read(hf, c):
        return {k: v(c) if callable(v) else v for k, v in values.items()}

    return Pair(read, lambda c: {})


def flag(theirs, *ours):
    """One key of theirs that is several fields of ours."""
    return Pair(
        lambda hf, c: dict.fromkeys(ours, bool(hf[theirs])),
        lambda c: {theirs: getattr(c, ours[0])},
    )


def refused(key, feature, allowed=(None, False)):
    """A key that must not be set: we have nothing that does what it asks for."""

    def read(hf, c):
        if hf.get(key) not in allowed:
            raise UserError(
                f"config.json: {key}={hf[key]!r} asks for {feature}, which is not "
                f"implemented; expected {' or '.join(map(repr, allowed))}"
            )
        return {}

    return Pair(read, lambda c: {})


def heads(*, whole=False):
    """Head counts and sizes, which may be left out.

    Args:
        whole: heads fill the width, and their size has no key.
    """

    def read(hf, c):
        count = hf["num_attention_heads"]
        named = None if whole else hf.get("head_dim")
        return {
            "heads": count,
            "kv_heads": hf.get("num_key_value_heads") or count,
            "head_dim": named or hf["hidden_size"] // count,
        }

    def write(c):
        out = {"num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads}
        return out if whole else out | {"head_dim": c.head_dim}

    return Pair(read, write)


def activation(key="hidden_act", *, tanh="gelu_pytorch_tanh"):
    """The feed-forward's nonlinearity.

    Args:
        key: their name of it.
        tanh: what they call GELU's approximation by tanh.
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


def query_scale():
    """Gemma's attention scale, written as the number whose root divides the scores."""

    def read(hf, c):
        scale = float(hf["query_pre_attn_scalar"]) ** -0.5
        return {"attention_scale": 0.0 if scale == c["head_dim"] ** -0.5 else scale}

    def write(c):
        found = c.attention_scale**-2 if c.attention_scale else c.head_dim
        whole = math.isclose(found, round(found), rel_tol=1e-6)
        return {"query_pre_attn_scalar": round(found) if whole else found}

    return Pair(read, write)


# Which layers do what


def per_layer(pattern, layers):
    """A pattern repeated to one value a layer.

    >>> per_layer((True, False), 3)
    (True, False, True)
    """
    return tuple(bool(pattern[i % len(pattern)]) for i in range(layers))


def shortest(values):
    """The shortest pattern that repeats to these values; () where all are true.

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


def window(slides=None, *, switch=False, types=True, idle=None):
    """Sliding windows.

    Args:
        slides: (hf, layer) -> whether it slides, where `layer_types` does not say; None
            for all.
        switch: nothing slides unless `use_sliding_window` is set.
        types: whether `layer_types` is heeded, and written.
        idle: the size to write where no layer slides, if there must be one.
    """

    def read(hf, c):
        size = hf.get("sliding_window") or 0
        if not size or (switch and not hf.get("use_sliding_window")):
            return {"window": 0, "sliding": ()}
        named = hf.get("layer_types") if types else None
        if named:
            known = {SLIDING: True, FULL: False}
            for name in named:
                if name not in known:
                    raise UserError(
                        f"config.json: layer_types names {name!r}, which is not "
                        f"implemented; known: {', '.join(known)}"
                    )
            found = [known[name] for name in named]
        else:
            found = [slides is None or slides(hf, i) for i in range(c["layers"])]
        if not any(found):
            return {"window": 0, "sliding": ()}
        return {"window": size, "sliding": shortest(found)}

    def write(c):
        found = per_layer(c.sliding or (True,), c.layers)
        if not c.window:
            found = (False,) * c.layers
        out = {"sliding_window": c.window or idle}
        if switch:
            out["use_sliding_window"] = bool(c.window)
            # Older readers: the first so many do not slide, all others do.
            out["max_window_layers"] = found.index(True) if any(found) else c.layers
        if types:
            out["layer_types"] = [SLIDING if slides else FULL for slides in found]
        return out

    return Pair(read, write)


def rotating():
    """SmolLM3's layers without rotation: 1 rotates, 0 does not."""

    def read(hf, c):
        found = hf.get("no_rope_layers")
        if found is None:
            every = hf.get("no_rope_layer_interval", 4)
            found = [(i + 1) % every != 0 for i in range(c["layers"])]
        return {"rotates": shortest(found)}

    def write(c):
        found = per_layer(c.rotates or (True,), c.layers)
        return {"no_rope_layers": [int(x) for x in found]}

    return Pair(read, write)


def sparse():
    """Qwen3-MoE's layers with experts among dense ones."""

    def read(hf, c):
        every, dense = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers")
        found = [
            (i + 1) % every == 0 and i not in (dense or ()) for i in range(c["layers"])
        ]
        return {"sparse": shortest(found)}

    def write(c):
        found = per_layer(c.sparse or (True,), c.layers)
        dense = [i for i, is_sparse in enumerate(found) if not is_sparse]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    return Pair(read, write)


# Whole configs


def read(pairs, hf):
    """Fields of `ModelConfig` from config.json."""
    hf, fields = Keys(hf), {}
    try:
        for pair in pairs:
            fields |= pair.read(hf, fields)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"config.json: a value is not of the kind its key takes ({error})"
        ) from error
    return ModelConfig(**fields)


def write(pairs, config):
    """Keys of config.json from a `ModelConfig`."""
    out = {}
    for pair in pairs:
        out |= pair.write(config)
    return out


def meaning(config):
    """A config's fields as far as they bear on what the model computes.

    Patterns are spelled out by layer, and what is off has no settings: two configs with
    one meaning are one model.
    """
    c = config
    out = {name: getattr(c, name) for name in c.__dataclass_fields__}
    for name in THE_RUNS:
        out.pop(name, None)
    slides = c.window > 0
    out["sliding"] = per_layer(c.sliding or (True,), c.layers) if slides else ()
    rotary = c.positions == "rope"
    out["rotates"] = per_layer(c.rotates or (True,), c.layers) if rotary else ()
    out["sparse"] = per_layer(c.sparse or (True,), c.layers) if c.experts else ()
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


def differences(one, other):
    """Names of the fields in which two meanings differ, floats up to rounding."""

    def same(a, b):
        if isinstance(a, float) and isinstance(b, (int, float)):
            return math.isclose(a, b, rel_tol=1e-9)
        return a == b

    names = sorted(one.keys() | other.keys())
    return [n for n in names if not same(one.get(n), other.get(n))]
