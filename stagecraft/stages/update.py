"""From an objective to the update of a stage: one optimizer step, or several.

A step is exact however it is split: the loss is a sum over the whole batch
divided by a count of the whole batch, over devices and micro-batches alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stagecraft import masked, optim, sharding
from stagecraft.models import lora
from stagecraft.stages import stage
from stagecraft.stages.stage import Program, Stage, State


class Objective(NamedTuple):
    """How a stage's batch and model become terms of one loss.

    Attributes:
        reductions: (batch) -> {term: masked.Reduction}; how each term is summed and
            what it is divided by. It depends on the batch alone, so that the
            denominators of a whole accumulation window are known before its first
            micro-batch. It may name terms that a loss does not have.
        terms: (model, batch) -> ({term: unreduced loss}, {metric: Mean or Max}). In an
            update the batch has "unmoved" bool[]: the model is still the one that the
            stage began with, or that sampled the rollout.
        weights: {term: float}; 1 for a term that is not named.
        sums: (model, batch) -> {name: array}: sums over rows that `terms` needs of
            the whole batch, of which no gradient is taken; they join the batch where it
            is split into micro-batches. None where `terms` needs nothing of the kind.
    """

    reductions: Callable
    terms: Callable
    weights: dict
    sums: Callable | None = None


def unless_unmoved(batch, own, other):
    """Returns `other`; in an update of a model that has not moved yet, `own`.

    What an earlier program computed with the same weights is then the update's own
    number, bit for bit: two programs may round it apart, in bfloat16 by enough to clip
    a ratio or to prefer one completion to another. No gradient flows through `own`.
    """
    return jnp.where(batch.get("unmoved", False), jax.lax.stop_gradient(own), other)


def make_step(objective, optimizers, *, micro_batches=1, lr_scale=None):
    """Makes one optimizer step on a prepared batch, with gradient accumulation.

    The loss is the sum over terms of weight * (sum of losses / count), the sums being
    those of the whole batch: over every device and every micro-batch. Splitting a batch
    therefore never changes the number.

    Args:
        objective: an `Objective`.
        optimizers: an `optim.Optimizer`, or {part: Optimizer} for a model that is a
            dict of parts: each part then has its own clipping and learning rate.
        micro_batches: int, parts that the batch is worked on in, one after the
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
            keys = None if key is None else jax.random.split(key, micro_batches)
            if objective.sums is not None:
                whole = _add_up(objective.sums, state.model, frozen, split[0], keys)
                for name, total in whole.items():
                    shape = (micro_batches, *total.shape)
                    split[0][name] = jnp.broadcast_to(total, shape)
            split += (keys,)
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


def _add_up(sums, model, frozen, micro_batches, keys):
    """Returns the sums of `Objective.sums` over all micro-batches."""

    def one(xs):
        micro, key = xs
        return sums(lora.join(frozen, model, key), micro)

    each = jax.lax.map(one, (micro_batches, keys))
    return jax.tree.map(lambda x: x.sum(0), each)


def _apply(optimizers, grads, state, step, lr_scale):
    """Takes a step of one optimizer, or of one for each part of the model."""
    if not isinstance(optimizers, dict):
        return optim.apply(
            optimizers, grads, state.opt_state, state.model, step, lr_scale=lr_scale
        )
    model, opt_state, norms, squares = {}, {}, {}, 0.0
    for part, one in optimizers.items():
        model[part], opt_state[part], metrics = optim.apply(
            one, grads[part], state.opt_state[part], state.model[part], step
        )
        squares += jnp.square(metrics["grad_norm"])
        norms |= {f"{k}/{part}": v for k, v in metrics.items()}
    first = next(iter(optimizers))
    norms["learning_rate"] = norms[f"learning_rate/{first}"]
    return model, opt_state, norms | {"grad_norm": jnp.sqrt(squares)}


def make_update(config, objective, optimizer, carry=None):
    """Makes update(state, batch, frozen) -> (state, metrics), one optimizer step.

    Args:
        config: the stage's resolved config: micro_batches, ema_decay.
        objective: an `Objective`.
        optimizer: an `optim.Optimizer`.
        carry: (state, model, batch) -> {name: value} of State.extra to replace.
    """
    step = make_step(objective, optimizer, micro_batches=config.micro_batches)

    def update(state, batch, frozen):
        key = dropout_key(state)
        rows = {k: v for k, v in batch.items() if k != "metrics"}
        rows["unmoved"] = state.step == 0
        model, opt_state, metrics = step(state, rows, state.step, frozen, key)
        metrics = (
            metrics | {"num_tokens": count_tokens(rows)} | batch.get("metrics", {})
        )
        extra = carry(state, model, batch) if carry else {}
        state = advance(config, state, model, opt_state, **extra)
        return state, masked.compute(metrics)

    return update


