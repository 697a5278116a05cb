"""The fields that make a decoder, with their defaults, checked before it is built."""

import dataclasses
from typing import NamedTuple

from jax.sharding import Mesh

from stagecraft import schema
from stagecraft.errors import UserError

# How rotary wavelengths stretch beyond the trained length, and the numbers each needs.
ROPE_SCALING = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_length"),
    "llama3": ("factor", "low_frequency", "high_frequency", "original_length"),
    "yarn": (
        "factor",
        "original_length",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
    "longrope": (
        "short_factors",
        "long_factors",
        "original_length",
        "attention_factor",
    ),
}
# Fields that are positive integers.
COUNTS = (
    "vocab_size",
    "width",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "ff_width",
    "max_length",
)
# Fields that are words, and the words each may be.
CHOICES = {
    "dtype": ("float32", "bfloat16", "float16"),
    "remat": ("none", "full", "dots", "names", "offload"),
    "norm": ("rms", "layer"),
    "norm_place": ("pre", "post", "both"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "positions": ("rope", "learned", "none"),
    "rope_scaling": tuple(ROPE_SCALING),
    "qk_norm_over": ("head", "projection"),
    "attention": ("auto", "xla", "blockwise", "cudnn", "splash"),
}
# Fields that are positive numbers, or 0 where they do nothing.
OFF_AT_ZERO = (
    "attention_scale",
    "attention_softcap",
    "logit_softcap",
    "rope_theta_sliding",
    "balance_coef",
)


class LayerSpec(NamedTuple):
    """What sets one layer apart from its neighbours.

    Attributes:
        window: tokens it sees, itself included; 0 for all before it.
        rotates: whether queries and keys rotate with their positions.
        sparse: whether its feed-forward is a mixture of experts.
    """

    window: int
    rotates: bool
    sparse: bool


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer; what sets the model families apart are its fields.

    These are also the keys and defaults of an experiment's `model`
    (`stagecraft.defaults.model`), but for vocab_size, which is its tokenizer's, and
    family. A pattern of layers is repeated from the first layer on; () stands for all.
    """

    vocab_size: int  # V, number of token ids
    width: int = 128  # D, size of the residual stream
    layers: int = 4  # L, number of blocks
    heads: int = 4  # H, number of query heads
    kv_heads: int = 4  # K, key/value heads; each serves H / K query heads
    head_dim: int = 32  # C, channels per head; even, since rotations act on pairs
    ff_width: int = 352  # F, hidden width of the feed-forward
    max_length: int = 256  # the context, in tokens; the data is cut to it
    tied: bool = True  # one matrix for input and output embedding
    embed_scale: float = 1.0  # multiplies input embeddings; Gemma: D^0.5

    norm: str = "rms"  # RMSNorm; or "layer", LayerNorm with a bias
    norm_offset: float = 0.0  # added to a norm's scale; Gemma: 1, with scales near 0
    # Norms of a block: "pre" (before attention and feed-forward), "post" (after them,
    # OLMo 2) or "both" (Gemma 2 and 3).
    norm_place: str = "pre"
    norm_eps: float = 1e-5  # added to the mean square in every norm

    qk_norm: bool = True  # RMSNorm on queries and keys, before the rotation
    qk_norm_over: str = "head"  # each head's C channels; or "projection" (OLMo 2)
    qkv_bias: bool = False
    out_bias: bool = False
    ff_bias: bool = False
    attention_scale: float = 0.0  # multiplies the scores; 0 for C^-0.5
    attention_softcap: float = 0.0  # c in c tanh(scores / c); 0 for none
    logit_softcap: float = 0.0  # the same of the logits
    window: int = 0  # tokens a sliding layer sees, itself included; 0 for no sliding
    sliding: tuple[bool, ...] = ()  # which layers slide: (True, False) is every other

    positions: str = "rope"  # or "learned" (one row a position, GPT-2), "none"
    rotates: tuple[bool, ...] = ()  # which layers rotate
    rope_theta: float = 1e4  # base of the rotary wavelengths
    # Of sliding layers, which are then not scaled (Gemma 3); 0 for the same.
    rope_theta_sliding: float = 0.0
    rope_share: float = 1.0  # of a head's channels; the first ones rotate
    rope_scaling: str = "none"  # or another name of `ROPE_SCALING`
    rope_arguments: tuple = ()  # its numbers, in the order of `ROPE_SCALING`

    gated: bool = True  # activation(x W_gate) * x W_up; else activation(x W_up)
    activation: str = "silu"  # or "gelu", "gelu_tanh", "relu"
    experts: int = 0  # E, feed-forwards to choose from in a sparse layer; 0 for dense
    experts_per_token: int = 2  # how many of them process a token
    expert_width: int = 0  # F of each expert
    experts_renormalize: bool = True  # the chosen experts' weights add up to 1
    sparse: tuple[bool, ...] = ()  # which layers have experts
    # Weight of the load-balancing loss (`experts.Balance`) in stages of kind
    # language_model; micro-batches cost a forward pass more, which counts the load of
    # the whole batch first.
    balance_coef: float = 0.0

    init_std: float = 0.02  # standard deviation of initial weights
    dtype: str = "float32"  # of the computation; parameters are always float32
    # What the backward pass finds stored of each block. "none" recomputes nothing;
    # "full" stores block inputs only; "dots" also matmul outputs; "names" also queries,
    # keys, values and the attention output; "offload" does too, in the host's memory.
    remat: str = "none"
    # The kernel for whole sequences; "auto" takes the fastest that can do what is asked
    # (see `stagecraft.models.attention`); or "xla", "blockwise", "cudnn", "splash".
    attention: str = "auto"
    # A kernel asked for by name that is not available is an error, not a fall-back.
    strict_kernels: bool = False
    # The Hugging Face family it was read from and is written as; "" for the first that
    # has everything it needs.
    family: str = ""

    def __post_init__(self):
        # Read back from JSON, tuples are lists; a static field must be hashable.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                object.__setattr__(self, field.name, _tuple(value))

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The `LayerSpec` of each layer, from the first to the last."""
        patterns = (self.sliding, self.rotates, self.sparse)
        sliding, rotates, sparse = (per_layer(p, self.layers) for p in patterns)
        return tuple(
            LayerSpec(
                window=self.window if sliding[i] else 0,
                rotates=self.positions == "rope" and rotates[i],
                sparse=self.experts > 0 and sparse[i],
            )
            for i in range(self.layers)
        )

    @property
    def rotary_channels(self) -> int:
        """Number of a head's channels that rotate; they are its first ones."""
        return int(self.head_dim * self.rope_share)

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.attention_scale or self.head_dim**-0.5

    def validate(self) -> "ModelConfig":
        """Checks every field; returns itself.

        Raises:
            UserError: a value is impossible; names the key and what it may be.
        """
        self._validate_values()
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.kv_heads: must divide model.heads = {self.heads}, "
                f"got {self.kv_heads}"
            )
        self._validate_patterns()
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

    def _validate_values(self):
        for name in COUNTS:
            _check_integer(name, getattr(self, name), 1)
        for name in ("window", "experts", "expert_width"):
            _check_integer(name, getattr(self, name), 0)
        for name in ("rope_theta", "norm_eps", "init_std", "embed_scale"):
            value = getattr(self, name)
            if not value > 0:
                raise UserError(
                    f"model.{name}: expected a positive number, got {value!r}"
                )
        for name in OFF_AT_ZERO:
            value = getattr(self, name)
            if not value >= 0:
                raise UserError(
                    f"model.{name}: expected 0 (off) or a positive number, got "
                    f"{value!r}"
                )
        for name, allowed in CHOICES.items():
            schema.choice(f"model.{name}", getattr(self, name), allowed)

    def _validate_patterns(self):
        for name, key, enabled in (
            ("sliding", "window", self.window > 0),
            ("rotates", "positions", self.positions == "rope"),
            ("sparse", "experts", self.experts > 0),
        ):
            pattern = getattr(self, name)
            if any(value not in (0, 1) for value in pattern):
                raise UserError(
                    f"model.{name}: expected True or False for each layer of the "
                    f"pattern, got {pattern!r}"
                )
            if pattern and not enabled:
                raise UserError(
                    f"model.{name}: a pattern of layers needs model.{key}, which is "
                    f"{getattr(self, key)!r}"
                )

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
        _check_integer("experts_per_token", self.experts_per_token, 1)
        _check_integer("expert_width", self.expert_width, 1)
        if self.experts_per_token > self.experts:
            raise UserError(
                f"model.experts_per_token: at most model.experts = {self.experts}, "
                f"got {self.experts_per_token}"
            )
        if not any(spec.sparse for spec in self.layer_specs):
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


