"""Proximal policy optimization with a critic (PPO): sample, score, then several epochs.

`prepare` samples completions from the current policy and lets the frozen models judge
them: reward model, reference, and the critic as it stands before the update. `update`
runs epochs x minibatches, each a real optimizer step on the policy and its critic.

Log-probabilities are taken at the sampling temperature everywhere, and those of the
old policy are recomputed by a full forward pass: the first minibatch then has ratio 1
to rounding, whatever kernels the sampler used.

Source: Schulman et al. 2017 (arxiv.org/abs/1707.06347); per-token KL in the reward as
Ziegler et al. 2019 (arxiv.org/abs/1909.08593); details as Huang et al. 2024
(arxiv.org/abs/2403.17031). Not here: entropy bonus, reward whitening, shared backbone.
"""

import functools

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, mesh, optimizer
from stagecraft.metrics import section
from stagecraft.models import heads, sampling
from stagecraft.models.scores import scores
from stagecraft.stages import stage

OFFERS = ("logps", "old_logps", "advantages")

# Also logged for the first minibatch alone, where the policy has not moved yet: ratio 1
# and nothing clipped, or the two sides disagree about what was sampled.
FIRST = ("val/ratio", "policy/ratio_max", "policy/clipfrac_avg")


def make(config, model_config, shared_mesh, parents, *, stop_id):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        model_config: a `ModelConfig`.
        shared_mesh: the mesh.
        parents: {"start": Transformer, "reference": Transformer, "reward":
            ScalarModel, "value": ScalarModel}; the critic starts from `value`.
        stop_id: the end-of-turn token.

    Returns:
        a `Stage`; raw batches are prompt_ids i32[B, P], prompt_mask bool[B, P].
    """
    del model_config
    optimizer_ = optimizer.make(config.optimizer, steps=config.steps)
    objective = make_objective(
        config.objective,
        dict(config.objective_args),
        value_clip=config.value_clip,
        value_coef=config.value_coef,
        temperature=config.sampling.temperature,
    )
    copies = {
        "policy": stage.make_copy(parents["start"], shared_mesh),
        "value": stage.make_copy(parents["value"], shared_mesh),
    }

    def init(key):
        del key
        model = {name: copy() for name, copy in copies.items()}
        step, kl_coef = mesh.replicate(
            (jnp.zeros((), jnp.int32), jnp.asarray(config.kl_coef, jnp.float32)),
            shared_mesh,
        )
        opt_state = mesh.born_optimizer(optimizer_.tx, model, shared_mesh)
        return stage.State(step, model, opt_state, {"kl_coef": kl_coef})

    sample = jax.jit(functools.partial(_sample, config=config, stop_id=stop_id))
    judge = jax.jit(functools.partial(_judge, config=config))
    frozen = {k: parents[k] for k in ("reference", "reward")}

    def prepare(state, raw, key):
        raw = mesh.put(raw, shared_mesh)
        sample_key, order_key = jax.random.split(key)
        # Waiting (nothing is moved to the host) makes the three times tell apart.
        with section("update"):
            jax.block_until_ready(state.model)
        with section("sample"):
            rollout = sample(state.model["policy"], raw, sample_key)
            jax.block_until_ready(rollout)
        with section("score"):
            coef = state.extra["kl_coef"]
            batch = judge(state.model, frozen, rollout, order_key, coef)
            return jax.block_until_ready(batch)

    def work(raw):
        rows, prompt = raw["prompt_ids"].shape
        tokens = rows * (prompt + config.sampling.max_new_tokens)
        # Policy and critic are trained; policy and reference, critic and reward model
        # each read the rollout once before.
        return {
            "trained": config.epochs * tokens,
            "scalar_trained": config.epochs * tokens,
            "scored": 2 * tokens,
            "scalar_scored": 2 * tokens,
            "sampled": tokens,
            "length": prompt + config.sampling.max_new_tokens,
        }

    return stage.Stage(
        init=init,
        prepare=prepare,
        update=stage.jit_update(_make_update(config, objective, optimizer_)),
        evaluate=stage.make_evaluate(objective),
        work=work,
    )


def _sample(policy, raw, key, *, config, stop_id):
    """Completions of a batch of prompts, as one row of tokens each.

    Returns:
        ids, segments, positions i32[B, P + N], tokens i32[B, N], mask bool[B, N],
        behaviour_logps f32[B, N], ended bool[B].
    """
    got = sampling.generate(
        policy,
        raw["prompt_ids"],
        raw["prompt_mask"],
        key,
        stop_id=stop_id,
        **dict(config.sampling),
    )
    seen = jnp.concatenate([raw["prompt_mask"], got.mask], axis=1)
    return {
        "ids": jnp.concatenate([raw["prompt_ids"], got.tokens], axis=1),
        "segments": seen.astype(jnp.int32),
        "positions": jnp.cumsum(seen, axis=1, dtype=jnp.int32) - seen,
        "tokens": got.tokens,
        "mask": got.mask,
        "behaviour_logps": got.logps,
        "ended": got.ended,
    }


def response_logps(model, batch, temperature):
    """Log-probabilities of the sampled tokens, at the sampling temperature.

    Args:
        model: a `Transformer`.
        batch: ids, segments, positions i32[B, P + N], tokens i32[B, N].
        temperature: float; that of the rollout.

    Returns:
        `heads.TokenStats`, each f32[B, N].
    """
    new = batch["tokens"].shape[1]
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    # Token t is predicted from the state before it: one column to the left.
    before = hidden[:, -new - 1 : -1]
    return heads.token_logps(
        before, model.output_embedding(), batch["tokens"], temperature=temperature
    )


def response_values(model, batch):
    """V(s_t) before each sampled token, f32[B, N]."""
    new = batch["tokens"].shape[1]
    values = model(batch["ids"], batch["positions"], batch["segments"])
    return values[:, -new - 1 : -1]


def _judge(model, frozen, rollout, key, kl_coef, *, config):
    """Everything an update needs that only frozen or not-yet-updated models know."""
    temperature = config.sampling.temperature
    mask = rollout["mask"]
    old = response_logps(model["policy"], rollout, temperature)
    ref = response_logps(frozen["reference"], rollout, temperature)
    values = jnp.where(mask, response_values(model["value"], rollout), 0.0)
    prompt = rollout["ids"].shape[1] - mask.shape[1]
    raw_scores = scores(
        frozen["reward"],
        rollout["ids"],
        jnp.pad(mask, ((0, 0), (prompt, 0))),
        rollout["segments"],
        rollout["positions"],
    )
    paid = losses.missing_eos(
        raw_scores, rollout["ended"], penalty=config.missing_eos_penalty
    )
    rewards = losses.kl_reward(paid, old.logps, ref.logps, mask, kl_coef=kl_coef)
    advantages, returns = losses.gae(
        rewards, values, mask, discount=config.discount, lambda_=config.lambda_
    )
    kl = masked.sum(losses.k1(old.logps, ref.logps), mask, axis=-1)  # [B]
    of = masked.Mean.of
    told = {
        "objective/kl": of(kl),
        "objective/entropy": of(masked.sum(-old.logps, mask, axis=-1)),
        "objective/scores": of(raw_scores),
        "objective/non_score_reward": of(-kl_coef * kl),
        "objective/rlhf_reward": of(paid - kl_coef * kl),
        "objective/kl_coef": of(kl_coef),
        "objective/response_length": of(mask.sum(-1).astype(jnp.float32)),
        "objective/missing_eos_rate": of(1.0 - rollout["ended"].astype(jnp.float32)),
        "val/explained_variance": of(losses.explained_variance(values, returns, mask)),
        "val/rollout_logp_gap": of(
            jnp.abs(rollout["behaviour_logps"] - old.logps), mask
        ),
    }
    rows = rollout["tokens"].shape[0]
    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)
    return {
        "rollout": {
            k: rollout[k] for k in ("ids", "segments", "positions", "tokens", "mask")
        }
        | {
            "old_logps": old.logps,
            "old_values": values,
            "advantages": losses.whiten(advantages, mask),
            "returns": returns,
        },
        "order": order.reshape(config.epochs * config.minibatches, -1),
        "kl": kl.mean(),
        "metrics": told,
    }


def make_objective(
    name="ppo_policy",
    arguments=None,
    *,
    value_clip=0.2,
    value_coef=0.1,
    temperature=1.0,
):
    """Clipped policy and value losses over a minibatch of a judged rollout."""
    loss_fn, takes = stage.loss_function(name, OFFERS, arguments or {})
    arguments = arguments or {}

    def masks(batch):
        return {"policy": batch["mask"], "value": batch["mask"]}

    def terms(model, batch):
        mask = batch["mask"]
        stats = response_logps(model["policy"], batch, temperature)
        # Where the mask is false both sides are set alike, so that exp() is 1 there.
        logps = jnp.where(mask, stats.logps, 0.0)
        offered = {
            "logps": logps,
            "old_logps": jnp.where(mask, batch["old_logps"], 0.0),
            "advantages": batch["advantages"],
        }
        policy, metrics = loss_fn(*(offered[k] for k in takes), **arguments)
        values = response_values(model["value"], batch)
        value, value_metrics = losses.ppo_value(
            values, batch["old_values"], batch["returns"], clip=value_clip
        )
        value_metrics = {
            f"{k}/value" if k in metrics else k: v for k, v in value_metrics.items()
        }
        metrics = {
            k: (masked.Max if k.endswith("_max") else masked.Mean).of(v, mask)
            for k, v in (metrics | value_metrics).items()
        }
        metrics |= {
            "loss/policy_avg": masked.Mean.of(policy, mask),
            "loss/value_avg": masked.Mean.of(value, mask),
            "policy/entropy_avg": masked.Mean.of(stats.entropy, mask),
        }
        return {"policy": policy, "value": value}, metrics

    return stage.Objective(masks, terms, {"policy": 1.0, "value": value_coef})


def _make_update(config, objective, optimizer_):
    step = stage.make_step(
        objective,
        optimizer_,
        micro_batches=config.micro_batches,
        lr_scale={"policy": 1.0, "value": config.value_lr_scale},
    )

    def update(state, batch):
        def minibatch(carry, rows):
            model, opt_state = carry
            part = jax.tree.map(lambda x: x[rows], batch["rollout"])
            part = jax.tree.map(
                lambda x: mesh.constrain(x, "batch", *(None,) * (x.ndim - 1)), part
            )
            now = state._replace(model=model, opt_state=opt_state)
            # The schedule counts rollouts: one learning rate for a rollout's updates.
            model, opt_state, metrics = step(now, part, state.step)
            return (model, opt_state), metrics

        start = (state.model, state.opt_state)
        (model, opt_state), metrics = jax.lax.scan(minibatch, start, batch["order"])
        first = jax.tree.map(lambda x: x[0], metrics)
        metrics = masked.fold(metrics) | batch["metrics"]
        metrics |= {f"{k}_first": first[k] for k in FIRST}
        kl_coef = state.extra["kl_coef"]
        if config.kl_target > 0:
            kl_coef = losses.adaptive(
                kl_coef,
                batch["kl"],
                target=config.kl_target,
                horizon=config.kl_horizon,
                batch_size=batch["order"].size // config.epochs,
            )
        state = stage.State(state.step + 1, model, opt_state, {"kl_coef": kl_coef})
        return state, masked.results(metrics)

    return update
