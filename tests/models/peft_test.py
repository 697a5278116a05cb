"""PEFT folders without PEFT: hand-made ones, and ours by the safetensors library."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stagecraft import defaults, tree
from stagecraft.errors import UserError
from stagecraft.models import huggingface, locate, lora, peft
from stagecraft.models.transformer import ScalarModel, Transformer
from tests import tiny

D, HEADS, KV, C, FF, V, L = 8, 2, 1, 4, 12, 16, 2
CONFIG = tiny.config(
    **dict(vocab_size=V, width=D, layers=L, heads=HEADS, kv_heads=KV, head_dim=C),
    **dict(ff_width=FF, max_length=32, qk_norm=False, tied=False, init_std=0.3),
)
GPT2 = dataclasses.replace(
    CONFIG,
    **dict(kv_heads=HEADS, tied=True, norm="layer", positions="learned", gated=False),
    **dict(activation="gelu_tanh", qkv_bias=True, out_bias=True, ff_bias=True),
)


@pytest.fixture
def shared():
    mesh = tiny.single()
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def base(tmp_path, shared):
    model = Transformer(CONFIG, jax.random.key(0))
    huggingface.save(model, tmp_path / "base")
    return model


def write(folder, arrays, **config):
    folder.mkdir(exist_ok=True)
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    told |= {"base_model_name_or_path": "../base"} | config
    (folder / peft.CONFIG).write_text(json.dumps(told))
    named = {f"base_model.model.{k}": np.float32(v) for k, v in arrays.items()}
    save_file(named, folder / peft.WEIGHTS)


def pair(rng, module, inside, out, rank=2):
    return {
        f"{module}.lora_A.weight": rng.normal(size=(rank, inside)),
        f"{module}.lora_B.weight": rng.normal(size=(out, rank)),
    }


def test_a_folder_is_read_as_the_sum_of_its_matrices(base, shared, tmp_path):
    rng = np.random.default_rng(0)
    query = pair(rng, "model.layers.1.self_attn.q_proj", D, HEADS * C)
    out = pair(rng, "model.layers.0.self_attn.o_proj", HEADS * C, D)
    down = pair(rng, "model.layers.1.mlp.down_proj", FF, D, rank=3)
    patterns = dict(rank_pattern={"down_proj": 3}, alpha_pattern={"o_proj": 1})
    write(tmp_path / "adapter", query | out | down, **patterns)
    found = tree.named(locate.locate(f"hf:{tmp_path / 'adapter'}").load(shared))

    def moved(pairs, scale):
        a, b = (np.float32(x) for x in pairs.values())
        return scale * (b @ a).T  # [in, out]

    expected = {k: np.array(v) for k, v in tree.named(base).items()}
    expected["layers/attention/query"][1] += moved(query, 3).reshape(D, HEADS, C)
    expected["layers/attention/out"][0] += moved(out, 0.5).reshape(HEADS, C, D)
    expected["layers/ff/down"][1] += moved(down, 2)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
    source = locate.locate(f"hf:{tmp_path / 'adapter'}")
    assert source.tokenizer() == tmp_path / "adapter/../base"
    assert source.info()["model"]["width"] == D


def filled(settings, base, *, scalar=False):
    adapter = lora.init(settings, base, jax.random.key(1), scalar=scalar)
    keys = iter(jax.random.split(jax.random.key(2), 99))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), adapter)


def test_ours_is_written_by_their_names_and_comes_back(base, shared, tmp_path):
    settings = lora.Settings(2, 6.0, "key,out", 0.1, False, True)
    adapter = filled(settings, base)
    folder = tmp_path / "out"
    peft.save(adapter, CONFIG, folder, shared, base=tmp_path / "base")
    found = load_file(folder / peft.WEIGHTS)
    prefix = "base_model.model.model."
    assert found[f"{prefix}layers.1.self_attn.k_proj.lora_A.weight"].shape == (2, D)
    assert found[f"{prefix}layers.1.self_attn.k_proj.lora_B.weight"].shape == (C, 2)
    embed = np.asarray(adapter.parts["embed"][...])
    assert np.array_equal(found[f"{prefix}embed_tokens.weight"], embed)
    assert len(found) == 2 * 2 * L + 2
    told = json.loads((folder / peft.CONFIG).read_text())
    assert told["target_modules"] == ["k_proj", "o_proj"]
    assert told["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert (told["r"], told["lora_alpha"], told["lora_dropout"]) == (2, 6.0, 0.1)
    again = locate.locate(f"hf:{folder}").load(shared)
    for name, value in tree.named(lora.merge(base, adapter)).items():
        np.testing.assert_allclose(tree.named(again)[name], value, atol=1e-5)
    with pytest.raises(UserError, match="is there already and not empty"):
        peft.save(adapter, CONFIG, folder, shared, base="base")


def test_three_weights_of_ours_in_one_module_of_theirs(shared, tmp_path):
    base = Transformer(GPT2, jax.random.key(0))
    huggingface.save(base, tmp_path / "base")
    settings = lora.Settings(2, 6.0, "query,value,down", 0.0, False, False)
    adapter = filled(settings, base)
    peft.save(adapter, GPT2, tmp_path / "out", shared, base=tmp_path / "base")
    told = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert told["fan_in_fan_out"] is True
    assert told["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert told["rank_pattern"] == {"c_attn": 4}
    assert told["alpha_pattern"] == {"c_attn": 12.0}
    found = load_file(tmp_path / "out" / peft.WEIGHTS)
    b = found["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert b.shape == (3 * D, 4) and not b[D : 2 * D].any()  # keys have none
    assert not b[:D, 2:].any() and not b[2 * D :, :2].any()
    again = locate.locate(f"hf:{tmp_path / 'out'}").load(shared)
    for name, value in tree.named(lora.merge(base, adapter)).items():
        np.testing.assert_allclose(tree.named(again)[name], value, atol=1e-5)


def test_a_reward_models_head_and_constant(base, shared, tmp_path):
    settings = lora.Settings(**dict(defaults.lora()) | dict(rank=2))
    adapter = filled(settings, base, scalar=True)
    adapter.parts["bias"][...] = np.float32(1.5)
    peft.save(adapter, CONFIG, tmp_path / "out", shared, base=tmp_path / "base")
    told = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert told["task_type"] == "SEQ_CLS" and told["modules_to_save"] == ["score"]
    again = locate.locate(f"hf:{tmp_path / 'out'}").load(shared)
    assert isinstance(again, ScalarModel) and float(again.bias[...]) == 1.5
    assert np.array_equal(again.head[...], adapter.parts["head"][...])
    source = locate.locate(f"hf:{tmp_path / 'out'}")
    assert source.info()["module"] == "scalar"
    with pytest.raises(UserError, match="makes a scalar model, expected a transformer"):
        source.examine(shared, module="transformer")


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (dict(peft_type="IA3"), "peft_type='IA3': expected 'LORA'"),
        (dict(use_dora=True), "asks for DoRA.*merge_and_unload"),
        (dict(bias="all"), "asks for trained biases"),
        (dict(init_lora_weights="pissa_niter_4"), "base changed by init_lora_weights"),
        (
            dict(base_model_name_or_path="org/model"),
            "'org/model': no folder of a model",
        ),
    ],
)
def test_configs_that_are_refused(config, line, base, shared, tmp_path):
    rng = np.random.default_rng(0)
    arrays = pair(rng, "model.layers.0.mlp.up_proj", D, FF)
    write(tmp_path / "adapter", arrays, **config)
    with pytest.raises(UserError, match=line) as found:
        locate.locate(f"hf:{tmp_path / 'adapter'}").load(shared)
    assert "adapter_config.json" in str(found.value)


def _nothing(arrays):
    return arrays | {"model.layers.0.mlp.router.lora_A.weight": np.ones((2, D))}


def _wrong_shape(arrays):
    return {k: v[:, :-1] if "lora_A" in k else v for k, v in arrays.items()}


def _half(arrays):
    return {k: v for k, v in arrays.items() if "lora_A" in k}


def _nan(arrays):
    return {k: v * np.nan for k, v in arrays.items()}


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (_nothing, "mlp.router.lora_A.weight, which sits on nothing"),
        (_wrong_shape, r"has shape \[2, 7\]; on its base it must be \[2, 8\]"),
        (_half, "but no model.layers.0.mlp.up_proj.lora_B.weight"),
        (_nan, "not finite"),
    ],
)
def test_tensors_that_are_refused(spoil, line, base, shared, tmp_path):
    rng = np.random.default_rng(0)
    arrays = spoil(pair(rng, "model.layers.0.mlp.up_proj", D, FF))
    write(tmp_path / "adapter", arrays)
    with pytest.raises(UserError, match=line):
        locate.locate(f"hf:{tmp_path / 'adapter'}").load(shared)


def test_pickles_and_torn_tables_are_refused(shared, tmp_path):
    tied = dataclasses.replace(CONFIG, tied=True)
    huggingface.save(Transformer(tied, jax.random.key(0)), tmp_path / "base")
    write(tmp_path / "adapter", {"model.embed_tokens.weight": np.ones((V, D))})
    with pytest.raises(UserError, match="its base has one table for both"):
        locate.locate(f"hf:{tmp_path / 'adapter'}").load(shared)
    (tmp_path / "adapter" / peft.WEIGHTS).unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickles are not opened"):
        locate.locate(f"hf:{tmp_path / 'adapter'}").load(shared)


# After a resize of the embedding

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tables(rows, *names):
    rng = np.random.default_rng(rows)
    return {n: rng.normal(size=(rows, D)).astype(np.float32) for n in names}


@pytest.mark.parametrize("rows", [V + 5, V - 3])
def test_an_adapter_saved_after_a_resize(base, shared, tmp_path, caplog, rows):
    rng = np.random.default_rng(0)
    query = pair(rng, "model.layers.1.self_attn.q_proj", D, HEADS * C)
    new = tables(rows, EMBED, HEAD)
    write(tmp_path / "adapter", query | new)
    source = locate.locate(f"hf:{tmp_path / 'adapter'}")
    assert source.info()["model"]["vocab_size"] == rows
    assert f"holds tables of {rows} ids, its base {V}" in caplog.text
    source.examine(shared)
    model = source.load(shared)
    assert model.config.vocab_size == rows
    np.testing.assert_array_equal(model.embed[...], new[EMBED])
    np.testing.assert_array_equal(model.unembed[...], new[HEAD])
    write(tmp_path / "same", query)
    same = locate.locate(f"hf:{tmp_path / 'same'}").load(shared)
    for name, value in tree.named(same).items():
        if "embed" not in name:
            np.testing.assert_array_equal(tree.named(model)[name], value)
    huggingface.save(model, tmp_path / "out")
    assert huggingface.config(tmp_path / "out").vocab_size == rows


@pytest.mark.parametrize(
    "stored",
    [
        tables(V + 5, EMBED),
        tables(V + 5, HEAD),
        tables(V + 5, EMBED) | tables(V + 6, HEAD),
        tables(V, EMBED) | tables(V + 6, HEAD),
    ],
)
def test_tables_of_a_resize_that_do_not_agree(base, shared, tmp_path, stored):
    write(tmp_path / "adapter", stored)
    with pytest.raises(UserError, match="holds tables of.*save_embedding_layers") as e:
        locate.locate(f"hf:{tmp_path / 'adapter'}").info()
    assert "\n" not in str(e.value)


def test_a_table_of_another_width(base, shared, tmp_path):
    wide = {k: v[:, :-1].copy() for k, v in tables(V, EMBED, HEAD).items()}
    write(tmp_path / "adapter", wide)
    with pytest.raises(UserError, match=rf"has shape \[{V}, 7\]; on its base it must"):
        locate.locate(f"hf:{tmp_path / 'adapter'}").load(shared)
