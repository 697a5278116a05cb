"""The shape every stage has, and the one update all of them share.

Law: frozen models act in `prepare`, only the trained model acts in `update`. So an
update is always batch -> loss -> gradient, a prepared batch saved to disk replays any
bug, and no frozen tree ever enters a gradient.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, mesh, optimizer, schema
from stagecraft.errors import UserError


class Stage(NamedTuple):
    """A stage is a handful of pure functions.

    Attributes:
        init: (key) -> State, sharded from birth.
        prepare: (state, raw, key) -> batch. Frozen models act here.
        update: (state, batch) -> (state, {metric: number}); jitted, state donated.
        evaluate: (state, batch) -> {metric: Mean or Max} of a held-out prepared batch,
            still to be merged with those of other batches.
        work: (raw) -> tokens one step runs through a model, from the shapes alone
            (padding costs as much as text): "trained" forward and backward, "scored"
            forward only, "sampled", and "scalar_" before those of reward and value
            models; and "length", of a row.
    """

    init: Callable
    prepare: Callable
    update: Callable
    evaluate: Callable
    work: Callable


class State(NamedTuple):
    """What a stage carries from step to step, and what a checkpoint holds.

    Attributes:
        step: i32[], updates done.
        model: the trained parameters; one module, or a dict of modules.
        opt_state: the optimizer's state, sharded like the parameters.
        extra: {name: array} for the rest (PPO's KL coefficient).
    """

    step: jax.Array
    model: Any
    opt_state: Any
    extra: dict


class Objective(NamedTuple):
    """How a stage's batch and model become terms of one loss.

    Attributes:
        masks: (batch) -> {term: bool array}; which elements of each term count. It
            depends on the batch alone, so that the denominators of a whole
            accumulation window are known before its first micro-batch.
        terms: (model, batch) -> ({term: unreduced loss}, {metric: Mean or Max}).
        weights: {term: float}.
    """

    masks: Callable
    terms: Callable
    weights: dict


def make_init(make_model, optimizer_, shared_mesh, extra=None):
    """init(key) -> State, every array of it created on the devices that keep it.

    Args:
        make_model: (key) -> model; traced, so nothing is built whole anywhere.
        optimizer_: an `optimizer.Optimizer`.
        shared_mesh: the mesh.
        extra: {name: float} of scalars to carry.
    """

    def init(key):
        model = mesh.born(make_model, shared_mesh)(key)
        scalars = {k: jnp.asarray(v, jnp.float32) for k, v in (extra or {}).items()}
        step, scalars = mesh.replicate((jnp.zeros((), jnp.int32), scalars), shared_mesh)
        opt_state = mesh.born_optimizer(optimizer_.tx, model, shared_mesh)
        return State(step, model, opt_state, scalars)

    return init


def make_copy(module, shared_mesh):
    """() -> a fresh copy of a parent's parameters, sharded alike.

    The child's state is donated at every update, the parent may go on as a frozen
    reference: they must not share buffers.
    """
    shardings = mesh.shardings(module, shared_mesh)
    copy = jax.jit(lambda m: jax.tree.map(jnp.copy, m), out_shardings=shardings)
    return lambda: copy(module)


def make_step(objective, optimizer_, *, micro_batches=1, lr_scale=None):
    """One optimizer step from a prepared batch, with gradient accumulation.

    The loss is sum over terms of weight * (sum of losses / sum of mask), the sums being
    those of the whole batch: over every device and every micro-batch. Splitting a batch
    therefore never changes the number.

    Args:
        objective: an `Objective`.
        optimizer_: an `optimizer.Optimizer`.
        micro_batches: int; the batch is worked on in so many parts, one after the
            other, to save memory.
        lr_scale: multiplies the learning rate of some top-level parts of the model.

    Returns:
        step(state, batch, schedule_step) -> (model, opt_state, metrics).
    """

    def step(state, batch, schedule_step):
        masks = objective.masks(batch)
        totals = {k: jnp.maximum(m.sum(), 1) for k, m in masks.items()}

        def loss_fn(model, micro, micro_masks):
            terms, metrics = objective.terms(model, micro)
            loss = 0.0
            for name, values in terms.items():
                share = masked.sum(values, micro_masks[name]) / totals[name]
                loss += objective.weights[name] * share
            return loss, metrics

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if micro_batches == 1:
            (loss, metrics), grads = grad_fn(state.model, batch, masks)
            grads = mesh.constrain_tree(grads)
        else:
            split = jax.tree.map(lambda x: _split(x, micro_batches), (batch, masks))
            first = jax.tree.map(lambda x: x[0], split)
            shapes = jax.eval_shape(grad_fn, state.model, *first)
            (_, empty), empty_grads = shapes
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty_grads)
            start = (jnp.zeros(()), masked.empty_like(empty), zeros)

            def accumulate(carry, micro):
                (loss, metrics), grads = grad_fn(state.model, *micro)
                loss0, metrics0, grads0 = carry
                grads = mesh.constrain_tree(jax.tree.map(jnp.add, grads0, grads))
                return (loss0 + loss, masked.merge(metrics0, metrics), grads), None

            (loss, metrics, grads), _ = jax.lax.scan(accumulate, start, split)
        model, opt_state, norms = optimizer.apply(
            optimizer_,
            grads,
            state.opt_state,
            state.model,
            schedule_step,
            lr_scale=lr_scale,
        )
        scalars = {"loss": loss, **norms}
        metrics = metrics | {k: masked.Mean.of(v) for k, v in scalars.items()}
        return model, opt_state, metrics

    return step


def make_update(objective, optimizer_, *, micro_batches=1):
    """update(state, batch) -> (state, metrics): one batch, one optimizer step."""
    step = make_step(objective, optimizer_, micro_batches=micro_batches)

    def update(state, batch):
        model, opt_state, metrics = step(state, batch, state.step)
        state = State(state.step + 1, model, opt_state, state.extra)
        return state, masked.results(metrics)

    return jit_update(update)


def jit_update(update):
    """jit with the state donated and its shardings kept from call to call."""
    compiled = {}

    def call(state, batch):
        # Known at the first call: what goes in sharded comes out sharded the same way.
        if "update" not in compiled:
            shardings = jax.tree.map(lambda x: x.sharding, state)
            compiled["update"] = jax.jit(
                update, donate_argnums=0, out_shardings=(shardings, None)
            )
        return compiled["update"](state, batch)

    return call


def make_evaluate(objective):
    """evaluate(state, batch) -> the objective's metrics and loss, without gradient."""

    @jax.jit
    def evaluate(model, batch):
        masks = objective.masks(batch)
        terms, metrics = objective.terms(model, batch)
        for name, values in terms.items():
            key = "loss" if len(terms) == 1 else f"loss/{name}"
            metrics = metrics | {key: masked.Mean.of(values, masks[name])}
        return metrics

    return lambda state, batch: evaluate(state.model, batch)


def _split(x, parts):
    """[B, ...] as [parts, B / parts, ...], each part taking rows from every device.

    Rows of a batch lie on devices in contiguous blocks; taking every `parts`-th row
    keeps each micro-batch spread over all of them without moving data.
    """
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def loss_function(name, offers, arguments=()):
    """Finds an objective's loss and checks that the stage can feed it.

    Args:
        name: a name in `stagecraft.losses`, "package.module:function", or a callable.
        offers: the arrays the stage can pass, by argument name.
        arguments: names of the keyword arguments it is to get.

    Returns:
        the function, and the names of the arrays it takes, in order.
    """
    function = name
    if isinstance(name, str) and ":" in name:
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"objective={name!r}: cannot import it ({error}); "
                "expected 'package.module:function'"
            ) from error
    elif isinstance(name, str):
        function = getattr(losses, name, None)
        if name not in losses.__all__ or function is None:
            raise UserError(
                f"objective={name!r}: no such loss; stagecraft.losses has "
                f"{', '.join(losses.__all__)}; your own is 'package.module:function'"
            )
    parameters = inspect.signature(function).parameters.values()
    positional = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.default is p.empty
    ]
    unknown = [p for p in positional if p not in offers]
    if unknown:
        raise UserError(
            f"objective={_label(name)}: asks for {', '.join(unknown)}; "
            f"this stage offers {', '.join(offers)}"
        )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        keywords = [p.name for p in parameters if p.name not in positional]
        for key in arguments:
            if key not in keywords:
                raise UserError(schema.unknown(f"objective_args.{key}", key, keywords))
    return function, positional


def _label(name):
    return repr(name) if isinstance(name, str) else getattr(name, "__name__", str(name))
