"""GGUF files of tiny models, read here and by transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers

from stagecraft.models import locate
from stagecraft.models.transformer import Transformer
from stagecraft.text import chat
from stagecraft.text import tokenizer as tokenizers
from tests import tiny
from tests.models import gguf_files
from tests.text import families

pytestmark = pytest.mark.peers

# Widths of whole blocks of 32 weights.
SIZES = dict(layers=2, width=64, ff_width=96, rope_theta=5000.0)
FAMILIES = {
    "llama": dict(qk_norm=False, tied=True, head_dim=16),
    "qwen2": dict(qk_norm=False, qkv_bias=True, tied=False, head_dim=16),
    # What transformers takes every such file to have.
    "qwen3": dict(qk_norm=True, tied=False, head_dim=128),
}


def randomised(model, rng):
    """The model with norms and biases that are not ones and zeros."""
    return jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), model
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantised", ["F32", "Q8_0", "Q4_1"])
def test_logits_are_those_of_transformers(family, quantised, tmp_path, parity_rng):
    own = families.folder(tmp_path / "tokenizer", "chatml", "bytes")
    size = tokenizers.load(own).vocab_size
    config = tiny.config(vocab_size=size, family=family, **SIZES, **FAMILIES[family])
    model = randomised(Transformer(config, jax.random.key(1)), parity_rng)
    path = tmp_path / "it.gguf"
    gguf_files.write(path, model, own, quantised=quantised)
    with jax.set_mesh(tiny.single()):
        ours = locate.locate(f"gguf:{path}").load(tiny.single())
        ids = parity_rng.integers(0, size, (2, 24)).astype(np.int32)
        places = np.tile(np.arange(24, dtype=np.int32), (2, 1))
        got = np.asarray(ours.logits(ids, places, np.ones_like(ids)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="it.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        want = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    assert got.std() > 0.1
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_a_tokenizer_is_that_of_transformers(name, pre, tmp_path, parity_rng):
    own = families.folder(tmp_path / "tokenizer", name, "bytes")
    config = tiny.config(vocab_size=tokenizers.load(own).vocab_size, qk_norm=False)
    model = Transformer(config, jax.random.key(1))

    def change(writer):
        writer.kv_data[0]["tokenizer.ggml.pre"].value = pre

    gguf_files.write(tmp_path / "it.gguf", model, own, change=change)
    ours = tokenizers.load(tmp_path / "it.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="it.gguf")
    for _ in range(40):
        text = families.words(parity_rng, name, most=12)
        if pre == "qwen2" and "\u0301" in text:  # composed by Qwen's own, not by them
            continue
        if not ours.spells(text):
            want = theirs(text, add_special_tokens=False).input_ids
            assert ours.encode(text) == want
            assert ours.decode(want) == text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    want = theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert chat.generation_prompt(messages, ours) == want
