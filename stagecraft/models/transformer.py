"""The decoder: one tree of parameters for every stage, for training and for sampling.

Modules are Flax NNX modules used as plain pytrees: `jax.jit`, `jax.grad` and
`jax.tree.map` act on them directly, and every method is a pure function of its module.
Configs and other settings are static fields. Parameters are float32 and cast to the
compute dtype where they are used; norms, softmax and logits are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from stagecraft import sharding
from stagecraft.models import attention, heads, layers, linear, norms, rope
from stagecraft.models.config import ModelConfig
from stagecraft.models.experts import Balance, Experts, balance, copies

# Names of the activations that `remat="names"` and "offload" keep.
SAVED = ("query", "key", "value", "attended")

# Below this depth the layer loop is unrolled: it compiles as fast, and it saves the
# copies of a loop, a visible part of a small model's step.
UNROLL = 8

# Every product with a weight, except those of experts.
_project = linear.project


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, key):
        c = config
        keys = jax.random.split(key, 4)
        out_std = c.init_std / (2 * c.layers) ** 0.5
        dims, kv_dims = (c.heads, c.head_dim), (c.kv_heads, c.head_dim)
        axes, kv_axes = ("heads", None), ("kv_heads", None)
        normal, zeros = linear.normal, linear.zeros
        self.query = normal(keys[0], (c.width, *dims), c.init_std, ("embed", *axes))
        kv = (c.width, *kv_dims)
        self.key = normal(keys[1], kv, c.init_std, ("embed", *kv_axes))
        self.value = normal(keys[2], kv, c.init_std, ("embed", *kv_axes))
        self.out = normal(keys[3], (*dims, c.width), out_std, (*axes, "embed"))
        self.query_bias = zeros(dims, axes) if c.qkv_bias else None
        self.key_bias = zeros(kv_dims, kv_axes) if c.qkv_bias else None
        self.value_bias = zeros(kv_dims, kv_axes) if c.qkv_bias else None
        self.out_bias = zeros((c.width,), ("embed",)) if c.out_bias else None
        self.query_norm = _head_norm(c, c.heads, "heads") if c.qk_norm else None
        self.key_norm = _head_norm(c, c.kv_heads, "kv_heads") if c.qk_norm else None

    def __call__(
        self, x: Array, angles, attend: Callable, norm: Callable | None
    ) -> tuple[Array, Any]:
        def products(x):
            x = _maybe(norm, x)
            return (
                _project(x, self.query, self.query_bias),
                _project(x, self.key, self.key_bias),
                _project(x, self.value, self.value_bias),
            )

        def placed(x, norm):
            x = x if norm is None else _norm_heads(norm, x)
            return x if angles is None else rope.rotate(x, angles)

        query, key, value = _computed_again(products)(x)
        query = _computed_again(lambda x: placed(x, self.query_norm))(query)
        key = _computed_again(lambda x: placed(x, self.key_norm))(key)
        query = checkpoint_name(query, "query")
        key = checkpoint_name(key, "key")
        value = checkpoint_name(value, "value")
        attended, extra = attend(query, key, value)
        attended = checkpoint_name(attended, "attended")

        def out(x):
            return _project(x, self.out, self.out_bias, contracted=2)

        return _computed_again(out)(attended), extra


def _head_norm(config, count, axis):
    """Makes the norm of `count` heads: over each one's channels, or over all."""
    c = config
    if c.qk_norm_over == "head":
        return norms.RMSNorm(c.head_dim, c.norm_eps, None, c.norm_offset)
    return norms.RMSNorm(count * c.head_dim, c.norm_eps, axis, c.norm_offset)


def _norm_heads(norm, x):
    """Normalises [B, T, H, C] over as many channels as the norm's scale has."""
    if norm.scale.shape[-1] == x.shape[-1]:
        return norm(x)
    return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


