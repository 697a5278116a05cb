"""Preference optimization from pairs (DPO and its kin): no reward model, no sampling.

The frozen reference acts in `prepare`; an update sees its log-probabilities as data.
When the same pairs come round more than once, they are scored once, before the first
step. A loss that asks for no reference costs no reference pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from stagecraft import losses, masked, optim, schema, sharding
from stagecraft.errors import UserError
from stagecraft.models import lora
from stagecraft.models.heads import TokenStats
from stagecraft.models.transformer import Transformer
from stagecraft.stages import objective, stage
from stagecraft.stages.reward import flatten_pairs, pair_rows

OFFERS = {
    "policy_logps": "B 2",
    "ref_logps": "B 2",
    "scores": "B 2",
    "lengths": "B 2",
    "chosen_logps": "B T",
    "document_logps": "B T",
    "preference": "B",
    "rows": "B bool",
}
PLACES = {"rows": "B", "chosen": "B T", "document": "B T"}


def make(config, model_config, mesh, parents, *, dataset=None):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        model_config: a `ModelConfig`.
        mesh: the mesh.
        parents: {"start": Transformer, "reference": Transformer}; often the same tree.
        dataset: the `Dataset` trained on, or None; when its rows come more than once,
            their reference log-probabilities are made once.

    Returns:
        a `Stage`; raw batches are ids, mask, segments, positions, each [B, 2, T], and
        perhaps preference f32[B] and index i32[B]; `prepare` adds ref_logps f32[B, 2].
    """
    del model_config
    optimizer = optim.make(config.optimizer, steps=config.steps)
    decay = config.ema_decay
    goal, needs = make_objective(config)
    score = make_reference_score(config)
    trained = stage.trained(config, parents["start"], mesh)
    moving = config.sync_every > 0 and "ref_logps" in needs
    kept = None
    if "ref_logps" in needs and not moving and dataset is not None:
        kept = once(config, dataset, parents["reference"], score, mesh)

    def init(key):
        state = stage.begin(
            *(trained.born(key), optimizer, mesh),
            ema=decay > 0,
            dropout=stage.dropout(config, key),
        )
        if moving:
            first = moving_reference(state, trained.frozen, parents["reference"])
            state.extra["reference"] = stage.make_copy(first, mesh)()
        return state

    def prepare(state, raw, key):
        del key
        batch, index = stage.placed(raw, mesh)
        if "ref_logps" not in needs:
            return batch
        known = kept(index) if kept is not None else None
        if known is None:
            reference = parents["reference"]
            if moving:
                reference = lora.join(trained.frozen, state.extra["reference"])
            known = score(reference, batch)
        return batch | {"ref_logps": known}

    def sync(state, model, batch):
        del batch
        return {"reference": synced(state, model, config)} if moving else {}

    def work(raw):
        found = {"trained": raw["ids"].size, "length": raw["ids"].shape[-1]}
        if kept is not None:  # every row once, spread over the steps
            rows = raw["ids"].size // len(raw["ids"])
            found["scored"] = dataset.rows * rows // config.steps
        elif "ref_logps" in needs:
            found["scored"] = raw["ids"].size
        return found

    return stage.Stage(
        init=init,
        prepare=prepare,
        update=stage.make_update(
            goal,
            optimizer,
            micro_batches=config.micro_batches,
            ema_decay=decay,
            carry=sync,
            frozen=trained.frozen,
        ),
        evaluate=stage.make_evaluate(goal, trained.frozen),
        work=work,
        frozen=trained.frozen,
    )


def moving_reference(state, frozen, reference):
    """Returns the first weights of a moving reference, not yet copied.

    Under an adapter they are an adapter too, on the same base: the policy's initial
    one, which changes nothing yet.
    """
    return reference if frozen is None else state.model


def synced(state, model, config):
    """Returns the reference, mixed with the policy every `sync_every` steps.

    TR-DPO (Gorbatovski et al. 2024, arxiv.org/abs/2404.09656), the soft update; with
    sync_alpha=1 the hard one.
    """
    due = (state.step + 1) % config.sync_every == 0
    alpha = jnp.where(due, config.sync_alpha, 0.0)
    return jax.tree.map(
        lambda ref, new: (ref + alpha * (new - ref)).astype(ref.dtype),
        state.extra["reference"],
        model,
    )


def once(config, dataset, reference, score, mesh):
    """Scores every row under the reference once, when training sees rows twice.

    Returns:
        (index) -> f32[B, ...] of those rows, None for rows of other data; or None when
        scoring batch by batch is less work, or several processes share the rows.
    """
    if config.steps * config.batch_size <= dataset.rows or jax.process_count() > 1:
        return None
    # In the order of the data and in whole batches: a resumed run has the same bits.
    ref_logps = []

    def lookup(index):
        if index is None or index.min() < 0 or index.max() >= dataset.rows:
            return None
        if not ref_logps:
            batches = [
                score(reference, stage.placed(raw, mesh)[0])
                for raw in dataset.epoch(config.batch_size)
            ]
            rows = np.concatenate(jax.device_get(batches))[: dataset.rows]
            ref_logps.append(rows)
        return sharding.shard_batch(ref_logps[0][np.asarray(index)], mesh)

    return lookup


