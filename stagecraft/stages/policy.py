"""Proximal policy optimization with a critic (PPO): sample, score, then several epochs.

`prepare` samples completions from the current policy and has the frozen models score
them: rewards, reference, and the critic from before the update. `update` runs
epochs x minibatches, each a real optimizer step on the policy and its critic.

Log-probabilities are taken at the sampling temperature everywhere, and those of the
old policy are recomputed by a full forward pass, whatever kernels the sampler used. In
the first minibatch nothing has moved, and the old log-probabilities are the update's
own: the ratio is exactly 1 there, also where bfloat16 rounds two programs apart.

Source: Schulman et al. 2017 (arxiv.org/abs/1707.06347); per-token KL in the reward as
Ziegler et al. 2019 (arxiv.org/abs/1909.08593); details as Huang et al. 2024
(arxiv.org/abs/2403.17031); the mix with pretraining as Ouyang et al. 2022
(arxiv.org/abs/2203.02155). Not here: a backbone shared by policy and critic.
"""

import functools

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, optim, schema, sharding
from stagecraft.data import prompts
from stagecraft.errors import UserError
from stagecraft.signals import verifiers
from stagecraft.stages import apart, checks, objective, rollout, stage, update
from stagecraft.stages.kind import JUDGE, REFERENCE, REWARD, START, Kind, Role
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
# and nothing clipped. The gap is that of the old log-probabilities to the update's own:
# rounding, or the two sides disagree about what was sampled.
FIRST = (
    "val/ratio",
    "policy/ratio_max",
    "policy/clipfrac_avg",
    "val/old_logp_gap",
)


