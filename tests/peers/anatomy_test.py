"""Folders that transformers changed and wrote: only what it changed is said to be."""

import numpy as np
import pytest
import torch
import transformers

from stagecraft.anatomy import changes, elements

pytestmark = pytest.mark.peers
SIZES = {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}


def pair(model, folder, edit):
    """Saves a model before and after an edit; returns the names of both folders."""
    names = []
    for name in ("before", "after"):
        if name == "after":
            with torch.no_grad():
                edit(model)
        model.save_pretrained(folder / name)
        names.append(f"hf:{folder / name}")
    return names


def changed(found):
    return {row["name"]: row for row in found["matrices"] if row["change_norm"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_projection_of_llama_is_all_that_changed(tmp_path, dtype):
    config = transformers.LlamaConfig(
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    weight = model.model.layers[1].self_attn.o_proj.weight
    before = weight.detach().float().numpy().copy()
    noise = 0.01 * torch.randn(weight.shape)
    names = pair(model, tmp_path, lambda m: weight.add_(noise.to(dtype)))
    found = changed(changes.of_pair(*names, to=tmp_path / "out"))
    assert list(found) == ["layers/1/attention/out"]
    row = found["layers/1/attention/out"]
    after = weight.detach().float().numpy()
    judge(row, before, after)
    assert row["dtypes"] == ["BF16" if dtype == torch.bfloat16 else "F32"] * 2


def judge(row, before, after):
    """Figures of a matrix [out, in] by numpy in float64."""
    change = after.astype(np.float64) - before
    sigma = np.linalg.svd(change, compute_uv=False)
    share = sigma**2 / np.sum(sigma**2)
    expected = {
        "relative_change": np.linalg.norm(change) / np.linalg.norm(before),
        "effective_rank": np.exp(-np.sum(share * np.log(share))),
        "stable_rank": 1 / share[0],
        "unchanged_bf16": 1 - np.mean(elements.visible(before, after)),
        "spectral_change": sigma[0] / np.linalg.norm(before, 2),
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-5), key
    cos = [
        np.linalg.svd(a.T @ b, compute_uv=False)[-1]
        for a, b in zip(
            *(
                (u[:, :8], vt[:8].T)
                for u, _, vt in (
                    np.linalg.svd(x.astype(np.float64), full_matrices=False)
                    for x in (before, after)
                )
            ),
            strict=True,
        )
    ]
    for side, value in zip(("write", "read"), cos, strict=True):
        angle = np.degrees(np.arccos(np.clip(value, -1, 1)))
        assert row[f"rotation_{side}"] == pytest.approx(angle, abs=1e-3)


def test_a_part_of_gpt2s_fused_projection_is_one_matrix(tmp_path):
    """Its Conv1D holds [in, out], query, key and value side by side."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES))
    weight = model.transformer.h[0].attn.c_attn.weight  # [32, 96]
    before = weight.detach().numpy().copy()[:, 32:64]

    def edit(model):
        weight[:, 32:64] += 0.02 * torch.randn(32, 32)

    found = changed(changes.of_pair(*pair(model, tmp_path, edit), to=tmp_path / "out"))
    assert list(found) == ["layers/0/attention/key"]
    after = weight.detach().numpy()[:, 32:64]
    judge(found["layers/0/attention/key"], before.T, after.T)
