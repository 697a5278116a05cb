"""The shape every stage has, and the one update all of them share.

Law: frozen models act in `prepare`, only the trained model acts in `update`. So an
update is always batch -> loss -> gradient, a prepared batch saved to disk replays any
bug, and no frozen tree ever enters a gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stagecraft import masked, optim, sharding
from stagecraft.models import lora
from stagecraft.models.transformer import ScalarModel


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
        frozen: what `State.model` is an adapter of: a module, or a dict of them; None
            where a model is trained whole. `lora.join(frozen, state.model)` is the
            model. It is never donated, and frozen models may share its buffers.
    """

    init: Callable
    prepare: Callable
    update: Callable
    evaluate: Callable
    work: Callable
    frozen: Any = None


class State(NamedTuple):
    """What a stage carries from step to step, and what a checkpoint holds.

    Attributes:
        step: i32[], updates done.
        model: the trained parameters; one module or `lora.Adapter`, or a dict of them.
        opt_state: the optimizer's state, sharded like the parameters.
        extra: {name: array or tree} for the rest: PPO's KL coefficient, a moving
            reference, "ema" for the average of the weights.
    """

    step: jax.Array
    model: Any
    opt_state: Any
    extra: dict


class Objective(NamedTuple):
    """How a stage's batch and model become terms of one loss.

    Attributes:
        reductions: (batch) -> {term: masked.Reduction}; how each term is summed and
            what it is divided by. It depends on the batch alone, so that the
            denominators of a whole accumulation window are known before its first
            micro-batch. It may name terms that a loss does not have.
        terms: (model, batch) -> ({term: unreduced loss}, {metric: Mean or Max}).
        weights: {term: float}; 1 for a term that is not named.
    """

    reductions: Callable
    terms: Callable
    weights: dict


class Trained(NamedTuple):
    """What a stage trains of a parent.

    Attributes:
        frozen: the parent, where an adapter is trained; else None.
        born: (key) -> the parameters before the first step: a copy of the parent's, or
            a fresh adapter.
    """

    frozen: Any
    born: Callable


def trained(config, parent, mesh, *, scalar=False):
    """What a stage trains of a parent, by the `lora` keys of its config.

    Args:
        config: the stage's resolved config.
        parent: a `Transformer` or a `ScalarModel`; the stage's to keep, not to change.
        mesh: the mesh.
        scalar: whether the model has a scalar head: a new one on a `Transformer`.
    """
    if config.lora.rank:
        settings = lora.Settings(**config.lora)
        # Made at once as shapes: a target the model lacks is refused here.
        lora.abstract(settings, parent, mesh, scalar=scalar)
        return Trained(parent, lora.made(settings, parent, mesh, scalar=scalar))
    copy = make_copy(parent, mesh)
    if not scalar or isinstance(parent, ScalarModel):
        return Trained(None, lambda key: copy())
    head = sharding.init_sharded(lambda k, body: ScalarModel(body, k), mesh)
    return Trained(None, lambda key: head(key, copy()))


def begin(model, optimizers, mesh, *, ema=False, dropout=None, **extra):
    """The state before the first step, every array on the devices that keep it.

    Args:
        model: the parameters, the state's own; one module or a dict of modules.
        optimizers: an `optim.Optimizer`, or one for each part of the model.
        mesh: the mesh.
        ema: whether to carry an average of the weights.
        dropout: a random key to carry, that of an adapter's dropout.
        **extra: scalars to carry.
    """
    scalars = {k: jnp.asarray(v, jnp.float32) for k, v in extra.items()}
    if dropout is not None:
        scalars["dropout"] = jax.random.key_data(dropout)
    step, carried = sharding.replicate((jnp.zeros((), jnp.int32), scalars), mesh)
    if isinstance(optimizers, dict):
        opt_state = {
            part: sharding.init_optimizer(one.tx, model[part], mesh)
            for part, one in optimizers.items()
        }
    else:
        opt_state = sharding.init_optimizer(optimizers.tx, model, mesh)
    if ema:
        carried["ema"] = make_copy(model, mesh)()
    return State(step, model, opt_state, carried)


