"""The numbers that make a decoder, checked before anything is built."""

import dataclasses

from stagecraft.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "full", "dots", "names")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer of the Llama and Qwen families.

    Attributes:
        vocab_size: V, number of token ids.
        width: D, size of the residual stream.
        layers: L, number of blocks.
        heads: H, number of query heads.
        kv_heads: K, number of key/value heads; each serves H / K query heads.
        head_dim: C, channels per head; even, since rotations act on pairs.
        ff_width: F, hidden width of the SwiGLU feed-forward.
        max_length: longest sequence in tokens; the data is cut to it.
        tied: one matrix for input and output embedding.
        qk_norm: RMSNorm on each head's queries and keys, before the rotation.
        rope_theta: base of the rotary wavelengths.
        norm_eps: added to the mean square in every RMSNorm.
        init_std: standard deviation of initial weights.
        dtype: compute dtype; parameters are always float32.
        remat: what the backward pass finds stored of each block. "none" recomputes
            nothing; "full" stores block inputs only; "dots" also matmul outputs;
            "names" also queries, keys, values and the attention output.
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
    qk_norm: bool = True
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dtype: str = "float32"
    remat: str = "none"

    def validate(self) -> "ModelConfig":
        """Returns itself.

        Raises:
            UserError: a value is impossible; names the key and what it may be.
        """
        for name in (
            *("vocab_size", "width", "layers", "heads", "kv_heads"),
            *("head_dim", "ff_width", "max_length"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(
                    f"model.{name}: expected a positive integer, got {value!r}"
                )
        for name in ("rope_theta", "norm_eps", "init_std"):
            value = getattr(self, name)
            if not value > 0:
                raise UserError(
                    f"model.{name}: expected a positive number, got {value!r}"
                )
        for name, allowed in (("dtype", DTYPES), ("remat", REMAT)):
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
        if self.head_dim % 2:
            raise UserError(
                f"model.head_dim: must be even (rotary pairs), got {self.head_dim}"
            )
        return self


def check_mesh(config: ModelConfig, mesh) -> None:
    """Refuses a mesh over which the model's arrays do not divide.

    Args:
        config: the model.
        mesh: a mesh with axes `data`, `fsdp`, `tensor`.

    Raises:
        UserError: names the key, its value and the mesh axis.
    """
    for axis, names in (
        ("tensor", ("heads", "kv_heads", "ff_width", "vocab_size")),
        ("fsdp", ("width",)),
    ):
        for name in names:
            value, size = getattr(config, name), mesh.shape[axis]
            if value % size:
                raise UserError(
                    f"model.{name}: {value} does not divide over mesh.{axis} = {size}; "
                    f"use a multiple of {size}, or a smaller mesh.{axis}"
                )
