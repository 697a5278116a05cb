"""Online preference optimization: the policy's own two answers, ranked as it learns.

Each step samples two completions a prompt from the current policy, lets the rewards
say which is better, and takes one step of a pair loss on them (Guo et al. 2024,
arxiv.org/abs/2402.04792). The reference stays where training began.
"""

import functools

import jax.numpy as jnp

from stagecraft import losses, masked, optim, sharding
from stagecraft.data import prompts
from stagecraft.signals import verifiers
from stagecraft.stages import checks, rollout, stage, update
from stagecraft.stages.kind import JUDGE, REFERENCE, REWARD, START, Kind
from stagecraft.stages.preference import (
    OFFERS,
    PLACES,
    check_pairs,
    make_objective,
    reference_logps,
)
from stagecraft.stages.reference import begins_as_reference


def make(config, context):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        context: the `Context`; parents {"start", "reference": Transformer} and perhaps
            "reward": ScalarModel.

    Returns:
        a `Stage`; raw batches are prompt_ids i32[B, P], prompt_mask bool[B, P], index
        i32[B]; prepared ones are those of `preference`, and "metrics".
    """
    mesh = context.mesh
    optimizer = optim.make(config.optimizer, steps=config.steps)
    loss_objective, needs = make_objective(config, begins_as_reference(context))
    trained = stage.trained(config, context)
    beginning = stage.begin(config, trained, optimizer, mesh)
    rollouts = rollout.make(config, context, samples=2)
    by_rows, needs_reference = sharding.batch_sharding(mesh), "ref_logps" in needs
    names = ("ids", "mask", "segments", "positions")
    names += ("ref_logps",) if needs_reference else ()

    def judge(policy, reference, samples, rewards, key, carried):
        del policy, key, carried
        pairs, metrics = rank_pairs(config, rollouts, samples, rewards)
        if needs_reference:
            pairs["ref_logps"] = reference_logps(config, reference, pairs)
        return pairs | {"metrics": metrics}

    def work(raw, batch=None):
        prompts, prompt = raw["prompt_ids"].shape
        _, length = rollout.computed(config, raw, batch)
        tokens = 2 * prompts * length
        return {
            "trained": tokens,
            "scored": needs_reference * tokens,
            "scalar_scored": ("reward" in context.parents) * tokens,
            # The two completions of a prompt share its prefill.
            "sampled": tokens - prompts * prompt,
            "length": length,
        }

    return rollout.make_stage(
        config,
        context,
        beginning,
        rollouts,
        judge=judge,
        placement=dict.fromkeys(names, by_rows) | {"metrics": sharding.whole(mesh)},
        update=update.make_update(config, loss_objective, optimizer),
        metrics=functools.partial(_score_metrics, config),
        work=work,
        split=lambda key: (key, key),
    )


def _score_metrics(config, samples, scores, scored):
    final = _final_scores(config, scores, samples)
    return {"objective/scores": masked.Mean.of(final, scored)}


def _final_scores(config, scores, samples):
    """Returns f32[R], the scores, lowered where a completion never ended."""
    return losses.missing_eos(
        scores, samples["ended"], penalty=config.missing_eos_penalty
    )


def rank_pairs(config, rollouts, samples, rewards):
    """Returns two completions a prompt as pairs, the better first (equals stay).

    Args:
        config: the stage's resolved config.
        rollouts: the stage's `Rollouts`: names and weights of the rewards.
        samples: a rollout of R = 2 B completions; rewards: f32[R, S].

    Returns:
        ids, segments, positions, mask, each [B, 2, T]; {metric: Mean or Max}.
    """
    scores, scored = verifiers.total(rewards, rollouts.weights)
    final = _final_scores(config, scores, samples)
    final, both = final.reshape(-1, 2), scored.reshape(-1, 2).all(axis=1)
    first = (final[:, 0] >= final[:, 1])[:, None]
    order = jnp.where(first, jnp.array([[0, 1]]), jnp.array([[1, 0]]))  # [B, 2]
    prompt = samples["ids"].shape[1] - samples["mask"].shape[1]
    arrays = {k: samples[k] for k in ("ids", "segments", "positions")}
    arrays["mask"] = jnp.pad(
        samples["mask"] & jnp.repeat(both, 2)[:, None], ((0, 0), (prompt, 0))
    )
    pairs = {
        k: jnp.take_along_axis(v.reshape(-1, 2, v.shape[-1]), order[:, :, None], axis=1)
        for k, v in arrays.items()
    }
    of, ended = masked.Mean.of, samples["ended"].astype(jnp.float32)
    metrics = {
        "objective/scores": of(final.reshape(-1), scored),
        "objective/scores_margin": of(jnp.abs(final[:, 0] - final[:, 1]), both),
        "val/contain_eos_token": of(ended),
    }
    metrics |= rollout.source_metrics(rewards, rollouts.names)
    metrics |= rollout.completion_metrics(samples["mask"], samples["ended"])
    return pairs, metrics


def _check(where, config, experiment, mesh):
    checks.rewards(where, config)
    checks.sampling(where, config, experiment)
    checks.room(where, config, experiment, mesh)
    loss = checks.training(where, config, experiment, mesh, KIND)
    check_pairs(where, config, loss)


KIND = Kind(
    name="online_preference",
    make=make,
    data=prompts.build,
    check=_check,
    roles=START | REFERENCE | REWARD | JUDGE,
    model="transformer",
    samples=True,
    losses=losses.PAIRS,
    offers=OFFERS,
    places=PLACES,
)
