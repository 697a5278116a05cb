"""The optimizer: clipping, moments and weight decay by Optax, and a learning rate.

The learning rate stays outside the transformation, so that a step is always
`params - schedule(step) * updates` and the step counter is the training loop's own.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from stagecraft import schema, tree
from stagecraft.errors import UserError


def _adam(c):
    return optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps)


def _adafactor(c):
    """Shazeer and Stern 2018 (arxiv.org/abs/1804.04235), composed as optax.adafactor.

    A step is relative to the parameter's own root mean square.
    """
    del c
    parts = (
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return layerwise(lambda axes: optax.chain(*parts))


def _muon(c):
    """Jordan et al. 2024 (github.com/KellerJordan/Muon) for matrices, Adam elsewhere.

    With update_rms above 0 a matrix moves by that root mean square, which is about
    Adam's own, so that one learning rate suits both (Liu et al. 2025,
    arxiv.org/abs/2502.16982, eq. 4).
    """

    def make_group(axes):
        dimensions = {name: matrix_axes(name, own) for name, own in axes.items()}
        matrices = optax.contrib.muon(
            learning_rate=-1.0,  # a direction: sign and rate are applied later
            beta=c.momentum,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=c.update_rms or None,
        )
        # Left to itself, optax.contrib.muon gives the rest to Adam with Nesterov's
        # momentum.
        labels = {name: "muon" if d else "adam" for name, d in dimensions.items()}
        return optax.partition({"muon": matrices, "adam": _adam(c)}, labels)

    return layerwise(make_group)


# How a clipped gradient becomes a direction.
DIRECTIONS = {
    "adamw": _adam,
    "adam": _adam,
    "lion": lambda c: optax.scale_by_lion(b1=c.b1, b2=c.b2),
    "adafactor": _adafactor,
    "muon": _muon,
    "rmsprop": lambda c: optax.scale_by_rms(decay=c.b2, eps=c.eps, eps_in_sqrt=False),
    "sgd": lambda c: optax.identity(),
}
# The settings that only some directions read, and which these do.
_OWN = ("b1", "b2", "eps", "momentum", "update_rms")
_READ = {
    "adamw": ("b1", "b2", "eps"),
    "adam": ("b1", "b2", "eps"),
    "lion": ("b1", "b2"),
    "muon": _OWN,
    "rmsprop": ("b2", "eps"),
}

# The learning rate after warm-up; each takes (config, steps, steps of decay).
SCHEDULES = {
    "constant": lambda c, steps, decay: optax.constant_schedule(c.lr),
    "cosine": lambda c, steps, decay: optax.cosine_decay_schedule(
        c.lr, steps, c.end_ratio
    ),
    "linear": lambda c, steps, decay: optax.linear_schedule(
        c.lr, c.end_ratio * c.lr, steps
    ),
    "wsd": lambda c, steps, decay: optax.linear_schedule(
        c.lr, c.end_ratio * c.lr, decay, transition_begin=steps - decay
    ),
}

# Every setting: its type, its range in words, and as a test.
_SETTINGS = {
    "name": (str, f"one of {', '.join(DIRECTIONS)}", lambda v: v in DIRECTIONS),
    "lr": (float, "at least 0", lambda v: v >= 0),
    "schedule": (str, f"one of {', '.join(SCHEDULES)}", lambda v: v in SCHEDULES),
    "warmup_steps": (int, "a whole number, at least 0", lambda v: v >= 0),
    "end_ratio": (float, "from 0 to 1", lambda v: 0 <= v <= 1),
    "decay_share": (float, "above 0, at most 1", lambda v: 0 < v <= 1),
    "b1": (float, "from 0 to below 1", lambda v: 0 <= v < 1),
    "b2": (float, "from 0 to below 1", lambda v: 0 <= v < 1),
    "eps": (float, "above 0", lambda v: v > 0),
    "momentum": (float, "from 0 to below 1", lambda v: 0 <= v < 1),
    "update_rms": (float, "at least 0 (0 is off)", lambda v: v >= 0),
    "weight_decay": (float, "at least 0", lambda v: v >= 0),
    "clip_norm": (float, "at least 0 (0 is off)", lambda v: v >= 0),
}


class Optimizer(NamedTuple):
    """A gradient transformation and its learning rate.

    Attributes:
        tx: gradient transformation without the learning rate and without the sign.
        schedule: step (int or i32 scalar) -> learning rate f32 scalar.
    """

    tx: optax.GradientTransformation
    schedule: Callable[[Any], Array]


def _validate(config, steps):
    for key in config:
        if key not in _SETTINGS:
            raise UserError(schema.unknown(f"optimizer.{key}", key, _SETTINGS))
    for key, (wanted, limits, allowed) in _SETTINGS.items():
        if key not in config:
            raise UserError(f"optimizer.{key} is missing; it must be {limits}")
        value = config[key]
        types = (int, float) if wanted is float else wanted
        fits = isinstance(value, types) and not isinstance(value, bool)
        if not fits or not allowed(value):
            raise UserError(f"optimizer.{key} must be {limits}, got {value!r}")
    if config.warmup_steps >= steps:
        raise UserError(
            f"optimizer.warmup_steps must be below the {steps} steps of the run, got "
            f"{config.warmup_steps}; lower it or train longer"
        )
    if config.schedule == "wsd" and _decay_steps(config, steps) < 1:
        raise UserError(
            f"optimizer.decay_share of {config.decay_share} is no whole step of the "
            f"{steps} steps of the run; raise it or train longer"
        )
    if config.schedule == "wsd" and (
        config.warmup_steps + _decay_steps(config, steps) > steps
    ):
        raise UserError(
            f"optimizer.decay_share of {config.decay_share} leaves no room for "
            f"warmup_steps={config.warmup_steps} in the {steps} steps of the run; "
            "lower one of them"
        )
    if config.name == "adam" and config.weight_decay:
        raise UserError(
            "optimizer.weight_decay must be 0 with adam, which has none, got "
            f"{config.weight_decay!r}; adamw is Adam with decay"
        )


def unread(config: ConfigDict) -> dict[str, str]:
    """Returns {setting: why} of those that change nothing beside the others."""
    read = _READ.get(config.name, ())
    keys = {k: f"name={config.name!r}" for k in _OWN if k not in read}
    if config.schedule == "constant":
        keys["end_ratio"] = "schedule='constant'"
    if config.schedule != "wsd":
        keys["decay_share"] = f"schedule={config.schedule!r}"
    return keys


def _decay_steps(config, steps):
    return round(config.decay_share * steps)


# Names of parameters without weight decay: norms, their scales, and biases.
_UNDECAYED = re.compile(r"(scale|bias|norm)$")


def decayed(params: Any) -> Any:
    """Marks the parameters with weight decay: all but norms, scales and biases.

    Decided by name, since stacking the layers gives every scale one more axis.

    Args:
        params: any tree of parameters, abstract ones included.

    Returns:
        The same tree of Python booleans.
    """
    return tree.map_names(lambda name, _: not _UNDECAYED.search(name), params)


def matrix_axes(
    name: str, axes: tuple[str | None, ...]
) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns which dimensions of a parameter are rows and columns for Muon.

    Args:
        name: of the parameter, as in `tree.named`.
        axes: the logical names of its dimensions; None for those without a name.

    Returns:
        optax's MuonDimensionNumbers; None for parameters that are no matrix of a layer:
        norms, biases, scalar heads, routers, and embeddings, whose rows are looked up
        one by one.

    >>> matrix_axes("layers/attention/query", ("embed", "heads", None))
    MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
    >>> matrix_axes("layers/attention/out", ("heads", None, "embed"))
    MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=(2,))
    >>> matrix_axes("layers/attention/out/a", ("heads", None, None))
    MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=(2,))
    >>> matrix_axes("layers/experts/down", ("experts", "ff", "embed"))
    MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    >>> matrix_axes("positions", ("positions", "embed"))
    >>> matrix_axes("layers/norm/scale", ("embed",)), matrix_axes("head", ("embed",))
    (None, None)
    """
    batch = [i for i, axis in enumerate(axes) if axis == "experts"]
    inner = [i for i in range(len(axes)) if i not in batch]
    table = "vocab" in axes or "positions" in axes
    embedding = table or re.search(r"embed$", name)
    if len(inner) < 2 or embedding or _UNDECAYED.search(name):
        return None
    # A weight reads the residual stream by its first dimension, or writes it by its
    # last; the others (heads and channels) are one long side.
    writes = axes[inner[-1]] == "embed" and axes[inner[0]] != "embed"
    if thin := re.search(r"/([ab])$", name):  # of an adapter: the rank's end is known
        writes = thin[1] == "a"
    cut = -1 if writes else 1
    rows, columns = tuple(inner[:cut]), tuple(inner[cut:])
    return optax.contrib.MuonDimensionNumbers(rows, columns)


