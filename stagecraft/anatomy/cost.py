"""What a stage costs in floating-point operations, counted from its model and tokens.

The count is the usual one of matrix products, a multiply and an add being two. For one
token going forward

    2 N + 4 L H C context

where N are the parameters that take part in a matrix product (the output embedding
also when it is tied; norms, biases and the input lookup not; of the experts those that
work on the token, and their router), and `context` is the mean number of positions a
token attends to, itself included, at most the window in layers that have one. With
context = T this is PaLM's 2 N + 4 L H C T a token (appendix B of Chowdhery et al.
2204.02311, a third of its 6 N + 12 L H Q T for forward and backward); with the causal
mean T / 2 it is 2 N + 2 L T D of Kaplan et al. 2001.08361, table 1. Backward costs
twice the forward. Rematerialisation is work done again, not work needed, and is left
out.
"""

from collections.abc import Mapping

from stagecraft.models.config import COUNTS, ModelConfig

# Keys of a model's config that the counts need.
NEEDED = frozenset({*COUNTS, "tied", "qk_norm"} - {"max_length"})
_MATRICES = ("query", "key", "value", "output", "gate", "up", "down", "router")
_EXPERTS = ("expert_gate", "expert_up", "expert_down")
_COUNTERS = ("trained", "scored", "sampled", "scalar_trained", "scalar_scored")


def parameters(model: Mapping) -> dict:
    """Counts the parameters of a decoder.

    Args:
        model: a ModelConfig as a mapping; the keys in `NEEDED` are read, and others
            where they are there.

    Returns:
        {"by_kind": {kind: int}, "embedding": int, "body": int, "total": int}; the body
        is all that is not an embedding, which is what scaling laws call N.
    """
    c = ModelConfig(**model)  # what an older run did not have is at its default
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    table = c.vocab_size * c.width
    sparse = sum(spec.sparse for spec in c.layer_specs)
    dense = c.layers - sparse
    expert = sparse * c.experts * c.width * c.expert_width
    by_kind = {
        "embed": table,
        "unembed": 0 if c.tied else table,
        "query": c.layers * c.width * queries,
        "key": c.layers * c.width * keys,
        "value": c.layers * c.width * keys,
        "output": c.layers * queries * c.width,
        "gate": dense * c.width * c.ff_width * c.gated,
        "up": dense * c.width * c.ff_width,
        "down": dense * c.ff_width * c.width,
        "norm": _norms(c, queries, keys),
    }
    # What only some families have is listed only where it is.
    others = {
        "positions": c.max_length * c.width * (c.positions == "learned"),
        "bias": _biases(c, queries, keys, dense),
        "router": sparse * c.width * c.experts,
        **{f"expert_{name}": expert for name in ("gate", "up", "down")},
    }
    by_kind |= {name: count for name, count in others.items() if count}
    embedding = by_kind["embed"] + by_kind["unembed"] + others["positions"]
    total = sum(by_kind.values())
    return dict(
        by_kind=by_kind, embedding=embedding, body=total - embedding, total=total
    )


def _norms(c, queries, keys):
    stream = c.width * (2 if c.norm == "layer" else 1)
    places = 4 if c.norm_place == "both" else 2
    heads = 2 * c.head_dim if c.qk_norm_over == "head" else queries + keys
    return c.layers * (places * stream + heads * c.qk_norm) + stream


def _biases(c, queries, keys, dense):
    attention = (queries + 2 * keys) * c.qkv_bias + c.width * c.out_bias
    wide = c.ff_width * (2 if c.gated else 1)
    return c.layers * attention + dense * (wide + c.width) * c.ff_bias


