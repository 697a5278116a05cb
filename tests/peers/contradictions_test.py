"""Folders that say two things: what transformers reads is what we read."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stagecraft import exchange, sharding
from stagecraft.models import huggingface
from stagecraft.text import tokenizer as tokenizers
from tests.peers import families_test
from tests.text import families

pytestmark = pytest.mark.peers


def tied_folder(path, **changes):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=families_test.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    config = transformers.LlamaConfig(**sizes | changes)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    metadata = {"format": "pt"}
    save_file(tensors, folder / "model.safetensors", metadata)


def _differs(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()


def _twice(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def _second_name(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def agree(folder):
    tokens = np.random.default_rng(0).integers(0, families_test.VOCAB, (2, 12))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = huggingface.load(folder, sharding.make_mesh())
    np.testing.assert_allclose(families_test.ours(ours, tokens), expected, atol=1e-4)
    return ours


@pytest.mark.parametrize("change", [_differs, _twice, _second_name])
def test_tied_heads(tmp_path, change):
    folder = tied_folder(tmp_path / "in")
    rewritten(folder, change)
    ours = agree(folder)
    assert (ours.unembed is None) == (change is not _differs)


def test_two_sets_of_weights(tmp_path):
    folder = tied_folder(tmp_path / "in")
    other = tied_folder(tmp_path / "other", initializer_range=0.1)
    model = transformers.AutoModelForCausalLM.from_pretrained(other)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    for path in (tmp_path / "shards").glob("model*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert (folder / "model.safetensors.index.json").exists()
    agree(folder)


def test_theta_inside_of_the_older_key(tmp_path):
    folder = tied_folder(tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config.pop("rope_theta", None)
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert agree(folder).config.rope_theta == 77.0


def test_generation_ends_where_training_did(tmp_path):
    """An exported folder stops at the template's end of turn, whatever it came with."""
    tokens = families.folder(tmp_path / "in", "chatml")
    made = tokenizers.load(tokens)
    tied_folder(tokens, vocab_size=made.vocab_size)
    other = made.encode("yes")[0]
    settings = {"eos_token_id": other, "top_k": 7, "do_sample": True}
    (tokens / "generation_config.json").write_text(json.dumps(settings))
    exchange.import_folder(tokens, tmp_path / "run")
    exchange.export(tmp_path / "run", "base", tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert peer.generation_config.eos_token_id == [made.stops[0], other]
    assert (peer.generation_config.top_k, peer.generation_config.do_sample) == (7, True)
    # A model that says nothing but the end of a turn.
    end, hidden = made.stops[0], peer.lm_head.weight
    with torch.no_grad():
        peer.lm_head.weight = torch.nn.Parameter(torch.zeros_like(hidden))
        peer.lm_head.bias = torch.nn.Parameter(torch.zeros(len(hidden)))
        peer.lm_head.bias[end] = 9.0
    prompt = torch.tensor([made.encode("Oslo")])
    out = peer.generate(prompt, max_new_tokens=5, do_sample=False)
    assert out[0, prompt.shape[1] :].tolist() == [end]