def layerwise(make_group: Callable[[dict], Any]) -> optax.GradientTransformation:
    """Makes a transformation that treats each layer of stacked parameters separately.

    Layers are stacked in one array ([L, D, F]), but a matrix to orthogonalise, or a
    second moment to factor, is one layer's. The state's arrays keep the logical axes of
    their parameters' dimensions, those of factored moments too, so that
    `sharding.init_sharded` can shard them.

    Args:
        make_group: ({name: logical axes of one layer's array}) -> the transformation of
            a dict {name: array} of such arrays.

    Returns:
        a GradientTransformation on trees of modules (or of plain arrays).
    """

    def groups(params):
        """Groups parameters: {stack's name: {name: (array, axes of one layer)}}."""
        out = {}
        for name, variable in _variables(params).items():
            array, axes = variable
            stacked = array.ndim - len(axes)
            key = f"layers{array.shape[0]}" if stacked else "single"
            out.setdefault(key, {})[name] = variable
        return out

    def transformation(group):
        return make_group({name: axes for name, (_, axes) in group.items()})

    def with_axes(key, group, state):
        """Wraps the arrays of a state, so that they carry axes."""
        stack = () if key == "single" else ("layers",)

        def one(path, array):
            names = [getattr(part, "key", None) for part in path]
            name = next((n for n in reversed(names) if n in group), None)
            if name is None:
                return array
            parameter, axes = group[name]
            axes = _remaining_axes(array.shape, parameter.shape, (*stack, *axes))
            return nnx.Param(array, axes=axes)

        return jax.tree.map_with_path(one, state)

    def init(params):
        state = {}
        for key, group in groups(params).items():
            init_group = transformation(group).init
            init_group = init_group if key == "single" else jax.vmap(init_group)
            arrays = {name: array for name, (array, _) in group.items()}
            state[key] = with_axes(key, group, init_group(arrays))
        return state

    def update(updates, state, params=None):
        grads, directions, new_state = tree.named(updates), {}, {}
        for key, group in groups(params).items():
            step = transformation(group).update
            step = step if key == "single" else jax.vmap(step)
            bare = jax.tree.map(_bare, state[key], is_leaf=tree.is_variable)
            arrays = {name: array for name, (array, _) in group.items()}
            group_grads = {name: grads[name] for name in arrays}
            group_directions, new = step(group_grads, bare, arrays)
            directions |= group_directions
            new_state[key] = with_axes(key, group, new)
        return tree.map_names(lambda name, _: directions[name], updates), new_state

    return optax.GradientTransformation(init, update)