def advance(state, model, opt_state, *, ema_decay=0.0, **extra):
    """The state one step on; `extra` replaces what it names."""
    carried = state.extra | extra
    if ema_decay:
        carried["ema"] = optim.ema(state.extra["ema"], model, ema_decay)
    return State(state.step + 1, model, opt_state, carried)


def placed(raw, mesh):
    """A raw batch on the mesh, and the numbers of its rows, which stay on the host.

    Args:
        raw: {name: array}, rows first, perhaps with "index" i32[B].
        mesh: the mesh.

    Returns:
        {name: array} without "index"; the index, or None.
    """
    rest = {k: v for k, v in raw.items() if k != "index"}
    return sharding.shard_batch(rest, mesh), raw.get("index")


def make_copy(module, mesh):
    """() -> a fresh copy of a parent's parameters, sharded alike.

    The child's state is donated at every update, the parent may go on as a frozen
    reference: they must not share buffers.
    """
    shardings = sharding.shardings(module, mesh)
    copy = jax.jit(lambda m: jax.tree.map(jnp.copy, m), out_shardings=shardings)
    return lambda: copy(module)


def make_step(objective, optimizers, *, micro_batches=1, lr_scale=None):
    """One optimizer step from a prepared batch, with gradient accumulation.

    The loss is the sum over terms of weight * (sum of losses / count), the sums being
    those of the whole batch: over every device and every micro-batch. Splitting a batch
    therefore never changes the number.

    Args:
        objective: an `Objective`.
        optimizers: an `optim.Optimizer`, or {part: Optimizer} for a model that is a
            dict of parts: each part then has its own clipping and learning rate.
        micro_batches: int; the batch is worked on in so many parts, one after the
            other, to save memory.
        lr_scale: {part: factor} on the learning rate of one optimizer for all parts.

    Returns:
        step(state, batch, schedule_step, frozen=None, key=None) -> (model, opt_state,
        metrics); `frozen` is the stage's, which no gradient is taken of, `key` that of
        an adapter's dropout.
    """

    def step(state, batch, schedule_step, frozen=None, key=None):
        reductions = objective.reductions(batch)
        totals = {k: r.total() for k, r in reductions.items()}
        weights = {k: r.weights for k, r in reductions.items()}

        def loss_fn(model, micro, micro_weights, key):
            terms, metrics = objective.terms(lora.join(frozen, model, key), micro)
            loss = 0.0
            for name, values in terms.items():
                part = masked.Reduction(micro_weights[name], micro_weights[name])
                share = part.sum(values) / totals[name]
                loss += objective.weights.get(name, 1.0) * share
            return loss, metrics

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if micro_batches == 1:
            (loss, metrics), grads = grad_fn(state.model, batch, weights, key)
            grads = sharding.constrain_tree(grads)
        else:
            split = jax.tree.map(lambda x: _split(x, micro_batches), (batch, weights))
            split += (None if key is None else jax.random.split(key, micro_batches),)
            first = jax.tree.map(lambda x: x[0], split)
            shapes = jax.eval_shape(grad_fn, state.model, *first)
            (_, empty), empty_grads = shapes
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty_grads)
            start = (jnp.zeros(()), masked.empty_like(empty), zeros)

            def accumulate(carry, micro):
                (loss, metrics), grads = grad_fn(state.model, *micro)
                loss0, metrics0, grads0 = carry
                grads = sharding.constrain_tree(jax.tree.map(jnp.add, grads0, grads))
                return (loss0 + loss, masked.merge(metrics0, metrics), grads), None

            (loss, metrics, grads), _ = jax.lax.scan(accumulate, start, split)
        model, opt_state, norms = _apply(
            optimizers, grads, state, schedule_step, lr_scale
        )
        scalars = {"loss": loss, **norms}
        metrics = metrics | {k: masked.Mean.of(v) for k, v in scalars.items()}
        return model, opt_state, metrics

    return step


