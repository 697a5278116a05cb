"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np

from stagecraft.models import gguf as ours
from stagecraft.models import huggingface, tensors

NAMES = {theirs: own for own, theirs in ours.TOP.items()}
PARTS = {theirs: own for own, theirs in ours.LAYER.items()}
CONTROL, USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED


def permuted(array, heads):
    """Rows of queries and keys as llama.cpp's converter permutes them."""
    rows = array.shape[0] // heads // 2
    split = array.reshape(heads, 2, rows, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def name_of(theirs):
    """llama.cpp's name of a tensor."""
    if theirs in NAMES:
        return NAMES[theirs]
    _, _, number, *middle, kind = theirs.split(".")
    return f"blk.{number}.{PARTS['.'.join(middle)]}.{kind}"


def write(path, model, tokenizer, *, quantised="F32", change=None):
    """Writes a model and the tokenizer.json of a folder.

    Args:
        path: the file.
        model: a `Transformer` of a family that GGUF files have.
        tokenizer: a Hugging Face folder with a byte-level tokenizer; None for none.
        quantised: name of the kind of the matrices.
        change: (writer) -> None, called before the file is written.
    """
    folder = path.parent / f"{path.stem}_folder"
    family = huggingface.save(model, folder).name
    c = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ff_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    kind = gguf.GGMLQuantizationType[quantised]
    for theirs, tensor in tensors.read_folder(folder).items():
        array, own = np.asarray(tensor.open(), np.float32), name_of(theirs)
        if family == "llama" and ".attn_q." in own:
            array = permuted(array, c.heads)
        if family == "llama" and ".attn_k." in own:
            array = permuted(array, c.kv_heads)
        if array.ndim == 1:
            writer.add_tensor(own, array)
        else:
            data = gguf.quants.quantize(array, kind)
            writer.add_tensor(own, data, raw_dtype=kind)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, folder, pre="gpt-2"):
    """Adds the tokenizer of a folder, with its chat template."""
    content = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    ids = dict(content["model"]["vocab"])
    added = {one["content"]: one for one in content["added_tokens"]}
    ids |= {text: one["id"] for text, one in added.items()}
    tokens = sorted(ids, key=ids.get)
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for one in added.values():
        kinds[one["id"]] = CONTROL if one["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    )
    named = {k: v for k, v in config.items() if k.endswith("_token") and v}
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        text = named.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if text in ids:
            add(ids[text])
    post = json.dumps(content.get("post_processor"))
    writer.add_add_bos_token("SpecialToken" in post and "bos_token" in named)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())
    elif isinstance(config.get("chat_template"), str):
        writer.add_chat_template(config["chat_template"])
