"""Preference optimization from single judged completions (KTO, BCO).

A record says of one completion whether it is desirable. KTO measures itself against
the policy's distance to the reference on completions of *other* prompts: the batch
rotated by one row. BCO measures itself against a running mean of all rewards of
training, which held-out rows leave as it is.
"""

import functools

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, optim, sharding
from stagecraft.data import comparisons
from stagecraft.errors import UserError
from stagecraft.models import lora
from stagecraft.stages import checks, objective, stage, update
from stagecraft.stages.kind import REFERENCE, START, Kind
from stagecraft.stages.reference import Reference, begins_as_reference
from stagecraft.stages.stage import Program

OFFERS = {
    "policy_logps": "B",
    "ref_logps": "B",
    "labels": "B bool",
    "lengths": "B",
    "kl": "",
    "delta": "",
    "rows": "B bool",
}
PLACES = {"rows": "B"}


def make(config, context):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        context: the `Context`; parents {"start", "reference": Transformer}; for its
            dataset see `preference.make`.

    Returns:
        a `Stage`; raw batches are ids, mask, segments, positions, each [B, T], label
        bool[B] and perhaps index i32[B].
    """
    mesh = context.mesh
    optimizer = optim.make(config.optimizer, steps=config.steps)
    begins = begins_as_reference(context)
    loss_objective, needs = make_objective(config, begins)
    if "delta" in needs:  # a mean of log-ratios
        needs |= {"ref_logps"}
    trained = stage.trained(config, context)
    moves = config.sync_every > 0 and "ref_logps" in needs
    parent = context.parents["reference"] if moves else None
    scalars = {"delta": 0.0, "seen": 0.0} if "delta" in needs else {}
    beginning = stage.begin(
        config, trained, optimizer, mesh, reference=parent, **scalars
    )
    reference = Reference(config, context, beginning, score)
    by_rows, whole = sharding.batch_sharding(mesh), sharding.whole(mesh)
    score_jitted = stage.jit(score, by_rows)
    distance_jitted = stage.jit(reference_distance, whole)

    def prepare(state, raw, key, *, trains=True):
        del key
        batch, index = stage.split_index(raw, mesh)
        policy = lora.join(beginning.frozen, state.model)
        if "ref_logps" in needs:
            batch["ref_logps"] = reference.logps(state, batch, index)
        if "kl" in needs:
            batch["kl"] = distance_jitted(policy, reference.model(state), batch)
        if "delta" in needs and not trains:
            # Rewards of held-out rows do not move what they are compared with.
            batch |= {k: state.extra[k] for k in ("delta", "seen")}
        elif "delta" in needs:
            rewards = _rewards(config, score_jitted(policy, batch), batch)
            mean, count = state.extra["delta"], state.extra["seen"]
            rows = batch["mask"].any(-1)
            batch["delta"], batch["seen"] = running_mean(mean, count, rewards, rows)
        return batch

    def prepared(raw):
        rows = stage.abstract_rows(raw, mesh)
        policy, programs, batch = beginning.abstract_model(), {}, dict(rows)
        if "ref_logps" in needs:
            programs["reference"] = reference.program(rows)
            batch["ref_logps"] = programs["reference"].results()
        if "kl" in needs:
            arguments = (policy, reference.abstract_model(), rows)
            programs["distance"] = Program(reference_distance, arguments, whole)
            batch["kl"] = programs["distance"].results()
        if "delta" in needs:
            programs["policy"] = Program(score, (policy, rows), by_rows)
            batch |= {k: beginning.abstract.extra[k] for k in ("delta", "seen")}
        return programs, batch

    def carry(state, model, batch):
        means = {k: batch[k] for k in ("delta", "seen") if "delta" in needs}
        return means | reference.moved(state, model)

    def work(raw, batch=None):
        del batch  # its rows are as long as the raw ones
        tokens = raw["ids"].size
        scored = (2 * ("kl" in needs) + ("delta" in needs)) * tokens
        scored += reference.work(raw) if "ref_logps" in needs else 0
        return {"trained": tokens, "scored": scored, "length": raw["ids"].shape[-1]}

    return update.assemble(
        mesh,
        beginning,
        update=update.make_update(config, loss_objective, optimizer, carry),
        prepare=prepare,
        prepared=prepared,
        objective=loss_objective,
        prepare_heldout=functools.partial(prepare, trains=False),
        work=work,
    )


def score(model, batch):
    """Returns summed log-probabilities of completions, f32[B]."""
    return row_logps(model, batch)[0]


def _rewards(config, policy_logps, batch):
    """Returns the implied rewards of a batch, f32[B]: beta times the log-ratio."""
    beta = float(config.objective_args.get("beta", 0.1))
    return beta * (policy_logps - batch["ref_logps"])


def make_objective(config, begins=False):
    """Returns the objective over single completions, and the arrays its losses take.

    Args:
        config: the stage's resolved config.
        begins: whether the policy begins as its reference.
    """
    loss_fn = objective.combine(config, KIND)

    def reductions(batch):
        return {"rows": masked.Reduction.of(batch["mask"].any(-1))}

    def terms(model, batch):
        logps, stats, mask = row_logps(model, batch)
        rows = batch["mask"].any(-1)
        offered = {
            "policy_logps": logps,
            "labels": batch["label"],
            "lengths": mask.sum(-1).astype(jnp.float32),
            "rows": rows,
        }
        given = {k: batch[k] for k in ("ref_logps", "kl", "delta") if k in batch}
        if begins:  # nothing is gained yet, on no completion and so not on average
            own = {"ref_logps": logps, "kl": 0.0, "delta": 0.0}
            given = {k: update.unless_unmoved(batch, own[k], given[k]) for k in given}
        offered |= given
        loss, metrics = loss_fn.apply(offered)
        metrics = objective.measured(metrics, {1: rows, 2: mask})
        sides = {"chosen": batch["label"] & rows, "rejected": ~batch["label"] & rows}
        for side, who in sides.items():
            metrics[f"logits/{side}"] = masked.Mean.of(
                stats.logit_mean, mask & who[:, None]
            )
        means = [metrics.get(f"rewards/{side}") for side in sides]
        if all(isinstance(m, masked.Mean) for m in means):
            metrics["rewards/margins"] = masked.Sum.of(means, [1.0, -1.0])
        metrics["entropy"] = masked.Mean.of(stats.entropy, mask)
        return loss, metrics

    return update.Objective(reductions, terms, {}), loss_fn.needs


def row_logps(model, batch):
    """Returns summed log-probabilities, f32[B], the token statistics and the mask."""
    targets, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    stats = model.token_logps(hidden, targets)
    return losses.sequence_logps(stats.logps, mask), stats, mask


def rotated(batch):
    """Pairs each prompt with the completion of the row before it, in a circle.

    Rows of padding at the end of a batch take no part: the first row takes the last
    real row's completion.

    Args:
        batch: ids, segments i32[B, T], mask bool[B, T]: a prompt, then a completion
            under the mask, then padding.

    Returns:
        the same arrays and positions, cut at T.
    """
    ids, mask = batch["ids"], batch["mask"]
    rows, length = ids.shape
    column = jnp.arange(length)[None, :]
    prompt = jnp.argmax(mask, axis=1)[:, None]  # where the completion begins
    size = mask.sum(axis=1)[:, None]
    real = mask.any(axis=1)
    count = jnp.maximum(real.sum(), 1)
    other = jnp.where(real, (jnp.arange(rows) - 1) % count, jnp.arange(rows))
    source = column - prompt + prompt[other]
    taken = jnp.take_along_axis(ids[other], jnp.clip(source, 0, length - 1), axis=1)
    answer = (column >= prompt) & (column < prompt + size[other])
    answer &= (source < length) & real[:, None]
    seen = (column < prompt) | answer
    return {
        "ids": jnp.where(answer, taken, jnp.where(column < prompt, ids, 0)),
        "mask": answer,
        "segments": seen.astype(jnp.int32),
        "positions": jnp.broadcast_to(column, ids.shape).astype(jnp.int32),
    }


def reference_distance(model, reference, batch):
    """Returns KTO's z: the mean log-ratio on rotated completions, at least 0."""
    turned = rotated(batch)
    turned = {k: sharding.constrain(v, "batch", None) for k, v in turned.items()}
    ratio = row_logps(model, turned)[0] - row_logps(reference, turned)[0]
    return jnp.maximum(masked.mean(ratio, batch["mask"].any(-1)), 0.0)


@jax.jit
def running_mean(mean, seen, values, mask):
    """Returns the mean of all values so far and their number, with a batch added."""
    total = seen + masked.count(mask)
    added = masked.sum(values, mask) - masked.count(mask) * mean
    return mean + added / jnp.maximum(total, 1.0), total


def _check(where, config, experiment, mesh):
    checks.length(where, config, experiment, mesh)
    checks.moving_reference(where, config)
    loss = checks.training(where, config, experiment, mesh, KIND)
    checks.reference(where, config, loss)
    if "kl" in loss.needs and config.batch_size < 2:
        raise UserError(
            f"{where}.batch_size={config.batch_size}: {config.objective} measures each "
            "prompt with another row's completion; expected 2 or more"
        )


KIND = Kind(
    name="unpaired_preference",
    make=make,
    data=comparisons.judgements,
    check=_check,
    roles=START | REFERENCE,
    model="transformer",
    losses=losses.UNPAIRED,
    offers=OFFERS,
    places=PLACES,
)
