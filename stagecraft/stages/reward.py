"""Reward model from comparisons: Bradley-Terry on the score of the last real token.

The body starts from the SFT model, the scalar head is new. The score is read where the
completion's mask is last true, which is its end-of-turn token: never where padding
seems to begin.
"""

import functools

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, optim, sharding
from stagecraft.data import comparisons
from stagecraft.errors import UserError
from stagecraft.models import lora
from stagecraft.models.scores import scores
from stagecraft.stages import checks, objective, stage, update
from stagecraft.stages.kind import Kind, Role

BUCKETS = 5  # of confidence, from 0.5 to 1

OFFERS = {"rewards": "B K", "present": "B K bool", "margin": "B", "preference": "B"}
PLACES = {"rows": "B"}


def make(config, context):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        context: the `Context`; parents {"start": Transformer}, the SFT model, or a
            ScalarModel to go on from.

    Returns:
        a `Stage`; batches are ids, mask, segments, positions, each [B, K, T], best
        completion first (K = 2: chosen, rejected), and perhaps margin, preference
        f32[B].
    """
    mesh = context.mesh
    trained = stage.trained(config, context, scalar=True)
    optimizer = optim.make(config.optimizer, steps=config.steps)
    loss_objective = make_objective(config)

    def work(raw, batch=None):
        del batch  # its rows are as long as the raw ones
        return {"scalar_trained": raw["ids"].size, "length": raw["ids"].shape[-1]}

    return update.assemble(
        mesh,
        stage.begin(config, trained, optimizer, mesh),
        update=update.make_update(config, loss_objective, optimizer),
        prepare=lambda state, raw, key: stage.split_index(raw, mesh)[0],
        objective=loss_objective,
        work=work,
    )


def make_objective(config):
    """Returns the objective over a batch of pairs, as `update.make_update` takes it."""
    loss_fn = objective.combine(config, KIND)

    def reductions(batch):
        return {"rows": masked.Reduction.of(pair_rows(batch["mask"]))}

    def terms(model, batch):
        rewards, present = pair_scores(model, batch), batch["mask"].any(-1)
        if rewards.shape[1] > 2 and "present" not in loss_fn.needs:
            raise UserError(
                f"objective={config.objective!r}: the records rank up to "
                f"{rewards.shape[1]} completions of a prompt; it takes pairs: choose "
                "bradley_terry_ranked"
            )
        offered = {"rewards": rewards, "present": present}
        offered |= {k: batch[k] for k in ("margin", "preference") if k in batch}
        loss, metrics = loss_fn.apply(offered)
        rows = pair_rows(batch["mask"])
        metrics = objective.measured(metrics, {1: rows, 2: present})
        counted = present & rows[:, None]
        metrics |= {
            "mean_reward": masked.Mean.of(rewards, counted),
            "max_reward": masked.Max.of(rewards, counted),
            "min_reward": masked.Min.of(rewards, counted),
        }
        lengths = batch["mask"][:, :2].sum(-1)
        metrics |= calibration(rewards[:, 0] - rewards[:, 1], rows)
        metrics["length_accuracy"] = masked.Mean.of(longer_wins(lengths), rows)
        return loss, metrics

    return update.Objective(reductions, terms, {})


def normalize(state, reference, batch_size, frozen=None):
    """Shifts the head's bias so that demonstrations have mean reward 0.

    The loss fixes rewards up to a constant; this is how Stiennon et al. 2020
    (arxiv.org/abs/2009.01325) and Huang et al. 2024 (arxiv.org/abs/2403.17031) fix it.

    Args:
        state: the state after the last step; its average of the weights is shifted too.
        reference: a `Dataset` of demonstrations.
        batch_size: rows at once.
        frozen: the stage's.

    Returns:
        the state, {"reference_reward": their mean before the shift, of the weights that
        are saved}.
    """
    models = [state.model]
    if "ema" in state.extra:
        models.append(state.extra["ema"])
    for model in models:
        model = lora.join(frozen, model)  # its bias is the state's own
        total = masked.Mean.empty()
        for raw in reference.epoch(batch_size):
            total = total.merge(_mean_score(model, sharding.on_mesh(raw)))
        model.bias[...] = model.bias[...] - total.compute()
    return state, {"reference_reward": float(total.compute())}


@jax.jit
def _mean_score(model, batch):
    return masked.Mean.of(scores(model, **batch), batch["mask"].any(-1))


def calibration(difference, rows):
    """Measures how often the model is right by how sure it is, and its mean error.

    Args:
        difference: f32[B], the chosen completion's reward less the rejected one's; the
            model's confidence in its verdict is the sigmoid of its size.
        rows: bool[B], the pairs that count.

    Returns:
        {"accuracy/0.5-0.6", ...: Mean, "calibration_error": CalibrationError}.
    """
    confidence = jax.nn.sigmoid(jnp.abs(difference))
    hits = (difference > 0).astype(jnp.float32)
    place = jnp.clip(((confidence - 0.5) / 0.5 * BUCKETS).astype(int), 0, BUCKETS - 1)
    inside = (place[:, None] == jnp.arange(BUCKETS)[None, :]) & rows[:, None]
    metrics = {}
    for number in range(BUCKETS):
        low = 0.5 + 0.5 * number / BUCKETS
        name = f"accuracy/{low:.1f}-{low + 0.5 / BUCKETS:.1f}"
        metrics[name] = masked.Mean.of(hits, inside[:, number])
    return metrics | {
        "calibration_error": masked.CalibrationError.of(confidence, hits, inside)
    }


def longer_wins(lengths):
    """Returns the accuracy of always preferring the longer one: i32[B, 2] -> f32[B]."""
    chosen, rejected = lengths[:, 0], lengths[:, 1]
    return (chosen > rejected) + 0.5 * (chosen == rejected).astype(jnp.float32)


def pair_rows(mask):
    """Marks rows whose first two completions both hold a token; padding does not.

    Args:
        mask: bool[B, K, T].

    Returns:
        bool[B].
    """
    return mask[:, :2].any(-1).all(-1)


def pair_scores(model, batch):
    """Returns the scores of each row's completions, f32[B, K]."""
    flat = {k: flatten_pairs(batch[k]) for k in ("ids", "mask", "segments")}
    flat["positions"] = flatten_pairs(batch["positions"])
    return scores(model, **flat).reshape(batch["ids"].shape[:2])


def flatten_pairs(x):
    """Reshapes [B, K, T] to [K B, T]; a row's stay neighbours (and on one device)."""
    return x.reshape(-1, x.shape[-1])


def _check(where, config, experiment, mesh):
    checks.length(where, config, experiment, mesh)
    checks.training(where, config, experiment, mesh, KIND)


def _finish(config, data, frozen):
    """Sets the mean reward of the demonstrations to 0, where there are any."""
    if data.reference is None:
        return None
    return functools.partial(
        normalize,
        reference=data.reference,
        batch_size=config.batch_size,
        frozen=frozen,
    )


KIND = Kind(
    name="reward",
    make=make,
    data=comparisons.rankings,
    check=_check,
    roles={"start": Role(("transformer", "scalar"), required=True)},
    model="scalar",
    losses=losses.REWARDS,
    offers=OFFERS,
    places=PLACES,
    unit="nats a pair",
    finish=_finish,
)
