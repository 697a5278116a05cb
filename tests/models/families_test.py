"""The decoder in the shapes of its families: against numpy, cached, and sharded.

Each family sets other fields; together the cases below set every one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import sharding, tree
from stagecraft.errors import UserError
from stagecraft.models import heads, layers, sampling, transformer
from stagecraft.models.config import ModelConfig
from stagecraft.models.transformer import Transformer
from tests import tiny
from tests.models import numpy_decoder

BASE = tiny.config(
    width=16,  # other than that of all heads
    layers=2,
    ff_width=24,
    max_length=32,
    init_std=0.02,
    qk_norm=False,
    rope_theta=100.0,
)
GEMMA = {
    **{"norm_offset": 1.0, "norm_place": "both", "embed_scale": 4.0, "window": 3},
    **{"activation": "gelu_tanh", "attention_scale": 0.2, "sliding": (1, 0)},
}
EXPERTS = {"experts": 4, "expert_width": 12}
CASES = {
    "gemma 2": {**GEMMA, "layers": 4, "attention_softcap": 2.0, "logit_softcap": 1.5},
    "gemma 3": {
        **GEMMA,
        **{"layers": 5, "sliding": (1, 1, 0), "qk_norm": True},
        **{"rope_theta_sliding": 20.0, "rope_scaling": "linear"},
        **{"rope_arguments": (4.0,)},
    },
    "olmo 2": {"norm_place": "post", "qk_norm": True, "qk_norm_over": "projection"},
    "gpt-2": {
        **{"norm": "layer", "positions": "learned", "gated": False, "kv_heads": 4},
        **{"qkv_bias": True, "out_bias": True, "ff_bias": True},
        **{"activation": "gelu_tanh", "head_dim": 5},
    },
    "smollm 3": {"rotates": (1, 1, 0), "layers": 4},
    "qwen 2": {
        "qkv_bias": True,
        "window": 4,
        "sliding": (0, 1, 1),
        "layers": 3,
        "tied": False,
    },
    "mixtral": {**EXPERTS, "window": 5},
    "qwen 3 moe": {
        **EXPERTS,
        **{"layers": 5, "sparse": (0, 1), "experts_per_token": 3, "qk_norm": True},
        **{"experts_renormalize": False, "balance_coef": 0.1},
    },
    "dense, then sparse": {
        **EXPERTS,
        "sparse": (0, 1, 1),
        "layers": 3,
        "activation": "relu",
    },
    "partly rotary, gelu": {"rope_share": 0.5, "activation": "gelu", "ff_bias": True},
    "llama 3.1": {"rope_scaling": "llama3", "rope_arguments": (8.0, 1.0, 4.0, 40)},
    "yarn": {
        "rope_scaling": "yarn",
        "rope_arguments": (4.0, 64, 8.0, 1.0, 1.2, True),
    },
    "yarn, not truncated": {
        "rope_scaling": "yarn",
        "rope_arguments": (4.0, 64, 8.0, 1.0, 1.2, False),
    },
    "dynamic": {"rope_scaling": "dynamic", "rope_arguments": (3.0, 8)},
    "longrope": {
        "rope_scaling": "longrope",
        "rope_arguments": ((1.0, 1.1, 1.2, 1.3), (1.0, 2.0, 3.0, 4.0), 8, 1.1),
    },
    "no positions": {"positions": "none"},
}
# Those in which a cached token must see other things than a whole pass shows it.
CACHED = [
    *("gemma 2", "gemma 3", "gpt-2", "smollm 3", "mixtral", "qwen 3 moe"),
]


@functools.cache
def make(case, seed=0):
    """Random weights of a size at which every part matters to the logits."""
    config = dataclasses.replace(BASE, **CASES[case]).validate()
    model = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        size = 0.6 if name.endswith("router") else 0.3
        x = rng.normal(0, size, leaf.shape)
        x = x + (1 - config.norm_offset) if name.endswith("scale") else x
        return jnp.asarray(x, leaf.dtype)

    return tree.map_names(draw, model)


def document(length, seed=0):
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, length)


def packed(parts, left=0, right=0):
    """One row: padding, documents one after the other, padding."""
    ids = np.concatenate([np.full(left, 3), *parts, np.full(right, 5)])
    positions = np.concatenate(
        [np.zeros(left), *(np.arange(len(d)) for d in parts), np.zeros(right)]
    )
    segments = np.concatenate(
        [
            np.zeros(left),
            *(np.full(len(d), i + 1) for i, d in enumerate(parts)),
            np.zeros(right),
        ]
    )
    return [a[None].astype(np.int32) for a in (ids, positions, segments)]


logits = jax.jit(lambda model, *args: model.logits(*args))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_plain_numpy(case):
    """Packed behind padding, documents of unequal length: as each alone."""
    model, parts = make(case), [document(11, 1), document(6, 2)]
    got = np.asarray(logits(model, *packed(parts, left=2, right=1)))[0]
    assert np.isfinite(got).all()
    start = 2
    for part in parts:
        expected = numpy_decoder.logits(model, part)
        rows = got[start : start + len(part)]
        np.testing.assert_allclose(rows, expected, atol=3e-5, rtol=1e-4)
        start += len(part)


@pytest.mark.parametrize("case", CACHED)
def test_cached_decoding_equals_the_whole_pass(case):
    model, lengths, new = make(case), (7, 2, 5), 9
    ids = np.stack([document(7, i) for i in range(3)]).astype(np.int32)
    mask = np.arange(7) >= 7 - np.asarray(lengths)[:, None]
    sample = sampling.generate(
        model,
        *(ids, mask, jax.random.key(0)),
        max_new_tokens=new,
        stop_ids=(),
        temperature=0.0,
    )
    tokens = np.concatenate([ids, sample.tokens], axis=1)
    segments = np.pad(mask, ((0, 0), (0, new)), constant_values=True).astype(np.int32)
    positions = np.cumsum(segments, axis=1) - segments
    whole = np.asarray(logits(model, tokens, positions, segments))[:, 6:-1]
    np.testing.assert_array_equal(sample.tokens, whole.argmax(-1))
    whole = np.float64(whole)
    top = whole.max(-1) - np.log(np.exp(whole).sum(-1))
    np.testing.assert_allclose(sample.logps, top, atol=2e-5)


def gradient(model, args):
    def loss(model):
        hidden, *rest = (
            model.hidden_and_balance(*args)
            if model.config.balance_coef
            else (model.hidden(*args),)
        )
        targets = jnp.roll(args[0], -1, axis=1)
        stats = model.token_logps(hidden, targets, block_size=5)
        total = jnp.where(args[2] > 0, stats.logps, 0).sum()
        total += sum(balance.loss.sum() for balance in rest)
        return total / (args[2] > 0).sum()  # a token's, as in training

    return jax.jit(jax.value_and_grad(loss))(model)


def close(a, b, atol):
    for (name, x), y in zip(tree.named(a).items(), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", ["gemma 3", "qwen 3 moe"])
def test_the_layer_loop_changes_no_number(case, monkeypatch):
    """Neither how it is unrolled nor what is recomputed."""
    model, args = make(case), packed([document(9, 1), document(4, 2)])
    value, expected = gradient(model, args)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    monkeypatch.setattr(transformer, "UNROLL", 0)
    again = dataclasses.replace(model.config, remat="full")
    other = tree.map_names(
        lambda name, _: tree.named(model)[name],
        jax.eval_shape(lambda key: Transformer(again, key), jax.random.key(0)),
    )
    got, found = gradient(other, args)
    assert got == pytest.approx(float(value), rel=1e-5)
    close(found, expected, atol=2e-6)


def prompts(args):
    """The first tokens of each row, none of them padding."""
    return args[0][:, :6], np.ones((8, 6), bool)


def greedy(model, ids, mask):
    settings = dict(max_new_tokens=4, stop_ids=(), temperature=0.0)
    return sampling.generate(model, ids, mask, jax.random.key(0), **settings).tokens


@functools.cache
def on_one_device(case):
    """What every mesh must come to: (model, rows, (loss, gradient), greedy tokens)."""
    model = make(case)
    rows = [packed([document(8, i), document(4, i + 9)]) for i in range(8)]
    args = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    return model, args, gradient(model, args), greedy(model, *prompts(args))


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("gemma 2", dict(fsdp=2, tensor=2)),
        ("gpt-2", dict(fsdp=2, tensor=2)),
        ("gemma 2", dict(context=4)),
        ("qwen 3 moe", dict(fsdp=2, context=2, expert=2)),
        ("qwen 3 moe", dict(expert=4, tensor=2)),
    ],
)
def test_the_mesh_does_not_matter(case, sizes):
    model, args, (expected, plain), tokens = on_one_device(case)
    made = sharding.make_mesh(**sizes)
    with jax.set_mesh(made):
        placed = jax.device_put(model, sharding.shardings(model, made))
        got, sharded = gradient(placed, sharding.shard_batch(args, made))
        sampled = greedy(placed, *sharding.shard_batch(prompts(args), made))
    assert got == pytest.approx(float(expected), rel=1e-5)
    close(sharded, plain, atol=1e-5)
    np.testing.assert_array_equal(sampled, tokens)


def test_context_leaves_each_device_its_part_of_a_row():
    """Hidden states lie apart, and a gradient needs a part of the memory."""
    config = dataclasses.replace(BASE, **{**CASES["gemma 2"], "max_length": 512})
    abstract = jax.eval_shape(
        lambda key: Transformer(config.validate(), key), jax.random.key(0)
    )
    tokens = [jax.ShapeDtypeStruct((1, 512), jnp.int32)] * 3

    def loss(model, ids, positions, segments):
        return model.hidden(ids, positions, segments).sum()

    def compiled(parts):
        mesh = sharding.make_mesh(1, context=parts, devices=jax.devices()[:parts])
        with jax.set_mesh(mesh):
            model = sharding.with_shardings(
                abstract, sharding.shardings(abstract, mesh)
            )
            hidden = jax.jit(Transformer.hidden).lower(model, *tokens).compile()
            grad = jax.jit(jax.grad(loss)).lower(model, *tokens).compile()
        return hidden, grad.memory_analysis().temp_size_in_bytes

    (_, whole), (hidden, part) = compiled(1), compiled(4)
    assert hidden.output_shardings.spec[1] == "context"
    # Keys and values of a layer are whole, and so are the gradients of weights: .55 of
    # the memory with jax 0.10, .63 with 0.12.
    assert part < 0.7 * whole


def test_the_names_of_the_parts():
    """Contract with `huggingface`: what a family's table can count on."""

    def names(case):
        return {k: v.shape for k, v in tree.named(make(case)).items()}

    gpt = names("gpt-2")
    assert gpt["positions"] == (32, 16)
    assert gpt["norm/bias"] == (16,)
    assert gpt["layers/attention/query_bias"] == (2, 4, 5)
    assert gpt["layers/attention/out_bias"] == gpt["layers/ff/down_bias"] == (2, 16)
    assert gpt["layers/ff/up_bias"] == (2, 24) and "layers/ff/gate" not in gpt
    assert names("olmo 2")["layers/attention/query_norm/scale"] == (2, 32)
    assert names("olmo 2")["layers/attention/key_norm/scale"] == (2, 16)
    places = {
        "qwen 2": {"attention_norm", "ff_norm"},
        "olmo 2": {"attention_post_norm", "ff_post_norm"},
    }
    places["gemma 2"] = places["qwen 2"] | places["olmo 2"]
    for case, expected in places.items():
        found = {k.split("/")[1] for k in names(case) if k.startswith("layers/")}
        assert found - {"attention", "ff"} == expected
    moe = names("qwen 3 moe")
    assert moe["layers/sparse/experts/router"] == (2, 16, 4)
    assert moe["layers/sparse/experts/gate"] == (2, 4, 16, 12)
    assert moe["layers/sparse/experts/down"] == (2, 4, 12, 16)
    assert moe["layers/dense/ff/gate"] == (3, 16, 24)
    assert names("mixtral")["layers/experts/up"] == (2, 4, 16, 12)


