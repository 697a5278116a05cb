"""Rotary positions in config.json, and the scaling of their wavelengths."""

import math

from stagecraft.errors import UserError
from stagecraft.models.config import ROPE_SCALING
from stagecraft.models.translation import FULL, SLIDING, Pair, agreed

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
        given, older = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
        nested = [key for key, value in given.items() if isinstance(value, dict)]
        if nested:
            raise UserError(
                f"config.json: rope_parameters.{nested[0]}: this family has one set of "
                "wavelengths for all layers; expected rope_parameters.rope_theta"
            )
        places = {"": hf, "rope_parameters.": given, "rope_scaling.": older}
        out = _read_both(hf, older, given, SHARE if share else None)
        if share:
            out["rope_share"] = float(_once(SHARE, places) or share)
        return out | {"rope_theta": float(_once("rope_theta", places) or theta)}

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
        flat = {k: v for k, v in given.items() if k not in (FULL, SLIDING)}
        if flat.get("rope_theta") or flat.get("rope_type", "default") != "default":
            raise UserError(
                f"config.json: rope_parameters={flat!r}: this family has two sets of "
                f"wavelengths; expected rope_parameters.{FULL} and .{SLIDING}"
            )
        older = hf.get("rope_scaling") or {}
        places = {"": hf, f"rope_parameters.{FULL}.": full, "rope_scaling.": older}
        near = agreed(
            {
                "rope_local_base_freq": hf.get("rope_local_base_freq"),
                f"rope_parameters.{SLIDING}.rope_theta": slides.get("rope_theta"),
            }
        )
        return _read_both(hf, older, full) | {
            "rope_theta": float(_once("rope_theta", places) or theta),
            "rope_theta_sliding": float(near or local),
        }

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


def _once(key, places):
    """Returns the value of a key that may stand in several places, None for none."""
    return agreed({place + key: keys.get(key) for place, keys in places.items()})


def _read_both(hf, older, newer, share_key=None):
    """Reads the scaling in rope_scaling, the older key, or in rope_parameters."""
    if not older:
        return _read_scaling(hf, newer, share_key)
    out = _read_scaling(hf, older, share_key)
    if newer.get("rope_type") and _read_scaling(hf, newer, share_key) != out:
        raise UserError(
            f"config.json: rope_scaling={older!r}, but rope_parameters={newer!r}; only "
            "one can be meant: take the other out"
        )
    return out


def _read_scaling(hf, given, share_key=None):
    """Reads our rope_scaling and rope_arguments.

    Args:
        hf: config.json.
        given: its keys about scaling.
        share_key: the key for the share of rotating channels, where the family has one.
    """
    names = {"su": "longrope"}
    types = {key: given.get(key) or "" for key in ("rope_type", "type")}
    scaling = agreed({key: names.get(name, name) for key, name in types.items()})
    scaling = "none" if scaling in (None, "default") else scaling
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
        places = {"": hf, "rope_parameters.": given}
        original = _once("original_max_position_embeddings", places) or longest
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
