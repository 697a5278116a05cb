"""Folders that say two things: read as transformers reads them, or refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from stagecraft.errors import UserError
from stagecraft.models import families, huggingface, locate, peft, tensors
from tests import tiny
from tests.models.folders import CONFIG, L, V, put, refused

TIED = CONFIG | {"tie_word_embeddings": True}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def said(caplog):
    return [record.getMessage() for record in caplog.records]


# Tied embeddings


def test_a_tied_head_that_differs_is_a_table_of_its_own(tmp_path, arrays, caplog):
    folder = put(tmp_path / "in", arrays, TIED)
    model = huggingface.load(folder, tiny.single())
    np.testing.assert_array_equal(model.embed[...], arrays[EMBED])
    np.testing.assert_array_equal(model.unembed[...], arrays[HEAD])
    (line,) = said(caplog)
    assert "lm_head.weight differs from model.embed_tokens.weight" in line
    huggingface.save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


def test_a_head_that_differs_in_its_last_row_alone(tmp_path, arrays):
    head = arrays[EMBED].copy()
    head[-1, -1] += 1
    folder = put(tmp_path / "in", arrays | {HEAD: head}, TIED)
    assert huggingface.config(folder).tied is False
    present = tensors.read_folder(folder)
    assert not tensors.equal(present[EMBED], present[HEAD], rows=3)
    assert tensors.equal(present[EMBED], present[EMBED], rows=3)


def test_a_tied_table_may_be_there_twice_or_under_its_second_name(
    tmp_path, arrays, caplog
):
    twice = arrays | {HEAD: arrays[EMBED]}
    second = {k: v for k, v in twice.items() if k != EMBED}
    for name, tensors_ in {"twice": twice, "second": second}.items():
        model = huggingface.load(put(tmp_path / name, tensors_, TIED), tiny.single())
        assert model.unembed is None
        np.testing.assert_array_equal(model.embed[...], arrays[EMBED])
    assert not said(caplog)


# Keys of config.json

NEW = {"rope_parameters": {"rope_theta": 600.0, "rope_type": "default"}}
LINEAR = {"rope_type": "linear", "factor": 2.0}
GEMMA = {
    **{k: v for k, v in CONFIG.items() if k not in ("rope_theta", "model_type")},
    **{"model_type": "gemma3_text", "tie_word_embeddings": True},
}
FULL, NEAR = {"rope_theta": 1e6}, {"rope_theta": 1e4}
BY_TYPE = {"full_attention": FULL, "sliding_attention": NEAR}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (NEW, ["rope_theta=500.0", "rope_parameters.rope_theta=600.0"]),
        (
            {"rope_scaling": LINEAR | {"rope_theta": 700.0}},
            ["rope_theta=500.0", "rope_scaling.rope_theta=700.0"],
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}},
            ["rope_scaling={", "rope_parameters={", "'factor': 4.0"],
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
            ["rope_scaling={", "rope_parameters={"],
        ),
        (
            {"rope_scaling": LINEAR | {"type": "dynamic"}},
            ["rope_type='linear'", "type='dynamic'"],
        ),
        ({"rope_parameters": BY_TYPE}, ["rope_parameters.full_attention", "one set"]),
        (
            GEMMA | {"rope_theta": 1e5, "rope_parameters": BY_TYPE},
            ["rope_theta=100000.0", "rope_parameters.full_attention.rope_theta"],
        ),
        (
            GEMMA | {"rope_local_base_freq": 5.0, "rope_parameters": BY_TYPE},
            ["rope_local_base_freq=5.0", "rope_parameters.sliding_attention"],
        ),
        (
            GEMMA | {"rope_scaling": LINEAR, "rope_parameters": {}}
            | {"rope_parameters": {"full_attention": FULL | {"rope_type": "default"}}},
            ["rope_scaling={", "rope_parameters={"],
        ),
        (GEMMA | {"rope_parameters": NEAR}, ["two sets of wavelengths"]),
        (GEMMA | {"layer_types": ["full_attention"]}, ["1 layers", f"layers={L}"]),
        (
            {"text_config": {"tie_word_embeddings": True}},
            ["tie_word_embeddings=False", "text_config.tie_word_embeddings=True"],
        ),
        (
            {"text_config": {"vocab_size": V + 1}},
            [f"vocab_size={V}", f"text_config.vocab_size={V + 1}"],
        ),
        (
            {"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}
            | dict.fromkeys(["rope_theta", "tie_word_embeddings"]),
            ["text_config.tie_word_embeddings=False"],
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "num_local_experts": 8},
            ["num_experts=4", "num_local_experts=8"],
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts": 8},
            ["num_local_experts=4", "num_experts=8"],
        ),
        (
            {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 4}
            | {"hidden_size": 16},
            ["n_embd=8", "hidden_size=16"],
        ),
    ],
)  # fmt: skip
def test_keys_that_say_different_things(config, words):
    config = {k: v for k, v in (CONFIG | config).items() if v is not None}
    with pytest.raises(UserError) as caught:
        families.read_config(config)
    line = str(caught.value)
    assert line.startswith("config.json: ") and "\n" not in line
    for word in words:
        assert word in line, line


def test_keys_that_say_the_same_twice():
    plain = families.read_config(CONFIG)
    again = {"rope_theta": 500, "rope_type": "default"}
    text = {"vocab_size": V, "initializer_range": 0.3, "torch_dtype": "float16"}
    for more in (
        {"rope_parameters": again},
        {"rope_parameters": again, "rope_scaling": None, "text_config": text},
    ):
        assert families.read_config(CONFIG | more) == plain
    scaled = families.read_config(CONFIG | {"rope_scaling": LINEAR})
    both = {"rope_scaling": LINEAR, "rope_parameters": again | LINEAR}
    assert families.read_config(CONFIG | both) == scaled
    only = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    inside = {"rope_scaling": LINEAR | {"rope_theta": 500.0}}
    assert families.read_config(only | inside) == scaled


def test_a_vocabulary_that_is_not_the_embeddings(tmp_path, arrays):
    folder = put(tmp_path / "in", arrays, CONFIG | {"vocab_size": V + 2})
    refused(folder, f"has shape [{V}, 8]", f"calls for [{V + 2}, 8]")


# Files of weights


def test_the_whole_file_comes_before_an_index(tmp_path, arrays, caplog):
    other = {k: v + 1 for k, v in arrays.items()}
    put(tmp_path / "in", other, shards=3)
    put(tmp_path / "in", arrays)
    model = huggingface.load(tmp_path / "in", tiny.single())
    np.testing.assert_array_equal(model.embed[...], arrays[EMBED])
    (line,) = said(caplog)
    assert "reads model.safetensors, as transformers does" in line
    assert "model-0.safetensors" in line
    both = huggingface.digest(tmp_path / "in")
    for path in (tmp_path / "in").glob("model-*"):
        path.unlink()
    (tmp_path / "in" / tensors.INDEX).unlink()
    assert huggingface.digest(tmp_path / "in") == both


def test_pickles_beside_safetensors_are_passed_over_by_name(tmp_path, arrays, caplog):
    folder = put(tmp_path / "in", arrays)
    (folder / "training_args.bin").write_bytes(b"x")
    huggingface.load(folder, tiny.single())
    assert not said(caplog)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    huggingface.load(folder, tiny.single())
    huggingface.load(folder, tiny.single())
    (line,) = said(caplog)
    assert "pytorch_model.bin is not read" in line


def test_two_files_of_one_tensor(tmp_path, arrays):
    folder = put(tmp_path / "in", arrays)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({HEAD: arrays[HEAD]}, folder / "b.safetensors")
    refused(folder, "a.safetensors and b.safetensors both hold lm_head.weight")


def test_a_model_and_an_adapter_in_one_folder(tmp_path, arrays):
    folder = put(tmp_path / "in", arrays)
    (folder / peft.CONFIG).write_text("{}")
    assert locate.locate(f"hf:{folder}").where == "folder"  # left behind by a merge
    save_file({"x": np.ones(1, np.float32)}, folder / peft.WEIGHTS)
    with pytest.raises(UserError, match="holds a model .model.safetensors. and an ad"):
        locate.locate(f"hf:{folder}")
    (folder / "model.safetensors").unlink()
    assert locate.locate(f"hf:{folder}").where == "adapter"