def _apply(optimizers, grads, state, step, lr_scale):
    """One step of one optimizer, or of one for each part of the model."""
    if not isinstance(optimizers, dict):
        return optim.apply(
            optimizers, grads, state.opt_state, state.model, step, lr_scale=lr_scale
        )
    model, opt_state, norms, squares = {}, {}, {}, 0.0
    for part, one in optimizers.items():
        model[part], opt_state[part], told = optim.apply(
            one, grads[part], state.opt_state[part], state.model[part], step
        )
        squares += jnp.square(told["grad_norm"])
        norms |= {f"{k}/{part}": v for k, v in told.items()}
    first = next(iter(optimizers))
    norms["learning_rate"] = norms[f"learning_rate/{first}"]
    return model, opt_state, norms | {"grad_norm": jnp.sqrt(squares)}


def make_update(
    objective, optimizer, *, micro_batches=1, ema_decay=0.0, carry=None, frozen=None
):
    """update(state, batch) -> (state, metrics): one batch, one optimizer step.

    Args:
        objective: an `Objective`.
        optimizer: an `optim.Optimizer`.
        micro_batches: parts the batch is worked on in.
        ema_decay: of the average of the weights; 0 keeps none.
        carry: (state, model, batch) -> {name: value} of State.extra to replace.
        frozen: the stage's.
    """
    step = make_step(objective, optimizer, micro_batches=micro_batches)

    def update(state, batch, frozen):
        key = dropout_key(state)
        model, opt_state, metrics = step(state, batch, state.step, frozen, key)
        extra = carry(state, model, batch) if carry else {}
        state = advance(state, model, opt_state, ema_decay=ema_decay, **extra)
        return state, masked.compute(metrics)

    return jit_update(update, frozen)


def dropout(config, key):
    """What `begin` is to carry for an adapter's dropout: a random key, or None."""
    drops = config.lora.rank and config.lora.dropout
    return jax.random.fold_in(key, 2) if drops else None


def dropout_key(state):
    """The random key of this step's dropout; None where nothing is dropped."""
    if "dropout" not in state.extra:
        return None
    key = jax.random.wrap_key_data(state.extra["dropout"])
    return jax.random.fold_in(key, state.step)


def dropout_keys(state, count):
    """The same for so many optimizer steps in one update."""
    key = dropout_key(state)
    return None if key is None else jax.random.split(key, count)


def jit_update(update, frozen=None):
    """jit with the state donated and its shardings kept from call to call.

    Args:
        update: (state, batch, frozen) -> (state, metrics).
        frozen: the stage's: an argument of the program, neither donated nor a constant.
    """
    compiled = {}

    def call(state, batch):
        # Known at the first call: what goes in sharded comes out sharded the same way.
        if "update" not in compiled:
            shardings = jax.tree.map(lambda x: x.sharding, state)
            compiled["update"] = jax.jit(
                update, donate_argnums=0, out_shardings=(shardings, None)
            )
        return compiled["update"](state, batch, frozen)

    return call


def make_evaluate(objective, frozen=None):
    """evaluate(state, batch) -> the objective's metrics and loss, without gradient."""

    @jax.jit
    def evaluate(model, batch):
        reductions = objective.reductions(batch)
        terms, metrics = objective.terms(model, batch)
        means = {
            name: masked.Mean.weighted(values, reductions[name])
            for name, values in terms.items()
        }
        weights = [objective.weights.get(name, 1.0) for name in means]
        if len(means) > 1:
            metrics = metrics | {f"loss/{name}": mean for name, mean in means.items()}
        return metrics | {"loss": masked.Sum.of([*means.values()], weights)}

    return lambda state, batch: evaluate(lora.join(frozen, state.model), batch)


def _split(x, parts):
    """[B, ...] as [parts, B / parts, ...], each part taking rows from every device.

    Rows of a batch lie on devices in contiguous blocks; taking every `parts`-th row
    keeps each micro-batch spread over all of them without moving data. A scalar belongs
    to every part.
    """
    if x.ndim == 0:
        return jnp.broadcast_to(x, (parts,))
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
