"""Mistakes in what becomes of samples: rewards, advantages, losses of tokens."""

from tests.mutants.mutant import in_file

_KL = in_file(
    "stagecraft/losses/kl.py",
    "tests/losses/kl_test.py",
    ("KL sign", "return logps - ref_logps", "return ref_logps - logps"),
    (
        "k3 of the reversed ratio",
        "jnp.exp(-difference) - 1 + difference",
        "jnp.exp(difference) - 1 - difference",
    ),
    (
        "k3 of an unlimited ratio",
        "jnp.maximum(k1(logps, ref_logps), -MAX_LOG_RATIO)",
        "k1(logps, ref_logps)",
        "tests/losses/extremes_test.py -k k3",
    ),
    (
        "KL is paid, not charged",
        "return at_end - kl_coef * kl",
        "return at_end + kl_coef * kl",
    ),
    (
        "score in the last column",
        "jnp.max(jnp.where(paid, column, -1), axis=1, keepdims=True)",
        "jnp.max(column, axis=1, keepdims=True)",
    ),
    (
        "score one token early",
        "at_end = jnp.where(column == last, scores[:, None], jnp.zeros_like(kl))",
        "at_end = jnp.where(column == last - 1, scores[:, None], jnp.zeros_like(kl))",
    ),
    (
        "placement B pays at the end token",
        "paid = value_mask(mask, placement)\n",
        "paid = mask\n",
    ),
    (
        "no value in the slot of placement B",
        "return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))",
        "return mask",
    ),
    (
        "k1 in the loss is let through",
        'if estimator == "k1":',
        'if estimator == "k0":',
    ),
    (
        "bias correction ignored",
        "kl = kl * probability_ratio(logps - old_logps)",
        "kl = 1.0 * kl",
    ),
    (
        "missing EOS: the ended ones pay",
        "return jnp.where(ended, scores, lowered)",
        "return jnp.where(ended, lowered, scores)",
    ),
    (
        "adaptive KL without a limit",
        "jnp.clip(kl / target - 1, -0.2, 0.2)",
        "kl / target - 1",
    ),
    (
        "adaptive KL runs away",
        "kl_coef * (1 + error * batch_size / horizon)",
        "kl_coef * (1 - error * batch_size / horizon)",
    ),
    (
        "adaptive KL ignores the batch",
        "error * batch_size / horizon",
        "error / horizon",
    ),
)

_ADVANTAGE = in_file(
    "stagecraft/losses/advantage.py",
    "tests/losses/advantage_test.py",
    (
        "returns from whitened advantages",
        "return advantages.T, advantages.T + values",
        "return advantages.T, whiten(advantages.T, mask) + values",
    ),
    (
        "advantages whitened before returns",
        "    return advantages.T, advantages.T + values",
        "    return whiten(advantages.T, mask), advantages.T + values",
    ),
    (
        "gae without lambda",
        "delta + discount * lambda_ * later",
        "delta + discount * later",
    ),
    (
        "gae without discount",
        "delta + discount * lambda_ * later",
        "delta + lambda_ * later",
    ),
    (
        "gae does not discount the next value",
        "rewards + discount * ahead - values",
        "rewards + ahead - values",
    ),
    (
        "gae values shifted",
        "[values[:, 1:], jnp.zeros_like(values[:, :1])]",
        "[values[:, :-1], jnp.zeros_like(values[:, :1])]",
    ),
    (
        "gae sees values outside the mask",
        "rewards, values = masked.clear(rewards, mask), masked.clear(values, mask)",
        "rewards = masked.clear(rewards, mask)",
    ),
    (
        "bootstrap ignored",
        "ahead = jnp.where(last, bootstrap[:, None], ahead)",
        "ahead = jnp.where(last, 0 * bootstrap[:, None], ahead)",
    ),
    (
        "whitening with the mean kept wrong",
        "scaled if shift_mean else scaled + mean",
        "scaled",
    ),
    (
        "whitening divides by n - 1",
        "masked.var(x, mask, unbiased=unbiased)",
        "masked.var(x, mask, unbiased=True)",
    ),
    (
        "explained variance of the values",
        "masked.var(returns - values, mask) / safe",
        "masked.var(values, mask) / safe",
    ),
)

