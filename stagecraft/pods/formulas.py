"""What a stage needs on a mesh, from formulas: where nothing compiles, and to search.

Memory of a device, with N parameters, T tokens of a micro-batch's rows on it, and
shards = fsdp x tensor. Weights, both moments and gradients are float32; products are in
the compute dtype, of b bytes.

    state        exact, from the shapes and shardings of the stage
    gradients    4 N / shards, twice that with micro-batches
    activations  what `model.remat` stores of each layer, for T tokens, and the working
                 set of the one layer that is computed backward
    weights      two layers gathered over fsdp, b bytes a parameter
    head         the output embedding gathered, its gradient, and a block of logits

Time: products once forward and twice backward, what remat repeats on top, at the peak;
the state read and written once, weights read as often as they are used; over fsdp the
weights gathered for every pass and micro-batch and the gradients scattered; over data
the gradients reduced; over tensor two sums of activations a layer and pass, which
nothing overlaps. Of context and expert only what they split is counted, not what they
send, and weights of experts as if each device had all: a bound that errs to the side of
memory. Where a compiler is, it counts both.
"""

from typing import Any, NamedTuple

from stagecraft.anatomy import cost
from stagecraft.chips import Topology
from stagecraft.models import heads
from stagecraft.models.config import ModelConfig
from stagecraft.pods.roofline import Bounds

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


