"""Adapters that PEFT saved after a resize of the embedding are what PEFT loads."""

import numpy as np
import peft
import pytest
import torch
import transformers

from stagecraft import sharding
from stagecraft.models import locate
from tests.peers import families_test

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_after_a_resize(tmp_path, tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=families_test.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    made = transformers.LlamaForCausalLM(config)
    made.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = families_test.VOCAB + 8
    base.resize_token_embeddings(rows)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    peer = peft.get_peft_model(base, settings).eval()
    peer.save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(0).integers(0, rows, (2, 12))
    with torch.no_grad():
        expected = peer(torch.as_tensor(tokens)).logits.numpy()
    source = locate.locate(f"hf:{tmp_path / 'adapter'}")
    assert source.info()["model"]["vocab_size"] == rows
    ours = source.load(sharding.make_mesh())
    np.testing.assert_allclose(families_test.ours(ours, tokens), expected, atol=1e-4)
