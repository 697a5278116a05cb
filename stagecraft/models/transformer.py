"""The decoder: one tree of parameters for every stage, for training and for sampling.

Modules are Flax NNX modules used as plain pytrees: `jax.jit`, `jax.grad` and
`jax.tree.map` act on them directly, and every method is a pure function of its module.
Configs and other settings are static fields. Parameters are float32 and cast to the
compute dtype where they are used; norms, softmax and logits are float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from stagecraft import mesh
from stagecraft.models import attention as attention_lib
from stagecraft.models.config import ModelConfig

# Names of the activations that `remat="names"` keeps.
SAVED = ("query", "key", "value", "attended")

# Below this depth the layer loop is unrolled: it compiles as fast, and it saves the
# copies of a loop, a visible part of a small model's step.
UNROLL = 8


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang, Sennrich 2019)."""

    def __init__(self, size: int, eps: float, axis: str | None):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(axis,))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, key):
        c = config
        keys = jax.random.split(key, 4)
        out_std = c.init_std / (2 * c.layers) ** 0.5
        kv_shape = (c.width, c.kv_heads, c.head_dim)
        self.query = _normal(
            keys[0],
            (c.width, c.heads, c.head_dim),
            c.init_std,
            ("embed", "heads", None),
        )
        self.key = _normal(keys[1], kv_shape, c.init_std, ("embed", "kv_heads", None))
        self.value = _normal(keys[2], kv_shape, c.init_std, ("embed", "kv_heads", None))
        self.out = _normal(
            keys[3],
            (c.heads, c.head_dim, c.width),
            out_std,
            ("heads", None, "embed"),
        )
        self.query_norm = RMSNorm(c.head_dim, c.norm_eps, None) if c.qk_norm else None
        self.key_norm = RMSNorm(c.head_dim, c.norm_eps, None) if c.qk_norm else None

    def __call__(self, x, angles, attend):
        query = _project(x, self.query)
        key = _project(x, self.key)
        value = _project(x, self.value)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = checkpoint_name(attention_lib.rotate(query, angles), "query")
        key = checkpoint_name(attention_lib.rotate(key, angles), "key")
        value = checkpoint_name(value, "value")
        attended, extra = attend(query, key, value)
        attended = checkpoint_name(attended, "attended")
        return _project(attended, self.out, contracted=2), extra


