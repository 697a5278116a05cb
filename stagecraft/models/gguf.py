"""Models in GGUF files: start_from="gguf:FILE".

Weights are dequantised to float32, tensor by tensor, into the arrays of each device.
What is computed is read from the metadata; a key or a tensor that is not known may
change it, and is refused by its name. Names: gguf-py/gguf/constants.py of
github.com/ggml-org/llama.cpp.
"""

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from stagecraft import gguf_file, schema
from stagecraft.errors import UserError
from stagecraft.models import families, huggingface
from stagecraft.models.transformer import Transformer

# Architectures, and whether the rows of their queries and keys are permuted, as
# llama.cpp's rotation of neighbouring channels needs them.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}

KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Read beside these, or of no consequence.
OTHERS = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
OTHERS += ("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "vocab_size")

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": huggingface.HEAD,
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYERED = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class Quantised(NamedTuple):
    """A tensor of a GGUF file; stands where a `tensors.Tensor` does.

    Attributes:
        path: the file.
        shape: tuple of ints.
        tensor: the `gguf.ReaderTensor`.
        heads: whose rows are permuted, 0 where none are.
        dtype: of what `open` returns.
    """

    path: Path
    shape: tuple[int, ...]
    tensor: Any
    heads: int = 0
    dtype: str = "F32"

    def open(self) -> np.ndarray:
        """Returns the tensor in float32, its rows in transformers' order."""
        from gguf import quants

        try:
            array = quants.dequantize(self.tensor.data, self.tensor.tensor_type)
        except NotImplementedError:
            kind = self.tensor.tensor_type.name
            raise UserError(
                f"{self.path}: {self.tensor.name} is of the kind {kind}, which the "
                "gguf package does not dequantise"
            ) from None
        array = np.asarray(array, np.float32).reshape(self.shape)
        if not self.heads:
            return array
        # Of each head's channels (first half, second half), llama.cpp has one of each
        # in turn.
        split = array.reshape(self.heads, -1, 2, *self.shape[1:]).swapaxes(1, 2)
        return split.reshape(self.shape)


def info(path: str | Path) -> dict:
    """Returns a file's module and model, as `huggingface.info` does for a folder."""
    try:
        config = families.read_config(_config(gguf_file.read(path))).validate()
    except UserError as error:
        line = str(error).removeprefix("config.json: ")
        line = line if line.startswith(str(path)) else f"{path}: {line}"
        raise UserError(line) from None
    return {"module": "transformer", "model": dataclasses.asdict(config)}


def digest(path: str | Path) -> str:
    """Returns the SHA-256 of the file, its id in a lineage."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def examine(
    path: str | Path, mesh: Mesh, *, module: str | None = None, **changes
) -> huggingface.Plan:
    """Checks that a file's tensors are those of its model; arguments as of `load`."""
    if module == "scalar":
        raise UserError(f"{path}: is a language model, expected one with a score")
    model_info = info(path)
    model_info["model"] |= changes
    try:
        return huggingface.plan(path, model_info, _tensors(gguf_file.read(path)), mesh)
    except UserError as error:
        raise UserError(str(error).replace("config.json", "metadata")) from None


def load(
    path: str | Path, mesh: Mesh, *, module: str | None = None, **changes
) -> Transformer:
    """Reads a model, each device its own part.

    Args:
        path: the file.
        mesh: of the parameters, which are float32.
        module: "transformer" or "scalar", where only one will do.
        **changes: fields of `ModelConfig` that are the run's: dtype, remat.

    Raises:
        UserError: the file is incomplete, or of an architecture that is not read.
    """
    return huggingface.filled(examine(path, mesh, module=module, **changes), mesh)


def _config(content):
    """Returns a file's metadata as a config.json."""
    name, path = content.get("general.architecture", str), content.path
    if name not in ARCHITECTURES:
        raise UserError(
            f"{path}: general.architecture={name!r} is not read from a GGUF; "
            f"{schema.hint(name, ARCHITECTURES)}known: {', '.join(ARCHITECTURES)}"
        )
    own = {
        key.removeprefix(f"{name}."): key
        for key in content.values
        if key.startswith(f"{name}.")
    }
    for key in own:
        if key not in KEYS and key not in OTHERS:
            raise UserError(
                f"{path}: {own[key]}={content.values[own[key]]!r}: a setting that is "
                "not read here; take the model's Hugging Face folder"
            )
    if "rope_freqs.weight" in content.tensors:
        raise UserError(
            f"{path}: holds rope_freqs.weight, frequencies that are scaled one by one "
            "(as Llama 3.1's), which are not read; take the Hugging Face folder"
        )
    if content.get(f"{name}.rope.scaling.type", str, "none") != "none":
        kind = content.values[f"{name}.rope.scaling.type"]
        raise UserError(f"{path}: {name}.rope.scaling.type={kind!r} is not read here")
    hf = {
        theirs: content.get(f"{name}.{key}", (int, float))
        for key, theirs in KEYS.items()
    }
    heads = hf["num_attention_heads"]
    hf["num_key_value_heads"] = content.get(
        f"{name}.attention.head_count_kv", int, heads
    )
    hf["head_dim"] = _head_dim(content, name, hf["hidden_size"] // max(heads, 1))
    hf["rope_theta"] = content.get(f"{name}.rope.freq_base", float, 10000.0)
    table = content.tensors.get("token_embd.weight")
    if table is None:
        raise UserError(f"{path}: holds no token_embd.weight")
    biased = "blk.0.attn_q.bias" in content.tensors
    return hf | {
        "model_type": name,
        "hidden_act": "silu",
        "vocab_size": int(table.shape[-1]),
        "tie_word_embeddings": "output.weight" not in content.tensors,
        "attention_bias": biased,
        "mlp_bias": "blk.0.ffn_up.bias" in content.tensors,
        "use_sliding_window": False,
    }


def _head_dim(content, name, default):
    """Returns the channels of a head, all of which rotate and are alike."""
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    channels = {
        f"{name}.{key}": content.get(f"{name}.{key}", int)
        for key in keys
        if f"{name}.{key}" in content.values
    }
    sizes = set(channels.values()) or {default}
    if len(sizes) > 1:
        said = ", ".join(f"{key}={size}" for key, size in channels.items())
        raise UserError(
            f"{content.path}: {said}: heads that rotate in part are not read here"
        )
    return sizes.pop()


def _tensors(content):
    """Returns {transformers' name: `Quantised`}; names that are not known stay."""
    name = content.values["general.architecture"]
    heads = content.values[f"{name}.attention.head_count"]
    heads = {
        "attn_q": heads,
        "attn_k": content.values.get(f"{name}.attention.head_count_kv", heads),
    }
    out = {}
    for own, tensor in content.tensors.items():
        theirs, permuted = TOP.get(own, own), 0
        if match := _LAYERED.fullmatch(own):
            number, part, kind = match.groups()
            if part in LAYER:
                theirs = f"model.layers.{number}.{LAYER[part]}.{kind}"
            permuted = heads.get(part, 0) if ARCHITECTURES[name] else 0
        shape = tuple(int(size) for size in reversed(tensor.shape))
        out[theirs] = Quantised(content.path, shape, tensor, permuted)
    return out
