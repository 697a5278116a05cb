"""LoRA: thin matrices beside weights that stay.

A targeted weight W acts as W + s A B with s = alpha / rank (Hu et al. 2021,
arxiv.org/abs/2106.09685). What is trained is an `Adapter`: A and B of every target, and
whole what is new or asked for: a scalar head, the embeddings. The base is never
touched: `join` puts an adapter beside it without a copy, and the base alone is the
model with its adapter off.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from stagecraft import schema, sharding, tree
from stagecraft.errors import UserError
from stagecraft.models import linear
from stagecraft.models.transformer import ScalarModel

# What may be adapted: where it lies in a layer, and over how many of its dimensions a
# product sums.
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
    def scale(self):
        """s in W + s A B; with rslora alpha / sqrt(rank) (arxiv.org/abs/2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def names(self):
        """The targets, each once, in the order of `TARGETS`."""
        if self.targets == "all":
            return tuple(TARGETS)
        given = [name.strip() for name in self.targets.split(",") if name.strip()]
        return tuple(name for name in TARGETS if name in given)


def check(where, config):
    """Refuses impossible settings; `where` is what the keys lie under."""
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
    given = [name.strip() for name in settings.targets.split(",") if name.strip()]
    if not given:
        raise UserError(
            f"{where}.targets: is empty; expected 'all' or some of {', '.join(TARGETS)}"
        )
    for name in given:
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


class Low(NamedTuple):
    """A [*contracted, R] and B [R, *out] of one target, Params; stacked over layers."""

    a: Any
    b: Any


@jax.tree_util.register_pytree_with_keys_class
class Adapter:
    """What is trained in place of a model.

    Attributes:
        parts: {name of a parameter of the model: `Low`, or a Param trained whole}.
        settings: the `Settings`, static.
    """

    def __init__(self, parts, settings):
        self.parts, self.settings = dict(parts), settings

    def tree_flatten_with_keys(self):
        keys = tuple(self.parts)
        pairs = [(jax.tree_util.DictKey(k), self.parts[k]) for k in keys]
        return pairs, (keys, self.settings)

    @classmethod
    def tree_unflatten(cls, static, children):
        keys, settings = static
        return cls(zip(keys, children, strict=True), settings)


def begin(settings, base, key, *, scalar=False):
    """A fresh adapter: A random as PEFT's, B zero, so that nothing changes yet.

    Args:
        settings: a `Settings`.
        base: a `Transformer` or a `ScalarModel`, abstract or not.
        key: a random key.
        scalar: whether the model is to have a scalar head; a base without one gets a
            new one.

    Returns:
        an `Adapter`, of arrays of its own.
    """
    prefix = "body/" if scalar else ""
    inside = "body/" if isinstance(base, ScalarModel) else ""
    found, parts = tree.named(base), {}
    low_key = jax.random.fold_in(key, 1)
    for target in settings.names:
        where, contracted = TARGETS[target]
        names = [n for n in found if n.startswith(f"{inside}layers/")]
        names = [n for n in names if n.endswith(f"/{where}")]
        if not names and settings.targets != "all":
            has = [t for t, (w, _) in TARGETS.items() if _has(found, w)]
            raise UserError(
                f"lora.targets={settings.targets!r}: this model has no {target} that "
                f"takes an adapter; it has {', '.join(has)}"
            )
        for name in names:
            own = jax.random.fold_in(low_key, len(parts))
            low = _low(_at(base, name), contracted, settings.rank, own)
            parts[prefix + name.removeprefix(inside)] = low
    whole = base
    if scalar:
        whole = base if isinstance(base, ScalarModel) else ScalarModel(base, key)
        parts |= {name: getattr(whole, name) for name in HEAD}
    if settings.embeddings:
        kept = EMBEDDINGS[:1] if scalar else EMBEDDINGS
        for name in kept:
            if inside + name in found:
                parts[prefix + name] = _at(base, inside + name)
    own = {
        k: v if isinstance(v, Low) else jax.tree.map(jnp.copy, v)
        for k, v in parts.items()
    }
    return Adapter(own, settings)


def _has(found, where):
    return any(name.endswith(f"/{where}") for name in found)


def _low(weight, contracted, rank, key):
    axes = tuple(weight.get_metadata()["axes"])
    lead = weight.ndim - len(axes)  # layers, where they are stacked
    stack, shape = weight.shape[:lead], weight.shape[lead:]
    bound = math.prod(shape[:contracted]) ** -0.5  # PEFT's kaiming_uniform(sqrt(5))
    a = jax.random.uniform(
        key, (*stack, *shape[:contracted], rank), jnp.float32, -bound, bound
    )
    b = jnp.zeros((*stack, rank, *shape[contracted:]), jnp.float32)
    return Low(
        nnx.Param(a, axes=(*axes[:contracted], None)),
        nnx.Param(b, axes=(None, *axes[contracted:])),
    )


def join(base, adapter, key=None):
    """The model that an adapter makes of its base; no array is copied or computed.

    Args:
        base: a `Transformer` or `ScalarModel`; a dict of them for a dict of adapters;
            None where a model is trained whole.
        adapter: an `Adapter`, or a dict; with base=None any model, returned as it is.
        key: a random key for dropout; None drops nothing.

    Returns:
        a module of the same kind, whose targets are `linear.Adapted`.
    """
    if base is None:
        return adapter
    if isinstance(adapter, dict):
        keys = [None] * len(adapter)
        if key is not None:
            keys = jax.random.split(key, len(adapter))
        return {
            part: join(base[part], adapter[part], own)
            for part, own in zip(adapter, keys, strict=True)
        }
    settings, module = adapter.settings, _own(base, adapter)
    for number, (name, part) in enumerate(adapter.parts.items()):
        if not isinstance(part, Low):
            _put(module, name, part)
            continue
        weight, drops = _at(module, name), None
        if key is not None and settings.dropout:
            drops = _drops(jax.random.fold_in(key, number), weight, part)
        adapted = linear.Adapted(
            weight, part.a, part.b, settings.scale, settings.dropout, drops
        )
        _put(module, name, adapted)
    return module


def _drops(key, weight, low):
    """Data of a random key, one for each layer of stacked weights."""
    stack = weight.shape[: _lead(weight, low)]
    return jax.random.key_data(jax.random.split(key, stack) if stack else key)


def _lead(weight, low):
    """How many axes of a weight are stacks of layers."""
    return low.a.ndim + low.b.ndim - 2 - weight.ndim


def merge(base, adapter):
    """A plain model: W + s A B in place of every target; the rest is the base's own."""
    module = _own(base, adapter)
    for name, part in adapter.parts.items():
        if isinstance(part, Low):
            weight = _at(module, name)
            lead = _lead(weight, part)
            value = weight[...]
            new = _merged(lead, value.sharding)(
                value, part.a[...], part.b[...], adapter.settings.scale
            )
            part = weight.replace(new)
        _put(module, name, part)
    return module


@functools.lru_cache(maxsize=64)
def _merged(lead, sharding):
    def merged(weight, a, b, scale):
        def product(a, b):
            return jnp.tensordot(a, b, 1, precision="highest")

        for _ in range(lead):
            product = jax.vmap(product)
        return weight + scale * product(a, b)

    return jax.jit(merged, out_shardings=sharding)


def _own(base, adapter):
    """The base's modules anew around the same arrays, with a head if one is trained."""
    module = jax.tree.map(lambda x: x, base)
    if "head" in adapter.parts and not isinstance(module, ScalarModel):
        head = {name: adapter.parts[name] for name in HEAD}
        module = ScalarModel(module, None, **head)
    return module


def _at(module, name):
    """What lies in a module under a name such as layers/ff/up."""
    for step in name.split("/"):
        module = module[step] if isinstance(module, nnx.Dict) else getattr(module, step)
    return module


def _put(module, name, value):
    *path, last = name.split("/")
    setattr(_at(module, "/".join(path)) if path else module, last, value)


def made(settings, base, mesh, *, scalar=False):
    """(key) -> a fresh adapter, sharded from birth; see `begin`."""
    born = sharding.init_sharded(
        functools.partial(_begin, settings=settings, scalar=scalar), mesh
    )
    return lambda key: born(base, key)


def _begin(base, key, *, settings, scalar):
    return begin(settings, base, key, scalar=scalar)


def abstract(settings, base, mesh, *, scalar=False):
    """An adapter as shapes with shardings."""
    begin = functools.partial(_begin, settings=settings, scalar=scalar)
    return sharding.abstract(begin, base, jax.random.key(0), mesh=mesh)
