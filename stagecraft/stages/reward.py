"""Reward model from comparisons: Bradley-Terry on the score of the last real token.

The body starts from the SFT model, the scalar head is new. The score is read where the
completion's mask is last true, which is its end-of-turn token: never where padding
seems to begin.
"""

import jax.numpy as jnp

from stagecraft import masked, mesh, optimizer
from stagecraft.models.scores import scores
from stagecraft.models.transformer import ScalarModel
from stagecraft.stages import stage

OFFERS = ("rewards",)


def make(config, model_config, shared_mesh, parents):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        model_config: a `ModelConfig`; the body's own when it has a parent.
        shared_mesh: the mesh.
        parents: {"start": Transformer}, the SFT model.

    Returns:
        a `Stage`; batches are ids, mask, segments, positions, each [B, 2, T]: column 0
        chosen, column 1 rejected.
    """
    del model_config
    start = parents["start"]

    optimizer_ = optimizer.make(config.optimizer, steps=config.steps)
    objective = make_objective(config.objective, dict(config.objective_args))
    copy = stage.make_copy(start, shared_mesh)

    def init(key):
        # The head is born on its own; the body is a copy of the parent's.
        model = mesh.born(lambda k, body: ScalarModel(body, k), shared_mesh)(
            key, copy()
        )
        step = mesh.replicate(jnp.zeros((), jnp.int32), shared_mesh)
        opt_state = mesh.born_optimizer(optimizer_.tx, model, shared_mesh)
        return stage.State(step, model, opt_state, {})

    return stage.Stage(
        init=init,
        prepare=lambda state, raw, key: mesh.put(raw, shared_mesh),
        update=stage.make_update(
            objective, optimizer_, micro_batches=config.micro_batches
        ),
        evaluate=stage.make_evaluate(objective),
        work=lambda raw: {
            "scalar_trained": raw["ids"].size,
            "length": raw["ids"].shape[-1],
        },
    )


def make_objective(name="bradley_terry", arguments=None):
    """The objective over a batch of pairs, as `stage.make_update` takes it."""
    loss_fn, _ = stage.loss_function(name, OFFERS, arguments or {})
    arguments = arguments or {}

    def masks(batch):
        return {"reward": pair_rows(batch["mask"])}

    def terms(model, batch):
        rewards = pair_scores(model, batch)
        loss, metrics = loss_fn(rewards, **arguments)
        rows = pair_rows(batch["mask"])
        both = jnp.broadcast_to(rows[:, None], rewards.shape)
        metrics = {k: masked.Mean.of(v, rows) for k, v in metrics.items()}
        metrics |= {
            "mean_reward": masked.Mean.of(rewards, both),
            "max_reward": masked.Max.of(rewards, both),
        }
        return {"reward": loss}, metrics

    return stage.Objective(masks, terms, {"reward": 1.0})


def pair_rows(mask):
    """Rows whose two completions both hold a token; rows of padding do not count.

    Args:
        mask: bool[B, 2, T].

    Returns:
        bool[B].
    """
    return mask.any(-1).all(-1)


def pair_scores(model, batch):
    """Scores of the chosen and the rejected completion, f32[B, 2]."""
    flat = {k: flatten_pairs(batch[k]) for k in ("ids", "mask", "segments")}
    flat["positions"] = flatten_pairs(batch["positions"])
    return scores(model, **flat).reshape(-1, 2)


def flatten_pairs(x):
    """[B, 2, T] as [2 B, T]; the two of a pair stay neighbours (and on one device)."""
    return x.reshape(-1, x.shape[-1])