_POLICY = in_file(
    "stagecraft/losses/policy.py",
    "tests/losses/policy_test.py",
    (
        "the clip takes the better bound",
        "jnp.maximum(-advantages * ratio, -advantages * clipped)",
        "jnp.minimum(-advantages * ratio, -advantages * clipped)",
    ),
    (
        "advantage sign",
        "jnp.maximum(-advantages * ratio, -advantages * clipped)",
        "jnp.maximum(advantages * ratio, advantages * clipped)",
    ),
    (
        "clip-higher ignored",
        "1 + (clip if clip_high is None else clip_high)",
        "1 + clip",
        dict(within="surrogate"),
    ),
    (
        "dual clip of good tokens, too",
        "limit = jnp.where(advantages < 0, -dual_clip * advantages, jnp.inf)",
        "limit = -dual_clip * advantages",
    ),
    (
        "dual clip the wrong way",
        "loss = jnp.minimum(loss, limit)",
        "loss = jnp.maximum(loss, limit)",
    ),
    (
        "delta is a distance from 1",
        "ratio = jnp.minimum(ratio, delta)",
        "ratio = jnp.minimum(ratio, 1 + delta)",
    ),
    ("clip fraction of one side", "(below | above).astype", "above.astype"),
    (
        "approximate KL not halved",
        "0.5 * jnp.square(log_ratio)",
        "jnp.square(log_ratio)",
    ),
    (
        "ratio upside down",
        "log_ratio = logps - old_logps  # [B, T]",
        "log_ratio = old_logps - logps  # [B, T]",
    ),
    (
        "ratios overflow",
        "jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)",
        "log_ratio",
    ),
    ("entropy is punished", "return -entropy, {}", "return entropy, {}"),
    (
        "reinforce sign",
        "return -advantages * logps, {}",
        "return advantages * logps, {}",
    ),
    (
        "value clip takes the better bound",
        "0.5 * jnp.maximum(free, clipped)",
        "0.5 * jnp.minimum(free, clipped)",
    ),
    (
        "value loss not halved",
        "loss = 0.5 * jnp.maximum(free, clipped)",
        "loss = jnp.maximum(free, clipped)",
    ),
    (
        "value clip around the return",
        "old_values - clip, old_values + clip",
        "returns - clip, returns + clip",
    ),
)

_GROUP = in_file(
    "stagecraft/losses/group.py",
    "tests/losses/group_test.py",
    (
        "grpo: deviation over n",
        "masked.var(rewards, scored, axis, unbiased=True)",
        "masked.var(rewards, scored, axis)",
    ),
    (
        "grpo: deviation of the batch",
        "_spread(paid, scored, 1)[:, None] + eps",
        "_spread(paid, scored, None) + eps",
    ),
    (
        "grpo: mean of the batch",
        "mean = masked.mean(paid, scored, axis=1)[:, None]",
        "mean = masked.mean(rewards, scored)",
    ),
    (
        "rloo divides by G",
        "others = masked.count(scored, axis=1)[:, None] - 1",
        "others = masked.count(scored, axis=1)[:, None]",
    ),
    (
        "rloo with oneself in",
        "baseline = (total - paid) / jnp.maximum(others, 1.0).astype(paid.dtype)",
        "baseline = total / jnp.maximum(others, 1.0).astype(paid.dtype)",
    ),
    ("rloo never normalised", "if not normalize:", "if True:"),
    (
        "dynamic sampling keeps all",
        "masked.max(rewards, scored, axis=1) > lowest",
        "masked.max(rewards, scored, axis=1) >= lowest",
    ),
    (
        "soft overlong begins at the limit",
        "left = (limit - cache) - lengths.astype(jnp.float32)",
        "left = limit - lengths.astype(jnp.float32)",
    ),
    (
        "gspo: product of the ratios",
        "ratio = probability_ratio(masked.mean(log_ratio, mask, axis=1))",
        "ratio = probability_ratio(masked.sum(log_ratio, mask, axis=1))",
    ),
    (
        "rloo: mean of the ratios",
        "ratio = probability_ratio(masked.sum(log_ratio, mask, axis=1))",
        "ratio = probability_ratio(masked.mean(log_ratio, mask, axis=1))",
    ),
    (
        "cispo cut at 1 + bound",
        "jax.lax.stop_gradient(jnp.minimum(ratio, clip_high))",
        "jax.lax.stop_gradient(jnp.minimum(ratio, 1 + clip_high))",
    ),
    (
        "cispo weight has a gradient",
        "weight = jax.lax.stop_gradient(jnp.minimum(ratio, clip_high))",
        "weight = jnp.minimum(ratio, clip_high)",
    ),
    ("cispo takes a crushing bound", "if clip_high <= 1:", "if clip_high <= 0:"),
    (
        "sapo gates swapped",
        "jnp.where(advantages > 0, tau_positive, tau_negative)",
        "jnp.where(advantages > 0, tau_negative, tau_positive)",
    ),
    (
        "sapo slope tau",
        'jax.nn.sigmoid(tau * (told["val/ratio"] - 1)) * 4 / tau',
        'jax.nn.sigmoid(tau * (told["val/ratio"] - 1)) * 4',
    ),
)

_AGGREGATE = in_file(
    "stagecraft/losses/aggregate.py",
    "tests/losses/aggregate_test.py",
    (
        "dr_grpo divides by the tokens",
        "jnp.full_like(lengths, max_length)",
        "lengths",
    ),
    ("grpo counts tokens", "jnp.maximum(lengths, 1.0)[:, None]", "1.0"),
    (
        "grpo leaves empty rows out",
        "jnp.ones_like(lengths)",
        "(lengths > 0).astype(lengths.dtype)",
    ),
    (
        "overlong filter keeps the cut ones",
        "return mask & ended[:, None]",
        "return mask & ~ended[:, None]",
    ),
)

MUTANTS = _KL + _ADVANTAGE + _POLICY + _GROUP + _AGGREGATE
