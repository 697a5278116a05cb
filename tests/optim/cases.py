"""What the optimizer's tests share: settings, small models, gradients, a schedule."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from stagecraft import optim


def settings(**changes):
    defaults = dict(
        name="adamw",
        lr=0.01,
        schedule="cosine",
        warmup_steps=3,
        end_ratio=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1,
        clip_norm=0.5,
        decay_share=0.3,
        momentum=0.95,
        update_rms=0.2,
    )
    if changes.get("name") == "adam":
        defaults["weight_decay"] = 0.0
    return ConfigDict(defaults | changes)


class Norm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(3))


class Block(nnx.Module):
    def __init__(self, key):
        self.query = nnx.Param(jax.random.normal(key, (3, 3)), axes=("embed", "heads"))
        self.norm = Norm()


class Model(nnx.Module):
    def __init__(self, key):
        self.embed = nnx.Param(jax.random.normal(key, (4, 3)))
        self.layers = jax.vmap(Block)(jax.random.split(key, 2))
        self.norm = Norm()
        self.bias = nnx.Param(jnp.ones(()))


def gradients(params, steps):
    """Different for every step and leaf; some beyond the clip, some within."""
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, params))
    for step in range(steps):
        size = 0.02 if step % 2 else 2.0
        new = [(size * rng.normal(size=x.shape)).astype(x.dtype) for x in leaves]
        yield jax.tree.unflatten(structure, new)


def train(config, params, grads, steps, **arguments):
    made = optim.make(config, steps=steps)
    state, step = made.tx.init(params), jax.jit(optim.apply, static_argnums=0)
    for i, g in enumerate(grads):
        params, state, metrics = step(made, g, state, params, i, **arguments)
    return params, state, metrics


def schedule_by_hand(step, kind, lr, warm, steps, end):
    if step < warm:
        return lr * (step + 1) / warm
    share = min((step - warm) / (steps - warm), 1)
    if kind == "constant":
        return lr
    if kind == "wsd":  # the last 3 of 10 steps
        return (
            lr + max(step - (steps - 3), 0) / 3 * (end * lr - lr)
            if step < 10
            else (end * lr)
        )
    if kind == "linear":
        return lr + share * (end * lr - lr)
    return lr * (end + (1 - end) * (1 + np.cos(np.pi * share)) / 2)
