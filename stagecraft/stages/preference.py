"""Preference optimization from pairs (DPO and its kin): no reward model, no sampling.

The frozen reference acts in `prepare`; an update sees its log-probabilities as data.
Pairs that training sees more than once are scored once, before the first step. A loss
that asks for no reference costs no reference pass.
"""

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from stagecraft import losses, masked, optim, schema
from stagecraft.data import comparisons
from stagecraft.errors import UserError
from stagecraft.models.heads import TokenStats
from stagecraft.models.transformer import Transformer
from stagecraft.stages import checks, objective, stage, update
from stagecraft.stages.kind import REFERENCE, START, Kind
from stagecraft.stages.reference import Reference, begins_as_reference
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


def make(config, context):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        context: the `Context`; parents {"start", "reference": Transformer}, often the
            same tree; when the rows of its dataset come more than once, their
            reference log-probabilities are made once.

    Returns:
        a `Stage`; raw batches are ids, mask, segments, positions, each [B, 2, T], and
        perhaps preference f32[B] and index i32[B]; `prepare` adds ref_logps f32[B, 2].
    """
    mesh = context.mesh
    optimizer = optim.make(config.optimizer, steps=config.steps)
    loss_objective, needs = make_objective(config, begins_as_reference(context))
    trained = stage.trained(config, context)
    needs_reference = "ref_logps" in needs
    moves = config.sync_every > 0 and needs_reference
    parent = context.parents["reference"] if moves else None
    beginning = stage.begin(config, trained, optimizer, mesh, reference=parent)

    def score(model, batch):
        return reference_logps(config, model, batch)

    reference = Reference(config, context, beginning, score)

    def prepare(state, raw, key):
        del key
        batch, index = stage.split_index(raw, mesh)
        if needs_reference:
            batch["ref_logps"] = reference.logps(state, batch, index)
        return batch

    def prepared(raw):
        batch = stage.abstract_rows(raw, mesh)
        if not needs_reference:
            return {}, batch
        program = reference.program(batch)
        return {"reference": program}, batch | {"ref_logps": program.results()}

    def work(raw, batch=None):
        del batch  # its rows are as long as the raw ones
        tokens = {"trained": raw["ids"].size, "length": raw["ids"].shape[-1]}
        return tokens | ({"scored": reference.work(raw)} if needs_reference else {})

    return update.assemble(
        mesh,
        beginning,
        update=update.make_update(
            config,
            loss_objective,
            optimizer,
            reference.moved,
        ),
        prepare=prepare,
        prepared=prepared,
        objective=loss_objective,
        work=work,
    )


def reference_logps(config: ConfigDict, model: Transformer, batch: dict) -> Array:
    """Returns log-probabilities of completions, f32[B, 2], summed as configured."""
    stats, mask = pair_logps(model, batch)
    return summed(stats.logps, mask, config)


def summed(logps: Array, mask: Array, config: ConfigDict) -> Array:
    """Sums log-probabilities of tokens to completions, f32[B, 2, T] -> f32[B, 2]."""
    if config.ld_alpha < 1:
        return losses.length_desensitized(logps, mask, alpha=config.ld_alpha)
    return losses.sequence_logps(logps, mask)


def make_objective(
    config: ConfigDict, begins: bool = False
) -> tuple[update.Objective, frozenset[str]]:
    """Returns the objective over prepared pairs, and the arrays that its losses take.

    Losses that take scores need "ref_logps" too, from which scores are computed.

    Args:
        config: the stage's resolved config.
        begins: whether the policy begins as its reference.
    """
    loss_fn = objective.combine(config, KIND)
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
            if begins:
                offered["ref_logps"] = update.unless_unmoved(
                    batch, offered["policy_logps"], batch["ref_logps"]
                )
            offered["scores"] = losses.divergence_scores(
                offered["policy_logps"],
                offered["ref_logps"],
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
    return update.Objective(reductions, terms, {}), needs


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


def check_pairs(where: str, config: ConfigDict, loss: objective.Loss) -> None:
    """Refuses options of losses over pairs that are impossible or change nothing.

    Raises:
        UserError: for an unknown f-divergence or weighting, or such an option without a
            loss that would follow it.
    """
    schema.choice(f"{where}.weighting", config.weighting, ("", "wpo"))
    if not 0 <= config.ld_alpha <= 1:
        raise UserError(f"{where}.ld_alpha={config.ld_alpha}: expected from 0 to 1")
    if config.weighting and "rows" not in loss.places:
        raise UserError(
            f"{where}.weighting={config.weighting!r}: weighs pairs, but "
            f"objective={config.objective!r} has no loss of pairs"
        )
    schema.choice(f"{where}.f_divergence", config.f_divergence, losses.DIVERGENCES)
    if config.f_divergence != "alpha":
        because = f"f_divergence={config.f_divergence!r}"
        checks.unread(where, config, {"alpha": because})
    if "rows" not in loss.places:
        because = f"objective={config.objective!r}, which has no loss of pairs"
        checks.unread(where, config, {"ld_alpha": because})
    checks.reference(where, config, loss)
    if "scores" in loss.needs:
        return
    for key, unset in (("f_divergence", "reverse_kl"), ("reference_free", False)):
        if config[key] != unset:
            raise UserError(
                f"{where}.{key}={config[key]!r}: changes the scores that a loss "
                f"compares, but objective={config.objective!r} takes none; leave it at "
                f"{unset!r}"
            )


def _check(where, config, experiment, mesh):
    checks.length(where, config, experiment, mesh)
    checks.moving_reference(where, config)
    loss = checks.training(where, config, experiment, mesh, KIND)
    check_pairs(where, config, loss)


KIND = Kind(
    name="preference",
    make=make,
    data=comparisons.pairs,
    check=_check,
    roles=START | REFERENCE,
    model="transformer",
    losses=losses.PAIRS,
    offers=OFFERS,
    places=PLACES,
)
