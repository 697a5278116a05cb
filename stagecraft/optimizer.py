"""The optimizer: clipping, moments and weight decay by Optax, and a learning rate.

The learning rate stays outside the transformation, so that a step is always
`params - schedule(step) * updates` and the step counter is the training loop's own.
"""

import difflib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from stagecraft import tree
from stagecraft.errors import UserError

# What turns a clipped gradient into a direction.
DIRECTIONS = {
    "adamw": lambda c: optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps),
    "rmsprop": lambda c: optax.scale_by_rms(decay=c.b2, eps=c.eps, eps_in_sqrt=False),
    "sgd": lambda c: optax.identity(),
}

# What the learning rate does once warm; each takes (peak, steps, end ratio).
SCHEDULES = {
    "constant": lambda peak, steps, end: optax.constant_schedule(peak),
    "cosine": lambda peak, steps, end: optax.cosine_decay_schedule(peak, steps, end),
    "linear": lambda peak, steps, end: optax.linear_schedule(peak, end * peak, steps),
}

# Every setting: its type, what it may be, and the test of that.
_SETTINGS = {
    "name": (str, f"one of {', '.join(DIRECTIONS)}", lambda v: v in DIRECTIONS),
    "lr": (float, "at least 0", lambda v: v >= 0),
    "schedule": (str, f"one of {', '.join(SCHEDULES)}", lambda v: v in SCHEDULES),
    "warmup_steps": (int, "a whole number, at least 0", lambda v: v >= 0),
    "end_ratio": (float, "from 0 to 1", lambda v: 0 <= v <= 1),
    "b1": (float, "from 0 to below 1", lambda v: 0 <= v < 1),
    "b2": (float, "from 0 to below 1", lambda v: 0 <= v < 1),
    "eps": (float, "above 0", lambda v: v > 0),
    "weight_decay": (float, "at least 0", lambda v: v >= 0),
    "clip_norm": (float, "at least 0 (0 is off)", lambda v: v >= 0),
}


class Optimizer(NamedTuple):
    """Everything an update needs besides gradients.

    Attributes:
        tx: gradient transformation without the learning rate and without the sign.
        schedule: step (int or i32 scalar) -> learning rate f32 scalar.
    """

    tx: optax.GradientTransformation
    schedule: Callable


def _validate(config, steps):
    for key in config:
        if key not in _SETTINGS:
            near = difflib.get_close_matches(key, _SETTINGS, n=1)
            known = f"did you mean {near[0]}?" if near else f"known: {[*_SETTINGS]}"
            raise UserError(f"optimizer.{key} is no setting of the optimizer; {known}")
    for key, (kind, limits, allowed) in _SETTINGS.items():
        if key not in config:
            raise UserError(f"optimizer.{key} is missing; it must be {limits}")
        value = config[key]
        kinds = (int, float) if kind is float else kind
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if not fits or not allowed(value):
            raise UserError(f"optimizer.{key} must be {limits}, got {value!r}")
    if config.warmup_steps >= steps:
        raise UserError(
            f"optimizer.warmup_steps must be below the {steps} steps of the run, got "
            f"{config.warmup_steps}; lower it or train longer"
        )


def decayed(params):
    """Which parameters weight decay pulls on: all but norms, scales and biases.

    Decided by name, since stacking the layers gives every scale one more axis.

    Args:
        params: any tree of parameters, abstract ones included.

    Returns:
        The same tree of Python booleans.
    """
    kept = re.compile(r"(scale|bias|norm)$")
    return tree.map_names(lambda name, _: not kept.search(name), params)


def learning_rate(config, steps):
    """The schedule alone; arguments as in `make`."""
    warm = config.warmup_steps
    after = SCHEDULES[config.schedule](config.lr, steps - warm, config.end_ratio)

    def schedule(step):
        step = jnp.asarray(step, jnp.int32)
        since = jnp.maximum(step - warm, 0).astype(jnp.float32)
        rate = jnp.asarray(after(since), jnp.float32)
        # Step 0 is worth a step too: the ramp starts at 1/warm, not at 0.
        ramp = (step + 1).astype(jnp.float32) / max(warm, 1)
        return jnp.where(step < warm, config.lr * ramp, rate)

    return schedule


def make(config, *, steps):
    """Builds the optimizer a config describes.

    Args:
        config: ConfigDict with exactly these keys: name ("adamw"; "rmsprop", whose
            decay is b2; "sgd", which reads none of b1, b2, eps), lr (the peak),
            schedule ("cosine", "linear", "constant"), warmup_steps (linear ramp to the
            peak), end_ratio (last learning rate over the peak), b1, b2, eps (outside
            the root), weight_decay (decoupled, Loshchilov and Hutter 2019,
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


def apply(optimizer, grads, opt_state, params, step, lr_scale=None):
    """Takes one step: params - learning rate * updates.

    Args:
        optimizer: an Optimizer.
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
    return (
        params,
        opt_state,
        {
            "grad_norm": tree.global_norm(grads),
            "update_norm": tree.global_norm(change),
            "param_norm": tree.global_norm(params),
            "learning_rate": rate,
        },
    )
