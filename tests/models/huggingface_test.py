"""Hugging Face folders without transformers: hand-made ones read, ours written.

The folders are written by the safetensors library from numpy arrays, and what we write
is read by it. Whole models are held against transformers in tests/peers.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from stagecraft import sharding, tree
from stagecraft.errors import UserError
from stagecraft.models import families, huggingface, layouts, tensors
from stagecraft.models.transformer import ScalarModel, Transformer
from tests import tiny
from tests.models.folders import CONFIG, C, D, F, H, K, L, V, put

# Reading


def test_every_number_where_it_belongs(folder, arrays):
    model = huggingface.load(folder, tiny.single())
    c = model.config
    assert (c.rope_theta, c.norm_eps, c.tied, c.qk_norm) == (500.0, 1e-5, False, False)
    ours = {k: np.asarray(v) for k, v in tree.named(model).items()}
    for layer in range(L):
        theirs = {
            k.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): v
            for k, v in arrays.items()
        }
        for name, key, heads in [
            ("query", "q_proj", H),
            ("key", "k_proj", K),
            ("value", "v_proj", K),
        ]:
            got = ours[f"layers/attention/{name}"][layer]
            for h in range(heads):
                for channel in range(C):
                    row = theirs[f"self_attn.{key}"][h * C + channel]
                    np.testing.assert_array_equal(got[:, h, channel], row)
        out = ours["layers/attention/out"][layer]
        expected = theirs["self_attn.o_proj"]
        np.testing.assert_array_equal(out.reshape(H * C, D), expected.T)
        for name in ("gate", "up", "down"):
            expected = theirs[f"mlp.{name}_proj"].T
            np.testing.assert_array_equal(ours[f"layers/ff/{name}"][layer], expected)
        for name, key in [
            ("attention_norm", "input_layernorm"),
            ("ff_norm", "post_attention_layernorm"),
        ]:
            got = ours[f"layers/{name}/scale"][layer]
            np.testing.assert_array_equal(got, theirs[key])
    for name, key in [
        ("embed", "model.embed_tokens.weight"),
        ("unembed", "lm_head.weight"),
        ("norm/scale", "model.norm.weight"),
    ]:
        np.testing.assert_array_equal(ours[name], arrays[key])


def test_sharded_from_the_disk(folder):
    """Every device holds its own part, and the parts are the same model."""
    whole = huggingface.load(folder, tiny.single())
    shared = sharding.make_mesh(2, 2, 2)
    spread = huggingface.load(folder, shared)
    assert tree.digest(whole) == tree.digest(spread)
    query = tree.named(spread)["layers/attention/query"]
    assert query.sharding.spec[1:3] == ("fsdp", "tensor")
    assert query.addressable_shards[0].data.shape == (L, D // 2, H // 2, C)
    for name, array in tree.named(spread).items():
        assert array.dtype == jnp.float32, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_any_dtype_becomes_float32(tmp_path, arrays, dtype):
    cast = {k: v.astype(jnp.dtype(dtype)) for k, v in arrays.items()}
    model = huggingface.load(put(tmp_path / "in", cast), tiny.single())
    got = tree.named(model)["embed"]
    expected = cast["model.embed_tokens.weight"].astype(np.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


def test_names_without_their_root_and_tensors_that_are_no_weights(tmp_path, arrays):
    plain = {k.removeprefix("model."): v for k, v in arrays.items()}
    plain["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    one = huggingface.load(put(tmp_path / "plain", plain), tiny.single())
    two = huggingface.load(put(tmp_path / "in", arrays), tiny.single())
    assert tree.digest(one) == tree.digest(two)


def test_both_spellings_of_rotary_positions(tmp_path, arrays):
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    old = CONFIG | {"rope_scaling": scaling | {"rope_type": "llama3"}}
    new = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    new["rope_parameters"] = scaling | {"rope_type": "llama3", "rope_theta": 500.0}
    oldest = CONFIG | {"rope_scaling": {"type": "linear", "factor": 2}}
    one, two, three = (
        huggingface.config(put(tmp_path / str(i), arrays, config))
        for i, config in enumerate([old, new, oldest])
    )
    assert one == two
    assert one.rope_arguments == (8.0, 1.0, 4.0, 16)
    assert (three.rope_scaling, three.rope_arguments) == ("linear", (2.0,))


# Writing


def test_there_and_back_bit_for_bit(tmp_path, folder, arrays):
    model = huggingface.load(folder, sharding.make_mesh(2, 2, 2))
    huggingface.save(model, tmp_path / "out", shard_size=1000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / tensors.INDEX).read_text())
    got = {}
    for file in files:
        part = load_file(tmp_path / "out" / file)
        assert sum(x.nbytes for x in part.values()) <= 1000 or len(part) == 1
        assert {index["weight_map"][name] for name in part} == {file}
        got |= part
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in CONFIG.items():
        assert said[key] == value, key
    assert said["rope_parameters"] == {"rope_theta": 500.0, "rope_type": "default"}
    assert said["torch_dtype"] == said["dtype"] == "float32"


FAMILY_FIELDS = {
    "llama": dict(qk_norm=False, ff_bias=True, tied=False),
    "qwen2": dict(qk_norm=False, qkv_bias=True, window=6, sliding=(False, True, True)),
    "qwen3": dict(qkv_bias=True, out_bias=True),
    "mistral": dict(qk_norm=False, window=5),
    "olmo2": dict(qk_norm_over="projection", norm_place="post"),
    "smollm3": dict(qk_norm=False, rotates=(True, True, False)),
    "gemma2": dict(
        **dict(qk_norm=False, norm_place="both", norm_offset=1.0, window=4),
        **dict(sliding=(True, False), attention_softcap=5.0, logit_softcap=3.0),
        **dict(activation="gelu_tanh", embed_scale=8**0.5, attention_scale=6**-0.5),
    ),
    "gemma3_text": dict(
        **dict(norm_place="both", norm_offset=1.0, window=4, embed_scale=8**0.5),
        **dict(sliding=(True, True, False), rope_theta=1e6, rope_theta_sliding=1e4),
        **dict(rope_scaling="linear", rope_arguments=(8.0,), activation="gelu_tanh"),
    ),
    "mixtral": dict(
        **dict(qk_norm=False, experts=4, expert_width=12),
        **dict(rope_scaling="yarn", rope_arguments=(4.0, 8, 32.0, 1.0, 1.1, True)),
    ),
    "qwen3_moe": dict(
        **dict(experts=4, experts_per_token=3, expert_width=10, tied=False),
        **dict(sparse=(False, True), experts_renormalize=False),
    ),
    "stablelm": dict(
        **dict(norm="layer", qk_norm=False, qkv_bias=True, rope_share=0.5),
        **dict(head_dim=8, heads=1, kv_heads=1),
    ),
    "gpt2": dict(
        **dict(norm="layer", positions="learned", gated=False, qk_norm=False),
        **dict(qkv_bias=True, out_bias=True, ff_bias=True, kv_heads=4, head_dim=2),
        activation="gelu_tanh",
    ),
}


def family_config(name):
    base = dict(vocab_size=V, width=D, layers=3, heads=H, kv_heads=K, head_dim=C)
    base |= dict(ff_width=F, max_length=32, family=name)
    return tiny.config(**base | FAMILY_FIELDS[name]).validate()


@pytest.mark.parametrize("name", FAMILY_FIELDS)
def test_every_family_there_and_back(tmp_path, name):
    """Also the config, by the family it names and by the first that fits."""
    config = family_config(name)
    model = Transformer(config, jax.random.key(3))
    assert huggingface.save(model, tmp_path / "out").name == name
    back = huggingface.load(tmp_path / "out", tiny.single())
    assert back.config == config
    assert tree.digest(back) == tree.digest(model)
    unnamed = dataclasses.replace(config, family="")
    plain = name not in ("mistral",)  # a llama with a window is one, but so is a qwen2
    assert families.matching(unnamed).name == name or not plain


def test_heads_that_fill_the_width_have_no_key(tmp_path):
    """StableLM's readers divide the width by the heads, whatever head_dim says."""
    config = family_config("stablelm")
    huggingface.save(Transformer(config, jax.random.key(0)), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    said = json.loads(path.read_text())
    assert "head_dim" not in said
    path.write_text(json.dumps(said | {"head_dim": 4}))
    assert huggingface.config(tmp_path / "out") == config
    odd = dataclasses.replace(config, family="", head_dim=16)
    with pytest.raises(UserError, match="no family of"):
        families.matching(odd)


# What each family's folder must hold, as its published checkpoints do.
LAST = "model.layers.2."
KEYS = {
    "llama": {LAST + "mlp.gate_proj.bias": (F,), "lm_head.weight": (V, D)},
    "qwen2": {LAST + "self_attn.k_proj.bias": (K * C,)},
    "qwen3": {LAST + "self_attn.q_norm.weight": (C,)},
    "mistral": {LAST + "self_attn.o_proj.weight": (D, H * C)},
    "olmo2": {
        LAST + "self_attn.q_norm.weight": (H * C,),
        LAST + "self_attn.k_norm.weight": (K * C,),
        LAST + "post_feedforward_layernorm.weight": (D,),
    },
    "smollm3": {LAST + "post_attention_layernorm.weight": (D,)},
    "gemma2": {
        LAST + "pre_feedforward_layernorm.weight": (D,),
        LAST + "post_feedforward_layernorm.weight": (D,),
    },
    "gemma3_text": {LAST + "self_attn.k_norm.weight": (C,)},
    "mixtral": {
        LAST + "block_sparse_moe.gate.weight": (4, D),
        LAST + "block_sparse_moe.experts.3.w1.weight": (12, D),
        LAST + "block_sparse_moe.experts.3.w2.weight": (D, 12),
        LAST + "block_sparse_moe.experts.3.w3.weight": (12, D),
    },
    "qwen3_moe": {
        LAST + "mlp.gate_proj.weight": (F, D),
        "model.layers.1.mlp.gate.weight": (4, D),
        "model.layers.1.mlp.experts.3.up_proj.weight": (10, D),
    },
    "stablelm": {
        LAST + "self_attn.q_proj.bias": (8,),
        LAST + "post_attention_layernorm.bias": (D,),
        "model.norm.bias": (D,),
    },
    "gpt2": {
        "transformer.wpe.weight": (32, D),
        "transformer.h.2.attn.c_attn.weight": (D, 3 * D),
        "transformer.h.2.mlp.c_fc.weight": (D, F),
        "transformer.ln_f.bias": (D,),
    },
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_and_shapes(name):
    config = family_config(name)
    shapes = tree.named(
        jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    )
    found = {}
    for place in layouts.of_model(families.FAMILIES[name], config, shapes):
        sizes = shapes[place.ours].shape[len(place.index) :]
        sizes = dict(zip(place.axes.ours, sizes, strict=True))
        found[place.key] = place.axes.shape(sizes)
    for key, shape in KEYS[name].items():
        assert found[key] == shape, key


def test_layers_are_spelled_one_by_one():
    """Also where none slides: readers would take a missing list for another one."""
    for changes, expected in [
        (dict(window=0, sliding=()), ["full_attention"] * 3),
        (dict(), ["full_attention", "sliding_attention", "sliding_attention"]),
    ]:
        config = dataclasses.replace(family_config("qwen2"), **changes)
        said = families.write_config(families.FAMILIES["qwen2"], config)
        assert said["layer_types"] == expected
        assert said["use_sliding_window"] is bool(config.window)
        assert said["max_window_layers"] == expected.count("full_attention")


def test_wavelengths_of_sliding_layers_are_not_lost():
    gemma = family_config("gemma2")
    own = dataclasses.replace(gemma, family="", rope_theta_sliding=500.0)
    with pytest.raises(UserError, match="rope_theta_sliding=500"):
        families.matching(own)
    same = dataclasses.replace(gemma, family="", rope_theta_sliding=gemma.rope_theta)
    assert families.matching(same).name == "gemma2"


def test_a_model_no_family_has(tmp_path):
    config = dataclasses.replace(family_config("llama"), norm_place="both")
    with pytest.raises(UserError, match="norm_place='both'"):
        huggingface.save(Transformer(config, jax.random.key(0)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_reward_models(tmp_path):
    config = dataclasses.replace(family_config("qwen3"), tied=True)
    model = ScalarModel(Transformer(config, jax.random.key(0)), jax.random.key(1))
    model.bias.set_value(jnp.float32(-1.25))
    huggingface.save(model, tmp_path / "out", ids={"pad_token_id": 3})
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architectures"] == ["Qwen3ForSequenceClassification"]
    assert said["pad_token_id"] == 3 and said["id2label"] == {"0": "LABEL_0"}
    score = load_file(tmp_path / "out" / "model.safetensors")["score.weight"]
    np.testing.assert_array_equal(score, np.asarray(model.head[...])[None])
    back = huggingface.load(tmp_path / "out", tiny.single(), module="scalar")
    assert tree.digest(back) == tree.digest(model)
    with pytest.raises(UserError, match="expected a ...ForCausalLM"):
        huggingface.load(tmp_path / "out", tiny.single(), module="transformer")
