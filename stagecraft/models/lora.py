"""LoRA: low-rank matrices beside frozen weights.

A targeted weight W acts as W + s A B with s = alpha / rank (Hu et al. 2021,
arxiv.org/abs/2106.09685). What is trained is an `Adapter`: A and B of every target, and
in full a new scalar head and, if asked for, the embeddings. The base never changes:
`join` puts an adapter beside it without a copy, and the base alone is the model without
its adapter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from stagecraft import schema, sharding, tree
from stagecraft.errors import UserError
from stagecraft.models import linear
from stagecraft.models.transformer import ScalarModel

# Weights that may be adapted: their path in a layer, and how many of their dimensions a
# product sums over.
TARGETS = {
    "query": ("attention/query", 1),
    "key": ("attention/key", 1),
    "value": ("attention/value", 1),
    "out": ("attention/out", 2),
    "gate": ("ff/gate", 1),
    "up": ("ff/up", 1),
    "down": ("ff/down", 1),
}
HEAD = ("head", "bias")  # of a scalar model
EMBEDDINGS = ("embed", "unembed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A stage's `lora` keys; see `stagecraft.defaults.lora`."""

    rank: int
    alpha: float
    targets: str
    dropout: float
    rslora: bool
    embeddings: bool

    @property
    def scale(self) -> float:
        """s in W + s A B; with rslora alpha / sqrt(rank) (arxiv.org/abs/2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def names(self) -> tuple[str, ...]:
        """The targets, each once, in the order of `TARGETS`."""
        if self.targets == "all":
            return tuple(TARGETS)
        return tuple(name for name in TARGETS if name in schema.listed(self.targets))


def check(where: str, config) -> None:
    """Refuses impossible settings; `where` is the group of the keys, for messages."""
    settings = Settings(**config)
    if settings.rank < 0:
        raise UserError(
            f"{where}.rank={settings.rank}: expected 1 or more, or 0 for no adapter"
        )
    if settings.alpha <= 0:
        raise UserError(f"{where}.alpha={settings.alpha}: expected above 0")
    if not 0 <= settings.dropout < 1:
        raise UserError(
            f"{where}.dropout={settings.dropout}: expected from 0 (off) to below 1"
        )
    targets = schema.listed(settings.targets)
    if not targets:
        raise UserError(
            f"{where}.targets: is empty; expected 'all' or some of {', '.join(TARGETS)}"
        )
    for name in targets:
        if name in ("embed", "unembed", "embeddings"):
            raise UserError(
                f"{where}.targets={settings.targets!r}: embeddings take no adapter; "
                f"train them whole with {where}.embeddings=True"
            )
        if name in ("experts", "router"):
            raise UserError(
                f"{where}.targets={settings.targets!r}: {name} take no adapter; "
                f"expected 'all' or some of {', '.join(TARGETS)}"
            )
        if name not in TARGETS and settings.targets != "all":
            raise UserError(schema.unknown(f"{where}.targets", name, TARGETS))


class LoraPair(NamedTuple):
    """A [*contracted, R] and B [R, *out] of one target, stacked over layers."""

    a: nnx.Param
    b: nnx.Param


@jax.tree_util.register_pytree_with_keys_class
class Adapter:
    """The trainable parameters of LoRA, in place of a model's own.

    Attributes:
        parts: {name of a parameter of the model: `LoraPair`, or a Param trained in
            full}.
        settings: the `Settings`, static.
    """

    def __init__(self, parts: dict, settings: Settings):
        self.parts, self.settings = dict(parts), settings

    def tree_flatten_with_keys(self):
        keys = tuple(self.parts)
        pairs = [(jax.tree_util.DictKey(k), self.parts[k]) for k in keys]
        return pairs, (keys, self.settings)

    @classmethod
    def tree_unflatten(cls, static, children):
        keys, settings = static
        return cls(zip(keys, children, strict=True), settings)


def init(settings: Settings, base, key: Array, *, scalar: bool = False) -> Adapter:
    """Makes a fresh adapter: A random as PEFT's, B zero, so that nothing changes yet.

    Args:
        base: a `Transformer` or a `ScalarModel`, abstract or not.
        key: a random key.
        scalar: whether the model is to have a scalar head; a base without one gets a
            new one.

    Returns:
        an `Adapter`, which shares no array with its base.
    """
    prefix = "body/" if scalar else ""
    inside = "body/" if isinstance(base, ScalarModel) else ""
    parameters, parts = tree.named(base), {}
    pair_key = jax.random.fold_in(key, 1)
    for target in settings.names:
        where, contracted = TARGETS[target]
        names = [n for n in parameters if n.startswith(f"{inside}layers/")]
        names = [n for n in names if n.endswith(f"/{where}")]
        if not names and settings.targets != "all":
            has = [t for t, (w, _) in TARGETS.items() if _has(parameters, w)]
            raise UserError(
                f"lora.targets={settings.targets!r}: this model has no {target} that "
                f"takes an adapter; it has {', '.join(has)}"
            )
        for name in names:
            own_key = jax.random.fold_in(pair_key, len(parts))
            pair = _init_pair(_at(base, name), contracted, settings.rank, own_key)
            parts[prefix + name.removeprefix(inside)] = pair
    if scalar:
        model = base if isinstance(base, ScalarModel) else ScalarModel(base, key)
        parts |= {name: getattr(model, name) for name in HEAD}
    if settings.embeddings:
        for name in EMBEDDINGS[:1] if scalar else EMBEDDINGS:
            if inside + name in parameters:
                parts[prefix + name] = _at(base, inside + name)
    copies = {
        k: v if isinstance(v, LoraPair) else jax.tree.map(jnp.copy, v)
        for k, v in parts.items()
    }
    return Adapter(copies, settings)


def _has(parameters, where):
    return any(name.endswith(f"/{where}") for name in parameters)


def _init_pair(weight, contracted, rank, key):
    axes = tuple(weight.get_metadata()["axes"])
    lead = weight.ndim - len(axes)  # layers, where they are stacked
    stack, shape = weight.shape[:lead], weight.shape[lead:]
    bound = math.prod(shape[:contracted]) ** -0.5  # PEFT's kaiming_uniform(sqrt(5))
    a = jax.random.uniform(
        key, (*stack, *shape[:contracted], rank), jnp.float32, -bound, bound
    )
    b = jnp.zeros((*stack, rank, *shape[contracted:]), jnp.float32)
    return LoraPair(
        nnx.Param(a, axes=(*axes[:contracted], None)),
        nnx.Param(b, axes=(None, *axes[contracted:])),
    )


def join(base: Any, adapter: Any, key: Array | None = None) -> Any:
    """Returns the adapted model; no array is copied or computed.

    Args:
        base: a `Transformer` or `ScalarModel`; a dict of them for a dict of adapters;
            None where all weights are trained.
        adapter: an `Adapter`, or a dict; with base=None any model, returned unchanged.
        key: a random key for dropout; None drops nothing.

    Returns:
        a module of the base's class, whose targets are `linear.Adapted`.
    """
    if base is None:
        return adapter
    if isinstance(adapter, dict):
        keys = [None] * len(adapter)
        if key is not None:
            keys = jax.random.split(key, len(adapter))
        return {
            name: join(base[name], adapter[name], own_key)
            for name, own_key in zip(adapter, keys, strict=True)
        }
    settings, module = adapter.settings, _rebuilt(base, adapter)
    for number, (name, part) in enumerate(adapter.parts.items()):
        if not isinstance(part, LoraPair):
            _put(module, name, part)
            continue
        weight, keys = _at(module, name), None
        if key is not None and settings.dropout:
            keys = _dropout_keys(jax.random.fold_in(key, number), weight, part)
        adapted = linear.Adapted(
            weight, part.a, part.b, settings.scale, settings.dropout, keys
        )
        _put(module, name, adapted)
    return module


def _dropout_keys(key, weight, pair):
    """Returns the data of a random key, or of one for each layer of stacked weights."""
    stack = weight.shape[: _lead(weight, pair)]
    return jax.random.key_data(jax.random.split(key, stack) if stack else key)


def _lead(weight, pair):
    """Counts the axes of a weight that are stacks of layers."""
    return pair.a.ndim + pair.b.ndim - 2 - weight.ndim


def merge(base: Any, adapter: Adapter) -> Any:
    """Returns a plain model, W + s A B for every target and the base's other arrays."""
    module = _rebuilt(base, adapter)
    for name, part in adapter.parts.items():
        if isinstance(part, LoraPair):
            weight = _at(module, name)
            lead = _lead(weight, part)
            value = weight[...]
            program = _merge_program(lead, value.sharding)
            scale = adapter.settings.scale
            part = weight.replace(program(value, part.a[...], part.b[...], scale))
        _put(module, name, part)
    return module


