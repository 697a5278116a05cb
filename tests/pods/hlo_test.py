"""What is read of compiled programs, against counts by hand and XLA's own."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stagecraft import chips, sharding
from stagecraft.pods import compiling, hlo, roofline
from stagecraft.stages.stage import Program

LAYERS, ROWS, WIDTH = 5, 32, 64


def compiled(layers=LAYERS, sizes=(2, 2, 2)):
    """A loop of products, weights over fsdp and tensor, rows over data and fsdp."""
    mesh = sharding.make_mesh(*sizes)

    def array(shape, *spec):
        placed = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)

    def loop(x, weights):
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return out.sum()

    weights = array((layers, WIDTH, WIDTH), None, "fsdp", "tensor")
    rows = array((ROWS, WIDTH), ("data", "fsdp"))
    with jax.set_mesh(mesh):
        return jax.jit(loop).lower(rows, weights).compile(), mesh


def test_loops_count_as_often_as_they_run():
    program, mesh = compiled()
    counts = hlo.read(program.as_text(), mesh.size)
    assert counts.products == LAYERS * 2 * ROWS * WIDTH * WIDTH / mesh.size
    assert counts.products_once == counts.products / LAYERS
    # XLA adds sums and tanh to it.
    assert counts.products_once <= program.cost_analysis()["flops"]
    assert program.cost_analysis()["flops"] < 1.1 * counts.products_once


def test_traffic_grows_with_the_loop():
    few, many = (compiled(layers)[0].as_text() for layers in (5, 20))
    few, many = (hlo.read(text, 8).traffic for text in (few, many))
    # The stacked weights are read a layer at a time, not whole in each turn.
    assert 3.5 < many / few < 4.1


def test_exchanges_by_axis():
    program, mesh = compiled()
    counts = hlo.read(program.as_text(), mesh.size)
    topology = chips.parse("h200:8")
    sums = {
        (e.kind, e.axes): e
        for e in roofline.exchanges(counts.collectives, mesh, topology)
    }
    gathered = sums["all-gather", ("fsdp",)]
    # Half of the columns of a layer's weights, in every turn.
    assert gathered.bytes == LAYERS * WIDTH * WIDTH // 2 * 4
    assert gathered.count == LAYERS and gathered.over == "ICI"
    assert gathered.seconds == pytest.approx(gathered.bytes / 2 / 4.5e11)
    assert sums["all-gather", ("tensor",)].bytes == LAYERS * ROWS // 4 * WIDTH * 4


# Lines as libtpu writes them, shortened.
# ruff: noqa: E501
_TPU = """
%all-reduce-scatter.1 (input.1: bf16[64,32]) -> bf16[16,32] {
  %input.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.9 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=57, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %slice.1 = bf16[16,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={16,32}
}

%product (a: bf16[4,32,1,8], b: bf16[16,4,8,1]) -> bf16[4,32,16,4] {
  %a = bf16[4,32,1,8]{3,1,2,0} parameter(0)
  %b = bf16[16,4,8,1]{3,2,1,0} parameter(1)
  ROOT %conv = bf16[4,32,16,4]{3,1,2,0:T(8,128)(2,1)} convolution(%a, %b), window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=0b1f_1oi0->0b1f
}

%body (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %p = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %gather = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %scattered = bf16[16,32]{1,0:T(8,128)(2,1)} fusion(%gather), kind=kCustom, calls=%all-reduce-scatter.1
  %splash_mha_fwd_segmented.3 = bf16[1,2,64,16]{3,2,1,0:T(8,128)(2,1)} custom-call(%q), custom_call_target="tpu_custom_call"
  %q = bf16[1,2,64,16]{3,2,1,0:T(8,128)(2,1)} copy(%x)
  ROOT %t = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%i, %x)
}

