"""Preference optimization from single judged completions (KTO, BCO).

A record says of one completion whether it is desirable. KTO measures itself against
the policy's distance to the reference on completions of *other* prompts: the batch
rotated by one row. BCO measures itself against a running mean of all rewards.
"""

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, optim, sharding
from stagecraft.models import lora
from stagecraft.stages import objective, stage
from stagecraft.stages.preference import moving_reference, once, synced

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


def make(config, model_config, mesh, parents, *, dataset=None):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        model_config: a `ModelConfig`.
        mesh: the mesh.
        parents: {"start": Transformer, "reference": Transformer}.
        dataset: the `Dataset` trained on, or None; see `preference.make`.

    Returns:
        a `Stage`; raw batches are ids, mask, segments, positions, each [B, T], label
        bool[B] and perhaps index i32[B].
    """
    del model_config
    optimizer = optim.make(config.optimizer, steps=config.steps)
    decay = config.ema_decay
    goal, needs = make_objective(config)
    if "delta" in needs:  # a mean of log-ratios
        needs |= {"ref_logps"}
    beta = float(config.objective_args.get("beta", 0.1))
    score = jax.jit(lambda model, batch: row_logps(model, batch)[0])
    distance = jax.jit(_distance)
    trained = stage.trained(config, parents["start"], mesh)
    moving = config.sync_every > 0 and "ref_logps" in needs
    kept = None
    if "ref_logps" in needs and not moving and dataset is not None:
        kept = once(config, dataset, parents["reference"], score, mesh)

    def init(key):
        extra = {"delta": 0.0, "seen": 0.0} if "delta" in needs else {}
        state = stage.begin(
            *(trained.born(key), optimizer, mesh),
            ema=decay > 0,
            dropout=stage.dropout(config, key),
            **extra,
        )
        if moving:
            first = moving_reference(state, trained.frozen, parents["reference"])
            state.extra["reference"] = stage.make_copy(first, mesh)()
        return state

    def prepare(state, raw, key):
        del key
        batch, index = stage.placed(raw, mesh)
        policy, reference = lora.join(trained.frozen, state.model), parents["reference"]
        if moving:
            reference = lora.join(trained.frozen, state.extra["reference"])
        known = kept(index) if kept is not None else None
        if known is not None:
            batch["ref_logps"] = known
        elif "ref_logps" in needs:
            batch["ref_logps"] = score(reference, batch)
        if "kl" in needs:
            batch["kl"] = distance(policy, reference, batch)
        if "delta" in needs:
            moved = running_mean(
                state.extra["delta"],
                state.extra["seen"],
                beta * (score(policy, batch) - batch["ref_logps"]),
                batch["mask"].any(-1),
            )
            batch["delta"], batch["seen"] = moved
        return batch

    def carry(state, model, batch):
        extra = {k: batch[k] for k in ("delta", "seen") if "delta" in needs}
        if moving:
            extra["reference"] = synced(state, model, config)
        return extra

    def work(raw):
        tokens = raw["ids"].size
        passes = 2 * ("kl" in needs) + ("delta" in needs)
        passes += "ref_logps" in needs and kept is None
        scored = passes * tokens
        if kept is not None:
            scored += dataset.rows * raw["ids"].shape[-1] // config.steps
        return {"trained": tokens, "scored": scored, "length": raw["ids"].shape[-1]}

    return stage.Stage(
        init=init,
        prepare=prepare,
        update=stage.make_update(
            goal,
            optimizer,
            micro_batches=config.micro_batches,
            ema_decay=decay,
            carry=carry,
            frozen=trained.frozen,
        ),
        evaluate=stage.make_evaluate(goal, trained.frozen),
        work=work,
        frozen=trained.frozen,
    )


def make_objective(config):
    """The objective over judged completions, and the arrays its losses take."""
    loss_fn = objective.combine(config, OFFERS, PLACES)

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
        offered |= {k: batch[k] for k in ("ref_logps", "kl", "delta") if k in batch}
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

    return stage.Objective(reductions, terms, {}), loss_fn.needs


def row_logps(model, batch):
    """Summed log-probabilities of completions, f32[B], their token statistics, mask."""
    targets, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    stats = model.token_logps(hidden, targets)
    return losses.sequence_logps(stats.logps, mask), stats, mask


def rotated(batch):
    """Each prompt with the completion of the row before, the first with the last's.

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


def _distance(model, reference, batch):
    """KTO's z: the policy's mean log-ratio on rotated completions, at least 0."""
    turned = rotated(batch)
    turned = {k: sharding.constrain(v, "batch", None) for k, v in turned.items()}
    ratio = row_logps(model, turned)[0] - row_logps(reference, turned)[0]
    return jnp.maximum(masked.mean(ratio, batch["mask"].any(-1)), 0.0)


@jax.jit
def running_mean(mean, seen, values, mask):
    """The mean of all values so far and their number, with a batch added."""
    total = seen + masked.count(mask)
    added = masked.sum(values, mask) - masked.count(mask) * mean
    return mean + added / jnp.maximum(total, 1.0), total
