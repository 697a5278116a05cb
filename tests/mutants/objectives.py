"""Mistakes in the losses of tokens, scores, pairs and single completions."""

from tests.mutants.mutant import in_file

_TOKENS = in_file(
    "stagecraft/losses/next_token.py",
    "tests/losses/next_token_test.py",
    (
        "mask off by one",
        "_drop_first(mask) & (segments == ahead)",
        "mask & (segments == ahead)",
    ),
    (
        "predicts across documents",
        "_drop_first(mask) & (segments == ahead) & (ahead > 0)",
        "_drop_first(mask) & (ahead > 0)",
    ),
    (
        "completions averaged, not summed",
        "return masked.sum(logps, target_mask, axis=-1)",
        "return masked.mean(logps, target_mask, axis=-1)",
    ),
    (
        "dft without stop-gradient",
        "-jax.lax.stop_gradient(jnp.exp(jnp.minimum(logps, 0.0))) * logps",
        "-jnp.exp(jnp.minimum(logps, 0.0)) * logps",
    ),
    (
        "z-loss not squared",
        'return jnp.square(log_z), {"log_z": log_z}',
        'return jnp.abs(log_z), {"log_z": log_z}',
    ),
)

_REWARD = in_file(
    "stagecraft/losses/reward.py",
    "tests/losses/reward_test.py",
    (
        "reward: chosen and rejected swapped",
        "difference = rewards[:, 0] - rewards[:, 1]",
        "difference = rewards[:, 1] - rewards[:, 0]",
    ),
    ("reward: margin added", "(difference - margin)", "(difference + margin)"),
    (
        "reward: soft labels swapped",
        "loss = preference * loss + (1 - preference) * other",
        "loss = (1 - preference) * loss + preference * other",
    ),
    (
        "reward: margin of one side only",
        "(-difference - margin)",
        "(-difference + margin)",
    ),
    (
        "centering of the difference",
        "jnp.square(rewards[:, 0] + rewards[:, 1])",
        "jnp.square(rewards[:, 0] - rewards[:, 1])",
    ),
    (
        "reward: a tie counts as right",
        "(difference > 0).astype",
        "(difference >= 0).astype",
    ),
    (
        "K-way: pairs not averaged",
        "mean(loss)",
        "masked.sum(loss, pairs, axis=(1, 2))",
    ),
    (
        "K-way: each with itself",
        "jnp.triu(jnp.ones(shape[1:], bool), k=1)",
        "jnp.triu(jnp.ones(shape[1:], bool), k=0)",
    ),
)

_PAIRS = in_file(
    "stagecraft/losses/pairs.py",
    "tests/losses/preference_test.py tests/losses/pairs_test.py",
    (
        "pairs: chosen and rejected swapped",
        "return pair[:, 0] - pair[:, 1]",
        "return pair[:, 1] - pair[:, 0]",
    ),
    (
        "pairs: not divided by the length",
        "return sums / jnp.maximum(lengths, 1.0).astype(sums.dtype)",
        "return sums",
    ),
    (
        "label smoothing one-sided",
        "return -(1 - label_smoothing) * right - label_smoothing * wrong",
        "return -(1 - label_smoothing) * right",
    ),
    (
        "reference-free keeps the reference",
        "policy_logps if reference_free else policy_logps - ref_logps",
        "policy_logps - ref_logps",
    ),
    (
        "a distance of scores without a limit",
        "jnp.square(jnp.clip(x, -_STEEPEST, _STEEPEST))",
        "jnp.square(x)",
        "tests/losses/extremes_test.py -k ipo",
    ),
    (
        "a bent score without a limit",
        "jnp.expm1(jnp.minimum(power * x, largest)) / power",
        "jnp.expm1(power * x) / power",
        "tests/losses/extremes_test.py -k alphapo",
    ),
    ("forward KL upside down", '"forward_kl": -1.0', '"forward_kl": 1.0'),
    (
        "alpha divergence of 1 - alpha",
        '"alpha": alpha - 1',
        '"alpha": -alpha',
    ),
    (
        "js of the reversed ratio",
        "jax.nn.log_sigmoid(log_ratio)",
        "-jax.nn.log_sigmoid(-log_ratio)",
    ),
    (
        "implied reward without beta",
        "beta * (policy_logps - ref_logps)",
        "policy_logps - ref_logps",
    ),
    (
        "pairs: scores of the stage ignored",
        "if scores is None:",
        "if True:",
        "tests/losses/preference_test.py -k divergences",
    ),
    (
        "pairs: scores without a reference",
        "scores = divergence_scores(policy_logps, ref_logps)",
        "scores = policy_logps",
    ),
    (
        "pairs: logged rewards of the scores",
        "return loss(scores, **given), metrics",
        'metrics = reward_metrics(policy_logps, given["beta"] * scores)\n'
        "return loss(scores, **given), metrics",
        "tests/losses/preference_test.py -k divergences",
    ),
    ("pairs: a tie counts as right", "(margins > 0)", "(margins >= 0)"),
    ("LD-DPO one token short", "place <= shared", "place < shared"),
    (
        "LD-DPO by the longer one",
        "shared = jnp.min(lengths, axis=-1)[:, None, None]",
        "shared = jnp.max(lengths, axis=-1)[:, None, None]",
    ),
    (
        "WPO weight has a gradient",
        "return jax.lax.stop_gradient(jnp.exp(jnp.sum(means, axis=-1)))",
        "return jnp.exp(jnp.sum(means, axis=-1))",
    ),
    (
        "WPO of sums",
        "means = masked.mean(surprise, mask, axis=-1)",
        "means = masked.sum(surprise, mask, axis=-1)",
    ),
)

