"""Folders as transformers saves them, made by hand."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from stagecraft.errors import UserError
from stagecraft.models import huggingface, tensors
from tests import tiny

D, H, K, C, F, V, L = 8, 4, 2, 4, 12, 16, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": C,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 500.0,
}


def weights(rng):
    """A llama's tensors under their names."""
    shapes = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(L):
        layer = {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "self_attn.q_proj": (H * C, D),
            "self_attn.k_proj": (K * C, D),
            "self_attn.v_proj": (K * C, D),
            "self_attn.o_proj": (D, H * C),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        shapes |= {f"model.layers.{i}.{k}.weight": s for k, s in layer.items()}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def put(folder, arrays, config=CONFIG, shards=1):
    """A folder of these arrays, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(arrays)
    if shards == 1:
        save_file(arrays, folder / "model.safetensors")
        return folder
    where = {}
    for number in range(shards):
        file = f"model-{number}.safetensors"
        part = {k: arrays[k] for k in names[number::shards]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / tensors.INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        huggingface.load(folder, tiny.single())
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    for word in words:
        assert word in line, line