def make_minibatch_update(
    config, objective, optimizer, *, lr_scale=None, beside=None, conclude=None
):
    """Makes an update of several epochs of minibatches, each an optimizer step.

    Args:
        config: the stage's resolved config: epochs, minibatches, micro_batches,
            ema_decay.
        objective: an `Objective`.
        optimizer: an `optim.Optimizer`, or one for each part of the model.
        lr_scale: as in `make_step`.
        beside: (state, batch, number) -> {name: array}, what joins the rollout's rows
            in the minibatch of that number.
        conclude: (state, batch, metrics) -> ({metric: Mean or Max}, {name: value} of
            State.extra to replace); the metrics are stacked over minibatches.

    Returns:
        update(state, batch, frozen) -> (state, metrics); the batch holds "rollout",
        {name: [R, ...]}, "order" i32[epochs * minibatches, R / minibatches], the rows
        of each minibatch, and "metrics".
    """
    micro_batches = config.micro_batches
    step = make_step(
        objective, optimizer, micro_batches=micro_batches, lr_scale=lr_scale
    )

    def update(state, batch, frozen):
        count = len(batch["order"])
        key = dropout_key(state)
        keys = None if key is None else jax.random.split(key, count)

        def minibatch(carry, xs):
            (model, opt_state), (number, rows, key) = carry, xs
            part = {k: v[rows] for k, v in batch["rollout"].items()}
            part |= beside(state, batch, number) if beside else {}
            part["unmoved"] = number == 0
            part = sharding.constrain_rows(part)
            now = state._replace(model=model, opt_state=opt_state)
            # The schedule counts rollouts: one learning rate for a rollout's updates.
            model, opt_state, metrics = step(now, part, state.step, frozen, key)
            return (model, opt_state), metrics

        (model, opt_state), stacked = jax.lax.scan(
            minibatch,
            (state.model, state.opt_state),
            (jnp.arange(count), batch["order"], keys),
        )
        metrics, extra = masked.reduce(stacked), {}
        rows = batch["rollout"] | batch.get("ptx", {})
        metrics |= {"num_tokens": count_tokens(rows)} | batch["metrics"]
        if conclude:
            more, extra = conclude(state, batch, stacked)
            metrics |= more
        state = advance(config, state, model, opt_state, **extra)
        return state, masked.compute(metrics)

    return update


def count_tokens(rows: dict[str, jax.Array]) -> masked.Mean:
    """Counts the tokens of a batch that are no padding; `train` adds them up.

    It is TRL's num_tokens: prompts are tokens too, and count in each row they begin.
    """
    counts = [(v > 0).sum() for k, v in rows.items() if k.endswith("segments")]
    return masked.Mean.of(sum(counts, jnp.zeros((), jnp.int32)))


def shuffled_minibatches(config, rows, key):
    """Returns the rows of every minibatch: i32[epochs * minibatches, rows each]."""
    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)
    return order.reshape(config.epochs * config.minibatches, -1)


def advance(config, state, model, opt_state, **extra):
    """Returns the state one step on; `extra` replaces what it names."""
    extra = state.extra | extra
    if config.ema_decay:
        extra["ema"] = optim.ema(state.extra["ema"], model, config.ema_decay)
    return State(state.step + 1, model, opt_state, extra)


def dropout_key(state):
    """Returns the random key of this step's dropout; None where nothing is dropped."""
    if "dropout" not in state.extra:
        return None
    key = jax.random.wrap_key_data(state.extra["dropout"])
    return jax.random.fold_in(key, state.step)


def make_evaluate(objective):
    """Makes a function for metrics and loss of a prepared batch, without gradient.

    Returns:
        evaluate(model, batch) -> {metric: Mean or Max}.
    """

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

    return evaluate


def assemble(
    mesh,
    beginning,
    *,
    update,
    prepare,
    work,
    prepared=None,
    objective=None,
    prepare_heldout=None,
    evaluate: Any = None,
    ahead: Any = None,
) -> Stage:
    """Builds the stage from its functions.

    Args:
        mesh: the mesh.
        beginning: a `stage.Beginning`.
        update: (state, batch, frozen) -> (state, metrics), pure and not jitted.
        prepare, work, ahead: as in `Stage`.
        prepared: (raw) -> ({name: Program} that `prepare` runs, the batch it returns as
            shapes); None where it only puts the raw batch on the mesh.
        objective: the `Objective` that a held-out batch is evaluated with, once it went
            through prepare_heldout: like `prepare`, which it is by default; or
        evaluate: as in `Stage`, of a stage that samples its evaluation.
    """
    frozen = beginning.frozen
    shardings = jax.tree.map(lambda x: x.sharding, beginning.abstract)
    placement = (shardings, None)
    jitted = stage.jit(update, placement, donate=(0,))
    measure = None if objective is None else make_evaluate(objective)

    def programs(raw):
        before, batch = {}, stage.abstract_rows(raw, mesh)
        if prepared is not None:
            before, batch = prepared(raw)
        arguments = (beginning.abstract, batch, beginning.abstract_frozen)
        after = {"update": Program(update, arguments, placement, (0,))}
        if measure is not None:
            model = beginning.abstract_model()
            after["evaluate"] = Program(measure, (model, batch))
        return before | after

    if measure is not None:
        evaluate = _evaluation(jax.jit(measure), prepare_heldout or prepare, frozen)
    return Stage(
        init=beginning.init,
        prepare=prepare,
        update=lambda state, batch: jitted(state, batch, frozen),
        evaluate=lambda state, raw, key: evaluate(stage.averaged(state), raw, key),
        work=work,
        programs=programs,
        frozen=frozen,
        ahead=ahead,
    )


def _evaluation(measure, prepare, frozen):
    def evaluate(state, raw, key):
        batch = prepare(state, raw, key)
        return measure(lora.join(frozen, state.model), batch)

    return evaluate


def _split(x, parts):
    """Splits [B, ...] to [parts, B / parts, ...], each with rows of every device.

    Rows of a batch lie on devices in contiguous blocks; taking every `parts`-th row
    keeps each micro-batch spread over all of them without moving data. A scalar belongs
    to every part.
    """
    if x.ndim == 0:
        return jnp.broadcast_to(x, (parts,))
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
