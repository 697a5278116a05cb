"""Pretraining and supervised fine-tuning: next-token loss on the tokens of a mask.

The two differ in their data alone: every token of a document is a target in
pretraining, in fine-tuning only the assistant's turns are, their ends included.

Not here: dropout (one pass over small data needs none), label smoothing.
"""

import jax.numpy as jnp

from stagecraft import losses, masked, optim
from stagecraft.data import corpus
from stagecraft.errors import UserError
from stagecraft.stages import checks, objective, stage, update
from stagecraft.stages.kind import Kind, Role

OFFERS = {"logps": "B T", "log_z": "B T"}
PLACES = {"tokens": "B T"}


def make(config, context):
    """Builds the stage.

    Args:
        config: the stage's resolved config (see `stagecraft.defaults`).
        context: the `Context`; parents {"start": Transformer} or {}: what training
            starts from. The embeddings of `unseen_ids` start from the mean of all
            others (see `average_rows`).

    Returns:
        a `Stage`; raw and prepared batches are ids i32[B, T], mask bool[B, T],
        segments i32[B, T], positions i32[B, T], and weight f32[B, T] where sources
        have weights.
    """
    mesh, unseen = context.mesh, context.unseen_ids
    optimizer = optim.make(config.optimizer, steps=config.steps)
    loss_objective = make_objective(config)
    if "start" in context.parents:
        trained = stage.trained(config, context)
    else:
        trained = stage.fresh(context.model_config, mesh)
    if trained.frozen is not None and unseen and not config.lora.embeddings:
        raise UserError(
            "lora.embeddings=False: start_from was trained on bare text and has never "
            "seen the pieces of a chat, whose embeddings an adapter leaves alone; set "
            "lora.embeddings=True"
        )

    def change(model):
        average_rows(model, unseen)

    beginning = stage.begin(
        config, trained, optimizer, mesh, change=change if unseen else None
    )

    start = context.parents.get("start")
    shape = context.model_config if start is None else start.config
    counts_first = shape.balance_coef > 0 and config.micro_batches > 1

    def work(raw, batch=None):
        del batch  # its rows are as long as the raw ones
        tokens = raw["ids"].size
        work = {"trained": tokens, "length": raw["ids"].shape[-1]}
        return work | ({"scored": tokens} if counts_first else {})

    return update.assemble(
        mesh,
        beginning,
        update=update.make_update(config, loss_objective, optimizer),
        prepare=lambda state, raw, key: stage.split_index(raw, mesh)[0],
        objective=loss_objective,
        work=work,
    )


def make_objective(config):
    """Returns the objective over a batch, as `update.make_update` takes it."""
    loss_fn = objective.combine(config, KIND)

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
            shares = None
            if "copies" in batch:
                shares = batch["copies"] / jnp.maximum(batch["real"], 1)
            hidden, balance = model.hidden_and_balance(*arrays, shares)
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

    def sums(model, batch):
        if not model.config.balance_coef:
            return {}
        arrays = [batch[k] for k in ("ids", "positions", "segments")]
        real = (batch["segments"] > 0).sum()
        return {"copies": model.expert_copies(*arrays), "real": real}

    return update.Objective(reductions, terms, {}, sums)


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
        others = jnp.ones(table.shape[0], bool).at[rows].set(False)
        mean = jnp.where(others[:, None], table, 0).sum(0) / others.sum()
        parameter[...] = table.at[rows].set(mean)
    return model


def _format(config):
    return "text" if config.data.format == "text" else config.data.render


def _check(where, config, experiment, mesh):
    checks.length(where, config, experiment, mesh)
    parent = experiment.stages.get(config.start_from)
    bare = parent is not None and parent.kind == KIND.name and _format(parent) == "text"
    learns_turns = _format(config) == "chat" and bool(config.lora.rank)
    if learns_turns and bare and not config.lora.embeddings:
        raise UserError(
            f"{where}.lora.embeddings=False: {config.start_from} learns from bare text "
            "and never sees the pieces of a chat, whose embeddings an adapter leaves "
            "alone; set it to True"
        )
    checks.training(where, config, experiment, mesh, KIND, check_data=corpus.check)
    reasons = corpus.unread(config.data).items()
    checks.unread(where, config, {f"data.{key}": why for key, why in reasons})


KIND = Kind(
    name="language_model",
    make=make,
    data=corpus.build,
    check=_check,
    roles={"start": Role(("transformer",))},
    model="transformer",
    supervised=True,
    format=_format,
    losses=losses.TOKENS,
    offers=OFFERS,
    places=PLACES,
    unit="nats a token",
)