def make_reference_score(config: ConfigDict) -> Callable[..., Array]:
    """Returns (model, batch) -> log-probabilities f32[B, 2], summed as configured."""

    @jax.jit
    def score(model, batch):
        stats, mask = pair_logps(model, batch)
        return summed(stats.logps, mask, config)

    return score


def summed(logps: Array, mask: Array, config: ConfigDict) -> Array:
    """Sums log-probabilities of tokens to completions, f32[B, 2, T] -> f32[B, 2]."""
    if config.ld_alpha < 1:
        return losses.length_desensitized(logps, mask, alpha=config.ld_alpha)
    return losses.sequence_logps(logps, mask)


def check_scores(config: ConfigDict, loss: objective.Loss) -> None:
    """Refuses settings of scores that no loss would follow.

    Raises:
        UserError: for an unknown f-divergence, or settings without a loss on scores.
    """
    schema.choice("f_divergence", config.f_divergence, losses.DIVERGENCES)
    if "scores" in loss.needs:
        return
    for key, unset in (("f_divergence", "reverse_kl"), ("reference_free", False)):
        if config[key] != unset:
            raise UserError(
                f"{key}={config[key]!r}: changes the scores that a loss compares, but "
                f"objective={config.objective!r} takes none; leave it at {unset!r}"
            )


def make_objective(config: ConfigDict) -> tuple[stage.Objective, frozenset[str]]:
    """Returns the objective over prepared pairs, and the arrays that its losses take.

    Losses that take scores need "ref_logps" too, which scores are made of.
    """
    loss_fn = objective.combine(config, OFFERS, PLACES)
    check_scores(config, loss_fn)
    weighted = config.weighting == "wpo"

    def reductions(batch):
        chosen, document = (_targets(batch, k)[:, 0] for k in ("mask", "segments"))
        places = {"rows": pair_rows(batch["mask"]), "chosen": chosen}
        places["document"] = document
        return {k: masked.Reduction.of(m) for k, m in places.items()}

    def terms(model, batch):
        stats, mask = pair_logps(model, batch, squares=weighted)
        rows = pair_rows(batch["mask"])
        chosen, rejected = mask[:, 0], mask[:, 1]
        document = _targets(batch, "segments")[:, 0]
        offered = {
            "policy_logps": summed(stats.logps, mask, config),
            "lengths": mask.sum(-1).astype(jnp.float32),
            "chosen_logps": masked.clear(stats.logps[:, 0], chosen),
            "document_logps": masked.clear(stats.logps[:, 0], document),
            "rows": rows,
        }
        offered |= {k: batch[k] for k in ("ref_logps", "preference") if k in batch}
        if "ref_logps" in batch:
            offered["scores"] = losses.divergence_scores(
                offered["policy_logps"],
                batch["ref_logps"],
                f_divergence=config.f_divergence,
                alpha=config.alpha,
                reference_free=config.reference_free,
            )
        loss, metrics = loss_fn.apply(offered)
        if weighted:
            loss["rows"] *= losses.wpo_weights(stats.logps, stats.log_p2, mask)
        metrics = objective.measured(metrics, {1: rows, 2: chosen})
        metrics |= {
            "logits/chosen": masked.Mean.of(stats.logit_mean[:, 0], chosen),
            "logits/rejected": masked.Mean.of(stats.logit_mean[:, 1], rejected),
            "entropy": masked.Mean.of(stats.entropy, mask),
            "mean_token_accuracy": masked.Mean.of(stats.correct[:, 0], chosen),
        }
        return loss, metrics

    needs = loss_fn.needs | ({"ref_logps"} if "scores" in loss_fn.needs else set())
    return stage.Objective(reductions, terms, {}), needs


def _targets(batch: dict[str, Array], key: str) -> Array:
    """Returns the targets bool[B, 2, T] among completions, or among all real tokens."""
    ids, segments = flatten_pairs(batch["ids"]), flatten_pairs(batch["segments"])
    _, mask = losses.shift(ids, flatten_pairs(batch[key]) > 0, segments)
    return mask.reshape(batch["ids"].shape)


def pair_logps(
    model: Transformer, batch: dict[str, Array], *, squares: bool = False
) -> tuple[TokenStats, Array]:
    """Computes the token statistics of both completions under a model.

    Args:
        model: a `Transformer`.
        batch: ids, mask, segments, positions, each [B, 2, T].
        squares: also compute the statistic `log_p2`.

    Returns:
        the token statistics, each f32[B, 2, T], and the target mask bool[B, 2, T].
    """
    shape = batch["ids"].shape
    ids, segments = flatten_pairs(batch["ids"]), flatten_pairs(batch["segments"])
    targets, mask = losses.shift(ids, flatten_pairs(batch["mask"]), segments)
    hidden = model.hidden(ids, flatten_pairs(batch["positions"]), segments)
    stats = model.token_logps(hidden, targets, squares=squares)
    return jax.tree.map(lambda x: x.reshape(shape), (stats, mask))
