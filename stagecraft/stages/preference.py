"""Preference optimization from pairs (DPO): no reward model, no sampling.

The frozen reference acts once per batch, in `prepare`; an update sees its
log-probabilities as data.
"""

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, mesh, optimizer
from stagecraft.models import heads
from stagecraft.stages import stage
from stagecraft.stages.reward import flatten_pairs, pair_rows

OFFERS = ("policy_logps", "ref_logps")


def make(config, model_config, shared_mesh, parents):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        model_config: a `ModelConfig`.
        shared_mesh: the mesh.
        parents: {"start": Transformer, "reference": Transformer}; often the same tree.

    Returns:
        a `Stage`; raw batches are ids, mask, segments, positions, each [B, 2, T];
        `prepare` adds ref_logps f32[B, 2].
    """
    del model_config
    optimizer_ = optimizer.make(config.optimizer, steps=config.steps)
    objective = make_objective(config.objective, dict(config.objective_args))
    reference = parents["reference"]
    copy = stage.make_copy(parents["start"], shared_mesh)
    score = jax.jit(pair_logps)

    def init(key):
        del key
        model = copy()
        step = mesh.replicate(jnp.zeros((), jnp.int32), shared_mesh)
        opt_state = mesh.born_optimizer(optimizer_.tx, model, shared_mesh)
        return stage.State(step, model, opt_state, {})

    def prepare(state, raw, key):
        del state, key
        batch = mesh.put(raw, shared_mesh)
        return batch | {"ref_logps": score(reference, batch)[0]}

    return stage.Stage(
        init=init,
        prepare=prepare,
        update=stage.make_update(
            objective, optimizer_, micro_batches=config.micro_batches
        ),
        evaluate=stage.make_evaluate(objective),
        work=lambda raw: {
            "trained": raw["ids"].size,
            "scored": raw["ids"].size,
            "length": raw["ids"].shape[-1],
        },
    )


def make_objective(name="dpo", arguments=None):
    """The objective over prepared pairs, as `stage.make_update` takes it."""
    loss_fn, takes = stage.loss_function(name, OFFERS, arguments or {})
    arguments = arguments or {}

    def masks(batch):
        return {"preference": pair_rows(batch["mask"])}

    def terms(model, batch):
        policy_logps, stats, target_mask = pair_logps(model, batch)
        offered = dict(policy_logps=policy_logps, ref_logps=batch["ref_logps"])
        loss, metrics = loss_fn(*(offered[k] for k in takes), **arguments)
        rows = pair_rows(batch["mask"])
        metrics = {k: masked.Mean.of(v, rows) for k, v in metrics.items()}
        chosen, rejected = target_mask[:, 0], target_mask[:, 1]
        metrics |= {
            "logits/chosen": masked.Mean.of(stats.logit_mean[:, 0], chosen),
            "logits/rejected": masked.Mean.of(stats.logit_mean[:, 1], rejected),
            "entropy": masked.Mean.of(stats.entropy, target_mask),
            "mean_token_accuracy": masked.Mean.of(stats.correct[:, 0], chosen),
        }
        return {"preference": loss}, metrics

    return stage.Objective(masks, terms, {"preference": 1.0})


def pair_logps(model, batch):
    """Summed log-probabilities of both completions under a model.

    Args:
        model: a `Transformer`.
        batch: ids, mask, segments, positions, each [B, 2, T].

    Returns:
        logps f32[B, 2] in nats, the token statistics reshaped to [B, 2, T], and the
        target mask bool[B, 2, T] they belong to.
    """
    shape = batch["ids"].shape
    ids, segments = flatten_pairs(batch["ids"]), flatten_pairs(batch["segments"])
    targets, mask = losses.shift(ids, flatten_pairs(batch["mask"]), segments)
    hidden = model.hidden(ids, flatten_pairs(batch["positions"]), segments)
    stats = heads.token_logps(hidden, model.output_embedding(), targets)
    stats, mask = jax.tree.map(lambda x: x.reshape(shape), (stats, mask))
    return losses.sequence_logps(stats.logps, mask), stats, mask
