"""Every family against transformers: random tiny models, read, run, written, read.

The shapes and every flag of a family are drawn from --parity-seed.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from stagecraft import sharding, tree
from stagecraft.models import huggingface, sampling
from stagecraft.models.transformer import Transformer
from tests.peers import bridge

pytestmark = pytest.mark.peers

VOCAB, LENGTH = 96, 44
DRAWS = 3  # models of each family
# Longer than what a model is said to have been trained on: scaling shows.
SHORT = 16


def choice(rng, *values):
    return values[rng.integers(len(values))]


def coin(rng):
    return bool(rng.integers(2))


def sizes(rng, *, head_dim=True, layers=None):
    heads = choice(rng, 2, 4)
    channels = choice(rng, 8, 16)
    out = dict(
        vocab_size=VOCAB,
        hidden_size=choice(rng, 32, 48) if head_dim else heads * channels,
        intermediate_size=choice(rng, 40, 56),
        num_hidden_layers=layers or int(rng.integers(2, 6)),
        num_attention_heads=heads,
        num_key_value_heads=choice(rng, heads, heads // 2) if heads > 2 else 2,
        max_position_embeddings=128,
        tie_word_embeddings=coin(rng),
        rms_norm_eps=choice(rng, 1e-6, 1e-5, 1e-3),
    )
    return out | ({"head_dim": channels} if head_dim else {})


def rope(rng, channels, *kinds):
    """rope_parameters of any kind, and the longest length they go with."""
    kind = choice(rng, *(kinds or ("default", *SCALED)))
    theta = choice(rng, 1e4, 3e3)
    return {"rope_type": kind, "rope_theta": theta} | SCALED.get(kind, dict)(
        *((rng, channels) if kind == "longrope" else ())
    )


def _longrope(rng, channels):
    pairs = channels // 2
    return dict(
        short_factor=rng.uniform(1, 1.5, pairs).tolist(),
        long_factor=rng.uniform(1.5, 4, pairs).tolist(),
        original_max_position_embeddings=SHORT,
    )


SCALED = {
    "linear": lambda: dict(factor=3.0),
    "dynamic": lambda: dict(factor=2.0),
    "yarn": lambda: dict(factor=8.0, original_max_position_embeddings=SHORT),
    "llama3": lambda: dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=SHORT,
    ),
    "longrope": _longrope,
}


def pattern(rng, layers):
    kinds = ["sliding_attention", "full_attention"]
    return [kinds[rng.integers(2)] for _ in range(layers)]


def llama(rng):
    out = sizes(rng) | dict(attention_bias=coin(rng), mlp_bias=coin(rng))
    out["rope_parameters"] = rope(rng, out["head_dim"])
    if out["rope_parameters"]["rope_type"] == "dynamic":
        out["max_position_embeddings"] = SHORT
    return out


def mistral(rng):
    out = sizes(rng) | dict(sliding_window=choice(rng, None, 5, 9))
    return out | dict(rope_parameters=rope(rng, out["head_dim"], "default", "yarn"))


def _qwen_window(rng, out):
    layers = out["num_hidden_layers"]
    out["use_sliding_window"] = coin(rng)
    out["sliding_window"] = choice(rng, 5, 9)
    if coin(rng):
        out["max_window_layers"] = int(rng.integers(0, layers))
    elif out["use_sliding_window"]:
        out["layer_types"] = pattern(rng, layers)
    return out


def qwen2(rng):
    out = _qwen_window(rng, sizes(rng, head_dim=False))
    channels = out["hidden_size"] // out["num_attention_heads"]
    return out | dict(rope_parameters=rope(rng, channels, "default", "yarn"))


def qwen3(rng):
    out = _qwen_window(rng, sizes(rng)) | dict(attention_bias=coin(rng))
    return out | dict(rope_parameters=rope(rng, out["head_dim"], "default", "yarn"))


def qwen3_moe(rng):
    out = sizes(rng) | dict(
        attention_bias=coin(rng),
        use_sliding_window=coin(rng),
        sliding_window=choice(rng, 5, 9),
        num_experts=choice(rng, 4, 8),
        num_experts_per_tok=choice(rng, 1, 2, 3),
        moe_intermediate_size=24,
        norm_topk_prob=coin(rng),
        decoder_sparse_step=choice(rng, 1, 2),
        mlp_only_layers=choice(rng, [], [0]),
    )
    return out | dict(rope_parameters=rope(rng, out["head_dim"], "default", "yarn"))


def mixtral(rng):
    out = sizes(rng) | dict(
        sliding_window=choice(rng, None, 7),
        num_local_experts=choice(rng, 4, 8),
        num_experts_per_tok=choice(rng, 1, 2),
    )
    return out | dict(rope_parameters=rope(rng, out["head_dim"], "default", "linear"))


def gemma2(rng):
    out = sizes(rng) | dict(
        attention_bias=coin(rng),
        query_pre_attn_scalar=choice(rng, 8, 24),
        sliding_window=choice(rng, 5, 9),
        attn_logit_softcapping=choice(rng, None, 5.0),
        final_logit_softcapping=choice(rng, None, 3.0),
        hidden_activation=choice(rng, "gelu_pytorch_tanh", "gelu"),
    )
    if coin(rng):
        out["layer_types"] = pattern(rng, out["num_hidden_layers"])
    return out | dict(rope_parameters=rope(rng, out["head_dim"], "default"))


def gemma3_text(rng):
    out = gemma2(rng)
    if "layer_types" not in out:
        out["num_hidden_layers"] = 7
    full = rope(rng, out["head_dim"], "default", "linear")
    near = {"rope_type": "default", "rope_theta": 500.0}
    both = {"full_attention": full, "sliding_attention": near}
    return out | dict(rope_parameters=both)


def olmo2(rng):
    out = sizes(rng, head_dim=False) | dict(attention_bias=coin(rng))
    channels = out["hidden_size"] // out["num_attention_heads"]
    return out | dict(rope_parameters=rope(rng, channels, "default", "yarn"))


def smollm3(rng):
    out = sizes(rng, head_dim=False) | dict(
        attention_bias=coin(rng),
        mlp_bias=coin(rng),
        use_sliding_window=coin(rng),
        sliding_window=choice(rng, 5, 9),
        no_rope_layer_interval=choice(rng, 2, 4),
    )
    channels = out["hidden_size"] // out["num_attention_heads"]
    return out | dict(rope_parameters=rope(rng, channels, "default", "yarn"))


def stablelm(rng):
    out = sizes(rng, head_dim=False) | dict(
        layer_norm_eps=choice(rng, 1e-5, 1e-3), use_qkv_bias=coin(rng)
    )
    channels = out["hidden_size"] // out["num_attention_heads"]
    share = choice(rng, 0.25, 0.5, 1.0)
    kinds = ("default", "linear", "yarn", "dynamic")
    if channels * share == 2:  # where transformers' dynamic divides by zero
        kinds = kinds[:3]
    scaling = rope(rng, channels, *kinds)
    if scaling["rope_type"] == "dynamic":
        out["max_position_embeddings"] = SHORT
    return out | dict(rope_parameters=scaling | {"partial_rotary_factor": share})


def gpt2(rng):
    heads = choice(rng, 2, 4)
    return dict(
        vocab_size=VOCAB,
        n_embd=heads * choice(rng, 8, 16),
        n_layer=int(rng.integers(2, 5)),
        n_head=heads,
        n_positions=96,
        n_inner=choice(rng, None, 40),
        activation_function=choice(rng, "gelu_new", "relu", "gelu"),
        tie_word_embeddings=coin(rng),
        layer_norm_epsilon=choice(rng, 1e-5, 1e-3),
    )


FAMILIES = {
    "llama": ("Llama", llama),
    "mistral": ("Mistral", mistral),
    "qwen2": ("Qwen2", qwen2),
    "qwen3": ("Qwen3", qwen3),
    "qwen3_moe": ("Qwen3Moe", qwen3_moe),
    "mixtral": ("Mixtral", mixtral),
    "gemma2": ("Gemma2", gemma2),
    "gemma3_text": ("Gemma3Text", gemma3_text),
    "olmo2": ("Olmo2", olmo2),
    "smollm3": ("SmolLM3", smollm3),
    "stablelm": ("StableLm", stablelm),
    "gpt2": ("GPT2", gpt2),
}
HEADS = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def make(family, seed, draw, *, scalar=False):
    """transformers' model of a family, its shape and weights drawn."""
    classes, draw_config = FAMILIES[family]
    rng = np.random.default_rng([seed, draw, len(family)])
    config = getattr(transformers, f"{classes}Config")(
        **draw_config(rng),
        **dict(pad_token_id=0, bos_token_id=None, eos_token_id=None),
        **(dict(num_labels=1) if scalar else {}),
        attn_implementation="eager",
    )
    name = HEADS.get(classes, f"{classes}ForCausalLM")
    if scalar:
        name = f"{classes}ForSequenceClassification"
    torch.manual_seed(seed * 1000 + draw)
    peer = getattr(transformers, name)(config).eval()
    low, high = (-0.5, 0.5) if family.startswith("gemma") else (0.5, 1.5)
    with torch.no_grad():
        for key, weight in peer.named_parameters():
            if ("norm" in key or "ln_" in key) and key.endswith("weight"):
                weight.uniform_(low, high)
            else:
                weight.normal_(0, 0.15)
    return peer


