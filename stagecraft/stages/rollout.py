"""Samples from the policy and what they are worth: shared by all stages that sample.

A reward model scores on the device; verifiers (functions of text) score on the host.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stagecraft import masked, sharding
from stagecraft.errors import UserError
from stagecraft.metrics import section
from stagecraft.models import sampling
from stagecraft.models.scores import scores

REWARD_MODEL = "reward_model"  # its name among the rewards


class Rollout(NamedTuple):
    """How a stage samples and scores.

    Attributes:
        sample: (policy, raw, key) -> rollout; raw is prompt_ids i32[B, P] and
            prompt_mask bool[B, P]. The rollout: ids, segments, positions
            i32[R, P + N], tokens i32[R, N], mask bool[R, N], behaviour_logps
            f32[R, N], ended bool[R], with R = B * samples rows, those of one prompt
            next to each other.
        score: (rollout, raw) -> rewards f32[R, S], one column a source, not finite
            where a row could not be scored.
        names: the S sources.
        weights: their weights.
    """

    sample: Callable
    score: Callable
    names: tuple
    weights: tuple


def make(config, mesh, reward_model, verifiers, *, stop_ids, samples=1):
    """Builds the sampling and scoring of a stage.

    Args:
        config: the stage's resolved config: sampling, reward_weights.
        mesh: the mesh.
        reward_model: a `ScalarModel`, or None.
        verifiers: a `signals.verifiers.Verifiers`, or None.
        stop_ids: the tokens that end a completion.
        samples: completions of each prompt.
    """
    names = (REWARD_MODEL,) * (reward_model is not None)
    names += tuple(verifiers.names) if verifiers else ()
    weights = tuple(config.reward_weights) or (1.0,) * len(names)
    if len(weights) != len(names) or not names:
        raise UserError(
            f"reward_weights={weights}: expected one for each of the {len(names)} "
            f"rewards ({', '.join(names) or 'none: set reward_from or verifiers'})"
        )
    draw = jax.jit(
        functools.partial(_sample, config=config, stop_ids=stop_ids, samples=samples)
    )
    judge = jax.jit(_model_score)

    def sample(policy, raw, key):
        with section("sample"):
            arrays = {k: raw[k] for k in ("prompt_ids", "prompt_mask")}
            return jax.block_until_ready(draw(policy, arrays, key))

    def score(rollout, index):
        columns = []
        if reward_model is not None:
            columns.append(judge(reward_model, rollout))
        if verifiers:
            with section("verify"):
                host = {k: np.asarray(rollout[k]) for k in ("tokens", "mask", "ended")}
                found = verifiers(np.repeat(np.asarray(index), samples), **host)
                columns += sharding.shard_batch(tuple(found.T.astype(np.float32)), mesh)
        return jnp.stack(columns, axis=1)

    return Rollout(sample, score, names, weights)


def _sample(policy, raw, key, *, config, stop_ids, samples):
    got = sampling.generate(
        policy,
        raw["prompt_ids"],
        raw["prompt_mask"],
        key,
        stop_ids=stop_ids,
        samples=samples,
        **dict(config.sampling),
    )
    prompt_ids, prompt_mask = (
        jnp.repeat(raw[k], samples, axis=0) for k in ("prompt_ids", "prompt_mask")
    )
    seen = jnp.concatenate([prompt_mask, got.mask], axis=1)
    return {
        "ids": jnp.concatenate([prompt_ids, got.tokens], axis=1),
        "segments": seen.astype(jnp.int32),
        "positions": jnp.cumsum(seen, axis=1, dtype=jnp.int32) - seen,
        "tokens": got.tokens,
        "mask": got.mask,
        "behaviour_logps": got.logps,
        "ended": got.ended,
    }


def _model_score(model, rollout):
    """The reward model's word on each completion, f32[R], read at its last token."""
    mask = rollout["mask"]
    prompt = rollout["ids"].shape[1] - mask.shape[1]
    whole = jnp.pad(mask, ((0, 0), (prompt, 0)))
    arrays = (rollout[k] for k in ("segments", "positions"))
    return scores(model, rollout["ids"], whole, *arrays)


def total(rewards, weights):
    """The weighted sum of all sources, and which rows every source could score.

    Args:
        rewards: f32[R, S], not finite where a source could not score a row.
        weights: S numbers.

    Returns:
        f32[R], 0 for rows that were not scored; bool[R].
    """
    scored = jnp.isfinite(rewards).all(axis=1)
    weighted = rewards * jnp.asarray(weights, rewards.dtype)[None, :]
    return jnp.where(scored, weighted.sum(axis=1), 0.0), scored


def source_metrics(rewards, names):
    """ "rewards/NAME/mean" and "/std" of each source, over the rows it scored."""
    told = {}
    for column, name in enumerate(names):
        values = rewards[:, column]
        known = jnp.isfinite(values)
        values = jnp.where(known, values, 0.0)
        spread = jnp.sqrt(masked.var(values, known, unbiased=True))
        told[f"rewards/{name}/mean"] = masked.Mean.of(values, known)
        told[f"rewards/{name}/std"] = masked.Mean.of(spread)
    scored = jnp.isfinite(rewards).all(axis=1)
    told["rewards/unscored"] = masked.Mean.of(1.0 - scored.astype(jnp.float32))
    return told


def completion_metrics(mask, ended):
    """TRL's figures of how long completions are and how many were cut off."""
    length = mask.sum(-1).astype(jnp.float32)
    of = masked.Mean.of
    return {
        "completions/mean_length": of(length),
        "completions/max_length": masked.Max.of(length),
        "completions/min_length": masked.Min.of(length),
        "completions/mean_terminated_length": of(length, ended),
        "completions/max_terminated_length": masked.Max.of(length, ended),
        "completions/min_terminated_length": masked.Min.of(length, ended),
        "completions/clipped_ratio": of(1.0 - ended.astype(jnp.float32)),
    }


def response_logps(model, batch, temperature, **settings):
    """Log-probabilities of the sampled tokens, at the sampling temperature.

    Args:
        model: a `Transformer`.
        batch: ids, segments, positions i32[B, P + N], tokens i32[B, N].
        temperature: float; that of the rollout.
        **settings: further ones of `heads.token_logps`.

    Returns:
        `heads.TokenStats`, each f32[B, N].
    """
    new = batch["tokens"].shape[1]
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    # Token t is predicted from the state before it: one column to the left.
    before = hidden[:, -new - 1 : -1]
    return model.token_logps(
        before, batch["tokens"], temperature=temperature, **settings
    )