def forward_flops(
    model: Mapping, tokens: float, context: float, *, scalar: bool = False
) -> float:
    """Counts the FLOPs of a forward pass.

    Args:
        model: a ModelConfig as a mapping.
        tokens: tokens that go through the model.
        context: mean number of positions a token attends to, itself included:
            (T + 1) / 2 for one document over a causal row of T.
        scalar: True for a reward or value model, which has no output embedding (its
            head of D weights is not counted).
    """
    c, by_kind = ModelConfig(**model), parameters(model)["by_kind"]
    working = {
        name: by_kind[name] for name in (*_MATRICES, *_EXPERTS) if name in by_kind
    }
    for name in working.keys() & {*_EXPERTS}:
        working[name] *= c.experts_per_token / c.experts
    weights = sum(working.values())
    if not scalar:
        weights += c.vocab_size * c.width
    seen = sum(min(context, s.window) if s.window else context for s in c.layer_specs)
    attention = 4 * c.heads * c.head_dim * seen
    return float(tokens * (2 * weights + attention))


def decode_bytes(
    model: Mapping, rows: float, prompt: int, new: int, width: int, parts: int = 1
) -> float:
    """Counts what a device reads to decode: weights and cache, for every token.

    Args:
        model: a ModelConfig as a mapping.
        rows: completions that the device decodes together.
        prompt, new: tokens of a prompt and of a completion.
        width: bytes of a number in the dtype of the computation.
        parts: devices that heads and weights are split over.
    """
    c, count = ModelConfig(**model), parameters(model)
    # The input embedding is looked up, not read whole, unless it is the output's too.
    active = count["total"] - (0 if c.tied else c.vocab_size * c.width)
    read = active * width / parts + cache_bytes(model, width, parts) * rows * (
        prompt + new / 2
    )
    return new * read


def cache_bytes(model: Mapping, width: int, parts: int = 1) -> float:
    """Counts the keys and values that one token leaves; arguments as `decode_bytes`."""
    c = ModelConfig(**model)
    return 2 * width * c.layers * c.kv_heads / parts * c.head_dim


def stage_flops(
    counters: Mapping,
    model: Mapping,
    *,
    scalar: Mapping | None = None,
    judge: Mapping | None = None,
    adapter: bool = False,
) -> float:
    """Counts the FLOPs of a whole stage.

    Padding counts as text, since it costs as much, and completions as if none ended
    before its limit. What only measures a stage is left out: held-out batches and
    samples for show.

    Args:
        counters: tokens by what was done with them; one left out is 0.
            trained: forward and backward, every epoch counted (three forwards each).
            scored: forward only, every pass counted: log-probs of the reference and
                of the policy that sampled, the load of experts before micro-batches.
            sampled: generated, one forward each, and the prompts read before: once
                where the completions of a prompt share that, once each elsewhere.
            scalar_trained, scalar_scored: the same for reward and value models.
            context: mean number of positions a token attends to.
            judged, judged_context: those of questions to a judge, one forward each.
        model: a ModelConfig as a mapping; of a stage that trains nothing, that of the
            model it samples from.
        scalar: that of its reward model, if it is another.
        judge: that of its judge; None where there is none, or where it is behind an
            endpoint, whose FLOPs are not known and are left out.
        adapter: whether a LoRA adapter was trained: backward then costs one
            forward, since the frozen weights need no gradient. The thin matrices
            themselves are not counted.

    Raises:
        ValueError: an unknown counter, or tokens without `context`.
    """
    unknown = set(counters) - {*_COUNTERS, "context", "judged", "judged_context"}
    if unknown:
        raise ValueError(f"unknown counters {sorted(unknown)}; known: {_COUNTERS}")
    if "context" not in counters:
        raise ValueError("counters need `context`, the mean positions attended to")
    total = 0.0
    for name in _COUNTERS:
        if name in counters:
            passes = (2 if adapter else 3) if name.endswith("trained") else 1
            headless = name.startswith("scalar")
            total += passes * forward_flops(
                (scalar or model) if headless else model,
                counters[name],
                counters["context"],
                scalar=headless,
            )
    if judge is not None and "judged" in counters:
        tokens, context = counters["judged"], counters["judged_context"]
        total += forward_flops(judge, tokens, context)
    return total


def share(stage: float, pretrain: float) -> float:
    """Returns a stage's FLOPs as a share of pretraining's.

    In published runs the later stages cost from 0.1 to some percent; with a small world
    and a small model, pretraining is so short that the share is far above that.
    """
    if pretrain <= 0:
        raise ValueError("pretraining cost nothing: there is no share to give")
    return stage / pretrain
