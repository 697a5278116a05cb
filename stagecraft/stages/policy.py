"""Proximal policy optimization with a critic (PPO): sample, score, then several epochs.

`prepare` samples completions from the current policy and lets the frozen models judge
them: rewards, reference, and the critic as it stands before the update. `update` runs
epochs x minibatches, each a real optimizer step on the policy and its critic.

Log-probabilities are taken at the sampling temperature everywhere, and those of the
old policy are recomputed by a full forward pass: the first minibatch then has ratio 1
to rounding, whatever kernels the sampler used.

Source: Schulman et al. 2017 (arxiv.org/abs/1707.06347); per-token KL in the reward as
Ziegler et al. 2019 (arxiv.org/abs/1909.08593); details as Huang et al. 2024
(arxiv.org/abs/2403.17031); the mix with pretraining as Ouyang et al. 2022
(arxiv.org/abs/2203.02155). Not here: a backbone shared by policy and critic.
"""

import functools

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, optim, sharding
from stagecraft.metrics import section
from stagecraft.models import lora
from stagecraft.stages import objective, rollout, stage
from stagecraft.stages.rollout import response_logps

OFFERS = {
    "logps": "B T",
    "old_logps": "B T",
    "ref_logps": "B T",
    "advantages": "B T",
    "mask": "B T bool",
    "entropy": "B T",
}
PLACES = {"policy": "B T"}

# Also logged for the first minibatch alone, where the policy has not moved yet: ratio 1
# and nothing clipped, or the two sides disagree about what was sampled.
FIRST = ("val/ratio", "policy/ratio_max", "policy/clipfrac_avg")


