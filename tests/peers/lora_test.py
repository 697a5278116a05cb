"""Adapters beside PEFT: its folders read, ours opened by it, on random tiny models."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from stagecraft import defaults, sharding
from stagecraft.models import huggingface, locate, lora
from stagecraft.models import peft as folders
from stagecraft.models.transformer import ScalarModel
from tests.peers import bridge

pytestmark = pytest.mark.peers

VOCAB, LENGTH = 48, 12
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    attn_implementation="eager",
    pad_token_id=0,
)
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        **dict(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        **dict(attn_implementation="eager", pad_token_id=0),
    ),
}
LINEAR = {"gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]}
LLAMA = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]


def folder_of(family, seed, path, *, scalar=False):
    """A random model of transformers, written."""
    config = FAMILIES[family]()
    kind = "SequenceClassification" if scalar else "CausalLM"
    if scalar:
        config.num_labels = 1
    torch.manual_seed(seed)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                weight.normal_(0, 0.2)
    model.save_pretrained(path)
    return opened(path, scalar)


def opened(path, scalar=False):
    kind = "SequenceClassification" if scalar else "CausalLM"
    return (
        getattr(transformers, f"AutoModelFor{kind}")
        .from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
        .eval()
    )


def theirs(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def ours(model, ids):
    ids = jnp.asarray(ids, jnp.int32)
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    run = jax.jit(lambda m, *a: m(*a) if isinstance(m, ScalarModel) else m.logits(*a))
    found = np.asarray(run(model, ids, places, jnp.ones_like(ids)))
    return found[:, -1:] if isinstance(model, ScalarModel) else found


def shaken(model, seed):
    """A PEFT model whose adapter is not zero."""
    torch.manual_seed(seed + 100)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_its_folders_are_read(family, parity_rng, parity_seed, tmp_path):
    base = folder_of(family, parity_seed, tmp_path / "base")
    every = LINEAR.get(family, LLAMA)
    count = parity_rng.integers(2, len(every) + 1)
    chosen = parity_rng.choice(every, count, replace=False).tolist()
    config = peft.LoraConfig(
        r=int(parity_rng.integers(2, 5)),
        lora_alpha=int(parity_rng.integers(2, 20)),
        target_modules=chosen,
        use_rslora=bool(parity_rng.integers(2)),
        rank_pattern={chosen[0]: 6},
        alpha_pattern={chosen[-1]: 7},
        layers_to_transform=[0, 2] if parity_rng.integers(2) else None,
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    model = shaken(peft.get_peft_model(base, config), parity_seed)
    model.save_pretrained(tmp_path / "adapter")
    ids = parity_rng.integers(0, VOCAB, (2, LENGTH))
    shared = sharding.make_mesh(1, 2, 2)
    with jax.set_mesh(shared):
        found = locate.locate(f"hf:{tmp_path / 'adapter'}").load(shared)
        np.testing.assert_allclose(ours(found, ids), theirs(model, ids), atol=1e-4)
        plain = ours(locate.locate(f"hf:{tmp_path / 'base'}").load(shared), ids)
    assert np.abs(plain - theirs(model, ids)).max() > 1e-2


CASES = [
    *((family, False, {}) for family in FAMILIES),
    ("gpt2", False, dict(rslora=True, targets="query,value,out,down")),
    ("llama", False, dict(embeddings=True)),
    ("qwen3", False, dict(embeddings=True, targets="up,query")),
    ("llama", True, {}),
    ("gpt2", True, dict(targets="query,key")),
]


@pytest.mark.parametrize(("family", "scalar", "changes"), CASES)
def test_it_opens_ours(family, scalar, changes, parity_rng, parity_seed, tmp_path):
    folder_of(family, parity_seed, tmp_path / "base", scalar=scalar)
    changes = dict(rank=3, alpha=5.0) | changes
    settings = lora.Settings(**dict(defaults.lora()) | changes)
    ids = parity_rng.integers(1, VOCAB, (2, LENGTH))
    shared = bridge.single()
    with jax.set_mesh(shared):
        base = huggingface.load(tmp_path / "base", shared)
        adapter = lora.init(settings, base, jax.random.key(0), scalar=scalar)
        keys = iter(jax.random.split(jax.random.key(parity_seed), 99))
        adapter = jax.tree.map(
            lambda x: 0.2 * jax.random.normal(next(keys), x.shape), adapter
        )
        if scalar:
            adapter.parts["bias"][...] = jnp.float32(0)
        config = getattr(base, "body", base).config
        folders.save(adapter, config, tmp_path / "out", shared, base=tmp_path / "base")
        expected = ours(lora.join(base, adapter), ids)
        again = locate.locate(f"hf:{tmp_path / 'out'}").load(shared)
        np.testing.assert_allclose(ours(again, ids), expected, atol=1e-4)
    model = peft.PeftModel.from_pretrained(
        opened(tmp_path / "base", scalar), tmp_path / "out"
    ).eval()
    np.testing.assert_allclose(theirs(model, ids), expected, atol=1e-4)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(theirs(merged, ids), expected, atol=1e-4)


def test_a_reward_adapter_on_a_language_model(parity_rng, parity_seed, tmp_path):
    """TRL's way: base a ...ForCausalLM, the head in modules_to_save."""
    folder_of("llama", parity_seed, tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, dtype=torch.float32
    )
    base.config.pad_token_id = 0
    config = peft.LoraConfig(
        r=2,
        **dict(task_type="SEQ_CLS", modules_to_save=["score"], target_modules=LLAMA),
    )
    model = shaken(peft.get_peft_model(base, config), parity_seed)
    model.save_pretrained(tmp_path / "adapter")
    ids = parity_rng.integers(1, VOCAB, (2, LENGTH))
    shared = bridge.single()
    with jax.set_mesh(shared):
        found = locate.locate(f"hf:{tmp_path / 'adapter'}").load(shared)
        np.testing.assert_allclose(ours(found, ids), theirs(model, ids), atol=1e-4)