def per_layer(pattern: tuple, layers: int) -> tuple[bool, ...]:
    """Repeats a pattern to one value a layer; an empty one covers all layers.

    >>> per_layer((True, False), 3)
    (True, False, True)
    """
    return tuple(
        bool(pattern[i % len(pattern)]) if pattern else True for i in range(layers)
    )


def _check_integer(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        expected = "a positive integer" if least else "a whole number, 0 or more"
        raise UserError(f"model.{name}: expected {expected}, got {value!r}")


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Refuses a mesh over which the model's arrays do not divide.

    Args:
        mesh: a mesh of `sharding.make_mesh`.

    Raises:
        UserError: names the key, its value and the mesh axis.
    """
    sparse = any(spec.sparse for spec in config.layer_specs)
    tensor = ("heads", "kv_heads", "ff_width", "vocab_size")
    for axis, names in (
        ("tensor", (*tensor, "expert_width") if sparse else tensor),
        ("fsdp", ("width",)),
        ("expert", ("experts",) if sparse else ()),
    ):
        for name in names:
            value, size = getattr(config, name), mesh.shape[axis]
            if value % size:
                raise UserError(
                    f"model.{name}: {value} does not divide over mesh.{axis} = {size}; "
                    f"use a multiple of {size}, or a smaller mesh.{axis}"
                )