@functools.lru_cache(maxsize=64)
def _merge_program(lead, sharding):
    def merge(weight, a, b, scale):
        def product(a, b):
            return jnp.tensordot(a, b, 1, precision="highest")

        for _ in range(lead):
            product = jax.vmap(product)
        return weight + scale * product(a, b)

    return jax.jit(merge, out_shardings=sharding)


def _rebuilt(base, adapter):
    """Rebuilds the base's modules around its arrays, with a head if one is trained."""
    module = jax.tree.map(lambda x: x, base)
    if "head" in adapter.parts and not isinstance(module, ScalarModel):
        head = {name: adapter.parts[name] for name in HEAD}
        module = ScalarModel(module, None, **head)
    return module


def _at(module, name):
    """Returns the part of a module with a name such as layers/ff/up."""
    for step in name.split("/"):
        module = module[step] if isinstance(module, nnx.Dict) else getattr(module, step)
    return module


def _put(module, name, value):
    *path, last = name.split("/")
    setattr(_at(module, "/".join(path)) if path else module, last, value)


def init_fn(
    settings: Settings, base: Any, mesh: Mesh, *, scalar: bool = False
) -> Callable[[Array], Adapter]:
    """Returns (key) -> a fresh sharded adapter; arguments as of `init`."""
    init_on_mesh = sharding.init_sharded(_init_from_base(settings, scalar), mesh)
    return lambda key: init_on_mesh(base, key)


def abstract(settings: Settings, base: Any, mesh: Mesh, *, scalar: bool = False) -> Any:
    """Returns an adapter as shapes with shardings; arguments as of `init`."""
    init_from_base = _init_from_base(settings, scalar)
    return sharding.abstract(init_from_base, mesh, base, jax.random.key(0))


def _init_from_base(settings, scalar):
    return lambda base, key: init(settings, base, key, scalar=scalar)