def make(config, model_config, mesh, parents, *, stop_ids, verifiers=None):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        model_config: a `ModelConfig`.
        mesh: the mesh.
        parents: {"start": Transformer, "reference": Transformer, "reward":
            ScalarModel, "value": ScalarModel}; the critic starts from `value`. Without
            a reward model and `value` it starts from the policy, its head new.
        stop_ids: the tokens that end a turn.
        verifiers: a `signals.verifier.Verifiers`, or None.

    Returns:
        a `Stage`; raw batches are prompt_ids i32[B, P], prompt_mask bool[B, P], index
        i32[B], and ptx_ids and so on [R, T] when pretraining text is mixed in.
    """
    del model_config
    optimizers = make_optimizers(config)
    decay = config.ema_decay
    goal, needs = make_objective(config)
    reference = parents["reference"]
    # Without a parent of its own the critic starts from the policy, its head new.
    starts = {"policy": parents["start"]}
    starts["value"] = parents.get("value", parents["start"])
    trained = {
        part: stage.trained(config, start, mesh, scalar=part == "value")
        for part, start in starts.items()
    }
    frozen = {part: one.frozen for part, one in trained.items()}
    frozen = frozen if config.lora.rank else None
    rolls = rollout.make(
        config, mesh, parents.get("reward"), verifiers, stop_ids=stop_ids
    )

    def init(key):
        return stage.begin(
            {part: one.born(key) for part, one in trained.items()},
            optimizers,
            mesh,
            ema=decay > 0,
            dropout=stage.dropout(config, key),
            kl_coef=config.kl_coef,
        )

    judge = jax.jit(
        functools.partial(
            _judge, config=config, names=rolls.names, weights=rolls.weights
        )
    )

    def prepare(state, raw, key):
        raw, index = stage.placed(raw, mesh)
        sample_key, order_key = jax.random.split(key)
        # Waiting (nothing is moved to the host) makes the times tell apart.
        with section("update"):
            jax.block_until_ready(state.model)
        model = lora.join(frozen, state.model)
        drawn = rolls.sample(model["policy"], raw, sample_key)
        with section("score"):
            rewards = rolls.score(drawn, index)
            coef = state.extra["kl_coef"]
            batch = judge(model, reference, drawn, rewards, order_key, coef)
            ptx = {k: v for k, v in raw.items() if k.startswith("ptx_")}
            return jax.block_until_ready(batch) | ({"ptx": ptx} if ptx else {})

    def work(raw):
        rows, prompt = raw["prompt_ids"].shape
        tokens = rows * (prompt + config.sampling.max_new_tokens)
        mixed = raw["ptx_ids"].size if "ptx_ids" in raw else 0
        # Policy and critic are trained; policy and reference, critic and reward model
        # each read the rollout once before.
        return {
            "trained": config.epochs * (tokens + mixed),
            "scalar_trained": config.epochs * tokens,
            "scored": 2 * tokens,
            "scalar_scored": (1 + ("reward" in parents)) * tokens,
            "sampled": tokens,
            "length": prompt + config.sampling.max_new_tokens,
        }

    return stage.Stage(
        init=init,
        prepare=prepare,
        update=stage.jit_update(_make_update(config, goal, optimizers, decay), frozen),
        evaluate=stage.make_evaluate(goal, frozen),
        work=work,
        frozen=frozen,
    )


def make_optimizers(config):
    """One optimizer for policy and critic, or {"policy", "value"} when it has its own.

    One clips the norm of both gradients together, two clip each.
    """
    policy = optim.make(config.optimizer, steps=config.steps)
    if not config.value_optimizer.name:
        return policy
    own = optim.make(config.value_optimizer, steps=config.steps)
    return {"policy": policy, "value": own}


def response_values(model, batch):
    """V(s_t) before each sampled token, f32[B, N]; and after the last one, f32[B].

    The second is the value of the state in which a completion was cut off.
    """
    new = batch["tokens"].shape[1]
    values = model(batch["ids"], batch["positions"], batch["segments"])
    return values[:, -new - 1 : -1], values[:, -1]


def _judge(model, reference, drawn, rewards, key, kl_coef, *, config, names, weights):
    """Everything an update needs that only frozen or not-yet-updated models know."""
    temperature, placement = config.sampling.temperature, config.score_placement
    ended = drawn["ended"]
    scores, scored = rollout.total(rewards, weights)
    # A row that no source could score teaches nothing, nor does it scale the others.
    mask = drawn["mask"] & scored[:, None]
    old = response_logps(model["policy"], drawn, temperature)
    ref = response_logps(reference, drawn, temperature)
    counted = losses.value_mask(mask, placement)
    values, after = response_values(model["value"], drawn)
    values = jnp.where(counted, values, 0.0)
    replace = config.missing_eos_score if config.replace_missing_eos else None
    paid = losses.missing_eos(
        scores, ended, penalty=config.missing_eos_penalty, replace=replace
    )
    in_reward = config.kl_placement == "reward"
    paid_tokens = losses.kl_reward(
        paid,
        old.logps,
        ref.logps,
        mask,
        kl_coef=kl_coef if in_reward else 0.0,
        placement=placement,
        estimator=config.kl_estimator if in_reward else "k1",
    )
    if config.whiten_rewards:
        paid_tokens = losses.whiten(
            paid_tokens, counted, shift_mean=False, unbiased=config.unbiased_whitening
        )
    advantages, returns = losses.gae(
        paid_tokens,
        values,
        counted,
        discount=config.discount,
        lambda_=config.lambda_,
        bootstrap=jnp.where(ended, 0.0, after) if config.bootstrap_truncated else None,
    )
    kl = masked.sum(losses.k1(old.logps, ref.logps), drawn["mask"], axis=-1)  # [B]
    of, penalty = masked.Mean.of, kl_coef * kl * in_reward
    told = {
        "objective/kl": of(kl),
        "objective/kl_per_token": of(losses.k1(old.logps, ref.logps), drawn["mask"]),
        "objective/entropy": of(masked.sum(-old.logps, drawn["mask"], axis=-1)),
        "objective/scores": of(paid, scored),
        "objective/non_score_reward": of(-penalty),
        "objective/rlhf_reward": of(paid - penalty, scored),
        "objective/kl_coef": of(kl_coef),
        "objective/response_length": of(drawn["mask"].sum(-1).astype(jnp.float32)),
        "objective/missing_eos_rate": of(1.0 - ended.astype(jnp.float32)),
        "val/num_eos_tokens": of(ended.sum().astype(jnp.float32)),
        "val/explained_variance": of(
            losses.explained_variance(values, returns, counted)
        ),
        "val/rollout_logp_gap": of(
            jnp.abs(drawn["behaviour_logps"] - old.logps), drawn["mask"]
        ),
    } | rollout.source_metrics(rewards, names)
    rows = drawn["tokens"].shape[0]
    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)
    kept = {k: drawn[k] for k in ("ids", "segments", "positions", "tokens")}
    return {
        "rollout": kept
        | {
            "mask": mask,
            "value_mask": counted,
            "old_logps": old.logps,
            "ref_logps": ref.logps,
            "old_values": values,
            "advantages": losses.whiten(
                advantages, mask, unbiased=config.unbiased_whitening
            ),
            "returns": returns,
        },
        "order": order.reshape(config.epochs * config.minibatches, -1),
        "kl": kl.mean(),
        "metrics": told,
    }


def make_objective(config):
    """Policy and value losses over a minibatch of a judged rollout."""
    loss_fn = objective.combine(config, OFFERS, PLACES)
    temperature = config.sampling.temperature
    in_loss = config.kl_coef > 0 and config.kl_placement == "loss"

    def reductions(batch):
        found = {"policy": batch["mask"], "value": batch["value_mask"]}
        if in_loss:
            found["kl"] = batch["mask"]
        if "ptx_ids" in batch:
            found["ptx"] = _ptx_targets(batch)[1]
        return {k: masked.Reduction.of(m) for k, m in found.items()}

    def terms(model, batch):
        mask = batch["mask"]
        stats = response_logps(
            model["policy"],
            batch,
            temperature,
            entropy_gradient="entropy" in loss_fn.needs,
        )
        # Where the mask is false both sides are set alike, so that exp() is 1 there.
        offered = {k: masked.clear(batch[k], mask) for k in ("old_logps", "ref_logps")}
        offered |= {
            "logps": masked.clear(stats.logps, mask),
            "advantages": batch["advantages"],
            "mask": mask,
            "entropy": stats.entropy,
        }
        found, metrics = loss_fn.apply(offered)
        values, _ = response_values(model["value"], batch)
        found["value"], value_metrics = losses.ppo_value(
            values, batch["old_values"], batch["returns"], clip=config.value_clip
        )
        rows = mask.any(-1)
        if in_loss:
            found["kl"], told = losses.kl_in_loss(
                offered["logps"], offered["ref_logps"], estimator=config.kl_estimator
            )
            metrics = metrics | told
        metrics = objective.measured(metrics, {1: rows, 2: mask})
        metrics |= objective.measured(value_metrics, {2: batch["value_mask"]})
        metrics |= {
            "loss/policy_avg": masked.Mean.of(found["policy"], mask),
            "loss/value_avg": masked.Mean.of(found["value"], batch["value_mask"]),
            "policy/entropy_avg": masked.Mean.of(stats.entropy, mask),
        }
        if "ptx_ids" in batch:
            found["ptx"], targets = _ptx(model["policy"], batch)
            metrics["loss/ptx_avg"] = masked.Mean.of(found["ptx"], targets)
        return found, metrics

    weights = {"value": config.value_coef, "kl": config.kl_coef, "ptx": config.ptx_coef}
    return stage.Objective(reductions, terms, weights), loss_fn.needs


def _ptx_targets(batch):
    ids, mask, segments = (batch[f"ptx_{k}"] for k in ("ids", "mask", "segments"))
    return losses.shift(ids, mask, segments)


def _ptx(policy, batch):
    """Next-token loss on pretraining text, f32[R, T], and its target mask."""
    targets, mask = _ptx_targets(batch)
    arrays = (batch[f"ptx_{k}"] for k in ("ids", "positions", "segments"))
    hidden = policy.hidden(*arrays)
    stats = policy.token_logps(hidden, targets, stats=False)
    return losses.next_token(stats.logps)[0], mask


def _make_update(config, goal, optimizers, decay):
    own = isinstance(optimizers, dict)
    step = stage.make_step(
        goal,
        optimizers,
        micro_batches=config.micro_batches,
        lr_scale=None if own else {"policy": 1.0, "value": config.value_lr_scale},
    )

    def update(state, batch, frozen):
        keys = stage.dropout_keys(state, len(batch["order"]))

        def minibatch(carry, xs):
            (model, opt_state, now), (rows, key) = carry, xs
            part = jax.tree.map(lambda x: x[rows], batch["rollout"])
            part = _placed(part | _chunk(batch, now, config.minibatches))
            seen = state._replace(model=model, opt_state=opt_state)
            # The schedule counts rollouts: one learning rate for a rollout's updates.
            model, opt_state, metrics = step(seen, part, state.step, frozen, key)
            return (model, opt_state, now + 1), metrics

        start = (state.model, state.opt_state, jnp.zeros((), jnp.int32))
        (model, opt_state, _), metrics = jax.lax.scan(
            minibatch, start, (batch["order"], keys)
        )
        first = jax.tree.map(lambda x: x[0], metrics)
        told = masked.reduce(metrics) | batch["metrics"]
        told |= {f"{k}_first": first[k] for k in FIRST if k in first}
        if "val/ratio" in metrics:  # how much the ratio differs between minibatches
            ratios = metrics["val/ratio"].total / metrics["val/ratio"].count
            told["val/ratio_var"] = masked.Mean.of(jnp.var(ratios))
        kl_coef = state.extra["kl_coef"]
        if config.kl_target > 0:
            kl_coef = losses.adaptive(
                kl_coef,
                batch["kl"],
                target=config.kl_target,
                horizon=config.kl_horizon,
                batch_size=batch["order"].size // config.epochs,
            )
        state = stage.advance(state, model, opt_state, ema_decay=decay, kl_coef=kl_coef)
        return state, masked.compute(told)

    return update


def _chunk(batch, now, minibatches):
    """A minibatch's own rows of pretraining text, the same ones in every epoch."""
    if "ptx" not in batch:
        return {}
    size = batch["ptx"]["ptx_ids"].shape[0] // minibatches
    at = (now % minibatches) * size
    return {
        k: jax.lax.dynamic_slice_in_dim(v, at, size) for k, v in batch["ptx"].items()
    }


def _placed(part):
    """Rows of a minibatch, spread over the devices again."""
    return jax.tree.map(
        lambda x: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)), part
    )
