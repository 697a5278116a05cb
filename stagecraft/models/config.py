"""The numbers that make a decoder, checked before anything is built."""

import dataclasses
from typing import NamedTuple

from stagecraft.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "full", "dots", "names")
NORMS = ("rms", "layer")
PLACES = ("pre", "post", "both")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
POSITIONS = ("rope", "learned", "none")
QK_NORM_OVER = ("head", "projection")
KERNELS = ("auto", "xla", "blockwise", "cudnn", "splash")
# How rotary wavelengths stretch beyond the length trained on, and what each is told.
ROPE_SCALING = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_length"),
    "llama3": ("factor", "low_frequency", "high_frequency", "original_length"),
    "yarn": (
        *("factor", "original_length", "beta_fast", "beta_slow"),
        *("attention_factor", "truncate"),
    ),
    "longrope": (
        *("short_factors", "long_factors", "original_length", "attention_factor"),
    ),
}


class Kind(NamedTuple):
    """What one layer does differently from its neighbours.

    Attributes:
        window: tokens it sees, itself included; 0 for all before it.
        rotates: whether queries and keys turn with their positions.
        sparse: whether its feed-forward is a choice of experts.
    """

    window: int
    rotates: bool
    sparse: bool


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer; what sets the model families apart are its fields.

    Attributes:
        vocab_size: V, number of token ids.
        width: D, size of the residual stream.
        layers: L, number of blocks.
        heads: H, number of query heads.
        kv_heads: K, number of key/value heads; each serves H / K query heads.
        head_dim: C, channels per head; even, since rotations act on pairs.
        ff_width: F, hidden width of the feed-forward.
        max_length: longest sequence in tokens; the data is cut to it.
        tied: one matrix for input and output embedding.
        embed_scale: multiplies input embeddings (Gemma: D^0.5).
        norm: "rms" (RMSNorm), or "layer" (LayerNorm, with a bias).
        norm_offset: added to a norm's scale (Gemma: 1, with scales near 0).
        norm_place: of a block's norms: "pre" (what enters attention and feed-forward),
            "post" (what leaves them, OLMo 2) or "both" (Gemma 2 and 3).
        norm_eps: added to the mean square in every norm.
        qk_norm: RMSNorm on queries and keys, before the rotation.
        qk_norm_over: "head" (each head's C channels) or "projection" (all heads at
            once, OLMo 2).
        qkv_bias, out_bias, ff_bias: biases of the projections.
        attention_scale: multiplies the scores; 0 for C^-0.5.
        attention_softcap: c in c tanh(scores / c); 0 for none.
        logit_softcap: the same of the logits.
        window: tokens a sliding layer sees, itself included; 0 for no sliding layers.
        sliding: which layers slide, repeated from the first on; () for all where
            window > 0.
        positions: "rope", "learned" (one row a position, GPT-2) or "none".
        rotates: which layers rotate, repeated from the first on; () for all.
        rope_theta: base of the rotary wavelengths.
        rope_theta_sliding: of sliding layers; 0 for the same, and without scaling
            otherwise (Gemma 3).
        rope_share: of the C channels that rotate, the first ones.
        rope_scaling: a name of `ROPE_SCALING`.
        rope_arguments: its numbers, in the order of `ROPE_SCALING`.
        gated: activation(x W_gate) * x W_up; otherwise activation(x W_up).
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        experts: E, feed-forwards to choose from in a sparse layer; 0 for dense.
        experts_per_token: how many work on a token.
        expert_width: F of each expert.
        experts_renormalize: the chosen experts' weights add up to 1.
        sparse: which layers have experts, repeated from the first on; () for all.
        balance_coef: weight of the load-balancing loss (`experts.Balance`) in stages
            of kind language_model; in micro-batches, each one's own balance counts.
        init_std: standard deviation of initial weights.
        dtype: compute dtype; parameters are always float32.
        family: the Hugging Face family it came from and leaves as; "" for the first
            that has all it asks for.
        remat: what the backward pass finds stored of each block. "none" recomputes
            nothing; "full" stores block inputs only; "dots" also matmul outputs;
            "names" also queries, keys, values and the attention output.
        attention: the kernel of whole sequences; "auto" takes the fastest one that
            does what is asked (see `stagecraft.models.attention`).
        strict_kernels: a kernel asked for by name that cannot be had is an error, and
            not a fall-back that is printed.
    """

    vocab_size: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    ff_width: int = 352
    max_length: int = 128
    tied: bool = True
    embed_scale: float = 1.0
    norm: str = "rms"
    norm_offset: float = 0.0
    norm_place: str = "pre"
    norm_eps: float = 1e-5
    qk_norm: bool = True
    qk_norm_over: str = "head"
    qkv_bias: bool = False
    out_bias: bool = False
    ff_bias: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    window: int = 0
    sliding: tuple = ()
    positions: str = "rope"
    rotates: tuple = ()
    rope_theta: float = 1e4
    rope_theta_sliding: float = 0.0
    rope_share: float = 1.0
    rope_scaling: str = "none"
    rope_arguments: tuple = ()
    gated: bool = True
    activation: str = "silu"
    experts: int = 0
    experts_per_token: int = 2
    expert_width: int = 0
    experts_renormalize: bool = True
    sparse: tuple = ()
    balance_coef: float = 0.0
    init_std: float = 0.02
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    strict_kernels: bool = False
    family: str = ""

    def __post_init__(self):
        # Read back from JSON, tuples are lists; a static field must be hashable.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is tuple:
                object.__setattr__(self, field.name, _tuple(value))

    @property
    def kinds(self) -> tuple:
        """A `Kind` for each layer, from the first on."""
        return tuple(
            Kind(
                window=self.window if _at(self.sliding, layer) else 0,
                rotates=self.positions == "rope" and _at(self.rotates, layer),
                sparse=self.experts > 0 and _at(self.sparse, layer),
            )
            for layer in range(self.layers)
        )

    @property
    def rotary_channels(self) -> int:
        """How many of a head's channels rotate, from the first on."""
        return int(self.head_dim * self.rope_share)

    @property
    def scale(self) -> float:
        """What multiplies the attention scores."""
        return self.attention_scale or self.head_dim**-0.5

    def validate(self) -> "ModelConfig":
        """Returns itself.

        Raises:
            UserError: a value is impossible; names the key and what it may be.
        """
        for name in (
            *("vocab_size", "width", "layers", "heads", "kv_heads"),
            *("head_dim", "ff_width", "max_length"),
        ):
            _whole(name, getattr(self, name), 1)
        for name in ("window", "experts", "expert_width"):
            _whole(name, getattr(self, name), 0)
        for name in ("rope_theta", "norm_eps", "init_std", "embed_scale"):
            value = getattr(self, name)
            if not value > 0:
                raise UserError(
                    f"model.{name}: expected a positive number, got {value!r}"
                )
        for name in (
            *("attention_scale", "attention_softcap", "logit_softcap"),
            *("rope_theta_sliding", "balance_coef"),
        ):
            value = getattr(self, name)
            if not value >= 0:
                raise UserError(
                    f"model.{name}: expected 0 (off) or a positive number, got "
                    f"{value!r}"
                )
        for name, allowed in (
            *(("dtype", DTYPES), ("remat", REMAT), ("norm", NORMS)),
            *(("norm_place", PLACES), ("activation", ACTIVATIONS)),
            *(("positions", POSITIONS), ("rope_scaling", tuple(ROPE_SCALING))),
            *(("qk_norm_over", QK_NORM_OVER), ("attention", KERNELS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(
                    f"model.{name}: expected one of {', '.join(allowed)}, got {value!r}"
                )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.kv_heads: must divide model.heads = {self.heads}, "
                f"got {self.kv_heads}"
            )
        for name, needed in (
            ("sliding", ("window", self.window > 0)),
            ("rotates", ("positions", self.positions == "rope")),
            ("sparse", ("experts", self.experts > 0)),
        ):
            pattern, (key, there) = getattr(self, name), needed
            if any(value not in (0, 1) for value in pattern):
                raise UserError(
                    f"model.{name}: expected True or False for each layer of the "
                    f"pattern, got {pattern!r}"
                )
            if pattern and not there:
                raise UserError(
                    f"model.{name}: a pattern of layers needs model.{key}, which is "
                    f"{getattr(self, key)!r}"
                )
        if self.positions == "rope":
            self._validate_rope()
        elif self.rope_scaling != "none":
            raise UserError(
                f"model.rope_scaling: {self.rope_scaling!r} needs model.positions = "
                f"'rope', got {self.positions!r}"
            )
        if self.experts:
            self._validate_experts()
        elif self.balance_coef:
            raise UserError(
                f"model.balance_coef: {self.balance_coef!r} has nothing to balance, "
                "since model.experts is 0"
            )
        return self

    def _validate_rope(self):
        if not 0 < self.rope_share <= 1:
            raise UserError(
                f"model.rope_share: expected more than 0 and at most 1, got "
                f"{self.rope_share!r}"
            )
        if self.rotary_channels % 2 or not self.rotary_channels:
            share = "" if self.rope_share == 1 else f" * rope_share {self.rope_share}"
            raise UserError(
                f"model.head_dim: must be even (rotary pairs), got {self.head_dim}"
                f"{share}"
            )
        if self.rope_scaling == "dynamic" and self.rotary_channels == 2:
            raise UserError(
                "model.rope_scaling: 'dynamic' stretches the base by a power of "
                "d / (d - 2), which 2 rotating channels have not; expected 4 or more"
            )
        names, values = ROPE_SCALING[self.rope_scaling], self.rope_arguments
        if len(names) != len(values):
            raise UserError(
                f"model.rope_arguments: {self.rope_scaling!r} takes "
                f"({', '.join(names)}), got {values!r}"
            )
        for name, value in zip(names, values, strict=True):
            if name in ("short_factors", "long_factors"):
                pairs = self.rotary_channels // 2
                if not isinstance(value, tuple) or len(value) != pairs:
                    raise UserError(
                        f"model.rope_arguments: {name} are {pairs} numbers, one for "
                        f"each pair of channels, got {value!r}"
                    )
            elif name != "truncate" and not value > 0:
                raise UserError(
                    f"model.rope_arguments: {name} is a positive number, got {value!r}"
                )

    def _validate_experts(self):
        _whole("experts_per_token", self.experts_per_token, 1)
        _whole("expert_width", self.expert_width, 1)
        if self.experts_per_token > self.experts:
            raise UserError(
                f"model.experts_per_token: at most model.experts = {self.experts}, "
                f"got {self.experts_per_token}"
            )
        if not any(kind.sparse for kind in self.kinds):
            raise UserError(
                f"model.sparse: no layer of {self.layers} has the model.experts = "
                f"{self.experts}, got {self.sparse!r}"
            )
        if not self.gated or self.ff_bias:
            name = "ff_bias" if self.gated else "gated"
            raise UserError(
                f"model.{name}: experts are gated and have no biases, got "
                f"{getattr(self, name)!r} with model.experts = {self.experts}"
            )


def _tuple(value):
    return tuple(map(_tuple, value)) if isinstance(value, (list, tuple)) else value


def _at(pattern, layer):
    """A pattern's word on one layer; an empty one says yes."""
    return bool(pattern[layer % len(pattern)]) if pattern else True


def _whole(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        expected = "a positive integer" if least else "a whole number, 0 or more"
        raise UserError(f"model.{name}: expected {expected}, got {value!r}")


def check_mesh(config: ModelConfig, mesh) -> None:
    """Refuses a mesh over which the model's arrays do not divide.

    Args:
        config: the model.
        mesh: a mesh with axes `data`, `fsdp`, `tensor`.

    Raises:
        UserError: names the key, its value and the mesh axis.
    """
    sparse = any(kind.sparse for kind in config.kinds)
    tensor = ("heads", "kv_heads", "ff_width", "vocab_size")
    for axis, names in (
        ("tensor", (*tensor, "expert_width") if sparse else tensor),
        ("fsdp", ("width",)),
    ):
        for name in names:
            value, size = getattr(config, name), mesh.shape[axis]
            if value % size:
                raise UserError(
                    f"model.{name}: {value} does not divide over mesh.{axis} = {size}; "
                    f"use a multiple of {size}, or a smaller mesh.{axis}"
                )
