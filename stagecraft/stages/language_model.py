"""Pretraining and supervised fine-tuning: next-token loss on the tokens of a mask.

The two differ in their data alone: every token of a document is a target in
pretraining, the assistant's words (end of turn included) are in fine-tuning.

Not here: dropout (one pass over small data needs none), label smoothing, z-loss.
"""

import jax.numpy as jnp

from stagecraft import losses, masked, mesh, optimizer
from stagecraft.models import heads
from stagecraft.models.transformer import Transformer
from stagecraft.stages import stage

OFFERS = ("logps",)


def make(config, model_config, shared_mesh, parents, *, fresh_pieces=()):
    """Builds the stage.

    Args:
        config: the stage's resolved config (see `stagecraft.defaults`).
        model_config: a `ModelConfig`.
        shared_mesh: the mesh.
        parents: {"start": Transformer} or {}: what training starts from.
        fresh_pieces: ids of pieces the parent has never seen, whose embeddings are to
            start from the mean (see `average_rows`).

    Returns:
        a `Stage`; raw and prepared batches are ids i32[B, T], mask bool[B, T],
        segments i32[B, T], positions i32[B, T].
    """
    optimizer_ = optimizer.make(config.optimizer, steps=config.steps)
    objective = make_objective(config.objective, dict(config.objective_args))
    if "start" in parents:
        init = _init_from(parents["start"], fresh_pieces, optimizer_, shared_mesh)
    else:
        init = stage.make_init(
            lambda key: Transformer(model_config, key), optimizer_, shared_mesh
        )
    return stage.Stage(
        init=init,
        prepare=lambda state, raw, key: mesh.put(raw, shared_mesh),
        update=stage.make_update(
            objective, optimizer_, micro_batches=config.micro_batches
        ),
        evaluate=stage.make_evaluate(objective),
        work=lambda raw: {"trained": raw["ids"].size, "length": raw["ids"].shape[-1]},
    )


def make_objective(name="next_token", arguments=None):
    """The objective over a language-model batch, as `stage.make_update` takes it."""
    loss_fn, _ = stage.loss_function(name, OFFERS, arguments or {})
    arguments = arguments or {}

    def masks(batch):
        _, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
        return {"next_token": mask}

    def terms(model, batch):
        targets, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
        hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
        stats = heads.token_logps(hidden, model.output_embedding(), targets)
        loss, metrics = loss_fn(stats.logps, **arguments)
        metrics = {k: masked.Mean.of(v, mask) for k, v in metrics.items()}
        metrics |= {
            "mean_token_accuracy": masked.Mean.of(stats.correct, mask),
            "entropy": masked.Mean.of(stats.entropy, mask),
            "supervised_share": masked.Mean.of(
                mask.astype(jnp.float32), batch["segments"] > 0
            ),
        }
        return {"next_token": loss}, metrics

    return stage.Objective(masks, terms, {"next_token": 1.0})


def _init_from(start, fresh_pieces, optimizer_, shared_mesh):
    copy = stage.make_copy(start, shared_mesh)

    def init(key):
        del key
        model = copy()
        if fresh_pieces:
            model = average_rows(model, fresh_pieces)
        step = mesh.replicate(jnp.zeros((), jnp.int32), shared_mesh)
        opt_state = mesh.born_optimizer(optimizer_.tx, model, shared_mesh)
        return stage.State(step, model, opt_state, {})

    return init


def average_rows(model, pieces):
    """Sets the embedding rows of never-seen pieces to the mean of all other rows.

    Chat pieces do not occur in pretraining text, yet its softmax has pushed their rows
    away from every context; from the mean they are as likely as any other piece.

    Args:
        model: a `Transformer`; changed in place (it must be the caller's own copy).
        pieces: ids of the pieces.
    """
    rows = jnp.asarray(pieces)
    for parameter in (model.embed, model.unembed):
        if parameter is None:
            continue
        table = parameter[...]
        kept = jnp.ones(table.shape[0], bool).at[rows].set(False)
        mean = jnp.where(kept[:, None], table, 0).sum(0) / kept.sum()
        parameter[...] = table.at[rows].set(mean)
    return model
