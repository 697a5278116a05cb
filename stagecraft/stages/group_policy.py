"""Policy optimization without a critic: G samples a prompt are each other's baseline.

GRPO and its kin (DAPO, Dr. GRPO, GSPO, CISPO, SAPO), RLOO and REINFORCE++ differ in
three independent choices: how rewards become advantages (`advantage`), how a token's
loss is built (`objective`), and how tokens are averaged (`aggregation`).

Source: Shao et al. 2024 (arxiv.org/abs/2402.03300); Yu et al. 2025
(arxiv.org/abs/2503.14476) for the filters. Not here: correction for a sampler that runs
other kernels than the trainer (both are one model here, and `val/rollout_logp_gap`
says how far they are apart).
"""

import functools

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, optim, sharding
from stagecraft.metrics import section
from stagecraft.models import lora
from stagecraft.stages import objective, rollout, stage
from stagecraft.stages.policy import OFFERS, PLACES
from stagecraft.stages.rollout import response_logps

ADVANTAGES = ("group", "leave_one_out", "returns", "returns_baseline")


def make(config, model_config, mesh, parents, *, stop_ids, verifiers=None):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        model_config: a `ModelConfig`.
        mesh: the mesh.
        parents: {"start": Transformer, "reference": Transformer} and perhaps "reward":
            ScalarModel.
        stop_ids: the tokens that end a turn.
        verifiers: a `signals.verifier.Verifiers`, or None.

    Returns:
        a `Stage`; raw batches are prompt_ids i32[N, P], prompt_mask bool[N, P], index
        i32[N], with N = batch_size * oversample prompts; trained on are the
        batch_size * group_size completions of those kept.
    """
    del model_config
    optimizer = optim.make(config.optimizer, steps=config.steps)
    decay = config.ema_decay
    goal, needs = make_objective(config)
    reference = parents["reference"]
    trained = stage.trained(config, parents["start"], mesh)
    rolls = rollout.make(
        *(config, mesh, parents.get("reward"), verifiers),
        stop_ids=stop_ids,
        samples=config.group_size,
    )

    def init(key):
        return stage.begin(
            *(trained.born(key), optimizer, mesh),
            ema=decay > 0,
            dropout=stage.dropout(config, key),
        )

    judge = jax.jit(
        functools.partial(
            _judge,
            config=config,
            names=rolls.names,
            weights=rolls.weights,
            needs_reference=config.kl_coef > 0 or "ref_logps" in needs,
        )
    )

    def prepare(state, raw, key):
        raw, index = stage.placed(raw, mesh)
        sample_key, order_key = jax.random.split(key)
        with section("update"):
            jax.block_until_ready(state.model)
        policy = lora.join(trained.frozen, state.model)
        drawn = rolls.sample(policy, raw, sample_key)
        with section("score"):
            rewards = rolls.score(drawn, index)
            batch = judge(policy, reference, drawn, rewards, order_key)
            return jax.block_until_ready(batch)

    def work(raw):
        prompts, prompt = raw["prompt_ids"].shape
        length = prompt + config.sampling.max_new_tokens
        sampled = prompts * config.group_size * length
        kept = config.batch_size * config.group_size * length
        passes = (config.kl_coef > 0 or "ref_logps" in needs) + _several_steps(config)
        return {
            "trained": config.epochs * kept,
            "scored": passes * kept,
            "scalar_scored": ("reward" in parents) * sampled,
            "sampled": sampled,
            "length": length,
        }

    return stage.Stage(
        init=init,
        prepare=prepare,
        update=stage.jit_update(
            _make_update(config, goal, optimizer, decay), trained.frozen
        ),
        evaluate=stage.make_evaluate(goal, trained.frozen),
        work=work,
        frozen=trained.frozen,
    )


def _several_steps(config):
    """Whether the policy moves between the sampling and some update on it."""
    return config.epochs * config.minibatches > 1


def _judge(
    model, reference, drawn, rewards, key, *, config, names, weights, needs_reference
):
    """Advantages and what else an update needs, for the groups that are kept."""
    of, groups = masked.Mean.of, (-1, config.group_size)
    told = rollout.source_metrics(rewards, names)
    told |= rollout.completion_metrics(drawn["mask"], drawn["ended"])
    scores, scored = rollout.total(rewards, weights)
    scores = _shaped(scores, drawn, config)
    told |= {
        "reward": of(scores, scored),
        "frac_reward_zero_std": of(
            losses.frac_reward_zero_std(scores.reshape(groups), scored.reshape(groups))
        ),
    }
    if config.oversample > 1:
        chosen = _informative(scores.reshape(groups), scored.reshape(groups), config)
        drawn, scores, scored = jax.tree.map(
            lambda x: _placed(x.reshape(*groups, *x.shape[1:])[chosen], x.shape[1:]),
            (drawn, scores, scored),
        )
    mask = drawn["mask"]
    kept = {k: drawn[k] for k in ("ids", "segments", "positions", "tokens")}
    ref = penalty = None
    if _several_steps(config) or needs_reference:
        old = response_logps(model, drawn, config.sampling.temperature)
        kept["old_logps"] = old.logps
        gap = jnp.abs(drawn["behaviour_logps"] - old.logps)
        told["val/rollout_logp_gap"] = of(gap, mask)
        told["val/rollout_logp_gap_max"] = masked.Max.of(gap, mask)
    if needs_reference:
        ref = response_logps(reference, drawn, config.sampling.temperature)
        kept["ref_logps"] = ref.logps
        kl = losses.k1(old.logps, ref.logps)
        told["objective/kl"] = of(masked.sum(kl, mask, axis=-1))
        if config.kl_placement == "reward":
            penalty = config.kl_coef * masked.clear(kl, mask)
    advantages = _advantages(scores, scored, mask, penalty, config)
    told["reward_std"] = of(_group_std(scores, scored, config))
    # Rows no source could score, and with the filter those cut off, teach nothing.
    mask = mask & scored[:, None]
    if config.mask_truncated:
        mask = losses.overlong_filter(mask, drawn["ended"])
    kept |= {"mask": mask, "advantages": masked.clear(advantages, mask)}
    keys = jax.random.split(key, config.epochs)
    rows = mask.shape[0]
    order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)
    return {
        "rollout": kept,
        "order": order.reshape(config.epochs * config.minibatches, -1),
        "metrics": told,
    }


def _shaped(scores, drawn, config):
    """Scores less what is taken for having no end, or coming near the limit."""
    scores = losses.missing_eos(
        scores, drawn["ended"], penalty=config.missing_eos_penalty
    )
    if config.overlong_cache:
        limit = config.sampling.max_new_tokens
        lengths = drawn["mask"].sum(-1)
        scores += losses.soft_overlong(
            lengths, limit=limit, cache=config.overlong_cache
        )
    return scores


def _informative(scores, scored, config):
    """The first groups whose rewards differ, then others if these do not suffice."""
    teaches = losses.dynamic_sampling(scores, scored)
    return jnp.argsort(~teaches, stable=True)[: config.batch_size]


def _placed(x, shape):
    """[N, G, ...] as [N G, ...], spread over the devices."""
    return sharding.constrain(x.reshape(-1, *shape), "batch", *(None,) * len(shape))


def _group_std(scores, scored, config):
    groups = (-1, config.group_size)
    var = masked.var(scores.reshape(groups), scored.reshape(groups), 1, unbiased=True)
    return jnp.sqrt(var)


def _advantages(scores, scored, mask, penalty, config):
    """f32[R, N]: constant over a completion, or a return at each of its tokens.

    Args:
        scores: f32[R]; scored: bool[R]; mask: bool[R, N].
        penalty: f32[R, N], what the KL costs each token, or None.
    """
    groups = (-1, config.group_size)
    by_token = config.advantage.startswith("returns")
    if penalty is not None and not by_token:
        scores = scores - penalty.sum(axis=1)
    grouped, known = scores.reshape(groups), scored.reshape(groups)
    if config.advantage == "group":
        found = losses.group_advantages(grouped, known, scale=config.scale_rewards)
    elif config.advantage == "leave_one_out":
        normalize = config.normalize_advantages
        found = losses.leave_one_out(grouped, known, normalize=normalize)
    else:
        if config.advantage == "returns_baseline":
            scores = losses.group_advantages(grouped, known, scale="none").reshape(-1)
        nothing = jnp.zeros(mask.shape, jnp.float32)
        paid = losses.kl_reward(scores, nothing, nothing, mask, kl_coef=0.0)
        if penalty is not None:
            paid -= penalty
        returns = losses.discounted_returns(paid, mask, discount=config.discount)
        return losses.whiten(returns, mask & scored[:, None])
    return jnp.where(mask, found.reshape(-1, 1), 0.0)


def make_objective(config):
    """The policy loss over a minibatch of judged groups."""
    loss_fn = objective.combine(config, OFFERS, PLACES)
    temperature = config.sampling.temperature
    in_loss = config.kl_coef > 0 and config.kl_placement == "loss"

    def reductions(batch):
        found = losses.aggregate(
            config.aggregation,
            batch["mask"],
            max_length=config.sampling.max_new_tokens,
        )
        return {"policy": found, "kl": found}

    def terms(model, batch):
        mask = batch["mask"]
        stats = response_logps(
            model, batch, temperature, entropy_gradient="entropy" in loss_fn.needs
        )
        logps = masked.clear(stats.logps, mask)
        # One step on a fresh rollout: the policy that sampled is the one being trained.
        old = batch.get("old_logps", jax.lax.stop_gradient(logps))
        offered = {
            "logps": logps,
            "old_logps": masked.clear(old, mask),
            "advantages": batch["advantages"],
            "mask": mask,
            "entropy": stats.entropy,
        }
        if "ref_logps" in batch:
            offered["ref_logps"] = masked.clear(batch["ref_logps"], mask)
        found, metrics = loss_fn.apply(offered)
        if in_loss:
            found["kl"], told = losses.kl_in_loss(
                offered["logps"],
                offered["ref_logps"],
                offered["old_logps"],
                estimator=config.kl_estimator,
                bias_correction=config.kl_bias_correction,
            )
            metrics = metrics | told
        metrics = objective.measured(metrics, {1: mask.any(-1), 2: mask})
        metrics["entropy"] = masked.Mean.of(stats.entropy, mask)
        metrics["policy_loss"] = masked.Mean.weighted(
            found["policy"], reductions(batch)["policy"]
        )
        return found, metrics

    return stage.Objective(reductions, terms, {"kl": config.kl_coef}), loss_fn.needs


def _make_update(config, goal, optimizer, decay):
    step = stage.make_step(goal, optimizer, micro_batches=config.micro_batches)

    def update(state, batch, frozen):
        keys = stage.dropout_keys(state, len(batch["order"]))

        def minibatch(carry, xs):
            (model, opt_state), (rows, key) = carry, xs
            part = jax.tree.map(lambda x: x[rows], batch["rollout"])
            part = jax.tree.map(
                lambda x: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)), part
            )
            seen = state._replace(model=model, opt_state=opt_state)
            model, opt_state, metrics = step(seen, part, state.step, frozen, key)
            return (model, opt_state), metrics

        start = (state.model, state.opt_state)
        (model, opt_state), metrics = jax.lax.scan(
            minibatch, start, (batch["order"], keys)
        )
        told = masked.reduce(metrics) | batch["metrics"]
        state = stage.advance(state, model, opt_state, ema_decay=decay)
        return state, masked.compute(told)

    return update