%condition (p: (s32[], bf16[64,32])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main.0_spmd (x: bf16[64,32]) -> bf16[64,32] {
  %x.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def unrolled(layers):
    """The same products, written out one by one, and what the last of them keeps."""
    mesh = sharding.make_mesh(2, 2, 2)

    def array(shape, *spec):
        placed = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)

    def program(x, weights):
        seen = []
        for layer in range(layers):
            x = jnp.tanh(x @ weights[layer])
            seen.append(x)
        return x.sum(), jnp.stack(seen)

    weights = array((layers, WIDTH, WIDTH), None, "fsdp", "tensor")
    rows = array((ROWS, WIDTH), ("data", "fsdp"))
    return Program(program, (rows, weights)), mesh


def test_a_deep_program_follows_from_two_shallow_ones():
    few, many, deep = (compiling.compile_program(*unrolled(n)) for n in (2, 4, 11))
    extended = compiling.extended(few, many, (2, 4), 11)
    assert extended.depths == (2, 4) and not deep.depths
    assert extended.counts.products == deep.counts.products
    for part in ("arguments", "outputs"):
        assert extended.memory[part] == deep.memory[part]
    assert extended.counts.traffic == pytest.approx(deep.counts.traffic, rel=0.05)
    mesh, h200 = unrolled(2)[1], chips.parse("h200:8")
    sent = [
        {
            (e.kind, e.axes): (e.count, e.bytes)
            for e in roofline.exchanges(one.counts.collectives, mesh, h200)
        }
        for one in (extended, deep)
    ]
    assert sent[0] == sent[1]


def test_depths_end_as_the_model_does():
    """Forty layers are six periods of six and four more: ten and sixteen end alike."""
    specs = (["local"] * 5 + ["global"]) * 8
    assert compiling.depths(specs[:40]) == (10, 16)
    assert compiling.depths(specs[:16]) == compiling.depths(["one"] * 4) == ()


def test_a_shallow_program_that_does_not_fit_says_so():
    few = compiling.compile_program(*unrolled(2))
    many = few._replace(error="RESOURCE_EXHAUSTED", counts=None)
    extended = compiling.extended(few, many, (2, 4), 11)
    assert extended.error and extended.seconds == 2 * few.seconds


def test_forms_of_tpu_programs():
    counts = hlo.read(_TPU, 8)
    kinds = {one.kind: one for one in counts.collectives}
    # The sum and its slice are one exchange; all run as often as the condition says.
    assert set(kinds) == {"all-gather", "reduce-scatter"}
    assert kinds["reduce-scatter"].bytes == 64 * 32 * 2
    assert kinds["reduce-scatter"].group == (0, 2, 4, 6)
    assert kinds["all-gather"].group == (0, 2, 4, 6)
    assert {one.times for one in counts.collectives} == {12}
    [(times, arrays)] = counts.kernels["splash_mha_fwd_segmented"]
    assert times == 12 and arrays[0].shape == (1, 2, 64, 16)
    # Two products of every visible pair, here half of all.
    flops = roofline.kernel_flops(counts.kernels, density=0.5)
    assert flops == 12 * 2 * 2 * 2 * 64 * 64 * 16 * 0.5
    # One row a device: the compiler leaves its axis out. The mask's blocks come first.
    one = (hlo.Array("s8", (1, 4, 4), True), arrays[0]._replace(shape=(2, 64, 16)))
    kernels = {"splash_mha_dkv_segmented": [(1, one)]}
    assert roofline.kernel_flops(kernels, 0.5) == 4 * 2 * 2 * 64 * 64 * 16 * 0.5


def test_a_product_with_padding_counts_what_is_there():
    lines = _TPU.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("%product"))
    a, b, product = (hlo.parse(line) for line in lines[start + 1 : start + 4])
    types = {a.name: a.arrays, b.name: b.arrays}
    # 16 heads of 4 channels from 8: each output is one product, the rest is padding.
    assert hlo._product(product, types) == 2 * 4 * 32 * 16 * 4 * 8