class Layout(NamedTuple):
    """What a search may change.

    Attributes:
        data, fsdp, tensor, expert, context: sizes of the mesh.
        micro_batches: parts that a batch is worked on in.
        remat: a name of `model.remat`.
    """

    data: int
    fsdp: int
    tensor: int
    micro_batches: int
    remat: str
    expert: int = 1
    context: int = 1

    @property
    def rows(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.data * self.fsdp * self.expert


class Estimate(NamedTuple):
    """What a training step needs.

    Attributes:
        memory: {part: bytes a device}.
        bounds: of its time.
        waits: seconds of the sums over `tensor`, which the next product waits for.
    """

    memory: dict[str, float]
    bounds: Bounds
    waits: float

    @property
    def peak(self) -> float:
        """Bytes a device needs at once."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Of a step: the largest bound, and what nothing overlaps."""
        return self.bounds.seconds + self.waits


def step(
    model: dict[str, Any],
    layout: Layout,
    topology: Topology,
    *,
    rows: int,
    length: int,
    state_bytes: float | None = None,
    models: float = 1.0,
) -> Estimate:
    """Estimates an update of a stage that trains whole models.

    Args:
        model: the model's config as a mapping.
        layout: mesh, micro-batches and remat.
        topology: where it runs.
        rows: of the whole batch, every answer of a pair being one.
        length: tokens of a row.
        state_bytes: parameters and optimizer of a device; None for those of AdamW.
        models: trained at once; with a critic of the policy's size 2.
    """
    c, b = ModelConfig(**model), WIDTHS[model["dtype"]]
    count = cost.parameters(model)
    shards = layout.fsdp * layout.tensor
    whole = count["total"]
    state = 12 * models * whole / shards if state_bytes is None else state_bytes
    tokens = rows * length / layout.rows / layout.context
    micro = tokens / layout.micro_batches
    layer = count["body"] / c.layers
    stored, working = _activations(c, layout, b)
    table = c.vocab_size * c.width / layout.tensor
    block = min(heads.BLOCK_ELEMENTS_ELSEWHERE, micro * c.vocab_size / layout.tensor)
    memory = {
        "state": state,
        "gradients": models * 4 * whole / shards * (1 + (layout.micro_batches > 1)),
        "activations": micro * (stored * c.layers + working),
        "gathered weights": 2 * b * layer / layout.tensor,
        "head": 2 * b * table + 3 * 4 * block,
    }
    *bounds, waits = _seconds(
        c, model, layout, topology, tokens, length, state / models, b
    )
    bounds = Bounds(*(models * seconds for seconds in bounds))
    return Estimate(memory, bounds, models * waits)


def _activations(c, layout, b):
    """Returns bytes a token that a layer stores, and that its backward works with."""
    heads_ = (c.heads + 2 * c.kv_heads) * c.head_dim / layout.tensor
    attended = c.heads * c.head_dim / layout.tensor
    wide = c.ff_width
    if c.experts:
        wide = c.expert_width * c.experts_per_token
    inner = (3 if c.gated else 2) * wide / layout.tensor
    named = heads_ + attended
    stored = {
        "full": c.width,
        "names": c.width + named,
        "offload": c.width,
        "dots": 3 * c.width + named + inner,
        "none": 6 * c.width + 2 * named + 1.5 * inner,
    }[layout.remat]
    # Float32 copies of the norms, and gradients beside their values.
    working = b * (2 * named + 2 * inner + 4 * c.width) + 8 * c.width
    return b * stored, working


# Forward passes that backward repeats.
REPEATED = {"full": 1.0, "names": 0.75, "offload": 0.75, "dots": 0.05, "none": 0.0}


def _seconds(c, model, layout, topology, tokens, length, state, b):
    """Returns seconds: compute, HBM, ICI, DCN, and those of waiting for `tensor`."""
    count, chip = cost.parameters(model), topology.chip
    shards = layout.fsdp * layout.tensor
    forward = cost.forward_flops(model, tokens, (length + 1) / 2) / layout.tensor
    passes = 2 + REPEATED[layout.remat]
    # Weights are read in each pass of each micro-batch; activations a few times.
    used = count["total"] / layout.tensor * b * passes * layout.micro_batches
    stored, working = _activations(c, layout, b)
    moved = 2 * state + used + 3 * tokens * c.layers * (stored + working)
    whole = count["total"] * b / layout.tensor  # the weights, once gathered
    sent = {"ICI": 0.0, "DCN": 0.0}
    # A GPU's links end at its host, a TPU's at its slice.
    reach = chip.host if chip.platform == "gpu" else topology.devices / topology.slices
    gathered = (passes + 1) * layout.micro_batches * whole
    sent["DCN" if shards > reach else "ICI"] += gathered * (1 - 1 / layout.fsdp)
    copies = layout.data * layout.expert * layout.context
    if copies > 1:
        over = "DCN" if copies * shards > reach else "ICI"
        sent[over] += 2 * whole / layout.fsdp * (1 - 1 / copies)
    # A ring in both directions along one axis of the torus.
    rate = chip.link if chip.platform == "gpu" else 2 * chip.link / chip.cores
    summed = 4 * b * tokens * c.width * c.layers * passes * (1 - 1 / layout.tensor)
    return (
        forward * (1 + passes) / topology.peak(c.dtype),
        moved / topology.bandwidth,
        sent["ICI"] / rate,
        sent["DCN"] / topology.dcn,
        summed / rate,
    )


def decode(
    model: dict[str, Any],
    layout: Layout,
    topology: Topology,
    *,
    rows: int,
    prompt: int,
    new: int,
) -> dict[str, float]:
    """Returns the least time of decoding: weights and cache are read for every token.

    Weights are read in the compute dtype, whole but for `tensor` on every device: those
    split over fsdp are gathered before, which is not counted here.

    Args:
        model, layout, topology: as of `step`.
        rows: completions of the whole batch.
        prompt, new: tokens of a prompt and of a completion.

    Returns:
        {"seconds", "tokens_per_second" of a chip, "cache_bytes" of a device, in the
        end}.
    """
    width, own = WIDTHS[model["dtype"]], rows / layout.rows
    read = cost.decode_bytes(model, own, prompt, new, width, layout.tensor)
    seconds = read / topology.bandwidth
    cache = own * cost.cache_bytes(model, width, layout.tensor)
    return {
        "seconds": seconds,
        "tokens_per_second": rows * new / seconds / topology.chips,
        "cache_bytes": cache * (prompt + new),
    }
