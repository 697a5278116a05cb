"""Samples from the policy and their rewards: shared by all stages that sample.

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
from stagecraft.models import lora, sampling
from stagecraft.models.scores import scores
from stagecraft.signals.verifiers import FAILED, total
from stagecraft.stages import folding, stage
from stagecraft.stages.apart import Begun, Between, gathered
from stagecraft.stages.stage import Program
from stagecraft.stages.update import assemble, unless_unmoved

LEAST = 8  # tokens that completions are cut to at least: few lengths, few programs
REWARD_MODEL = "reward_model"  # its name among the rewards


class Rollouts(NamedTuple):
    """How a stage samples and scores.

    `sample` is the seam for another sampler, an inference server say: all that is asked
    of it is that its rollout is of these weights or older ones, and that
    behaviour_logps are of the distribution that it sampled from. `continued` makes a
    rollout of what it answers; tests/stages/http_sampler_test.py is one over HTTP.

    Attributes:
        sample: (policy, raw, key) -> rollout; raw is prompt_ids i32[B, P] and
            prompt_mask bool[B, P], padded on the left; the same key samples the same.
            The rollout, rows split over the stage's mesh: ids, segments, positions
            i32[R, P + N], tokens i32[R, N], mask bool[R, N] (through the stop token),
            behaviour_logps f32[R, N] (nats, at the temperature), ended bool[R] (not cut
            off), with R = B * samples rows, those of one prompt next to each other, and
            N the longest completion, rounded up.
        begin: like `sample`, but the rollout is not waited for; and
        finish: what `begin` returned -> the rollout.
        score: (rollout, index, step) -> rewards f32[R, S], one column a source, not
            finite where it has none (`verifiers.total`); index i32[B] says which
            records the prompts are, step the updates done.
        programs: (policy, raw) -> ({name: Program}, rollout, rewards), all as shapes.
        names: the S sources.
        weights: their weights.
        staleness: the updates that a rollout may be old.
    """

    sample: Callable
    begin: Callable
    finish: Callable
    score: Callable
    programs: Callable
    names: tuple[str, ...]
    weights: tuple[float, ...]
    staleness: int = 0


def make(config, context, *, samples=1):
    """Builds the sampling and scoring of a stage: `Rollouts`.

    Args:
        config: the stage's resolved config: sampling, reward_weights.
        context: the stage's `Context`; without "reward" among its parents only its
            verifiers score.
        samples: completions of each prompt.
    """
    mesh, verifiers = context.mesh, context.verifiers
    reward_model = context.parents.get("reward")
    names = (REWARD_MODEL,) * (reward_model is not None)
    names += tuple(verifiers.names) if verifiers else ()
    weights = tuple(config.reward_weights) or (1.0,) * len(names)
    if len(weights) != len(names) or not names:
        raise UserError(
            f"reward_weights={weights}: expected one for each of the {len(names)} "
            f"rewards ({', '.join(names) or 'none: set reward_from or verifiers'})"
        )
    by_rows, between = (
        sharding.batch_sharding(mesh),
        Between(mesh, context.rollout_mesh),
    )
    sampled_rows = sharding.batch_sharding(between.sampling)

    def generate(policy, raw, key):
        return _generate(policy, raw, key, config, context.stop_ids, samples)

    generate_jitted = stage.jit(generate, sampled_rows)
    score_jitted = stage.jit(model_scores, by_rows)

    longest_jitted = stage.jit(longest, sharding.whole(between.sampling))

    @functools.cache
    def trim_jitted(tokens):
        return stage.jit(functools.partial(trim, tokens=tokens), sampled_rows)

    def begin(policy, raw, key):
        arrays = {k: raw[k] for k in ("prompt_ids", "prompt_mask")}
        with between.sampler():
            return generate_jitted(between.weights(policy), *between.rows(arrays, key))

    def finish(samples):
        with section("sample"), between.sampler():
            jax.block_until_ready(samples)
            # Then every pass over the rollout is shorter, by a program for each length.
            whole = samples["tokens"].shape[1]
            tokens = halved(int(longest_jitted(samples["mask"])), whole)
            if tokens <= folding.WORTH_CUTTING * whole:
                samples = trim_jitted(tokens)(samples)
            return between.back(samples)

    def sample(policy, raw, key):
        with section("sample"):
            return finish(begin(policy, raw, key))

    def score(rollout, index, step):
        columns = []
        if reward_model is not None:
            columns.append(score_jitted(reward_model, rollout))
        if verifiers:
            with section("verify"):
                arrays = {k: rollout[k] for k in ("tokens", "mask", "ended")}
                arrays = sharding.to_host(arrays)
                index = np.repeat(np.asarray(index), samples)
                rewards = verifiers(index, **arrays, step=int(step))
                columns += sharding.shard_batch(
                    tuple(rewards.T.astype(np.float32)), mesh
                )
        return jnp.stack(columns, axis=1)

    def programs(policy, raw):
        arrays = {k: raw[k] for k in ("prompt_ids", "prompt_mask")}
        rows = stage.abstract_rows(arrays, between.sampling)
        arguments = (between.abstract_weights(policy), rows, stage.abstract_key())
        on = context.rollout_mesh
        every = {"sample": Program(generate, arguments, sampled_rows, mesh=on)}
        rollout = sharding.with_shardings(every["sample"].results(), by_rows)
        if reward_model is not None:
            arguments = (stage.abstract_frozen(reward_model, mesh), rollout)
            every["score"] = Program(model_scores, arguments, by_rows)
        shape = (len(rollout["tokens"]), len(names))
        rewards = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=by_rows)
        return every, rollout, rewards

    staleness = config.get("staleness", 0)  # not of every kind
    return Rollouts(sample, begin, finish, score, programs, names, weights, staleness)


def make_stage(
    config,
    context,
    beginning,
    rollouts,
    *,
    judge,
    placement,
    update,
    metrics,
    work,
    carried=(),
    beside=None,
    split=jax.random.split,
    order=None,
):
    """The stage that samples completions, has them scored, and learns from them.

    Args:
        config: the stage's resolved config: minibatches, micro_batches.
        context: the stage's `Context`.
        beginning: its `stage.Beginning`.
        rollouts: its `Rollouts`.
        judge: (model, reference, rollout, rewards, key, carried) -> batch, pure:
            whatever an update needs that only frozen or not-yet-updated models know.
        placement: shardings of that batch.
        update, work: as in `update.assemble`.
        metrics: (rollout, scores f32[R], scored bool[R]) -> {metric: Mean or Max}, what
            a held-out rollout shows beside each source's rewards and the lengths.
        carried: names of what `judge` reads of State.extra.
        beside: (raw) -> {name: rows} that join the batch unchanged, or None.
        split: (key) -> the keys of sampling and of `judge`.
        order: (rows, key of `judge`) -> i32[K, M], the rows of each batch of the
            update, where they may go through a model in pairs; None where not.
    """
    mesh, frozen = context.mesh, beginning.frozen
    fold = folding.make(config, context.mesh, order)
    reference = context.parents.get("reference")
    judge_jitted = stage.jit(judge, placement)
    ages_jitted = stage.jit(_ages, sharding.batch_sharding(mesh))

    def ahead(state, raw, key):
        raw, _ = stage.split_index(raw, mesh)
        policy = _policy(lora.join(frozen, state.model))
        # The update takes the state's buffers, while this is still to be computed.
        return Begun(rollouts.begin(policy, raw, split(key)[0]), jnp.copy(state.step))

    def prepare(state, raw, key, begun=None):
        raw, index = stage.split_index(raw, mesh)
        sample_key, judge_key = split(key)
        # Waiting (nothing is moved to the host) makes the times tell apart.
        with section("update"):
            jax.block_until_ready(state.model)
        model = lora.join(frozen, state.model)
        if begun is None:
            samples = rollouts.sample(_policy(model), raw, sample_key)
        else:
            samples = rollouts.finish(begun.rollout)
        if rollouts.staleness:
            step = state.step if begun is None else begun.step
            samples["age"] = ages_jitted(samples["ended"], state.step, step)
        with section("score"):
            rewards = rollouts.score(samples, index, state.step)
            # Only now: the same completion twice has the same reward to the bit.
            samples = fold(samples, judge_key)
            extra = {name: state.extra[name] for name in carried}
            batch = judge_jitted(model, reference, samples, rewards, judge_key, extra)
            return jax.block_until_ready(batch) | (beside(raw) if beside else {})

    def prepared(raw):
        model = beginning.abstract_model()
        programs, samples, rewards = rollouts.programs(_policy(model), raw)
        if rollouts.staleness:
            rows, step = samples["ended"], beginning.abstract.step
            shapes = jax.eval_shape(_ages, rows, step, step)
            samples["age"] = sharding.with_shardings(shapes, rows.sharding)
        extra = {name: beginning.abstract.extra[name] for name in carried}
        frozen_model = None
        if reference is not None:
            frozen_model = stage.abstract_frozen(reference, mesh)
        arguments = (model, frozen_model, samples, rewards, stage.abstract_key(), extra)
        programs["judge"] = Program(judge, arguments, placement)
        rows = beside(stage.abstract_rows(raw, mesh)) if beside else {}
        return programs, programs["judge"].results() | rows

    def measure(rollout, rewards, rows):
        values, scored = total(rewards, rollouts.weights)
        return (
            source_metrics(rewards, rollouts.names, rows)
            | completion_metrics(rollout["mask"], rollout["ended"], rows)
            | metrics(rollout, values, scored & rows)
        )

    measure_jitted = jax.jit(measure)

    def evaluate(state, raw, key):
        # The rows that fill up the last batch are no prompts; one token keeps them
        # from being empty.
        real = np.asarray(raw["index"]) >= 0
        mask = np.array(raw["prompt_mask"])
        mask[~real, -1] = True
        raw, index = stage.split_index(raw | {"prompt_mask": mask}, mesh)
        policy = _policy(lora.join(frozen, state.model))
        samples = rollouts.sample(policy, raw, key)
        rewards = rollouts.score(samples, np.maximum(index, 0), state.step)
        rows = np.repeat(real, len(samples["tokens"]) // len(real))
        return measure_jitted(samples, rewards, sharding.shard_batch(rows, mesh))

    return assemble(
        mesh,
        beginning,
        update=update,
        prepare=prepare,
        prepared=prepared,
        evaluate=evaluate,
        work=work,
        ahead=ahead if rollouts.staleness else None,
    )


def _policy(model):
    return model["policy"] if isinstance(model, dict) else model


def _ages(rows, step, sampled_at):
    """Returns i32[R], the updates between a rollout's weights and those of now."""
    return jnp.broadcast_to(step - sampled_at, rows.shape)


