"""Policy optimization without a critic: G samples a prompt are each other's baseline.

GRPO and its kin (DAPO, Dr. GRPO, GSPO, CISPO, SAPO), RLOO and REINFORCE++ differ in
three independent choices: how rewards become advantages (`advantage`), how a token's
loss is built (`objective`), and how tokens are averaged (`aggregation`).

Source: Shao et al. 2024 (arxiv.org/abs/2402.03300); Yu et al. 2025
(arxiv.org/abs/2503.14476) for the filters. Not here, unless rollouts may be old
(staleness): correction for a sampler that runs other kernels than the trainer (both are
one model here, and `val/rollout_logp_gap` says how far they are apart).
"""

import functools

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, optim, schema, sharding
from stagecraft.data import prompts
from stagecraft.errors import UserError
from stagecraft.signals import verifiers
from stagecraft.stages import apart, checks, objective, rollout, stage, update
from stagecraft.stages.kind import JUDGE, REFERENCE, REWARD, START, Kind
from stagecraft.stages.policy import OFFERS, PLACES
from stagecraft.stages.rollout import response_logps

ADVANTAGES = ("group", "leave_one_out", "returns", "returns_baseline")


def make(config, context):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        context: the `Context`; parents {"start", "reference": Transformer} and perhaps
            "reward": ScalarModel.

    Returns:
        a `Stage`; raw batches are prompt_ids i32[N, P], prompt_mask bool[N, P], index
        i32[N], with N = batch_size * oversample prompts; trained on are the
        batch_size * group_size completions of those kept.
    """
    mesh = context.mesh
    optimizer = optim.make(config.optimizer, steps=config.steps)
    loss_objective, needs = make_objective(config)
    needs_reference = config.kl_coef > 0 or "ref_logps" in needs
    trained = stage.trained(config, context)
    beginning = stage.begin(config, trained, optimizer, mesh)
    rollouts = rollout.make(config, context, samples=config.group_size)
    by_rows, whole = sharding.batch_sharding(mesh), sharding.whole(mesh)

    def judge(policy, reference, samples, rewards, key, carried):
        del carried
        return score_groups(
            config, rollouts, policy, reference, samples, rewards, key, needs_reference
        )

    # By the policy that sampled, and by the reference.
    scoring_passes = needs_reference + (needs_reference or _needs_old(config))

    def work(raw, batch=None):
        prompts, prompt = raw["prompt_ids"].shape
        own, length = rollout.computed(config, raw, batch)
        new = rollout.completion_length(config, raw, batch)
        rows = prompts * config.group_size
        trained = int(config.batch_size * config.group_size * own)
        return {
            "trained": config.epochs * trained,
            "scored": scoring_passes * trained,
            "scalar_scored": ("reward" in context.parents) * rows * (prompt + new),
            # The completions of a prompt share its prefill.
            "sampled": prompts * prompt + rows * new,
            "length": length,
        }

    # Which groups are kept is known only once all are scored.
    order = functools.partial(update.shuffled_minibatches, config)
    return rollout.make_stage(
        config,
        context,
        beginning,
        rollouts,
        judge=judge,
        placement=dict(rollout=by_rows, order=whole, metrics=whole),
        update=update.make_minibatch_update(config, loss_objective, optimizer),
        metrics=functools.partial(_score_metrics, config),
        work=work,
        order=order if config.oversample == 1 else None,
    )


def _score_metrics(config, samples, scores, scored):
    """Returns what a held-out rollout shows beside each reward: the shaped score."""
    return {"reward": masked.Mean.of(_shaped(scores, samples, config), scored)}


def _needs_old(config):
    """Returns whether some update is on samples of an older policy."""
    return config.epochs * config.minibatches > 1 or config.staleness > 0


def score_groups(
    config, rollouts, policy, reference, samples, rewards, key, needs_reference
):
    """Computes advantages and what else an update needs, for the groups kept.

    Args:
        config: the stage's resolved config.
        rollouts: the stage's `Rollouts`: names and weights of the rewards.
        policy: a `Transformer` before the update; reference: another.
        samples: a rollout of R completions; rewards: f32[R, S].
        key: random key of the minibatches.
        needs_reference: whether the reference's log-probabilities are needed.

    Returns:
        {"rollout": {name: [R, ...]}, "order", "metrics"}, as
        `update.make_minibatch_update` takes it.
    """
    of, groups = masked.Mean.of, (-1, config.group_size)
    metrics = rollout.source_metrics(rewards, rollouts.names)
    metrics |= rollout.completion_metrics(samples["mask"], samples["ended"])
    scores, scored = verifiers.total(rewards, rollouts.weights)
    scores = _shaped(scores, samples, config)
    no_spread = losses.frac_reward_zero_std(
        scores.reshape(groups), scored.reshape(groups)
    )
    # Also those of the groups that are dropped below.
    metrics["num_tokens"] = update.count_tokens(samples)
    metrics |= {"reward": of(scores, scored), "frac_reward_zero_std": of(no_spread)}
    if config.oversample > 1:
        chosen = _informative(scores.reshape(groups), scored.reshape(groups), config)
        samples, scores, scored = jax.tree.map(
            lambda x: _rows_of(x.reshape(*groups, *x.shape[1:])[chosen], x.shape[1:]),
            (samples, scores, scored),
        )
    mask = samples["mask"]
    names = ("ids", "segments", "positions", "tokens", "fold")
    arrays = {k: samples[k] for k in names if k in samples}
    penalty = None
    if needs_reference or _needs_old(config):
        old = response_logps(policy, samples, config.sampling.temperature)
        arrays["old_logps"] = old.logps
        gap = jnp.abs(samples["behaviour_logps"] - old.logps)
        metrics["val/rollout_logp_gap"] = of(gap, mask)
        metrics["val/rollout_logp_gap_max"] = masked.Max.of(gap, mask)
        if config.staleness:
            arrays["importance"], ratios = apart.importance(
                samples, old.logps, mask, config.importance_cap
            )
            metrics |= ratios
    if needs_reference:
        ref = response_logps(reference, samples, config.sampling.temperature)
        arrays["ref_logps"] = ref.logps
        kl = losses.k1(old.logps, ref.logps)
        metrics["objective/kl"] = of(masked.sum(kl, mask, axis=-1))
        if config.kl_placement == "reward":
            estimate = losses.ESTIMATORS[config.kl_estimator]
            by_token = estimate(old.logps, ref.logps)
            penalty = config.kl_coef * masked.clear(by_token, mask)
    advantages = _advantages(scores, scored, mask, penalty, config)
    metrics["reward_std"] = of(_group_std(scores, scored, config))
    # Rows no source could score, and with the filter those cut off, teach nothing.
    mask = mask & scored[:, None]
    if config.mask_truncated:
        mask = losses.overlong_filter(mask, samples["ended"])
    arrays |= {"mask": mask, "advantages": masked.clear(advantages, mask)}
    return {
        "rollout": arrays,
        "order": update.shuffled_minibatches(config, len(mask), key),
        "metrics": metrics,
    }


def _shaped(scores, samples, config):
    """Returns scores less the penalties for having no end or nearing the limit."""
    scores = losses.missing_eos(
        scores, samples["ended"], penalty=config.missing_eos_penalty
    )
    if config.overlong_cache:
        limit = config.sampling.max_new_tokens
        lengths = samples["mask"].sum(-1)
        scores += losses.soft_overlong(
            lengths, limit=limit, cache=config.overlong_cache
        )
    return scores


def _informative(scores, scored, config):
    """Selects the first groups whose rewards differ, then others to fill up."""
    teaches = losses.dynamic_sampling(scores, scored)
    return jnp.argsort(~teaches, stable=True)[: config.batch_size]


def _rows_of(x, shape):
    """Reshapes [N, G, ...] to [N G, ...], spread over the devices."""
    return sharding.constrain_rows(x.reshape(-1, *shape))


def _group_std(scores, scored, config):
    groups = (-1, config.group_size)
    var = masked.var(scores.reshape(groups), scored.reshape(groups), 1, unbiased=True)
    return jnp.sqrt(var)


def _advantages(scores, scored, mask, penalty, config):
    """Returns f32[R, N]: one advantage a completion, or a return at each token.

    Args:
        scores: f32[R]; scored: bool[R]; mask: bool[R, N].
        penalty: f32[R, N], what the KL costs each token, or None.
    """
    groups = (-1, config.group_size)
    by_token = config.advantage.startswith("returns")
    if penalty is not None and not by_token:
        scores = scores - penalty.sum(axis=1)
    grouped, in_groups = scores.reshape(groups), scored.reshape(groups)
    if config.advantage == "group":
        values = losses.group_advantages(grouped, in_groups, scale=config.scale_rewards)
    elif config.advantage == "leave_one_out":
        normalize = config.normalize_advantages
        values = losses.leave_one_out(grouped, in_groups, normalize=normalize)
    else:
        if config.advantage == "returns_baseline":
            scores = losses.group_advantages(grouped, in_groups, scale="none").reshape(
                -1
            )
        nothing = jnp.zeros(mask.shape, jnp.float32)
        rewards = losses.kl_reward(scores, nothing, nothing, mask, kl_coef=0.0)
        if penalty is not None:
            rewards -= penalty
        returns = losses.discounted_returns(rewards, mask, discount=config.discount)
        return losses.whiten(returns, mask & scored[:, None])
    return jnp.where(mask, values.reshape(-1, 1), 0.0)


def make_objective(config):
    """Returns the policy loss over a minibatch of scored groups."""
    loss_fn = objective.combine(config, KIND)
    temperature = config.sampling.temperature
    in_loss = config.kl_coef > 0 and config.kl_placement == "loss"

    def reductions(batch):
        reduction = losses.aggregate(
            config.aggregation,
            batch["mask"],
            max_length=config.sampling.max_new_tokens,
        )
        return {"policy": reduction, "kl": reduction}

    def terms(model, batch):
        mask = batch["mask"]
        stats = response_logps(
            model, batch, temperature, entropy_gradient="entropy" in loss_fn.needs
        )
        logps = masked.clear(stats.logps, mask)
        offered = {
            "logps": logps,
            "old_logps": rollout.old_logps(batch, logps),
            "advantages": batch["advantages"],
            "mask": mask,
            "entropy": stats.entropy,
        }
        if "ref_logps" in batch:
            offered["ref_logps"] = masked.clear(batch["ref_logps"], mask)
        loss, metrics = loss_fn.apply(offered)
        loss["policy"] = apart.corrected(loss["policy"], batch)
        if in_loss:
            loss["kl"], kl_metrics = losses.kl_in_loss(
                offered["logps"],
                offered["ref_logps"],
                offered["old_logps"],
                estimator=config.kl_estimator,
                bias_correction=config.kl_bias_correction,
            )
            metrics = metrics | kl_metrics
        metrics = objective.measured(metrics, {1: mask.any(-1), 2: mask})
        metrics["entropy"] = masked.Mean.of(stats.entropy, mask)
        metrics["policy_loss"] = masked.Mean.weighted(
            loss["policy"], reductions(batch)["policy"]
        )
        return loss, metrics

    return update.Objective(reductions, terms, {"kl": config.kl_coef}), loss_fn.needs


def _check(where, config, experiment, mesh):
    checks.rewards(where, config, config.group_size)
    schema.positive(f"{where}.oversample", config.oversample)
    if config.group_size < 2 and config.advantage != "returns":
        raise UserError(
            f"{where}.group_size={config.group_size}: advantage={config.advantage!r} "
            "compares the completions of one prompt; expected 2 or more"
        )
    schema.choice(f"{where}.advantage", config.advantage, ADVANTAGES)
    scales = ("group", "batch", "none")
    schema.choice(f"{where}.scale_rewards", config.scale_rewards, scales)
    schema.choice(f"{where}.aggregation", config.aggregation, losses.AGGREGATIONS)
    checks.kl(where, config, {"reward": ("k1",), "loss": ("k2", "k3")})
    _check_unread(where, config)
    if config.kl_bias_correction and config.kl_estimator != "k3":
        raise UserError(
            f"{where}.kl_bias_correction=True: is for kl_estimator='k3', got "
            f"{config.kl_estimator!r}"
        )
    if not 0 <= config.overlong_cache <= config.sampling.max_new_tokens:
        raise UserError(
            f"{where}.overlong_cache={config.overlong_cache}: expected from 0 (off) to "
            f"sampling.max_new_tokens={config.sampling.max_new_tokens}"
        )
    checks.sampling(where, config, experiment)
    checks.room(where, config, experiment, mesh)
    rows = checks.epochs(where, config, config.batch_size * config.group_size)
    # Prompts, before each is sampled from several times.
    prompts = config.batch_size * config.oversample
    at_once = {f"oversample={config.oversample}": prompts}
    loss = checks.training(
        where, config, experiment, mesh, KIND, rows=rows, at_once=at_once
    )
    checks.sequence_losses(where, config, loss, config.aggregation)
    checks.apart(where, config, experiment, loss, prompts)
    if not config.kl_coef:
        checks.reference(where, config, loss)


def _check_unread(where, config):
    """Refuses keys that another key leaves without an effect."""
    because, keys = f"advantage={config.advantage!r}", []
    if config.advantage != "group":
        keys.append("scale_rewards")
    if config.advantage != "leave_one_out":
        keys.append("normalize_advantages")
    if not config.advantage.startswith("returns"):
        keys.append("discount")
    reasons = dict.fromkeys(keys, because)
    if config.kl_placement == "reward":
        reasons["kl_bias_correction"] = "kl_placement='reward'"
    checks.unread(where, config, reasons)


KIND = Kind(
    name="group_policy",
    make=make,
    data=prompts.groups,
    check=_check,
    roles=START | REFERENCE | REWARD | JUDGE,
    model="transformer",
    samples=True,
    losses=losses.POLICY,
    offers=OFFERS,
    places=PLACES,
)