def make(config, context):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        context: the `Context`; parents {"start", "reference": Transformer, "reward",
            "value": ScalarModel}; the critic starts from `value`. Without a reward
            model and `value` it starts from the policy, its head new.

    Returns:
        a `Stage`; raw batches are prompt_ids i32[B, P], prompt_mask bool[B, P], index
        i32[B], and ptx_ids and so on [R, T] when pretraining text is mixed in.
    """
    mesh, critic = context.mesh, "value"
    if critic not in context.parents:  # two copies of one model
        critic, context = "start", context._replace(sole_roles=())
    optimizers = make_optimizers(config)
    loss_objective, _ = make_objective(config)
    parts = {
        "policy": stage.trained(config, context),
        "value": stage.trained(config, context, critic, scalar=True),
    }
    beginning = stage.begin(config, parts, optimizers, mesh, kl_coef=config.kl_coef)
    rollouts = rollout.make(config, context)
    by_rows, whole = sharding.batch_sharding(mesh), sharding.whole(mesh)

    def work(raw, batch=None):
        rows, prompt = raw["prompt_ids"].shape
        own, length = rollout.computed(config, raw, batch)
        tokens = int(rows * own)
        apart = rows * (prompt + rollout.completion_length(config, raw, batch))
        mixed = raw["ptx_ids"].size if "ptx_ids" in raw else 0
        # Policy and critic are trained; policy and reference, critic and reward model
        # each read the rollout once before.
        return {
            "trained": config.epochs * (tokens + mixed),
            "scalar_trained": config.epochs * tokens,
            "scored": 2 * tokens,
            "scalar_scored": tokens + ("reward" in context.parents) * apart,
            "sampled": apart,
            "length": length,
        }

    return rollout.make_stage(
        config,
        context,
        beginning,
        rollouts,
        judge=functools.partial(score_rollout, config, rollouts),
        placement=dict(rollout=by_rows, order=whole, kl=whole, metrics=whole),
        update=_make_update(config, loss_objective, optimizers),
        metrics=functools.partial(_score_metrics, config),
        work=work,
        carried=("kl_coef",),
        beside=_pretraining_rows,
        order=functools.partial(update.shuffled_minibatches, config),
    )


def _pretraining_rows(raw):
    rows = {k: v for k, v in raw.items() if k.startswith("ptx_")}
    return {"ptx": rows} if rows else {}


def _score_metrics(config, samples, scores, scored):
    """Returns what a held-out rollout shows: scores after the penalty, and ends."""
    final = _final_scores(config, scores, samples)
    ended = samples["ended"].astype(jnp.float32)
    return {
        "objective/scores": masked.Mean.of(final, scored),
        "objective/missing_eos_rate": masked.Mean.of(1.0 - ended, scored),
    }


def make_optimizers(config):
    """Makes an optimizer for both, or {"policy", "value"} if the critic has its own.

    One clips the norm of both gradients together, two clip each.
    """
    policy = optim.make(config.optimizer, steps=config.steps)
    if not config.value_optimizer.name:
        return policy
    own = optim.make(config.value_optimizer, steps=config.steps)
    return {"policy": policy, "value": own}


def response_values(model, batch):
    """Returns values before each sampled token, f32[B, N], and after the last, f32[B].

    The second is the value of the state in which a completion was cut off.
    """
    new = batch["tokens"].shape[1]
    values = rollout.outputs(model, batch, slice(-new - 1, None))
    return values[:, :-1], values[:, -1]


def score_rollout(config, rollouts, model, reference, samples, rewards, key, carried):
    """Computes what an update needs of the frozen and the not yet updated models.

    Args:
        config: the stage's resolved config.
        rollouts: the stage's `Rollouts`: names and weights of the rewards.
        model: {"policy": Transformer, "value": ScalarModel} before the update.
        reference: a `Transformer`.
        samples: a rollout of R completions; rewards: f32[R, S].
        key: random key of the minibatches.
        carried: {"kl_coef": f32[]}, the weight of the KL penalty.

    Returns:
        {"rollout": {name: [R, ...]}, "order", "kl", "metrics"}, as
        `update.make_minibatch_update` takes it.
    """
    scores, scored = verifiers.total(rewards, rollouts.weights)
    # A row that no source could score teaches nothing, nor does it scale the others.
    mask, kl_coef = samples["mask"] & scored[:, None], carried["kl_coef"]
    final = _final_scores(config, scores, samples)
    logps = log_probs(config, model["policy"], reference, samples)
    targets = advantages(config, model["value"], samples, mask, logps, final, kl_coef)
    metrics, kl = diagnostics(config, samples, scored, logps, targets, final, kl_coef)
    metrics |= rollout.source_metrics(rewards, rollouts.names)
    names = ("ids", "segments", "positions", "tokens", "fold")
    inputs = {k: samples[k] for k in names if k in samples}
    if config.staleness:
        inputs["importance"], ratios = apart.importance(
            samples, logps["old_logps"], mask, config.importance_cap
        )
        metrics |= ratios
    return {
        "rollout": inputs | {"mask": mask} | logps | targets,
        "order": update.shuffled_minibatches(config, len(mask), key),
        "kl": kl,
        "metrics": metrics,
    }


def log_probs(config, policy, reference, samples):
    """Returns {"old_logps", "ref_logps"}, f32[R, N], nats, at the temperature."""
    temperature = config.sampling.temperature
    return {
        "old_logps": response_logps(policy, samples, temperature).logps,
        "ref_logps": response_logps(reference, samples, temperature).logps,
    }


def advantages(config, critic, samples, mask, logps, final, kl_coef):
    """Computes what policy and critic learn from: GAE on scores and KL penalty.

    Args:
        critic: a `ScalarModel`.
        samples: a rollout of R completions; mask: bool[R, N], tokens that count.
        logps: as `log_probs` returns.
        final: f32[R], the reward of each completion, given at its end.
        kl_coef: f32[].

    Returns:
        {"value_mask": bool, "old_values", "returns", "advantages": f32}, each [R, N].
    """
    placement, unbiased = config.score_placement, config.unbiased_whitening
    value_mask = losses.value_mask(mask, placement)
    values, after = response_values(critic, samples)
    values = jnp.where(value_mask, values, 0.0)
    in_reward = config.kl_placement == "reward"
    rewards = losses.kl_reward(
        final,
        logps["old_logps"],
        logps["ref_logps"],
        mask,
        kl_coef=kl_coef if in_reward else 0.0,
        placement=placement,
        estimator=config.kl_estimator if in_reward else "k1",
    )
    if config.whiten_rewards:
        rewards = losses.whiten(
            rewards, value_mask, shift_mean=False, unbiased=unbiased
        )
    bootstrap = jnp.where(samples["ended"], 0.0, after)
    token_advantages, returns = losses.gae(
        rewards,
        values,
        value_mask,
        discount=config.discount,
        lambda_=config.lambda_,
        bootstrap=bootstrap if config.bootstrap_truncated else None,
    )
    return {
        "value_mask": value_mask,
        "old_values": values,
        "returns": returns,
        "advantages": losses.whiten(token_advantages, mask, unbiased=unbiased),
    }


def diagnostics(config, samples, scored, logps, targets, final, kl_coef):
    """Returns TRL's metrics of a rollout, and its mean KL to the reference in nats."""
    mask, ended = samples["mask"], samples["ended"]
    log_ratio = losses.k1(logps["old_logps"], logps["ref_logps"])
    kl = masked.sum(log_ratio, mask, axis=-1)  # [R]
    of, penalty = masked.Mean.of, jnp.zeros_like(kl)
    if config.kl_placement == "reward":
        estimate = losses.ESTIMATORS[config.kl_estimator]
        by_token = estimate(logps["old_logps"], logps["ref_logps"])
        penalty = kl_coef * masked.sum(by_token, mask, axis=-1)
    explained = losses.explained_variance(
        targets["old_values"], targets["returns"], targets["value_mask"]
    )
    gap = jnp.abs(samples["behaviour_logps"] - logps["old_logps"])
    metrics = {
        "objective/kl": of(kl),
        "objective/kl_per_token": of(log_ratio, mask),
        "objective/entropy": of(masked.sum(-logps["old_logps"], mask, axis=-1)),
        "objective/scores": of(final, scored),
        "objective/non_score_reward": of(-penalty, scored),
        "objective/rlhf_reward": of(final - penalty, scored),
        "objective/kl_coef": of(kl_coef),
        "objective/response_length": of(mask.sum(-1).astype(jnp.float32)),
        "objective/missing_eos_rate": of(1.0 - ended.astype(jnp.float32)),
        "val/num_eos_tokens": of(ended.sum().astype(jnp.float32)),
        "val/explained_variance": of(explained),
        "val/rollout_logp_gap": of(gap, mask),
    }
    return metrics, kl.mean()


