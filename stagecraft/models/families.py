"""The model families: how a Hugging Face folder spells our decoder.

A family is a table of two parts, both read in both directions: pairs that translate
its config.json (`translation.py`), and for each parameter its key in the folder and how
its axes map (`layouts.py`). In `"(h c) d -> d h c"` theirs is a matrix whose rows are
heads times channels, and ours has three axes; letters mean nothing outside their line.
`"d (0/3 h c)"` is the first of three parts of one tensor. In keys `{l}` counts layers
and `{e}` experts, which are axes of ours.
"""

import dataclasses
from typing import Any, NamedTuple

from stagecraft import schema
from stagecraft.errors import UserError
from stagecraft.models import translation as t
from stagecraft.models.config import ModelConfig
from stagecraft.models.translation_rope import rope, rope_by_type


class Family(NamedTuple):
    """The spelling of one family.

    Attributes:
        name: `model_type` in its config.json.
        classes: what transformers calls its class before "ForCausalLM", and before
            "ForSequenceClassification".
        defaults: transformers' values of keys that config.json leaves out.
        config: translations of config.json.
        top: {our parameter: (their key, axes)} outside the layers.
        layer: the same within one layer, keys after `layers`.
        layers: what the keys of a layer begin with.
    """

    name: str
    classes: tuple[str, str]
    defaults: dict[str, Any]
    config: tuple[t.Pair, ...]
    top: dict[str, tuple[str, str]]
    layer: dict[str, tuple[str, str]]
    layers: str = "model.layers.{l}."


OUTER = dict(
    vocab_size="vocab_size",
    width="hidden_size",
    layers="num_hidden_layers",
    max_length="max_position_embeddings",
    tied="tie_word_embeddings",
    norm_eps="rms_norm_eps",
    init_std="initializer_range",
)
SIZES = t.renamed(**OUTER)
FF = t.renamed(ff_width="intermediate_size")
ROPE = rope()
BASE = (SIZES, t.heads())
DENSE = (*BASE, FF)
# transformers' own, where they are not the sizes of one particular model.
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 32768,
}
BIASES = t.flag("attention_bias", "qkv_bias", "out_bias")
PLAIN = t.implied(qk_norm=False)
QK_NORM = t.implied(qk_norm=True)

TOP = {
    "embed": ("model.embed_tokens.weight", "v d -> v d"),
    "norm/scale": ("model.norm.weight", "d -> d"),
    "unembed": ("lm_head.weight", "v d -> v d"),
    "head": ("score.weight", "1 d -> d"),
}
ATTENTION = {
    "attention/query": ("self_attn.q_proj.weight", "(h c) d -> d h c"),
    "attention/key": ("self_attn.k_proj.weight", "(k c) d -> d k c"),
    "attention/value": ("self_attn.v_proj.weight", "(k c) d -> d k c"),
    "attention/out": ("self_attn.o_proj.weight", "d (h c) -> h c d"),
    "attention/query_bias": ("self_attn.q_proj.bias", "(h c) -> h c"),
    "attention/key_bias": ("self_attn.k_proj.bias", "(k c) -> k c"),
    "attention/value_bias": ("self_attn.v_proj.bias", "(k c) -> k c"),
    "attention/out_bias": ("self_attn.o_proj.bias", "d -> d"),
    "attention/query_norm/scale": ("self_attn.q_norm.weight", "c -> c"),
    "attention/key_norm/scale": ("self_attn.k_norm.weight", "c -> c"),
}
MLP = {
    "ff/gate": ("mlp.gate_proj.weight", "f d -> d f"),
    "ff/up": ("mlp.up_proj.weight", "f d -> d f"),
    "ff/down": ("mlp.down_proj.weight", "d f -> f d"),
    "ff/gate_bias": ("mlp.gate_proj.bias", "f -> f"),
    "ff/up_bias": ("mlp.up_proj.bias", "f -> f"),
    "ff/down_bias": ("mlp.down_proj.bias", "d -> d"),
}
PRE_NORMS = {
    "attention_norm/scale": ("input_layernorm.weight", "d -> d"),
    "ff_norm/scale": ("post_attention_layernorm.weight", "d -> d"),
}
POST_NORMS = {
    "attention_post_norm/scale": ("post_attention_layernorm.weight", "d -> d"),
    "ff_post_norm/scale": ("post_feedforward_layernorm.weight", "d -> d"),
}
BOTH_NORMS = POST_NORMS | {
    "attention_norm/scale": ("input_layernorm.weight", "d -> d"),
    "ff_norm/scale": ("pre_feedforward_layernorm.weight", "d -> d"),
}


