"""FLOPs and parameter counts against a count by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from stagecraft import tree
from stagecraft.anatomy import cost
from stagecraft.models.transformer import Transformer
from tests import tiny

TINY = {
    "vocab_size": 10,
    "width": 4,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 2,
    "ff_width": 6,
    "tied": True,
    "qk_norm": True,
}
SIZES = tiny.config(vocab_size=20, width=8, layers=3, head_dim=4, ff_width=12)


def test_parameters_of_a_tiny_model_by_hand():
    found = cost.parameters(TINY)
    assert found["by_kind"] == {
        "embed": 40,
        "unembed": 0,
        "query": 2 * 4 * 4,
        "key": 2 * 4 * 2,
        "value": 2 * 4 * 2,
        "output": 2 * 4 * 4,
        "gate": 2 * 4 * 6,
        "up": 2 * 4 * 6,
        "down": 2 * 6 * 4,
        "norm": 2 * (4 + 4 + 2 + 2) + 4,
    }
    assert found["embedding"] == 40
    assert found["body"] == 32 + 16 + 16 + 32 + 3 * 48 + 28
    assert found["total"] == found["body"] + 40
    assert cost.parameters({**TINY, "tied": False})["embedding"] == 80


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameters_are_those_of_the_model(tied, qk_norm):
    config = dataclasses.replace(SIZES, tied=tied, qk_norm=qk_norm)
    model = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    assert cost.parameters(vars(config))["total"] == tree.count(model)
    assert set(vars(config)) >= cost.NEEDED


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layer", "positions": "learned", "gated": False, "qk_norm": False},
        {"qkv_bias": True, "out_bias": True, "ff_bias": True, "norm_place": "post"},
        {"norm_place": "both", "qk_norm_over": "projection", "ff_bias": True},
        {"experts": 4, "expert_width": 6},
        {"experts": 4, "expert_width": 6, "sparse": (0, 1), "qkv_bias": True},
    ],
    ids=str,
)
def test_parameters_of_every_family(changes):
    config = dataclasses.replace(SIZES, **changes)
    model = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    assert cost.parameters(vars(config))["total"] == tree.count(model)


def test_an_adapter_saves_the_gradient_of_the_weights():
    counters = {"trained": 10, "scored": 20, "context": 8}
    one = cost.forward_flops(TINY, 1, 8)
    assert cost.stage_flops(counters, TINY, adapter=True) == pytest.approx(40 * one)


def test_only_the_experts_that_work_are_counted():
    """Two of four in one of two layers, beside a dense one; and a router."""
    sparse = {"experts": 4, "expert_width": 5, "sparse": (0, 1)}
    weights = 32 + 16 + 16 + 32 + 3 * 4 * 6 + 4 * 4 + 2 * 3 * 4 * 5
    flops = cost.forward_flops({**TINY, **sparse}, 1, 8, scalar=True)
    assert flops == 2 * weights + 4 * 2 * 2 * 2 * 8


def test_a_window_bounds_what_is_attended_to():
    sliding = {**TINY, "window": 3, "sliding": (1, 0)}
    whole = cost.forward_flops(TINY, 1, 8)
    assert whole - cost.forward_flops(sliding, 1, 8) == 4 * 2 * 2 * (8 - 3)
    assert cost.forward_flops(sliding, 1, 2) == cost.forward_flops(TINY, 1, 2)


def test_forward_flops_by_hand():
    weights = 32 + 16 + 16 + 32 + 3 * 48
    attention = 4 * 2 * 2 * 2 * 8  # 4 L H C context
    assert cost.forward_flops(TINY, 1, 8, scalar=True) == 2 * weights + attention
    assert cost.forward_flops(TINY, 5, 8) == 5 * (2 * (weights + 40) + attention)
    untied = cost.forward_flops({**TINY, "tied": False}, 5, 8)
    assert untied == cost.forward_flops(TINY, 5, 8)


@pytest.mark.parametrize(
    "changes",
    [{}, {"gated": False, "norm": "layer"}, {"kv_heads": 4, "ff_width": 128}],
    ids=str,
)
def test_a_layer_costs_what_xla_counts_of_it(changes):
    """One layer outside of any loop, which XLA would count once, times their number."""
    sizes = dict(vocab_size=256, width=256, head_dim=64, ff_width=256)
    config = tiny.config(**(sizes | changes))
    model = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    rows, length, layers = 4, 64, 5  # so short a row is one square of attention
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def counted(function, *arguments):
        lowered = jax.jit(function).lower(*arguments)
        return lowered.cost_analysis()["flops"]

    layer = counted(lambda m, x: m.hidden(x, x, x), model, ids)
    hidden = jax.ShapeDtypeStruct((rows, length, config.width), jnp.float32)
    logits = counted(lambda m, x: m.project_out(x), model, hidden)
    deep = vars(config) | {"layers": layers}
    whole, bare = (
        cost.forward_flops(deep, rows * length, length, scalar=scalar)
        for scalar in (False, True)
    )
    # Norms, rotations and the softmax are no products: they are the rest.
    assert bare < layers * layer < 1.02 * bare, layers * layer / bare
    assert whole == pytest.approx(layers * layer + logits, rel=0.02)


def test_stage_flops_weigh_what_was_done():
    one, scalar = (cost.forward_flops(TINY, 1, 8, scalar=s) for s in (False, True))
    counters = {"trained": 10, "scored": 20, "sampled": 30, "context": 8}
    assert cost.stage_flops(counters, TINY) == pytest.approx((30 + 20 + 30) * one)
    counters = {"scalar_trained": 10, "scalar_scored": 1, "context": 8}
    assert cost.stage_flops(counters, TINY) == pytest.approx(31 * scalar)


def test_questions_to_a_judge_are_of_its_own_size_and_length():
    judge = TINY | {"layers": 5}
    counters = {"sampled": 30, "context": 8, "judged": 40, "judged_context": 3}
    own = cost.forward_flops(TINY, 30, 8)
    asked = cost.forward_flops(judge, 40, 3)
    whole = cost.stage_flops(counters, TINY, judge=judge)
    assert whole == pytest.approx(own + asked)
    # Behind an endpoint nobody knows its size.
    assert cost.stage_flops(counters, TINY) == own


def test_wrong_counters_are_refused():
    with pytest.raises(ValueError, match="unknown counters"):
        cost.stage_flops({"learned": 1, "context": 1}, TINY)
    with pytest.raises(ValueError, match="context"):
        cost.stage_flops({"trained": 1}, TINY)


def test_share():
    assert cost.share(2.0, 8.0) == 0.25
    with pytest.raises(ValueError, match="pretraining"):
        cost.share(1.0, 0.0)