CASES = [(family, draw) for family in FAMILIES for draw in range(DRAWS)]


@pytest.fixture(
    scope="module", params=CASES, ids=[f"{family}-{draw}" for family, draw in CASES]
)
def both(request, tmp_path_factory, parity_seed):
    """(transformers' model, its folder in several shards, ours read from it)."""
    peer = make(request.param[0], parity_seed, request.param[1])
    folder = tmp_path_factory.mktemp("folder") / "theirs"
    peer.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return peer, folder, huggingface.load(folder, bridge.single())


def theirs(peer, ids, **kwargs):
    with torch.no_grad():
        tensors = {k: torch.as_tensor(v) for k, v in kwargs.items()}
        return peer(input_ids=torch.as_tensor(ids), **tensors).logits.numpy()


def ours(model, ids):
    positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    run = jax.jit(lambda m, *args: m.logits(*args))
    return np.asarray(run(model, ids, positions, np.ones_like(ids)))


def test_logits(both, parity_rng):
    peer, _, model = both
    ids = parity_rng.integers(0, VOCAB, (2, LENGTH))
    expected = theirs(peer, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours(model, ids), expected, atol=1e-4)


def test_written_and_opened_by_transformers(both, tmp_path, parity_rng):
    """The same class, the same logits bit for bit, and back the same weights."""
    peer, _, model = both
    family = huggingface.save(model, tmp_path / "out", shard_size=30_000)
    assert family.name == peer.config.model_type
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert type(again) is type(peer)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    ids = parity_rng.integers(0, VOCAB, (2, LENGTH))
    np.testing.assert_allclose(theirs(again, ids), theirs(peer, ids), atol=1e-6)
    back = huggingface.load(tmp_path / "out", bridge.single())
    assert back.config == model.config
    assert tree.digest(back) == tree.digest(model)