def experts(router, gate, up, down):
    """Returns the keys of a layer's experts, each with matrices of its own."""
    return {
        "experts/router": (router, "e d -> d e"),
        "experts/gate": (gate, "f d -> e d f"),
        "experts/up": (up, "f d -> e d f"),
        "experts/down": (down, "d f -> e f d"),
    }


LLAMA_LAYER = PRE_NORMS | ATTENTION | MLP
QWEN_WINDOW = t.window(lambda hf, i: i >= hf["max_window_layers"], switch=True)

LLAMA = Family(
    "llama",
    ("Llama", "Llama"),
    DEFAULTS | {"max_position_embeddings": 2048},
    (*DENSE, PLAIN, t.activation(), BIASES, t.flag("mlp_bias", "ff_bias"), ROPE),
    TOP,
    LLAMA_LAYER,
)
MISTRAL = Family(
    "mistral",
    ("Mistral", "Mistral"),
    DEFAULTS | {"sliding_window": 4096, "max_position_embeddings": 131072},
    (*DENSE, PLAIN, t.activation(), t.window(types=False), ROPE),
    TOP,
    LLAMA_LAYER,
)
QWEN2 = Family(
    "qwen2",
    ("Qwen2", "Qwen2"),
    DEFAULTS | {"sliding_window": 4096, "max_window_layers": 28},
    (*DENSE, PLAIN, t.implied(qkv_bias=True), t.activation(), QWEN_WINDOW, ROPE),
    TOP,
    LLAMA_LAYER,
)
QWEN3 = Family(
    "qwen3",
    ("Qwen3", "Qwen3"),
    DEFAULTS | {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    (*DENSE, QK_NORM, BIASES, t.activation(), QWEN_WINDOW, ROPE),
    TOP,
    LLAMA_LAYER,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    ("Qwen3Moe", "Qwen3Moe"),
    DEFAULTS
    | {"sliding_window": 4096, "num_experts_per_tok": 8, "norm_topk_prob": False},
    (
        *DENSE,
        QK_NORM,
        BIASES,
        t.activation(),
        ROPE,
        t.sparse(),
        t.window(switch=True, types=False),
        t.either("experts", "num_experts", "num_local_experts"),
        t.renamed(
            experts_per_token="num_experts_per_tok",
            expert_width="moe_intermediate_size",
            experts_renormalize="norm_topk_prob",
        ),
    ),
    TOP,
    LLAMA_LAYER
    | experts(
        "mlp.gate.weight",
        "mlp.experts.{e}.gate_proj.weight",
        "mlp.experts.{e}.up_proj.weight",
        "mlp.experts.{e}.down_proj.weight",
    ),
)
MIXTRAL = Family(
    "mixtral",
    ("Mixtral", "Mixtral"),
    DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    (
        *BASE,
        PLAIN,
        t.activation(),
        rope(theta=1e6),
        t.window(types=False),
        t.same(num_local_experts="num_experts"),
        t.renamed(
            experts="num_local_experts",
            experts_per_token="num_experts_per_tok",
            expert_width="intermediate_size",
        ),
        t.implied(ff_width=lambda c: c["expert_width"], experts_renormalize=True),
    ),
    TOP,
    PRE_NORMS
    | ATTENTION
    | experts(
        "block_sparse_moe.gate.weight",
        "block_sparse_moe.experts.{e}.w1.weight",
        "block_sparse_moe.experts.{e}.w3.weight",
        "block_sparse_moe.experts.{e}.w2.weight",
    ),
)
GEMMA = (
    *DENSE,
    BIASES,
    t.activation("hidden_activation"),
    t.query_scale(),
    t.implied(
        norm_place="both", norm_offset=1.0, embed_scale=lambda c: c["width"] ** 0.5
    ),
    t.optional(logit_softcap="final_logit_softcapping"),
    t.refused("use_bidirectional_attention", "attention to later tokens"),
)
GEMMA_DEFAULTS = DEFAULTS | {
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA2 = Family(
    "gemma2",
    ("Gemma2", "Gemma2"),
    GEMMA_DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    (
        *GEMMA,
        PLAIN,
        ROPE,
        t.optional(attention_softcap="attn_logit_softcapping"),
        t.window(lambda hf, i: i % 2 == 0, idle=4096),
    ),
    TOP,
    BOTH_NORMS | ATTENTION | MLP,
)
GEMMA3 = Family(
    "gemma3_text",
    ("Gemma3", "Gemma3Text"),
    GEMMA_DEFAULTS
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window_pattern": 6,
    },
    (
        *GEMMA,
        QK_NORM,
        rope_by_type(),
        # Its attn_logit_softcapping is a key that transformers reads and does not use.
        t.window(lambda hf, i: (i + 1) % hf["sliding_window_pattern"] != 0, idle=4096),
    ),
    TOP,
    BOTH_NORMS | ATTENTION | MLP,
)
OLMO2 = Family(
    "olmo2",
    ("Olmo2", "Olmo2"),
    DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    (
        *DENSE,
        BIASES,
        t.activation(),
        ROPE,
        t.implied(qk_norm=True, qk_norm_over="projection", norm_place="post"),
        t.refused("clip_qkv", "clipped queries, keys and values"),
    ),
    TOP,
    POST_NORMS | ATTENTION | MLP,
)
SMOLLM3 = Family(
    "smollm3",
    ("SmolLM3", "SmolLM3"),
    DEFAULTS | {"tie_word_embeddings": True},
    (
        *DENSE,
        PLAIN,
        t.activation(),
        BIASES,
        t.flag("mlp_bias", "ff_bias"),
        t.rotating(),
        rope(theta=2e6),
        t.window(
            lambda hf, i: (i + 1) % hf.get("no_rope_layer_interval", 4) == 0,
            switch=True,
        ),
    ),
    TOP,
    LLAMA_LAYER,
)
STABLELM = Family(
    "stablelm",
    ("StableLm", "StableLm"),
    DEFAULTS
    | {"layer_norm_eps": 1e-5, "use_qkv_bias": False, "max_position_embeddings": 4096},
    (
        t.renamed(**OUTER | dict(norm_eps="layer_norm_eps")),
        t.heads(fill_width=True),
        FF,
        PLAIN,
        t.implied(norm="layer"),
        t.activation(),
        t.flag("use_qkv_bias", "qkv_bias"),
        rope(share=0.25),
        t.refused("use_parallel_residual", "parallel attention and feed-forward"),
        t.refused("qk_layernorm", "LayerNorm on queries and keys"),
    ),
    TOP | {"norm/bias": ("model.norm.bias", "d -> d")},
    LLAMA_LAYER
    | {
        "attention_norm/bias": ("input_layernorm.bias", "d -> d"),
        "ff_norm/bias": ("post_attention_layernorm.bias", "d -> d"),
    },
)
GPT2 = Family(
    "gpt2",
    ("GPT2", "GPT2"),
    {
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "n_positions": 1024,
    },
    (
        t.renamed(
            vocab_size="vocab_size",
            width="n_embd",
            layers="n_layer",
            heads="n_head",
            kv_heads="n_head",
            max_length="n_positions",
            tied="tie_word_embeddings",
            norm_eps="layer_norm_epsilon",
            init_std="initializer_range",
        ),
        t.same(
            n_embd="hidden_size",
            n_layer="num_hidden_layers",
            n_head="num_attention_heads",
            n_positions="max_position_embeddings",
        ),
        t.Pair(
            lambda hf, c: {"ff_width": hf.get("n_inner") or 4 * c["width"]},
            lambda c: {"n_inner": c.ff_width},
        ),
        t.implied(
            norm="layer",
            positions="learned",
            gated=False,
            qk_norm=False,
            qkv_bias=True,
            out_bias=True,
            ff_bias=True,
            head_dim=lambda c: c["width"] // c["heads"],
        ),
        t.activation("activation_function", tanh="gelu_new"),
        t.refused("scale_attn_by_inverse_layer_idx", "scores scaled by layer"),
        t.refused("scale_attn_weights", "unscaled scores", (None, True)),
        t.refused("add_cross_attention", "cross-attention"),
    ),
    {
        "embed": ("transformer.wte.weight", "v d -> v d"),
        "positions": ("transformer.wpe.weight", "p d -> p d"),
        "norm/scale": ("transformer.ln_f.weight", "d -> d"),
        "norm/bias": ("transformer.ln_f.bias", "d -> d"),
        "unembed": ("lm_head.weight", "v d -> v d"),
        "head": ("score.weight", "1 d -> d"),
    },
    {
        "attention_norm/scale": ("ln_1.weight", "d -> d"),
        "attention_norm/bias": ("ln_1.bias", "d -> d"),
        "attention/query": ("attn.c_attn.weight", "d (0/3 h c) -> d h c"),
        "attention/key": ("attn.c_attn.weight", "d (1/3 h c) -> d h c"),
        "attention/value": ("attn.c_attn.weight", "d (2/3 h c) -> d h c"),
        "attention/query_bias": ("attn.c_attn.bias", "(0/3 h c) -> h c"),
        "attention/key_bias": ("attn.c_attn.bias", "(1/3 h c) -> h c"),
        "attention/value_bias": ("attn.c_attn.bias", "(2/3 h c) -> h c"),
        "attention/out": ("attn.c_proj.weight", "(h c) d -> h c d"),
        "attention/out_bias": ("attn.c_proj.bias", "d -> d"),
        "ff_norm/scale": ("ln_2.weight", "d -> d"),
        "ff_norm/bias": ("ln_2.bias", "d -> d"),
        "ff/up": ("mlp.c_fc.weight", "d f -> d f"),
        "ff/up_bias": ("mlp.c_fc.bias", "f -> f"),
        "ff/down": ("mlp.c_proj.weight", "f d -> f d"),
        "ff/down_bias": ("mlp.c_proj.bias", "d -> d"),
    },
    "transformer.h.{l}.",
)

# In the order that `matching` tries.
DENSE_FAMILIES = (LLAMA, QWEN3, QWEN2, MISTRAL, OLMO2, SMOLLM3, GEMMA2, GEMMA3)
OTHERS = (MIXTRAL, QWEN3_MOE, STABLELM, GPT2)
FAMILIES = {family.name: family for family in DENSE_FAMILIES + OTHERS}
# Of images and text, only its text decoder is read.
TEXT_OF_GEMMA3 = {"model_type": "gemma3_text"}
# Features of well-known architectures that our decoder lacks, by a key that shows them.
FEATURES = {
    "kv_lora_rank": "multi-head latent attention",
    "swiglu_limit": "attention sinks and clipped experts",
    "n_shared_experts": "shared experts",
    "state_size": "state-space layers",
    "vision_config": "an image encoder",
    "is_encoder_decoder": "an encoder",
}


def of(hf: dict) -> Family:
    """Returns the family of a config.json, by its `model_type`.

    Raises:
        UserError: there is none of that name, or its weights are quantised.
    """
    name = text_part(hf).get("model_type")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"config.json: quantization_config: quantised weights ({method}) are not "
            "read; take the model's unquantised folder"
        )
    if name in FAMILIES:
        return FAMILIES[name]
    has = [text for key, text in FEATURES.items() if hf.get(key)]
    features = f" (it has {', '.join(has)})" if has else ""
    raise UserError(
        f"config.json: model_type={name!r} is not implemented{features}; "
        f"{schema.hint(name, FAMILIES)}known: {', '.join(FAMILIES)}"
    )