_REFERENCE = in_file(
    "stagecraft/losses/preference.py",
    "tests/losses/preference_test.py",
    (
        "dpo: soft labels swapped",
        "flipped = 1 - right",
        "flipped = right",
        "tests/losses/preference_test.py -k soft",
    ),
    (
        "dpo: label smoothing ignored",
        "flipped = label_smoothing\n",
        "flipped = 0.0\n",
    ),
    (
        "ipo of sums",
        "average = per_token(scores, lengths)",
        "average = scores",
    ),
    (
        "ipo target 1 / beta",
        "squared(difference(average) - 1 / (2 * beta))",
        "squared(difference(average) - 1 / beta)",
    ),
    (
        "ipo_sum target 1 / beta",
        "squared(difference(scores) - 1 / (2 * beta))",
        "squared(difference(scores) - 1 / beta)",
    ),
    (
        "sigmoid_norm of sums",
        "logistic(beta * difference(per_token(scores, lengths)))",
        "logistic(beta * difference(scores))",
    ),
    (
        "robust not normalised",
        "return clean / (1 - 2 * label_smoothing)",
        "return clean",
    ),
    (
        "hinge without a bend",
        "jax.nn.relu(1 - beta * difference(scores))",
        "1 - beta * difference(scores)",
    ),
    (
        "exo with labels swapped",
        "jax.nn.sigmoid(margin) * right + jax.nn.sigmoid(-margin) * wrong",
        "jax.nn.sigmoid(-margin) * right + jax.nn.sigmoid(margin) * wrong",
    ),
    (
        "discopop blends the other way",
        "jax.nn.sigmoid(-margin / tau) * logistic(margin)",
        "jax.nn.sigmoid(margin / tau) * logistic(margin)",
    ),
    (
        "nca weighs the reference's side whole",
        "logistic(chosen) + 0.5 * (logistic(-chosen) + logistic(-rejected))",
        "logistic(chosen) + (logistic(-chosen) + logistic(-rejected))",
    ),
    (
        "bco_pair pushes both up",
        "logistic(-beta * scores[:, 1])",
        "logistic(beta * scores[:, 1])",
        dict(within="bco_pair"),
    ),
    ("sppo target 1 / beta", "target = 1 / (2 * beta)", "target = 1 / beta"),
    (
        "apo_zero pulls the chosen down",
        "jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)",
        "jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected)",
    ),
    (
        "apo_down without the chosen",
        "jax.nn.sigmoid(chosen) + jax.nn.sigmoid(-margin)",
        "jax.nn.sigmoid(-margin)",
    ),
    (
        "aot does not sort",
        "partner = jnp.sort(jnp.where(rows, b, last))[rank]",
        "partner = jnp.where(rows, b, last)",
    ),
    ("aot sorts padding in", "jnp.where(rows, a, last)", "a"),
    (
        "sft over the document",
        '{"chosen": -chosen_logps}',
        '{"document": -chosen_logps}',
    ),
)

_REFERENCE_FREE = in_file(
    "stagecraft/losses/reference_free.py",
    "tests/losses/reference_free_test.py",
    ("orpo: sign of log1mexp", "log_p - _log1mexp(log_p)", "log_p + _log1mexp(log_p)"),
    (
        "orpo of sums",
        "averages = per_token(policy_logps, lengths)",
        "averages = policy_logps",
        dict(within="orpo"),
    ),
    (
        "orpo without beta",
        '{"rows": -beta * ratio, "document": -document_logps}',
        '{"rows": -ratio, "document": -document_logps}',
    ),
    (
        "orpo learns the chosen alone",
        '"document": -document_logps',
        '"chosen": -document_logps',
    ),
    (
        "cpo: alpha ignored",
        '"chosen": -alpha * chosen_logps',
        '"chosen": -chosen_logps',
    ),
    (
        "cpo_ipo of sums",
        "per_token(policy_logps, lengths)",
        "policy_logps",
        dict(within="cpo_ipo"),
    ),
    (
        "simpo: gamma times beta",
        "logistic(beta * margin - gamma, label_smoothing)",
        "logistic(beta * (margin - gamma), label_smoothing)",
    ),
    (
        "alphapo bends the other way",
        "bend(averages, -alpha)",
        "bend(averages, alpha)",
    ),
)

_UNPAIRED = in_file(
    "stagecraft/losses/unpaired.py",
    "tests/losses/unpaired_test.py",
    (
        "kto: labels swapped",
        "jax.nn.sigmoid(jnp.where(labels, -gain, gain))",
        "jax.nn.sigmoid(jnp.where(labels, gain, -gain))",
    ),
    (
        "kto: weights swapped",
        "jnp.where(labels, desirable_weight * one, undesirable_weight * one)",
        "jnp.where(labels, undesirable_weight * one, desirable_weight * one)",
    ),
    ("kto: gradient through z", "kl = jax.lax.stop_gradient(kl)\n", "kl = 1.0 * kl\n"),
    ("kto: z added", "beta * (log_ratio - kl)", "beta * (log_ratio + kl)"),
    ("bco: delta added", "beta * log_ratio - delta", "beta * log_ratio + delta"),
    (
        "bco: gradient through delta",
        "delta = jax.lax.stop_gradient(delta)\n",
        "delta = 1.0 * delta\n",
    ),
    (
        "unpaired: padding is counted",
        "chosen, rejected = labels & rows, ~labels & rows",
        "chosen, rejected = labels, ~labels",
    ),
)

MUTANTS = _TOKENS + _REWARD + _PAIRS + _REFERENCE + _REFERENCE_FREE + _UNPAIRED