def test_the_same_on_eight_devices(both, parity_rng):
    _, folder, model = both
    shared = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(shared):
        spread = huggingface.load(folder, shared)
        assert tree.digest(spread) == tree.digest(model)
        ids = parity_rng.integers(0, VOCAB, (4, LENGTH))
        got = ours(spread, ids)
    np.testing.assert_allclose(got, ours(model, ids), atol=1e-4)


def by_length(peer):
    """Whether the longest row of a batch sets the wavelengths of all."""
    rope_ = getattr(peer.config, "rope_parameters", None) or {}
    return rope_.get("rope_type") in ("dynamic", "longrope")


def rewards(peer, ids, seen):
    """What transformers' reward model says of rows, each of its own length."""
    if not by_length(peer):
        return theirs(peer, ids, attention_mask=seen)[:, 0]
    found = []
    for row, count in zip(ids, seen.sum(1), strict=True):
        theirs(peer, ids[:1, :1])  # one long sequence sets those of the next, too
        found.append(theirs(peer, row[None, :count])[0, 0])
    return np.array(found)


def greedy(peer, ids, seen):
    """What transformers' generate says, 64 tokens a row."""
    if len(ids) > 1 and by_length(peer):
        # Each row alone, after a short one.
        rows = []
        for row, real in zip(ids, seen, strict=True):
            theirs(peer, ids[:1, :1])
            rows.append(greedy(peer, row[None, real], real[None, real]))
        return np.concatenate(rows)
    with torch.no_grad():
        return peer.generate(
            torch.as_tensor(ids),
            attention_mask=torch.as_tensor(seen.astype(np.int64)),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )[:, ids.shape[1] :].numpy()


