"""How config.json spells rotary positions, and what scales their wavelengths."""

import math

from stagecraft.errors import UserError
from stagecraft.models.translation import FULL, SLIDING, Pair

# Of the channels, those that rotate.
SHARE = "partial_rotary_factor"
# Their names of the numbers that stretch rotary wavelengths, in `ROPE_SCALING`'s order.
ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "truncate"),
    ),
    "longrope": (
        *("short_factor", "long_factor", "original_max_position_embeddings"),
        "attention_factor",
    ),
}


def rope(theta=1e4, *, share=None):
    """One set of wavelengths for all layers.

    Args:
        theta: their base where none is named.
        share: of the channels that rotate, where none is named; None for a family that
            rotates all of them and heeds no such key.
    """

    def read(hf, c):
        given = hf.get("rope_parameters") or {}
        found = hf.get("rope_scaling") or given
        base = given.get("rope_theta") or hf.get("rope_theta") or theta
        out = _read_scaling(hf, found, SHARE if share else None)
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


def rope_by_type(theta=1e6, local=1e4):
    """Gemma 3's two sets: one for full layers, one unscaled for sliding layers."""

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
        found = _read_scaling(hf, full | (hf.get("rope_scaling") or {}))
        return found | {"rope_theta": float(base), "rope_theta_sliding": float(near)}

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


def _read_scaling(hf, found, heeded=None):
    kind = found.get("rope_type") or found.get("type") or "default"
    kind = {"default": "none", "su": "longrope"}.get(kind, kind)
    if kind != "none" and kind not in ROPE_KEYS:
        raise UserError(
            f"config.json: rope_type={kind!r} is not implemented; known: default, "
            f"{', '.join(ROPE_KEYS)}"
        )
    for key in (SHARE, "mrope_section"):
        value = found.get(key) or hf.get(key) or 1.0
        if key != heeded and value != 1.0:
            raise UserError(
                f"config.json: {key}={value!r}: this family rotates all channels, "
                "transformers does not heed it either; expected 1.0"
            )
    if kind == "none":
        return {"rope_scaling": "none", "rope_arguments": ()}
    longest = hf["max_position_embeddings"]
    original = longest
    if kind != "dynamic":
        original = hf.get("original_max_position_embeddings") or found.get(
            "original_max_position_embeddings", longest
        )
    known = {k: v for k, v in found.items() if v is not None}
    known |= {"original_max_position_embeddings": original}
    known.setdefault("factor", longest / original)
    known.setdefault("attention_factor", _attention_factor(kind, known))
    known = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | known
    return {
        "rope_scaling": kind,
        "rope_arguments": tuple(_argument(kind, k, known) for k in ROPE_KEYS[kind]),
    }


def _argument(kind, key, known):
    if key not in known:
        raise UserError(f"config.json: rope_type={kind!r} needs {key}, which is absent")
    value = known[key]
    if isinstance(value, bool):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(float, value))
    return int(value) if key.startswith("original") else float(value)


def _attention_factor(kind, known):
    """What multiplies cosines and sines where the folder does not say.

    YaRN (Peng et al. 2023, section 3.4; the two mscale of DeepSeek), LongRoPE (Ding et
    al. 2024, section 3.3).
    """
    factor = known["factor"]
    if kind == "longrope" and factor > 1:
        return math.sqrt(
            1 + math.log(factor) / math.log(known["original_max_position_embeddings"])
        )
    if kind == "yarn" and factor > 1:
        top, bottom = known.get("mscale"), known.get("mscale_all_dim")
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