def _bare(x):
    return x.get_value() if tree.is_variable(x) else x


def _variables(params):
    """Returns {name: (array, logical axes of one layer's dimensions)}."""
    out = {}
    arrays = tree.named(params)
    leaves = jax.tree.leaves(params, is_leaf=tree.is_variable)
    leaves = [leaf for leaf in leaves if _bare(leaf) is not None]
    for (name, array), leaf in zip(arrays.items(), leaves, strict=True):
        axes = leaf.get_metadata().get("axes") if tree.is_variable(leaf) else None
        out[name] = (array, (None,) * array.ndim if axes is None else tuple(axes))
    return out


def _remaining_axes(shape, parameter_shape, axes):
    """Returns the axes of those dimensions of a parameter that its moments keep."""
    out, at = [], 0
    for size in shape:
        while at < len(parameter_shape) and parameter_shape[at] != size:
            at += 1
        out.append(axes[at] if at < len(parameter_shape) else None)
        at += 1
    return tuple(out)


def ema(average: Any, params: Any, decay: float) -> Any:
    """Averages weights exponentially: decay * average + (1 - decay) * params.

    Args:
        average: tree like `params`; the first is a copy of them.
        params: tree of parameters after an update.
        decay: from 0 (the parameters themselves) to below 1.

    Returns:
        The new average, of the type of `average`.

    >>> float(ema({"w": jnp.array(1.0)}, {"w": jnp.array(3.0)}, 0.75)["w"])
    1.5
    """
    return optax.incremental_update(params, average, 1.0 - decay)