def test_greedy_generation(both, parity_rng):
    """64 tokens after unequal prompts, padded on the left, token by token."""
    peer, _, model = both
    lengths = [3, 9, 17, 12]
    width = max(lengths)
    ids = parity_rng.integers(1, VOCAB, (len(lengths), width))
    seen = np.arange(width) >= width - np.array(lengths)[:, None]
    ids = np.where(seen, ids, 0)
    expected = greedy(peer, ids, seen)
    got = jax.jit(
        lambda m, i, s: sampling.generate(
            m,
            i,
            s,
            jax.random.key(0),
            max_new_tokens=64,
            temperature=0.0,
            stop_ids=(),
        )
    )(model, jnp.asarray(ids, jnp.int32), jnp.asarray(seen))
    np.testing.assert_array_equal(np.asarray(got.tokens), expected)


# Reward models


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_models(family, tmp_path, parity_seed, parity_rng):
    """Read from a ...ForSequenceClassification, and written as one."""
    peer = make(family, parity_seed, 0, scalar=True)
    peer.save_pretrained(tmp_path / "in")
    model = huggingface.load(tmp_path / "in", bridge.single(), module="scalar")
    ids = parity_rng.integers(1, VOCAB, (3, 20))
    ids[1, 15:], ids[2, 9:] = 0, 0
    last = np.array([19, 14, 8])
    seen = (ids != 0).astype(np.int64)
    expected = rewards(peer, ids, seen)
    positions = np.tile(np.arange(20), (3, 1))
    got = np.asarray(model(ids, positions, seen))[np.arange(3), last]
    np.testing.assert_allclose(got, expected, atol=1e-4)

    model.bias.set_value(jnp.float32(0.75))
    huggingface.save(model, tmp_path / "out", ids={"pad_token_id": 0})
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert type(again) is type(peer) and again.config.num_labels == 1
    np.testing.assert_allclose(rewards(again, ids, seen), expected, atol=1e-5)
    back = huggingface.load(tmp_path / "out", bridge.single())
    assert tree.digest(back) == tree.digest(model)


# Spellings


def test_older_spellings_of_config_json(tmp_path, parity_seed):
    """rope_theta and rope_scaling, torch_dtype, no layer_types: the same model."""
    for family in ("llama", "qwen2", "gemma3_text"):
        for draw in range(DRAWS):
            peer = make(family, parity_seed, draw)
            folder = tmp_path / f"{family}{draw}"
            peer.save_pretrained(folder)
            new = huggingface.config(folder)
            path = folder / "config.json"
            hf = json.loads(path.read_text())
            rope_ = hf.pop("rope_parameters")
            if family == "gemma3_text":
                hf["rope_local_base_freq"] = rope_["sliding_attention"]["rope_theta"]
                rope_ = rope_["full_attention"]
            hf["rope_theta"] = rope_.pop("rope_theta")
            kind = rope_.pop("rope_type")
            hf["rope_scaling"] = {"type": kind} | rope_ if kind != "default" else None
            hf["torch_dtype"] = hf.pop("dtype")
            path.write_text(json.dumps(hf))
            assert huggingface.config(folder) == new


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path, parity_seed):
    """Read as float32, written back as it came: bit for bit."""
    peer = make("llama", parity_seed, 0).to(getattr(torch, dtype))
    peer.save_pretrained(tmp_path / "in")
    model = huggingface.load(tmp_path / "in", bridge.single())
    assert {x.dtype for x in tree.named(model).values()} == {jnp.dtype("float32")}
    huggingface.save(model, tmp_path / "out", dtype=dtype)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == getattr(torch, dtype)
    for (name, one), two in zip(
        peer.named_parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_a_model_from_scratch_leaves_as_the_smallest_family(tmp_path, parity_rng):
    for changes, expected in [
        (dict(qk_norm=False), "Llama"),
        (dict(qk_norm=True, tied=False), "Qwen3"),
    ]:
        config = bridge.CONFIG.__class__(
            **{**bridge.CONFIG.__dict__, **changes, "init_std": 0.2}
        )
        model = Transformer(config, jax.random.key(1))
        huggingface.save(model, tmp_path / "out", overwrite=True)
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(peer).__name__ == f"{expected}ForCausalLM"
        ids = parity_rng.integers(0, config.vocab_size, (2, 30))
        np.testing.assert_allclose(ours(model, ids), theirs(peer, ids), atol=1e-4)
        shutil.rmtree(tmp_path / "out")