def _final_scores(config, scores, samples):
    """Returns f32[R], scores, lowered or replaced where a completion never ended."""
    return losses.missing_eos(
        scores,
        samples["ended"],
        penalty=config.missing_eos_penalty,
        replace=config.missing_eos_score if config.replace_missing_eos else None,
    )


def make_objective(config):
    """Returns policy and value losses over a minibatch of a scored rollout."""
    loss_fn = objective.combine(config, KIND)
    temperature = config.sampling.temperature
    in_loss = config.kl_coef > 0 and config.kl_placement == "loss"
    adaptive = config.kl_target > 0  # the coefficient is then the state's

    def reductions(batch):
        masks = {"policy": batch["mask"], "value": batch["value_mask"]}
        if in_loss:
            masks["kl"] = batch["mask"]
        if "ptx_ids" in batch:
            masks["ptx"] = _ptx_targets(batch)[1]
        return {k: masked.Reduction.of(m) for k, m in masks.items()}

    def terms(model, batch):
        mask = batch["mask"]
        stats = response_logps(
            model["policy"],
            batch,
            temperature,
            entropy_gradient="entropy" in loss_fn.needs,
        )
        # Where the mask is false both sides are set alike, so that exp() is 1 there.
        logps = masked.clear(stats.logps, mask)
        offered = {
            "logps": logps,
            "old_logps": rollout.old_logps(batch, logps),
            "ref_logps": masked.clear(batch["ref_logps"], mask),
            "advantages": batch["advantages"],
            "mask": mask,
            "entropy": stats.entropy,
        }
        loss, metrics = loss_fn.apply(offered)
        loss["policy"] = apart.corrected(loss["policy"], batch)
        values, _ = response_values(model["value"], batch)
        loss["value"], value_metrics = losses.ppo_value(
            values, batch["old_values"], batch["returns"], clip=config.value_clip
        )
        rows = mask.any(-1)
        if in_loss:
            loss["kl"], kl_metrics = losses.kl_in_loss(
                offered["logps"], offered["ref_logps"], estimator=config.kl_estimator
            )
            metrics = metrics | kl_metrics
            if adaptive:
                loss["kl"] *= batch["kl_coef"]
        metrics = objective.measured(metrics, {1: rows, 2: mask})
        metrics |= objective.measured(value_metrics, {2: batch["value_mask"]})
        metrics |= {
            "loss/policy_avg": masked.Mean.of(loss["policy"], mask),
            "loss/value_avg": masked.Mean.of(loss["value"], batch["value_mask"]),
            "policy/entropy_avg": masked.Mean.of(stats.entropy, mask),
            "val/old_logp_gap": masked.Mean.of(
                jnp.abs(stats.logps - batch["old_logps"]), mask
            ),
        }
        if "ptx_ids" in batch:
            loss["ptx"], targets = _ptx(model["policy"], batch)
            metrics["loss/ptx_avg"] = masked.Mean.of(loss["ptx"], targets)
        return loss, metrics

    kl_weight = 1.0 if adaptive else config.kl_coef
    weights = {"value": config.value_coef, "kl": kl_weight, "ptx": config.ptx_coef}
    return update.Objective(reductions, terms, weights), loss_fn.needs


def _ptx_targets(batch):
    ids, mask, segments = (batch[f"ptx_{k}"] for k in ("ids", "mask", "segments"))
    return losses.shift(ids, mask, segments)