def learning_rate(config: ConfigDict, steps: int) -> Callable[[Any], Array]:
    """Returns the schedule alone; arguments as in `make`."""
    warm = config.warmup_steps
    decay = _decay_steps(config, steps)
    after = SCHEDULES[config.schedule](config, steps - warm, decay)

    def schedule(step):
        step = jnp.asarray(step, jnp.int32)
        since = jnp.maximum(step - warm, 0).astype(jnp.float32)
        rate = jnp.asarray(after(since), jnp.float32)
        # The ramp starts at 1/warm, not at 0: step 0 also learns.
        ramp = (step + 1).astype(jnp.float32) / max(warm, 1)
        return jnp.where(step < warm, config.lr * ramp, rate)

    return schedule


def make(config: ConfigDict, *, steps: int) -> Optimizer:
    """Builds the optimizer a config describes.

    Args:
        config: ConfigDict with exactly these keys: name ("adamw"; "adam", the same
            without decay; "lion", Chen et al. 2023, arxiv.org/abs/2302.06675;
            "adafactor"; "muon"; "rmsprop", whose decay is b2; "sgd"), lr (the peak),
            schedule ("cosine", "linear", "constant", or "wsd": constant, then linear
            over the last decay_share of the steps), warmup_steps (linear ramp to the
            peak), end_ratio (last learning rate over the peak), b1 and b2 (of the Adam
            kind and lion), eps (of the Adam kind and rmsprop, outside the root),
            momentum and update_rms (of muon; 0 for sqrt(max(1, out / in)) instead),
            weight_decay (decoupled, Loshchilov and Hutter 2019,
            arxiv.org/abs/1711.05101), clip_norm (on the global norm of the gradient; 0
            is off).
        steps: where the schedule ends: `schedule(steps)` is end_ratio * lr.

    Returns:
        Optimizer(tx, schedule). `apply` takes one step with it.

    Raises:
        UserError: for a missing, unknown or impossible setting.
    """
    _validate(config, steps)
    parts = [DIRECTIONS[config.name](config)]
    if config.clip_norm > 0:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return Optimizer(optax.chain(*parts), learning_rate(config, steps))


def apply(
    optimizer: Optimizer,
    grads: Any,
    opt_state: optax.OptState,
    params: Any,
    step: Any,
    lr_scale: dict[str, float] | None = None,
) -> tuple[Any, optax.OptState, dict[str, Array]]:
    """Takes one step: params - learning rate * updates.

    Args:
        grads: tree of gradients, like `params`.
        opt_state: from `optimizer.tx.init(params)`.
        params: tree of parameters; the type is kept, modules included.
        step: int or i32 scalar, updates taken before this one.
        lr_scale: {top-level key of params: factor on its learning rate}, every key
            named; None for 1 everywhere.

    Returns:
        params, opt_state, and metrics (f32 scalars): "grad_norm" before clipping,
        "update_norm" of the change just made, "param_norm" after it, "learning_rate".

    Raises:
        ValueError: when `lr_scale` does not name the top-level keys of `params`.
    """
    rate = optimizer.schedule(step)
    directions, opt_state = optimizer.tx.update(grads, opt_state, params)
    if lr_scale is None:
        change = jax.tree.map(lambda x: (-rate * x).astype(x.dtype), directions)
    else:
        if not isinstance(params, dict) or params.keys() != lr_scale.keys():
            raise ValueError(f"lr_scale {sorted(lr_scale)} must name the params' keys")
        change = {
            key: jax.tree.map(
                lambda x, factor=factor: (-rate * factor * x).astype(x.dtype),
                directions[key],
            )
            for key, factor in lr_scale.items()
        }
    params = optax.apply_updates(params, change)
    metrics = {
        "grad_norm": tree.global_norm(grads),
        "update_norm": tree.global_norm(change),
        "param_norm": tree.global_norm(params),
        "learning_rate": rate,
    }
    return params, opt_state, metrics
