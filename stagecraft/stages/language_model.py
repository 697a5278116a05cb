"""Pretraining and supervised fine-tuning: next-token loss on the tokens of a mask.

The two differ in their data alone: every token of a document is a target in
pretraining, the assistant's words (end of turn included) are in fine-tuning.

Not here: dropout (one pass over small data needs none), label smoothing.
"""

import jax.numpy as jnp

from stagecraft import losses, masked, optim, sharding
from stagecraft.errors import UserError
from stagecraft.models import lora
from stagecraft.models.transformer import Transformer
from stagecraft.stages import objective, stage

OFFERS = {"logps": "B T", "log_z": "B T"}
PLACES = {"tokens": "B T"}


def make(config, model_config, mesh, parents, *, fresh_pieces=()):
    """Builds the stage.

    Args:
        config: the stage's resolved config (see `stagecraft.defaults`).
        model_config: a `ModelConfig`.
        mesh: the mesh.
        parents: {"start": Transformer} or {}: what training starts from.
        fresh_pieces: ids of pieces the parent has never seen, whose embeddings are to
            start from the mean (see `average_rows`).

    Returns:
        a `Stage`; raw and prepared batches are ids i32[B, T], mask bool[B, T],
        segments i32[B, T], positions i32[B, T], and weight f32[B, T] where sources
        have weights.
    """
    optimizer = optim.make(config.optimizer, steps=config.steps)
    decay = config.ema_decay
    goal = make_objective(config)
    if "start" in parents:
        trained = stage.trained(config, parents["start"], mesh)
    else:
        born = sharding.init_sharded(lambda k: Transformer(model_config, k), mesh)
        trained = stage.Trained(None, born)
    if trained.frozen is not None and fresh_pieces and not config.lora.embeddings:
        raise UserError(
            "lora.embeddings=False: start_from was trained on bare text and has never "
            "seen the pieces of a chat, whose embeddings an adapter leaves alone; set "
            "lora.embeddings=True"
        )

    def init(key):
        model = trained.born(key)
        if fresh_pieces:
            average_rows(lora.join(trained.frozen, model), fresh_pieces)
        return stage.begin(
            *(model, optimizer, mesh),
            ema=decay > 0,
            dropout=stage.dropout(config, key),
        )

    return stage.Stage(
        init=init,
        prepare=lambda state, raw, key: sharding.shard_batch(raw, mesh),
        update=stage.make_update(
            *(goal, optimizer),
            micro_batches=config.micro_batches,
            ema_decay=decay,
            frozen=trained.frozen,
        ),
        evaluate=stage.make_evaluate(goal, trained.frozen),
        work=lambda raw: {"trained": raw["ids"].size, "length": raw["ids"].shape[-1]},
        frozen=trained.frozen,
    )


def make_objective(config):
    """The objective over a language-model batch, as `stage.make_update` takes it."""
    loss_fn = objective.combine(config, OFFERS, PLACES)

    def reductions(batch):
        _, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
        weight = batch.get("weight")
        if weight is not None:  # of the token predicted, one column on
            weight = jnp.concatenate([weight[:, 1:], jnp.zeros_like(weight[:, :1])], 1)
        return {
            "tokens": masked.Reduction.of(mask, weight),
            "balance": masked.Reduction.of(batch["segments"] > 0),
        }

    def terms(model, batch):
        targets, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
        arrays = [batch[k] for k in ("ids", "positions", "segments")]
        balance, coef = None, model.config.balance_coef
        if coef:
            hidden, balance = model.hidden_and_balance(*arrays)
        else:
            hidden = model.hidden(*arrays)
        stats = model.token_logps(hidden, targets)
        loss, metrics = loss_fn.apply({"logps": stats.logps, "log_z": stats.log_z})
        metrics = objective.measured(metrics, {2: mask})
        metrics |= {
            "mean_token_accuracy": masked.Mean.of(stats.correct, mask),
            "entropy": masked.Mean.of(stats.entropy, mask),
            "supervised_share": masked.Mean.of(
                mask.astype(jnp.float32), batch["segments"] > 0
            ),
        }
        if balance is not None:
            real = batch["segments"] > 0
            loss["balance"] = coef * balance.loss
            busiest = balance.load.max() * balance.load.size
            metrics |= {
                "aux_loss": masked.Mean.of(balance.loss, real),
                "router_load_max": masked.Mean.of(busiest),  # 1 where all are equal
            }
        return loss, metrics

    return stage.Objective(reductions, terms, {})


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
