"""Adapters: what they compute, what they leave alone, and what they refuse.

The judge is the decoder in plain numpy, on weights that are summed up by hand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, experiment, sharding, tree
from stagecraft.errors import UserError
from stagecraft.models import linear, lora
from stagecraft.models.transformer import ScalarModel, Transformer
from tests import tiny
from tests.models import numpy_decoder

CONFIG = tiny.config(width=16, layers=3, head_dim=4, ff_width=24, init_std=0.3)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 9)
OUT = ("attention/out",)  # of which two dimensions are read


def settings(**changes):
    return lora.Settings(**dict(defaults.lora()) | dict(rank=3, alpha=6.0) | changes)


def filled(adapter, seed=3):
    """An adapter whose B is not zero."""
    keys = iter(jax.random.split(jax.random.key(seed), 200))
    return jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), adapter)


def made(config=CONFIG, **changes):
    base = Transformer(config, jax.random.key(1))
    return base, filled(lora.init(settings(**changes), base, jax.random.key(2)))


def by_hand(base, adapter, scale):
    """The base with W + s A B written into it, in float64."""
    found = {k: np.asarray(v, np.float64) for k, v in tree.named(base).items()}
    for name, low in adapter.parts.items():
        a, b = np.asarray(low.a[...], np.float64), np.asarray(low.b[...], np.float64)
        two = name.endswith(OUT)
        line = "lhcr,lrd->lhcd" if two else "ldr,lrx->ldx"
        if name.split("/")[-1] in ("query", "key", "value"):
            line = "ldr,lrhc->ldhc"
        found[name] = found[name] + scale * np.einsum(line, a, b)
    return tree.map_names(lambda name, _: found[name], base)


def logits(model, ids=IDS):
    row = jnp.asarray(ids)[None]
    places = jnp.arange(len(ids))[None]
    run = jax.jit(lambda m: m.logits(row, places, jnp.ones_like(row)))
    return np.asarray(run(model))[0]


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2.0),
        (dict(rslora=True), 6 / 3**0.5),
        (dict(targets="query, down"), 2.0),
    ],
)
def test_the_path_beside_is_the_sum(changes, scale):
    base, adapter = made(**changes)
    assert adapter.settings.scale == pytest.approx(scale)
    expected = numpy_decoder.logits(by_hand(base, adapter, scale), IDS)
    joined, merged = lora.join(base, adapter), lora.merge(base, adapter)
    np.testing.assert_allclose(logits(joined), expected, atol=1e-4)
    np.testing.assert_allclose(logits(merged), expected, atol=1e-4)
    assert np.abs(expected - logits(base)).max() > 0.5


def test_dense_and_sparse_layers_side_by_side():
    sparse = dict(experts=2, experts_per_token=1, sparse=(False, True, True))
    config = dataclasses.replace(CONFIG, **sparse, expert_width=8)
    base, adapter = made(config)
    names = set(adapter.parts)
    assert "layers/dense/ff/up" in names and "layers/sparse/attention/out" in names
    assert not [n for n in names if "experts" in n]
    expected = numpy_decoder.logits(by_hand(base, adapter, 2.0), IDS)
    np.testing.assert_allclose(logits(lora.join(base, adapter)), expected, atol=1e-4)


def test_a_fresh_adapter_changes_nothing_and_draws_as_peft():
    base = Transformer(CONFIG, jax.random.key(1))
    adapter = lora.init(settings(), base, jax.random.key(2))
    assert np.array_equal(logits(lora.join(base, adapter)), logits(base))
    for name, low in adapter.parts.items():
        a, size = np.asarray(low.a[...]), base.config.width
        size = {"down": 24}.get(name.split("/")[-1], size)
        assert not np.asarray(low.b[...]).any()
        bound = size**-0.5  # kaiming_uniform(a=sqrt(5)) over the inputs
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert abs(a.std() / (bound / 3**0.5) - 1) < 0.15
    assert tree.count(adapter) == 3 * 3 * sum(
        [16 + 16, 16 + 8, 16 + 8, 16 + 16, *[16 + 24] * 3]
    )


def test_gradients_by_finite_differences():
    base, adapter = made()

    @jax.jit
    def loss(adapter):
        row, places = jnp.asarray(IDS)[None], jnp.arange(len(IDS))[None]
        model = lora.join(base, adapter)
        hidden = model.hidden(row, places, jnp.ones_like(row))
        return model.token_logps(hidden, row).logps.sum()

    grads = jax.grad(loss)(adapter)
    rng = np.random.default_rng(5)
    for name in ("layers/attention/out", "layers/attention/key", "layers/ff/gate"):
        for side in (0, 1):
            leaf = adapter.parts[name][side]
            way = rng.normal(size=leaf.shape).astype(np.float32)
            way /= np.linalg.norm(way)

            def moved(step, name=name, side=side, leaf=leaf, way=way):
                parts = dict(adapter.parts)
                pair = list(parts[name])
                pair[side] = leaf.replace(leaf[...] + step * way)
                parts[name] = lora.LoraPair(*pair)
                return float(loss(lora.Adapter(parts, adapter.settings)))

            slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
            found = float((grads.parts[name][side][...] * way).sum())
            assert found == pytest.approx(slope, rel=2e-2, abs=2e-2), (name, side)


def test_dropout_drops_what_a_reads_and_nothing_else():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(5, 7, 6)), jnp.float32)
    w, a, b = (
        linear.normal(jax.random.key(i), shape, 1.0, (None, None))
        for i, shape in enumerate([(6, 4), (6, 2), (2, 4)])
    )
    key = jax.random.key_data(jax.random.key(9))
    kept = jax.random.bernoulli(jax.random.key(9), 0.75, x.shape)
    found = linear.project(x, linear.Adapted(w, a, b, 0.5, 0.25, key))
    dropped = np.where(kept, x / 0.75, 0)
    expected = x @ w[...] + 0.5 * dropped @ a[...] @ b[...]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    base, adapter = made(dropout=0.5)
    one, other = (lora.join(base, adapter, jax.random.key(i)) for i in (1, 2))
    off = logits(lora.join(base, adapter))
    assert np.abs(logits(one) - off).max() > 1e-2
    assert np.abs(logits(one) - logits(other)).max() > 1e-2
    keys = one.layers.attention.query.key
    assert len({tuple(k) for k in np.asarray(keys).tolist()}) == 3  # one a layer
    assert not np.array_equal(keys, one.layers.attention.value.key)


def test_a_head_is_new_or_its_parents_and_embeddings_if_asked():
    base = Transformer(CONFIG, jax.random.key(1))
    fresh = lora.init(settings(), base, jax.random.key(2), scalar=True)
    whole = ScalarModel(base, jax.random.key(2))
    assert np.array_equal(fresh.parts["head"][...], whole.head[...])
    joined = lora.join(base, fresh)
    assert isinstance(joined, ScalarModel)
    assert joined.body.embed is not None and not hasattr(base, "head")
    whole.bias[...] = jnp.float32(2.0)
    again = lora.init(settings(embeddings=True), whole, jax.random.key(3), scalar=True)
    assert float(again.parts["bias"][...]) == 2.0
    assert again.parts["head"][...] is not whole.head[...]
    assert "body/embed" in again.parts and "body/layers/ff/up" in again.parts
    assert lora.merge(whole, again).body.embed[...] is again.parts["body/embed"][...]


def test_an_adapter_is_sharded_like_what_it_sits_on():
    shared = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    with jax.set_mesh(shared):
        base = sharding.init_sharded(lambda k: Transformer(CONFIG, k), shared)(
            jax.random.key(0)
        )
        adapter = lora.init_fn(settings(), base, shared)(jax.random.key(1))
        spec = {n: x.sharding.spec for n, x in tree.named(adapter).items()}
        merged = lora.merge(base, adapter)
    assert spec["layers/ff/up/a"] == jax.P(None, "fsdp", None)
    assert spec["layers/ff/up/b"] == jax.P(None, None, "tensor")
    assert spec["layers/attention/out/a"] == jax.P(None, "tensor", None, None)
    up = merged.layers.ff.up[...]
    assert up.sharding.is_equivalent_to(base.layers.ff.up[...].sharding, up.ndim)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (dict(targets="query,kay"), "did you mean 'key'"),
        (dict(targets="embed"), "embeddings take no adapter"),
        (dict(targets="experts"), "experts take no adapter"),
        (dict(targets=""), "is empty"),
        (dict(rank=-1), "expected 1 or more, or 0"),
        (dict(dropout=1.0), "expected from 0"),
        (dict(alpha=0.0), "expected above 0"),
        (dict(rank=2), "an adapter sits on a trained model"),
    ],
)
def test_refused_before_anything_runs(changes, line):
    c = defaults.experiment()
    c.tokenizer.path = "bytes"
    c.stages.sft = defaults.stage("language_model", data=dict(files="a.txt"))
    c.stages.sft.lora.update(changes)
    with pytest.raises(UserError, match=line) as found:
        experiment.resolve(c)
    assert "stages.sft.lora." in str(found.value)


def test_more_refusals():
    c = defaults.experiment()
    c.tokenizer.path = "bytes"
    c.stages.pretrain = defaults.stage("language_model", data=dict(files="a.txt"))
    data = dict(files="a.jsonl", format="demonstrations")
    c.stages.sft = defaults.stage(
        "language_model", data=data, start_from="pretrain", lora=dict(rank=2)
    )
    with pytest.raises(UserError, match="sft.lora.embeddings=False.*bare text"):
        experiment.resolve(c)
    c.stages.sft.lora.embeddings = True
    c.stages.dpo = defaults.stage(
        "preference",
        **dict(data=dict(files="a.jsonl"), start_from="sft", lora=dict(rank=2)),
        sync_every=2,
    )
    with pytest.raises(UserError, match="dpo.sync_alpha=0.6: the mean of two"):
        experiment.resolve(c)
    c.stages.dpo.sync_alpha = 1.0
    c.stages.dpo.reference_from = "pretrain"
    with pytest.raises(UserError, match="dpo.reference_from='pretrain'.*leave it"):
        experiment.resolve(c)
    c.stages.dpo.reference_from = ""
    experiment.resolve(c)


def test_a_target_the_model_lacks_is_named():
    base = Transformer(tiny.config(gated=False), jax.random.key(0))
    with pytest.raises(
        UserError, match="no gate that takes.*query, key, value, out, up"
    ):
        lora.init(settings(targets="gate"), base, jax.random.key(0))
    assert "layers/ff/up" in lora.init(settings(), base, jax.random.key(0)).parts