def text_part(hf: dict) -> dict:
    """Returns the part of a config.json about text: all of it, except in Gemma 3."""
    if hf.get("model_type") != "gemma3" or "text_config" not in hf:
        return hf
    return _outer(hf) | hf["text_config"] | TEXT_OF_GEMMA3


def _outer(hf):
    """Returns the keys outside of the parts; Gemma 3 ties by the key that is here."""
    tied = {"tie_word_embeddings": True} if hf.get("model_type") == "gemma3" else {}
    return tied | {k: v for k, v in hf.items() if not k.endswith("_config")}


def read_config(hf: dict) -> ModelConfig:
    """Reads a config.json, its family's name among the fields."""
    family = of(hf)
    config = t.read(family.config, family.defaults | text_part(hf))
    if isinstance(inner := hf.get("text_config"), dict):
        t.check_parts(family.config, family.defaults | _outer(hf), inner)
    return dataclasses.replace(config, family=family.name)


def write_config(family: Family, config: ModelConfig) -> dict:
    """Returns the keys of config.json that say what a model computes."""
    return {"model_type": family.name} | t.write(family.config, config)


def matching(config: ModelConfig) -> Family:
    """Returns the family that can spell a config.

    Args:
        config: a `ModelConfig`; the family it names comes first.

    Raises:
        UserError: there is none; names what the nearest one lacks.
    """
    lacking = {}
    for name in dict.fromkeys([config.family, *FAMILIES]):
        if name not in FAMILIES:
            continue
        family = FAMILIES[name]
        try:
            back = read_config(write_config(family, config))
        except UserError:
            continue
        lacking[name] = t.differences(t.meaning(config), t.meaning(back))
        if not lacking[name]:
            return family
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    values = [f"{name}={getattr(config, name)!r}" for name in lacking[nearest]]
    raise UserError(
        f"no family of {', '.join(FAMILIES)} has a model of this config; the nearest, "
        f"{nearest}, cannot have {', '.join(values)}"
    )