def test_plans_cover_every_layer_once():
    for kinds in ("aaaa", "abab", "aabaa", "abcabcab", "aaab", "abba", "a", "ab"):
        found = []
        for pattern, turns in layers.plan(kinds):
            found += list(pattern) * turns
        assert "".join(found) == kinds
    assert layers.plan("abcabcab")[0] == (("a", "b", "c"), 2)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_capped_logits_without_all_of_them(cap):
    """Each statistic, and the gradient, as from whole logits in float64."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (2, 7, 16)).astype(np.float32)
    table = rng.normal(0, 1, (48, 16)).astype(np.float32)
    targets = rng.integers(0, 48, (2, 7))

    def run(hidden, table):
        return heads.token_logps(
            *(hidden, table, targets),
            temperature=0.7,
            softcap=cap,
            block_size=4,
            entropy_gradient=True,
        )

    stats = jax.jit(run)(hidden, table)
    raw = np.float64(hidden) @ np.float64(table).T
    raw = cap * np.tanh(raw / cap) if cap else raw
    scaled = raw / 0.7
    log_z = np.log(np.exp(scaled).sum(-1))
    logps = scaled - log_z[..., None]
    picked = np.take_along_axis(logps, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(stats.logps, picked, atol=1e-4)
    np.testing.assert_allclose(stats.log_z, log_z, atol=1e-4)
    np.testing.assert_allclose(stats.logit_mean, raw.mean(-1), atol=1e-4)
    entropy = -(np.exp(logps) * logps).sum(-1)
    np.testing.assert_allclose(stats.entropy, entropy, atol=1e-4)

    def ours(hidden, table):
        stats = run(hidden, table)
        return stats.logps.sum() + stats.entropy.sum()

    def whole(hidden, table):
        raw = hidden @ table.T
        raw = cap * jnp.tanh(raw / cap) if cap else raw
        logps = jax.nn.log_softmax(raw / 0.7)
        picked = jnp.take_along_axis(logps, targets[..., None], -1).sum()
        return picked - (jnp.exp(logps) * logps).sum()

    got, expected = (jax.jit(jax.grad(f, (0, 1)))(hidden, table) for f in (ours, whole))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "batch"}, ["model.norm", "rms", "layer", "'batch'"]),
        ({"sliding": (1, 0)}, ["model.sliding", "model.window"]),
        ({"sliding": (2,), "window": 3}, ["model.sliding", "True or False"]),
        ({"window": -1}, ["model.window", "0 or more", "-1"]),
        ({"rotates": (1,), "positions": "none"}, ["model.rotates", "positions"]),
        ({"rope_scaling": "ntk"}, ["model.rope_scaling", "dynamic", "'ntk'"]),
        ({"rope_scaling": "linear"}, ["model.rope_arguments", "factor", "()"]),
        (
            {"rope_scaling": "linear", "positions": "none", "rope_arguments": (2.0,)},
            ["model.rope_scaling", "'rope'"],
        ),
        ({"rope_share": 0.0}, ["model.rope_share", "0.0"]),
        ({"rope_share": 0.4}, ["even", "8", "0.4"]),
        (
            {
                **{"rope_share": 0.25, "rope_scaling": "dynamic"},
                "rope_arguments": (2, 8),
            },
            ["model.rope_scaling", "2 rotating channels"],
        ),
        (
            {
                "rope_scaling": "longrope",
                "rope_arguments": ((1.0,), (1.0,) * 4, 8, 1.0),
            },
            ["model.rope_arguments", "short_factors", "4 numbers"],
        ),
        ({"balance_coef": 0.1}, ["model.balance_coef", "model.experts"]),
        ({"sparse": (1,)}, ["model.sparse", "model.experts"]),
        ({**EXPERTS, "sparse": (0,)}, ["model.sparse", "no layer"]),
        ({"experts": 4}, ["model.expert_width", "positive"]),
        ({**EXPERTS, "experts_per_token": 5}, ["model.experts_per_token", "4", "5"]),
        ({**EXPERTS, "gated": False}, ["model.gated", "experts"]),
        ({**EXPERTS, "ff_bias": True}, ["model.ff_bias", "experts"]),
        ({"logit_softcap": -1.0}, ["model.logit_softcap", "-1.0"]),
        ({"embed_scale": 0.0}, ["model.embed_scale", "positive"]),
    ],
    ids=str,
)
def test_config_refuses(changes, words):
    with pytest.raises(UserError) as error:
        dataclasses.replace(BASE, **changes).validate()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_read_back_from_json_is_the_same():
    made = dataclasses.replace(BASE, **CASES["longrope"])
    fields = dataclasses.asdict(made)
    fields["rope_arguments"] = [
        list(fields["rope_arguments"][0]),
        *made.rope_arguments[1:],
    ]
    assert ModelConfig(**fields) == made and hash(ModelConfig(**fields))
