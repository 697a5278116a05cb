"""Rotary positions in config.json, and the scaling of their wavelengths."""

import math

from stagecraft.errors import UserError
from stagecraft.models.config import ROPE_SCALING
from stagecraft.models.translation import FULL, SLIDING, Pair

# The key for the share of channels that rotate.
SHARE = "partial_rotary_factor"
_THEIRS = {
    "original_length": "original_max_position_embeddings",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}
# Their names of the numbers that stretch rotary wavelengths, in `ROPE_SCALING`'s order.
ROPE_KEYS = {
    scaling: tuple(_THEIRS.get(name, name) for name in names)
    for scaling, names in ROPE_SCALING.items()
    if names
}


def rope(theta: float = 1e4, *, share: float | None = None) -> Pair:
    """Translates one set of wavelengths for all layers.

    Args:
        theta: default of their base.
        share: default of the share of channels that rotate; None for a family that
            rotates all of them and has no such key.
    """

    def read(hf, c):
        given = hf.get("rope_parameters") or {}
        scaling = hf.get("rope_scaling") or given
        base = given.get("rope_theta") or hf.get("rope_theta") or theta
        out = _read_scaling(hf, scaling, SHARE if share else None)
        if share:
            out["rope_share"] = float(given.get(SHARE) or hf.get(SHARE) or share)
        return out | {"rope_theta": float(base)}

    def write(c):
        scaling = _write_scaling(c) | ({SHARE: c.rope_share} if share else {})
        return {
            "rope_theta": c.rope_theta,
            "rope_scaling": scaling if c.rope_scaling != "none" else None,
            "rope_parameters": {"rope_theta": c.rope_theta} | scaling,
            **({SHARE: c.rope_share} if share else {}),
        }

    return Pair(read, write)


def rope_by_type(theta: float = 1e6, local: float = 1e4) -> Pair:
    """Translates Gemma 3's two sets: for full layers, and unscaled for sliding ones."""

    def read(hf, c):
        given = hf.get("rope_parameters") or {}
        full, slides = given.get(FULL) or {}, given.get(SLIDING) or {}
        if slides.get("rope_type", "default") != "default":
            raise UserError(
                f"config.json: rope_parameters.{SLIDING}.rope_type="
                f"{slides['rope_type']!r}: scaled wavelengths of sliding layers are "
                "not implemented; expected 'default'"
            )
        base = full.get("rope_theta") or hf.get("rope_theta") or theta
        near = slides.get("rope_theta") or hf.get("rope_local_base_freq") or local
        out = _read_scaling(hf, full | (hf.get("rope_scaling") or {}))
        return out | {"rope_theta": float(base), "rope_theta_sliding": float(near)}

    def write(c):
        scaling, near = _write_scaling(c), c.rope_theta_sliding or c.rope_theta
        return {
            "rope_theta": c.rope_theta,
            "rope_local_base_freq": near,
            "rope_scaling": scaling if c.rope_scaling != "none" else None,
            "rope_parameters": {
                FULL: {"rope_theta": c.rope_theta} | scaling,
                SLIDING: {"rope_theta": near, "rope_type": "default"},
            },
        }

    return Pair(read, write)


def _read_scaling(hf, given, share_key=None):
    """Reads our rope_scaling and rope_arguments.

    Args:
        hf: config.json.
        given: its keys about scaling.
        share_key: the key for the share of rotating channels, where the family has one.
    """
    scaling = given.get("rope_type") or given.get("type") or "default"
    scaling = {"default": "none", "su": "longrope"}.get(scaling, scaling)
    if scaling != "none" and scaling not in ROPE_KEYS:
        raise UserError(
            f"config.json: rope_type={scaling!r} is not implemented; known: default, "
            f"{', '.join(ROPE_KEYS)}"
        )
    for key in (SHARE, "mrope_section"):
        value = given.get(key) or hf.get(key) or 1.0
        if key != share_key and value != 1.0:
            raise UserError(
                f"config.json: {key}={value!r}: this family rotates all channels, and "
                "transformers ignores the key too; expected 1.0"
            )
    if scaling == "none":
        return {"rope_scaling": "none", "rope_arguments": ()}
    longest = hf["max_position_embeddings"]
    original = longest
    if scaling != "dynamic":
        original = hf.get("original_max_position_embeddings") or given.get(
            "original_max_position_embeddings", longest
        )
    values = {k: v for k, v in given.items() if v is not None}
    values |= {"original_max_position_embeddings": original}
    values.setdefault("factor", longest / original)
    values.setdefault("attention_factor", _attention_factor(scaling, values))
    values = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | values
    return {
        "rope_scaling": scaling,
        "rope_arguments": tuple(
            _argument(scaling, key, values) for key in ROPE_KEYS[scaling]
        ),
    }


def _argument(scaling, key, values):
    if key not in values:
        raise UserError(
            f"config.json: rope_type={scaling!r} needs {key}, which is absent"
        )
    value = values[key]
    if isinstance(value, bool):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(float, value))
    return int(value) if key.startswith("original") else float(value)


def _attention_factor(scaling, values):
    """Returns the default factor of cosines and sines.

    YaRN (Peng et al. 2023, section 3.4; the two mscale of DeepSeek), LongRoPE (Ding et
    al. 2024, section 3.3).
    """
    factor = values["factor"]
    if scaling == "longrope" and factor > 1:
        original = values["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if scaling == "yarn" and factor > 1:
        top, bottom = values.get("mscale"), values.get("mscale_all_dim")
        scales = (top, bottom) if top and bottom else (1.0, 0.0)
        top, bottom = (0.1 * scale * math.log(factor) + 1.0 for scale in scales)
        return top / bottom
    return 1.0


def _write_scaling(c):
    if c.rope_scaling == "none":
        return {"rope_type": "default"}
    out = {"rope_type": c.rope_scaling}
    for key, value in zip(ROPE_KEYS[c.rope_scaling], c.rope_arguments, strict=True):
        out[key] = list(value) if isinstance(value, tuple) else value
    if c.rope_scaling == "dynamic":  # theirs stretches beyond max_position_embeddings
        del out["original_max_position_embeddings"]
    if c.rope_scaling == "longrope":
        out["factor"] = c.max_length / out["original_max_position_embeddings"]
    return out