def _ptx(policy, batch):
    """Computes next-token loss on pretraining text, f32[R, T], and its target mask."""
    targets, mask = _ptx_targets(batch)
    arrays = (batch[f"ptx_{k}"] for k in ("ids", "positions", "segments"))
    hidden = policy.hidden(*arrays)
    stats = policy.token_logps(hidden, targets, stats=False)
    return losses.next_token(stats.logps)[0], mask


def _make_update(config, loss_objective, optimizers):
    own = isinstance(optimizers, dict)
    return update.make_minibatch_update(
        config,
        loss_objective,
        optimizers,
        lr_scale=None if own else {"policy": 1.0, "value": config.value_lr_scale},
        beside=functools.partial(_beside, config.minibatches),
        conclude=functools.partial(_conclude, config),
    )


def _beside(minibatches, state, batch, number):
    """Returns what joins a minibatch: the KL coefficient, and pretraining text."""
    part = _pretraining_part(minibatches, batch, number)
    return part | {"kl_coef": state.extra["kl_coef"]}


def _pretraining_part(minibatches, batch, number):
    """Selects a minibatch's rows of pretraining text, the same in every epoch."""
    if "ptx" not in batch:
        return {}
    size = batch["ptx"]["ptx_ids"].shape[0] // minibatches
    start = (number % minibatches) * size
    return {
        k: jax.lax.dynamic_slice_in_dim(v, start, size) for k, v in batch["ptx"].items()
    }


def _conclude(config, state, batch, metrics):
    """Returns metrics over an update's minibatches, and the next KL coefficient."""
    first = jax.tree.map(lambda x: x[0], metrics)
    more = {f"{k}_first": first[k] for k in FIRST if k in first}
    if "val/ratio" in metrics:  # how much the ratio differs between minibatches
        ratios = metrics["val/ratio"]
        means = ratios.total / jnp.maximum(ratios.count, 1.0)
        spread = masked.var(means, ratios.count > 0)
        more["val/ratio_var"] = masked.Mean.of(spread)
    kl_coef = state.extra["kl_coef"]
    if config.kl_target > 0:
        kl_coef = losses.adaptive(
            kl_coef,
            batch["kl"],
            target=config.kl_target,
            horizon=config.kl_horizon,
            batch_size=batch["order"].size // config.epochs,
        )
    return more, {"kl_coef": kl_coef}


def _check(where, config, experiment, mesh):
    checks.sampling(where, config, experiment)
    checks.room(where, config, experiment, mesh)
    checks.rewards(where, config)
    rows = checks.epochs(where, config, config.batch_size)
    checks.kl(where, config, {"reward": ("k1", "k3"), "loss": ("k2", "k3")})
    schema.choice(f"{where}.score_placement", config.score_placement, ("A", "B"))
    _check_unread(where, config)
    data = config.data
    if bool(data.ptx) != bool(data.ptx_rows):
        raise UserError(
            f"{where}.data.ptx_rows={data.ptx_rows} with data.ptx={data.ptx!r}: set "
            "both to mix pretraining text in, or neither"
        )
    parts = config.minibatches * config.micro_batches * sharding.row_shards(mesh)
    if data.ptx_rows % parts:
        raise UserError(
            f"{where}.data.ptx_rows={data.ptx_rows}: expected a multiple of "
            f"minibatches * micro_batches * devices along data and fsdp = {parts}"
        )
    loss = checks.training(where, config, experiment, mesh, KIND, rows=rows)
    checks.sequence_losses(where, config, loss)
    checks.apart(where, config, experiment, loss, config.batch_size)


def _check_unread(where, config):
    """Refuses keys that another key leaves without an effect."""
    keys = {}
    if not config.kl_target:
        keys["kl_horizon"] = "kl_target=0.0"
    if config.replace_missing_eos:
        keys["missing_eos_penalty"] = "replace_missing_eos=True"
    else:
        keys["missing_eos_score"] = "replace_missing_eos=False"
    if not config.data.ptx:
        keys |= dict.fromkeys(("ptx_coef", "data.ptx_length"), "data.ptx=''")
    name = config.value_optimizer.name
    if name:
        checks.optimizer(where, config, "value_optimizer")
        keys["value_lr_scale"] = f"value_optimizer.name={name!r}"
    else:
        own = [f"value_optimizer.{key}" for key in config.value_optimizer]
        keys |= dict.fromkeys(own, "value_optimizer.name=''")
    checks.unread(where, config, keys)


KIND = Kind(
    name="policy",
    make=make,
    data=prompts.build,
    check=_check,
    roles=START
    | REFERENCE
    | REWARD
    | JUDGE
    | {"value": Role(("scalar",), fallback="reward")},
    model="transformer",
    samples=True,
    losses=losses.POLICY,
    offers=OFFERS,
    places=PLACES,
)