def _generate(policy, raw, key, config, stop_ids, samples):
    if config.get("rollout_weights") == "gathered":  # not of every kind
        policy = gathered(policy)
    sampled = sampling.generate(
        policy,
        raw["prompt_ids"],
        raw["prompt_mask"],
        key,
        stop_ids=stop_ids,
        samples=samples,
        **dict(config.sampling),
    )
    return continued(raw, *sampled)


def continued(raw, tokens, mask, logps, ended):
    """Returns prompts with their completions as a rollout, whoever sampled them.

    Args:
        raw: prompt_ids i32[B, P], prompt_mask bool[B, P].
        tokens: i32[R, N], those of one prompt next to each other; mask: bool[R, N];
            logps: f32[R, N], nats; ended: bool[R]; as of `Rollouts.sample`.
    """
    prompt_ids, prompt_mask = (
        jnp.repeat(raw[k], len(tokens) // len(raw[k]), axis=0)
        for k in ("prompt_ids", "prompt_mask")
    )
    seen = jnp.concatenate([prompt_mask, mask], axis=1)
    return {
        "ids": jnp.concatenate([prompt_ids, tokens], axis=1),
        "segments": seen.astype(jnp.int32),
        "positions": jnp.cumsum(seen, axis=1, dtype=jnp.int32) - seen,
        "tokens": tokens,
        "mask": mask,
        "behaviour_logps": logps,
        "ended": ended,
    }


def longest(mask):
    """Returns the tokens of the longest completion; mask is bool[R, N]."""
    return mask.any(axis=0).sum(dtype=jnp.int32)


def halved(tokens, whole):
    """Returns the least of `whole`, its half, a quarter ... that so many tokens fit in.

    >>> [halved(tokens, 34) for tokens in (34, 18, 17, 9, 1)]
    [34, 34, 17, 9, 9]
    """
    while (half := (whole + 1) // 2) >= max(tokens, LEAST):
        whole = half
    return whole


def trim(rollout, tokens):
    """Cuts a rollout's completions to their first `tokens`, the rest being padding."""
    cut = rollout["tokens"].shape[1] - tokens
    return {
        k: v[:, : v.shape[1] - cut] if v.ndim > 1 else v for k, v in rollout.items()
    }


def completion_length(config, raw, batch):
    """Returns the tokens of completions that a step computes.

    Args:
        config: the stage's resolved config.
        raw: a raw batch; batch: what was prepared of it, or None for the most tokens.
    """
    if batch is None:
        return config.sampling.max_new_tokens
    ids = batch["rollout"]["ids"] if "rollout" in batch else batch["ids"]
    return ids.shape[-1] - raw["prompt_ids"].shape[1]


def computed(config, raw, batch):
    """Returns the tokens that a row takes in a pass, and those of a row of the pass.

    Arguments as of `completion_length`.
    """
    batch = {} if batch is None else batch.get("rollout", batch)
    if "fold" in batch:
        width = batch["fold"].shape[-1]
        return width / 2, width
    whole = raw["prompt_ids"].shape[1] + completion_length(config, raw, batch or None)
    return whole, whole


def model_scores(model, rollout):
    """Returns the reward model's score of each completion's last token, f32[R].

    `FAILED` in place of one that is not finite.
    """
    mask = rollout["mask"]
    prompt = rollout["ids"].shape[1] - mask.shape[1]
    whole = jnp.pad(mask, ((0, 0), (prompt, 0)))
    arrays = (rollout[k] for k in ("segments", "positions"))
    values = scores(model, rollout["ids"], whole, *arrays)
    return jnp.where(jnp.isfinite(values), values, FAILED)


def source_metrics(rewards, names, rows=None):
    """ "rewards/NAME/mean" and "/std" of each source, over the rows it scored.

    Args:
        rewards: f32[R, S]; names: the S sources.
        rows: bool[R], the rows that count; None for all.
    """
    metrics = {}
    for column, name in enumerate(names):
        values = rewards[:, column]
        finite = jnp.isfinite(values)
        finite = finite if rows is None else finite & rows
        values = jnp.where(finite, values, 0.0)
        spread = jnp.sqrt(masked.var(values, finite, unbiased=True))
        metrics[f"rewards/{name}/mean"] = masked.Mean.of(values, finite)
        metrics[f"rewards/{name}/std"] = masked.Mean.of(spread)
    _, scored = total(rewards, (1.0,) * len(names))
    metrics["rewards/unscored"] = masked.Mean.of(1.0 - scored.astype(jnp.float32), rows)
    return metrics


def completion_metrics(mask, ended, rows=None):
    """Returns TRL's figures of how long completions are and how many were cut off.

    Args:
        mask: bool[R, N]; ended: bool[R].
        rows: bool[R], the rows that count; None for all.
    """
    length = mask.sum(-1).astype(jnp.float32)
    of = masked.Mean.of
    clipped = 1.0 - ended.astype(jnp.float32)
    ended = ended if rows is None else ended & rows
    return {
        "completions/mean_length": of(length, rows),
        "completions/max_length": masked.Max.of(length, rows),
        "completions/min_length": masked.Min.of(length, rows),
        "completions/mean_terminated_length": of(length, ended),
        "completions/max_terminated_length": masked.Max.of(length, ended),
        "completions/min_terminated_length": masked.Min.of(length, ended),
        "completions/clipped_ratio": of(clipped, rows),
    }


def outputs(function, batch, columns):
    """Returns what a model says at some columns of the rows of a batch, [R, M, ...].

    Args:
        function: (ids, positions, segments) -> [R, T, ...].
        batch: ids, segments, positions i32[R, T], and "fold" where rows go through the
            model in pairs.
        columns: a slice of the T, of M.
    """
    if "fold" not in batch:
        return function(batch["ids"], batch["positions"], batch["segments"])[:, columns]
    pairs = folding.fold(batch)
    rows, length = batch["ids"].shape
    places = jnp.arange(length, dtype=jnp.int32)[columns]
    places = jnp.broadcast_to(places, (rows, len(places)))
    return pairs.at(function(pairs.ids, pairs.positions, pairs.segments), places)


def response_logps(model, batch, temperature, **settings):
    """Computes log-probabilities of the sampled tokens, at the temperature.

    Args:
        model: a `Transformer`.
        batch: ids, segments, positions i32[B, P + N], tokens i32[B, N], as `outputs`
            takes them.
        temperature: float; that of the rollout.
        **settings: further ones of `heads.token_logps`.

    Returns:
        `heads.TokenStats`, each f32[B, N].
    """
    # Token t is predicted from the state before it: one column to the left.
    new = batch["tokens"].shape[1]
    before = outputs(model.hidden, batch, slice(-new - 1, -1))
    return model.token_logps(
        before, batch["tokens"], temperature=temperature, **settings
    )


def old_logps(batch, logps):
    """Returns the sampling policy's log-probabilities of a minibatch, f32[B, N].

    In the first step on a rollout they are `logps`, the policy's own: the ratio is 1.
    """
    if "old_logps" not in batch:  # one step a rollout
        return jax.lax.stop_gradient(logps)
    old = masked.clear(batch["old_logps"], batch["mask"])
    return unless_unmoved(batch, logps, old)