class FeedForward(nnx.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down (Shazeer 2020), and its relatives."""

    def __init__(self, config: ModelConfig, key):
        c = config
        keys = jax.random.split(key, 3)
        down_std = c.init_std / (2 * c.layers) ** 0.5
        wide, axes = (c.width, c.ff_width), ("embed", "ff")
        normal, zeros = linear.normal, linear.zeros
        self.activation = c.activation
        self.gate = normal(keys[0], wide, c.init_std, axes) if c.gated else None
        self.up = normal(keys[1], wide, c.init_std, axes)
        self.down = normal(keys[2], wide[::-1], down_std, axes[::-1])
        bias, gate_bias = c.ff_bias, c.ff_bias and c.gated
        self.gate_bias = zeros((c.ff_width,), ("ff",)) if gate_bias else None
        self.up_bias = zeros((c.ff_width,), ("ff",)) if bias else None
        self.down_bias = zeros((c.width,), ("embed",)) if bias else None

    def __call__(self, x: Array, norm: Callable | None) -> Array:
        activate = linear.ACTIVATIONS[self.activation]

        def products(x):
            x = _maybe(norm, x)
            up, gate = _project(x, self.up, self.up_bias), None
            if self.gate is not None:
                gate = _project(x, self.gate, self.gate_bias)
            return gate, up

        def down(gate, up):
            inner = activate(up) if gate is None else activate(gate) * up
            return _project(inner, self.down, self.down_bias)

        return _computed_again(down)(*_computed_again(products)(x))


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each added to the residual stream.

    Norms come before each of the two, after each, or both.

    Args:
        key: random key of the initial weights.
        sparse: whether the feed-forward is a mixture of experts.
    """

    def __init__(self, config: ModelConfig, key, sparse: bool):
        attention_key, ff_key = jax.random.split(key)
        before = config.norm_place in ("pre", "both")
        after = config.norm_place in ("post", "both")
        self.attention_norm = norms.make(config) if before else None
        self.attention = Attention(config, attention_key)
        self.attention_post_norm = norms.make(config) if after else None
        self.ff_norm = norms.make(config) if before else None
        self.ff = None if sparse else FeedForward(config, ff_key)
        self.experts = Experts(config, ff_key) if sparse else None
        self.ff_post_norm = norms.make(config) if after else None

    def __call__(self, x: Array, angles, attend: Callable) -> tuple:
        """Runs the layer.

        Args:
            x: [B, T, D] residual stream.
            angles: from `rope.angles`; None where nothing rotates.
            attend: (query, key, value) -> (attended, extra); how tokens see each other,
                the only part in which training and decoding differ.

        Returns:
            [B, T, D]; extra; the experts' `Routing`, or None.
        """
        attended, extra = self.attention(x, angles, attend, self.attention_norm)
        x = x + _maybe(self.attention_post_norm, attended)
        if self.experts is None:
            y, routing = self.ff(x, self.ff_norm), None
        else:
            y, routing = self.experts(_maybe(self.ff_norm, x))
        x = x + _maybe(self.ff_post_norm, y)
        return sharding.constrain_tokens(x), extra, routing


def _computed_again(part):
    """Wraps a part of a layer; the backward pass computes its inside from its inputs.

    For what is cheap beside the products: norms and activations. Else each of the
    products that read a norm keeps a copy of it, and a scan over layers keeps them all.
    """
    return jax.checkpoint(part)


def _maybe(norm, x):
    return x if norm is None else norm(x)


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
        config: a validated `ModelConfig`, kept as a static field.
        key: random key of the initial weights.
    """

    def __init__(self, config: ModelConfig, key: Array):
        c = config.validate()
        embed_key, layers_key, unembed_key = jax.random.split(key, 3)
        self.config = c
        table, axes = (c.vocab_size, c.width), ("vocab", "embed")
        self.embed = linear.normal(embed_key, table, c.init_std, axes)
        rows, row_axes = (c.max_length, c.width), ("positions", "embed")
        self.positions = (
            linear.normal(jax.random.fold_in(embed_key, 1), rows, c.init_std, row_axes)
            if c.positions == "learned"
            else None
        )
        self.layers = _stacks(c, jax.random.split(layers_key, c.layers))
        self.norm = norms.make(c)
        self.unembed = (
            None if c.tied else linear.normal(unembed_key, table, c.init_std, axes)
        )

    def hidden(self, ids: Array, positions: Array, segments: Array) -> Array:
        """Returns the final hidden states of whole sequences.

        Args:
            ids: i32[B, T] tokens.
            positions: i32[B, T] position of each token in its document.
            segments: i32[B, T] document number from 1; 0 is padding, whose hidden
                states are finite and meaningless.

        Returns:
            [B, T, D] in the compute dtype, after the final norm.
        """
        return self._hidden(ids, positions, segments)[0]

    def hidden_and_balance(
        self,
        ids: Array,
        positions: Array,
        segments: Array,
        shares: Array | None = None,
    ) -> tuple[Array, Balance]:
        """Returns the final hidden states, and how the experts share the work.

        For models with experts; arguments as of `hidden`, and

        Args:
            shares: f32[S, E], the `share` of `experts.balance` in each of the S sparse
                layers; None for those of these rows.
        """
        none = Balance(
            loss=jnp.zeros(ids.shape, jnp.float32),
            load=jnp.zeros((self.config.experts,), jnp.float32),
        )

        def add(carry, routing):
            total, number = carry
            share = None if shares is None else shares[number]
            one = balance(routing, segments > 0, share)
            return jax.tree.map(jnp.add, total, one), number + 1

        x, (total, _) = self._hidden(
            ids, positions, segments, add, (none, jnp.int32(0))
        )
        count = sum(spec.sparse for spec in self.config.layer_specs)
        return x, jax.tree.map(lambda a: a / count, total)

    def expert_copies(self, ids: Array, positions: Array, segments: Array) -> Array:
        """Counts the copies of tokens that each expert of each sparse layer gets.

        Args:
            ids, positions, segments: as of `hidden`.

        Returns:
            f32[S, E].
        """
        c = self.config
        none = jnp.zeros((sum(s.sparse for s in c.layer_specs), c.experts), jnp.float32)

        def add(carry, routing):
            total, number = carry
            return total.at[number].set(copies(routing, segments > 0)), number + 1

        return self._hidden(ids, positions, segments, add, (none, jnp.int32(0)))[1][0]

    def _hidden(self, ids, positions, segments, add=None, total=None):
        """Returns hidden states, and `total` with every sparse layer's part added.

        Args:
            add: (total, `Routing` of a layer) -> total; None adds nothing.
            total: any tree of arrays.
        """
        c = self.config
        angles = self.angles(positions, segments)

        def step(carry, layer, spec):
            x, total = carry

            def attend(query, key, value):
                return self.attend(query, key, value, segments, spec), None

            x, _, routing = layer(x, angles[spec], attend)
            if add is not None and spec.sparse:
                total = add(total, routing)
            return (x, total), None

        carry = (self.lookup(ids, positions), total)
        (x, total), _ = self.through(step, carry, unroll=self.unroll, remat=c.remat)
        return self.norm(x), total

    def attend(self, query, key, value, segments, spec):
        """Attention over whole sequences in a layer of this `LayerSpec`."""
        c = self.config
        return attention.attention(
            query,
            key,
            value,
            segments,
            window=spec.window,
            softcap=c.attention_softcap,
            scale=c.scale,
            kernel=c.attention,
            strict=c.strict_kernels,
        )

    def through(self, step, carry, *, unroll=1, remat="none"):
        """Runs a step through the layers, from the first to the last.

        Args:
            step: (carry, layer, spec) -> (carry, out), `spec` a static `LayerSpec`.
            carry: any tree of arrays.
            unroll: layers that one turn of the loop runs, where all have one spec.
            remat: see `ModelConfig`.

        Returns:
            carry; the outs, stacked over layers.
        """
        return layers.scan(
            lambda spec: _remat(lambda c, layer: step(c, layer, spec), remat),
            carry,
            self.layers,
            self.config.layer_specs,
            unroll=unroll,
        )

    def each_layer(self):
        """Returns [(spec, layer)], from the first to the last."""
        return layers.each(self.layers, self.config.layer_specs)

    def output_embedding(self) -> Array:
        """Returns f32[V, D], whose products with hidden states are the logits."""
        return (self.embed if self.unembed is None else self.unembed)[...]

    def token_logps(self, hidden: Array, targets: Array, **options) -> heads.TokenStats:
        """Calls `heads.token_logps` with this model's output embedding."""
        return heads.token_logps(
            hidden,
            self.output_embedding(),
            targets,
            softcap=self.config.logit_softcap,
            **options,
        )

    def project_out(self, hidden: Array) -> Array:
        """Returns the logits of hidden states: [..., D] -> f32[..., V]."""
        embedding = self.output_embedding().astype(hidden.dtype)
        logits = jnp.einsum(
            "...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32
        )
        return linear.softcap(logits, self.config.logit_softcap)

    def logits(self, ids: Array, positions: Array, segments: Array) -> Array:
        """Returns f32[B, T, V] logits at once, for tests and short sequences only.

        Training goes through `token_logps`, which never builds this array.
        """
        return self.project_out(self.hidden(ids, positions, segments))

    def lookup(self, ids: Array, positions: Array) -> Array:
        """Looks up input embeddings: 2 x i32[B, T] -> [B, T, D] in the compute dtype.

        A learned position beyond the table is that of its last row: the data is cut to
        `max_length`, so that only padding can lie there.
        """
        # Gathered over `fsdp` first: a table split in both dimensions has no cheap
        # row lookup.
        table = self.embed[...].astype(self.config.dtype)
        table = sharding.constrain(table, "vocab", None)
        x = table[ids]
        if self.config.embed_scale != 1:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.positions is not None:
            table = self.positions[...].astype(self.config.dtype)
            table = sharding.constrain(table, None, None)
            x = x + jnp.take(table, positions, axis=0, mode="clip")
        return sharding.constrain_tokens(x)

    def angles(self, positions: Array, segments: Array | None) -> dict:
        """Returns {spec: rotary angles, or None} for the specs of this model's layers.

        Args: as of `rope.angles`.
        """
        shared = {}  # the same arrays for specs that rotate alike
        out = {}
        for spec in self.config.layer_specs:
            own = spec.window > 0 and self.config.rope_theta_sliding > 0
            if spec.rotates and own not in shared:
                shared[own] = rope.angles(self.config, positions, segments, sliding=own)
            out[spec] = shared[own] if spec.rotates else None
        return out

    @property
    def unroll(self) -> int:
        """Number of layers that one turn of the layer loop runs."""
        return self.config.layers if self.config.layers <= UNROLL else 1


class ScalarModel(nnx.Module):
    """A Transformer with one number per token: a reward or a value.

    Args:
        body: the Transformer to read; its parameters become part of this module.
        key: random key of the head, N(0, 1/(D + 1)) as in Stiennon et al. 2020.
        head, bias: Params f32[D] and f32[], in place of new ones.
    """

    def __init__(self, body: Transformer, key: Array | None, head=None, bias=None):
        width = body.config.width
        self.body = body
        if head is None:
            head = linear.normal(key, (width,), (width + 1) ** -0.5, ("embed",))
        self.head = head
        self.bias = linear.zeros((), ()) if bias is None else bias

    def __call__(self, ids: Array, positions: Array, segments: Array) -> Array:
        """Returns f32[B, T] values; arguments as in `Transformer.hidden`."""
        hidden = self.body.hidden(ids, positions, segments).astype(jnp.float32)
        return hidden @ self.head[...] + self.bias[...]


def _stacks(config, keys):
    """Stacks layers along one axis; dense and sparse ones apart where both occur."""

    def stack(sparse, keys):
        return jax.vmap(lambda key: Block(config, key, sparse))(keys)

    numbers = {"dense": [], "sparse": []}
    for number, spec in enumerate(config.layer_specs):
        numbers["sparse" if spec.sparse else "dense"].append(number)
    if not (numbers["dense"] and numbers["sparse"]):
        return stack(bool(numbers["sparse"]), keys)
    return nnx.Dict(
        {
            name: stack(name == "sparse", keys[jnp.asarray(part)])
            for name, part in numbers.items()
        }
    )


def _remat(body, policy: str):
    """Wraps a layer so that the backward pass recomputes what `policy` drops."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return body
    if policy == "full":
        return jax.checkpoint(body)
    if policy == "dots":
        return jax.checkpoint(body, policy=policies.dots_with_no_batch_dims_saveable)
    if policy == "offload":
        elsewhere = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(SAVED),
            offload_src="device",
            offload_dst=sharding.HOST,
        )
        return jax.checkpoint(body, policy=elsewhere)
    return jax.checkpoint(body, policy=policies.save_only_these_names(*SAVED))
