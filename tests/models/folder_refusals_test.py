"""What a folder must be to be read, and what writing one never destroys."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stagecraft import storage
from stagecraft.errors import UserError
from stagecraft.models import huggingface, tensors
from tests import tiny
from tests.models.folders import CONFIG, C, D, F, V, put, refused


def test_a_folder_that_is_there_stays(tmp_path, folder):
    model = huggingface.load(folder, tiny.single())
    target = tmp_path / "out"
    target.mkdir()
    huggingface.save(model, target)  # an empty one is no loss
    with pytest.raises(UserError, match="--overwrite"):
        huggingface.save(model, target)
    (target / "mine.txt").write_text("old")
    huggingface.save(model, target, overwrite=True, dtype="bfloat16")
    assert not (target / "mine.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_full_disk_leaves_the_old_folder_whole(tmp_path, folder, monkeypatch):
    model = huggingface.load(folder, tiny.single())
    huggingface.save(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    plain, written = np.ascontiguousarray, []

    def full(*args):
        written.append(args)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args)

    monkeypatch.setattr(tensors.np, "ascontiguousarray", full)
    with pytest.raises(UserError, match="No space left on device.*nothing was changed"):
        huggingface.save(model, tmp_path / "out", overwrite=True)
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert after == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, folder, monkeypatch):
    model = huggingface.load(folder, tiny.single())
    huggingface.save(model, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("old")
    plain = Path.rename

    def rename(self, target):
        if "partial" in self.name and "-old" not in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="Input/output error"):
        huggingface.save(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_no_permission_to_write(tmp_path, folder, monkeypatch):
    model = huggingface.load(folder, tiny.single())

    def forbidden(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage.tempfile, "mkdtemp", forbidden)
    with pytest.raises(UserError, match="out: cannot be written .Permission denied"):
        huggingface.save(model, tmp_path / "out")


def test_what_a_dtype_cannot_hold(tmp_path, folder):
    model = huggingface.load(folder, tiny.single())
    model.embed.set_value(model.embed[...].at[3, 2].set(1e6))
    with pytest.raises(UserError, match="embed_tokens.weight.*float16.*bfloat16"):
        huggingface.save(model, tmp_path / "out", dtype="float16")
    huggingface.save(model, tmp_path / "out", dtype="bfloat16")


# Bad input, one line each


def test_a_missing_shard(folder):
    (folder / "model-1.safetensors").unlink()
    refused(folder, "model-1.safetensors: is missing", "3 files")


def test_a_shard_cut_short(folder):
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, "model-2.safetensors: cut short", "fetch it again")


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", b"\xff" * 100, (20).to_bytes(8, "little") + b"not json at all....."],
)
def test_a_damaged_shard(folder, data):
    (folder / "model-0.safetensors").write_bytes(data)
    refused(folder, "model-0.safetensors: damaged")


def test_a_shard_without_what_the_index_says(folder, arrays):
    some = {k: v for k, v in arrays.items() if "lm_head" in k}
    save_file(some, folder / "model-0.safetensors")
    refused(folder, "model-0.safetensors: lacks", tensors.INDEX)


def test_a_broken_index(folder):
    (folder / tensors.INDEX).write_text("{")
    refused(folder, tensors.INDEX, "not an index")


def test_a_missing_tensor(tmp_path, arrays):
    rest = dict(arrays)
    rest["model.layers.1.mlp.up_prj.weight"] = rest.pop(
        "model.layers.1.mlp.up_proj.weight"
    )
    refused(
        put(tmp_path / "in", rest),
        "lacks model.layers.1.mlp.up_proj.weight",
        "the nearest there is is model.layers.1.mlp.up_prj.weight",
    )


def test_an_unexpected_tensor(tmp_path, arrays):
    more = arrays | {"model.layers.0.self_attn.q_norm.weight": np.ones(C, np.float32)}
    refused(
        put(tmp_path / "in", more),
        "holds model.layers.0.self_attn.q_norm.weight, which no llama",
        "nearest it has is model.layers.0.self_attn",
    )


def test_a_wrong_shape(tmp_path, arrays):
    wrong = arrays | {"model.layers.1.mlp.down_proj.weight": np.ones((D, F + 1))}
    refused(
        put(tmp_path / "in", wrong),
        f"down_proj.weight has shape [{D}, {F + 1}]",
        f"calls for [{D}, {F}]",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, arrays, value):
    bad = {k: v.copy() for k, v in arrays.items()}
    bad["model.layers.1.self_attn.v_proj.weight"][2, 3] = value
    refused(
        put(tmp_path / "in", bad, shards=2),
        ".safetensors: model.layers.1.self_attn.v_proj.weight holds values",
        "not finite",
    )


def test_pickles_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, "holds no *.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    refused(tmp_path, "pytorch_model.bin", "convert them to safetensors")


def test_quantised_weights(tmp_path, arrays):
    bad = arrays | {"lm_head.weight": np.ones((V, D), np.int8)}
    refused(put(tmp_path / "in", bad), "lm_head.weight", "as I8", "quantised")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="lama"), ["'lama'", "did you mean 'llama'?", "known: llama"]),
        (
            dict(model_type="deepseek_v3", kv_lora_rank=512),
            ["multi-head latent attention", "known: llama"],
        ),
        (dict(hidden_act="relu6"), ["hidden_act='relu6'", "known: silu"]),
        (
            dict(rope_scaling={"rope_type": "proportional", "factor": 2.0}),
            ["rope_type='proportional'", "known: default, linear"],
        ),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5"]),
        (
            dict(model_type="stablelm", use_parallel_residual=True),
            ["use_parallel_residual=True", "parallel attention"],
        ),
        (
            dict(quantization_config={"quant_method": "gptq"}),
            ["quantised weights (gptq)"],
        ),
        (
            dict(model_type="qwen3", use_sliding_window=True, layer_types=["chunked"]),
            ["layer_types names 'chunked'", "known: sliding_attention"],
        ),
        (dict(model_type="olmo2", clip_qkv=8.0), ["clip_qkv=8.0", "clipped"]),
        (dict(hidden_size=None), ["model.width", "None"]),
        (dict(num_attention_heads="4", head_dim=None), ["not of the type"]),
    ],
)
def test_features_we_lack_are_named(tmp_path, arrays, changes, words):
    refused(put(tmp_path / "in", arrays, CONFIG | changes), "config.json", *words)


def test_config_json_without_a_key(tmp_path, arrays):
    config = {k: v for k, v in CONFIG.items() if k != "intermediate_size"}
    refused(put(tmp_path / "in", arrays, config), "has no 'intermediate_size'")
    (tmp_path / "in" / "config.json").write_text("[]")
    refused(tmp_path / "in", "config.json: expected a JSON object")
    (tmp_path / "in" / "config.json").unlink()
    refused(tmp_path / "in", "config.json: cannot be read")
