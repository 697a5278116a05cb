"""The same weights in transformers' Llama and Qwen 3 give the same logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import tree
from stagecraft.models.config import ModelConfig
from stagecraft.models.transformer import Transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peers

BASE = ModelConfig(
    vocab_size=96,
    width=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ff_width=56,
    max_length=64,
    qk_norm=False,
    rope_theta=5e3,
    norm_eps=1e-6,
)
CASES = {
    "llama": {},
    "llama, untied, as many key heads": {"tied": False, "kv_heads": 4},
    "llama, one key head, wide heads": {"kv_heads": 1, "head_dim": 16},
    "qwen3": {"qk_norm": True},
}


def make_peer(c):
    """transformers' model of a config, with random weights, norm scales among them."""
    family = "Qwen3" if c.qk_norm else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.ff_width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_length,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tied,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 0.15)
    return peer


def convert(peer, c):
    """A Transformer with the peer's weights."""
    theirs = {k: v.detach().numpy() for k, v in peer.state_dict().items()}

    def layers(name):
        return np.stack(
            [theirs[f"model.layers.{i}.{name}.weight"] for i in range(c.layers)]
        )

    def transposed(name, *shape):
        return layers(name).swapaxes(1, 2).reshape(c.layers, *shape)

    ours = {
        "embed": theirs["model.embed_tokens.weight"],
        "norm/scale": theirs["model.norm.weight"],
        "layers/attention_norm/scale": layers("input_layernorm"),
        "layers/ff_norm/scale": layers("post_attention_layernorm"),
        "layers/attention/query": transposed(
            "self_attn.q_proj", c.width, c.heads, c.head_dim
        ),
        "layers/attention/key": transposed(
            "self_attn.k_proj", c.width, c.kv_heads, c.head_dim
        ),
        "layers/attention/value": transposed(
            "self_attn.v_proj", c.width, c.kv_heads, c.head_dim
        ),
        "layers/attention/out": transposed(
            "self_attn.o_proj", c.heads, c.head_dim, c.width
        ),
        "layers/ff/gate": transposed("mlp.gate_proj", c.width, c.ff_width),
        "layers/ff/up": transposed("mlp.up_proj", c.width, c.ff_width),
        "layers/ff/down": transposed("mlp.down_proj", c.ff_width, c.width),
    }
    if not c.tied:
        ours["unembed"] = theirs["lm_head.weight"]
    if c.qk_norm:
        ours["layers/attention/query_norm/scale"] = layers("self_attn.q_norm")
        ours["layers/attention/key_norm/scale"] = layers("self_attn.k_norm")
    abstract = jax.eval_shape(lambda key: Transformer(c, key), jax.random.key(0))
    assert ours.keys() == tree.named(abstract).keys()
    return tree.map_names(lambda name, leaf: jnp.asarray(ours[name]), abstract)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request):
    config = dataclasses.replace(BASE, **request.param)
    peer = make_peer(config)
    model = convert(peer, config)
    return jax.jit(lambda *args: model.logits(*args)), peer


def theirs(peer, ids, **kwargs):
    with torch.no_grad():
        tensors = {k: torch.as_tensor(v) for k, v in kwargs.items()}
        return peer(input_ids=torch.as_tensor(ids), **tensors).logits.numpy()


def tokens(*shape):
    return np.random.default_rng(1).integers(0, BASE.vocab_size, shape)


def test_plain(pair):
    ours, peer = pair
    ids = tokens(3, 17)
    positions = np.tile(np.arange(17), (3, 1))
    expected = theirs(peer, ids)
    assert np.abs(expected).max() > 1  # logits of a size at which 1e-4 means something
    got = ours(ids, positions, np.ones_like(ids))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_left_padded(pair):
    ours, peer = pair
    ids = tokens(4, 15)
    mask = (np.arange(15) >= np.array([0, 4, 9, 14])[:, None]).astype(np.int64)
    positions = np.cumsum(mask, axis=1) - mask
    expected = theirs(peer, ids, attention_mask=mask, position_ids=positions)
    got = np.asarray(ours(ids, positions, mask))
    assert np.isfinite(got).all()
    real = mask.astype(bool)
    np.testing.assert_allclose(got[real], expected[real], atol=1e-4)


def test_packed_documents_equal_separate_ones(pair):
    ours, peer = pair
    documents = [tokens(1, n) for n in (5, 9, 1, 7)]
    ids = np.concatenate(documents, axis=1)
    segments = np.concatenate(
        [np.full_like(d, i + 1) for i, d in enumerate(documents)], axis=1
    )
    positions = np.concatenate([np.arange(d.shape[1]) for d in documents])[None]
    got = ours(ids, positions, segments)
    expected = np.concatenate([theirs(peer, d) for d in documents], axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-4)