class FeedForward(nnx.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, key):
        c = config
        keys = jax.random.split(key, 3)
        down_std = c.init_std / (2 * c.layers) ** 0.5
        wide = (c.width, c.ff_width)
        self.gate = _normal(keys[0], wide, c.init_std, ("embed", "ff"))
        self.up = _normal(keys[1], wide, c.init_std, ("embed", "ff"))
        self.down = _normal(keys[2], wide[::-1], down_std, ("ff", "embed"))

    def __call__(self, x):
        gated = jax.nn.silu(_project(x, self.gate)) * _project(x, self.up)
        return _project(gated, self.down)


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each normalised first and added."""

    def __init__(self, config: ModelConfig, key):
        attention_key, ff_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.width, config.norm_eps, "embed")
        self.attention = Attention(config, attention_key)
        self.ff_norm = RMSNorm(config.width, config.norm_eps, "embed")
        self.ff = FeedForward(config, ff_key)

    def __call__(self, x, angles, attend):
        """Runs the layer.

        Args:
            x: [B, T, D] residual stream.
            angles: from `attention.rope`.
            attend: (query, key, value) -> (attended, extra); the way tokens see each
                other, the only part in which training and decoding differ.

        Returns:
            ([B, T, D], extra).
        """
        attended, extra = self.attention(self.attention_norm(x), angles, attend)
        x = x + attended
        x = x + self.ff(self.ff_norm(x))
        return mesh.constrain(x, "batch", None, None), extra


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
        config: a validated `ModelConfig`, kept as a static field.
        key: random key of the initial weights.
    """

    def __init__(self, config: ModelConfig, key):
        c = config.validate()
        embed_key, layers_key, unembed_key = jax.random.split(key, 3)
        self.config = c
        table = (c.vocab_size, c.width)
        self.embed = _normal(embed_key, table, c.init_std, ("vocab", "embed"))
        self.layers = jax.vmap(lambda k: Block(c, k))(
            jax.random.split(layers_key, c.layers)
        )
        self.norm = RMSNorm(c.width, c.norm_eps, "embed")
        self.unembed = (
            None
            if c.tied
            else _normal(unembed_key, table, c.init_std, ("vocab", "embed"))
        )

    def hidden(self, ids, positions, segments):
        """Final hidden states of whole sequences.

        Args:
            ids: i32[B, T] tokens.
            positions: i32[B, T] position of each token in its document.
            segments: i32[B, T] document number from 1; 0 is padding, whose hidden
                states are finite and meaningless.

        Returns:
            [B, T, D] in the compute dtype, after the final norm.
        """

        def attend(query, key, value):
            return attention_lib.attention(query, key, value, segments), None

        angles = self.angles(positions)
        body = _remat(
            lambda x, layer: layer(x, angles, attend),
            self.config.remat,
        )
        x, _ = jax.lax.scan(body, self.lookup(ids), self.layers, unroll=self.unroll)
        return self.norm(x)

    def output_embedding(self):
        """f32[V, D]: the rows whose products with hidden states are the logits."""
        return (self.embed if self.unembed is None else self.unembed)[...]

    def logits(self, ids, positions, segments):
        """f32[B, T, V], all at once: for tests and short sequences only.

        Training goes through `heads.token_logps`, which never builds this array.
        """
        hidden = self.hidden(ids, positions, segments)
        embedding = self.output_embedding().astype(hidden.dtype)
        return jnp.einsum(
            "btd,vd->btv", hidden, embedding, preferred_element_type=jnp.float32
        )

    def lookup(self, ids):
        """Input embeddings: i32[B, T] -> [B, T, D] in the compute dtype."""
        # Gathered over `fsdp` first: a table split in both dimensions has no cheap
        # row lookup.
        table = self.embed[...].astype(self.config.dtype)
        table = mesh.constrain(table, "vocab", None)
        return mesh.constrain(table[ids], "batch", None, None)

    def angles(self, positions):
        """Rotary angles of i32[B, T] positions."""
        c = self.config
        return attention_lib.rope(positions, c.head_dim, c.rope_theta)

    @property
    def unroll(self) -> int:
        """How many layers one turn of the layer loop runs."""
        return self.config.layers if self.config.layers <= UNROLL else 1


class ScalarModel(nnx.Module):
    """A Transformer with one number per token: a reward or a value.

    Args:
        body: the Transformer to read; its parameters become part of this module.
        key: random key of the head, N(0, 1/(D + 1)) as in Stiennon et al. 2020.
    """

    def __init__(self, body: Transformer, key):
        width = body.config.width
        self.body = body
        self.head = _normal(key, (width,), (width + 1) ** -0.5, ("embed",))
        self.bias = nnx.Param(jnp.zeros((), jnp.float32), axes=())

    def __call__(self, ids, positions, segments):
        """f32[B, T]; arguments as in `Transformer.hidden`."""
        hidden = self.body.hidden(ids, positions, segments).astype(jnp.float32)
        return hidden @ self.head[...] + self.bias[...]


def _normal(key, shape, std, axes):
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


def _project(x, weight, contracted: int = 1):
    """Contracts the last dimensions of x with the first ones of a weight.

    Both are flattened to matrices: the gradient of the weight is then a plain matmul.
    With [B, T, D] kept, XLA on a CPU transposes whole activations for it.
    """
    weight = weight[...].astype(x.dtype)
    rows, columns = x.shape[: x.ndim - contracted], weight.shape[contracted:]
    size = math.prod(weight.shape[:contracted])
    out = x.reshape(-1, size) @ weight.reshape(size, -1)
    return out.reshape(rows + columns)


def _remat(body, policy: str):
    """Wraps a layer so that the backward pass recomputes what `policy` drops."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return body
    if policy == "full":
        return jax.checkpoint(body)
    if policy == "dots":
        return jax.checkpoint(body, policy=policies.dots_with_no_batch_dims_saveable)
    return jax.checkpoint(body, policy=policies.save_only_these_names(*SAVED))
