"""Mistakes in the stages that sample: what is scored, and who learns from it."""

from tests.mutants.mutant import in_file

_FOLDING = in_file(
    "stagecraft/stages/folding.py",
    "tests/stages/folding_test.py",
    (
        "the second row of a pair sees the first",
        "jnp.where(in_first, 1, 2)",
        "jnp.where(in_first, 1, 1)",
    ),
    (
        "the second row goes on where the first ends",
        "jnp.where(in_first, column, column - here)",
        "column + 0 * here",
    ),
    (
        "the second row begins with the first",
        "jnp.concatenate([pair, pair + here[..., 0]], axis=1)",
        "jnp.concatenate([pair, pair], axis=1)",
    ),
    (
        "padding before a row counts",
        "(self.begin - self.skip)[:, None] + columns",
        "self.begin[:, None] + columns",
    ),
    (
        "the longest with the longest",
        "ranked[:, :half], ranked[:, ::-1][:, :half]",
        "ranked[:, ::2], ranked[:, 1::2]",
    ),
    (
        "micro-batches are neighbours",
        "lengths.reshape(len(order), -1, micro_batches).swapaxes(1, 2)",
        "lengths.reshape(len(order), micro_batches, -1)",
    ),
    (
        "pairs of the update's batches are not looked at",
        "widest(segments, order(rows, key), micro_batches, blocks)",
        "0",
    ),
)

_ROLLOUT = in_file(
    "stagecraft/stages/rollout.py",
    "tests/stages/group_policy_test.py tests/stages/policy_test.py",
    (
        "masks from the ids",
        "seen = jnp.concatenate([prompt_mask, mask], axis=1)",
        "seen = jnp.concatenate([prompt_ids, tokens], axis=1) != 0",
        "tests/stages/policy_test.py tests/mutation_gaps_test.py",
    ),
    (
        "positions from 1",
        "jnp.cumsum(seen, axis=1, dtype=jnp.int32) - seen",
        "jnp.cumsum(seen, axis=1, dtype=jnp.int32)",
        "tests/stages/policy_test.py tests/mutation_gaps_test.py",
    ),
    (
        "prompts tiled, not repeated",
        "jnp.repeat(raw[k], len(tokens) // len(raw[k]), axis=0)",
        "jnp.tile(raw[k], (len(tokens) // len(raw[k]), 1))",
    ),
    (
        "verifiers get tiled prompts",
        "np.repeat(np.asarray(index), samples)",
        "np.tile(np.asarray(index), samples)",
        "tests/stages/group_policy_test.py -k rewards",
    ),
    (
        "a rollout is as long as its shortest completion",
        "mask.any(axis=0)",
        "mask.all(axis=0)",
        "tests/stages/lengths_test.py",
    ),
    (
        "a rollout loses its last token",
        "tokens = halved(int(longest_jitted(got['mask'])), whole)",
        "tokens = int(longest_jitted(got['mask'])) - 1",
        "tests/stages/lengths_test.py",
    ),
    (
        "work is counted as if completions were the longest",
        "if batch is None:",
        "if True:",
        "tests/stages/lengths_test.py",
    ),
    (
        "log-probs of the token after",
        "slice(-new - 1, -1)",
        "slice(-new, None)",
        "tests/stages/policy_test.py -k agree",
    ),
    (
        "rows that fill a held-out batch are counted",
        "rows = np.repeat(real, len(rollout['tokens']) // len(real))",
        "rows = np.repeat(real | True, len(rollout['tokens']) // len(real))",
        "tests/stages/evaluate_test.py",
    ),
    (
        "rows that fill a held-out batch are scored",
        "metrics(rollout, values, scored & rows)",
        "metrics(rollout, values, scored)",
        "tests/stages/evaluate_test.py",
    ),
    (
        "rewards of rows that fill a held-out batch",
        "source_metrics(rewards, rollouts.names, rows)",
        "source_metrics(rewards, rollouts.names)",
        "tests/stages/evaluate_test.py",
    ),
    (
        "lengths of rows that fill a held-out batch",
        'completion_metrics(rollout["mask"], rollout["ended"], rows)',
        'completion_metrics(rollout["mask"], rollout["ended"])',
        "tests/stages/evaluate_test.py",
    ),
    (
        "verifiers are asked for rows that are none",
        "rollouts.score(samples, np.maximum(index, 0), state.step)",
        "rollouts.score(samples, index, state.step)",
        "tests/stages/evaluate_test.py",
    ),
    (
        "held-out prompts of no token",
        "mask[~real, -1] = True",
        "pass",
        "tests/stages/evaluate_test.py",
        "what is sampled for rows that are no prompts counts in no figure",
    ),
    (
        "no gradient where the policy sampled itself",
        "return jax.lax.stop_gradient(logps)",
        "return logps",
        "tests/mutation_gaps_test.py -k gradient",
    ),
    (
        "the first ratio is between two programs",
        "return unless_unmoved(batch, logps, old)",
        "return old",
        "tests/stages/unmoved_test.py -k first_step_alone",
    ),
)

_POLICY = in_file(
    "stagecraft/stages/policy.py",
    "tests/stages/policy_test.py",
    (
        "an adaptive coefficient that the loss does not read",
        'loss["kl"] *= batch["kl_coef"]',
        'loss["kl"] *= config.kl_coef',
        "tests/stages/policy_options_test.py -k adaptive",
    ),
    (
        "k1 logged whatever was paid",
        "estimate = losses.ESTIMATORS[config.kl_estimator]",
        "estimate = losses.k1",
        "tests/stages/policy_options_test.py -k paid",
    ),
    (
        "a ratio of minibatches without scores",
        "masked.var(means, ratios.count > 0)",
        "jnp.var(ratios.total / ratios.count)",
        "tests/stages/policy_options_test.py -k paid",
    ),
    (
        "no temperature in the old policy",
        '"old_logps": response_logps(policy, samples, temperature).logps',
        '"old_logps": response_logps(policy, samples, 1.0).logps',
    ),
    (
        "no temperature in the reference",
        '"ref_logps": response_logps(reference, samples, temperature).logps',
        '"ref_logps": response_logps(reference, samples, 1.0).logps',
    ),
    (
        "no temperature in the update",
        "temperature = config.sampling.temperature",
        "temperature = 1.0",
        dict(within="make_objective"),
    ),
    (
        "the reference is the policy (ppo)",
        '"ref_logps": response_logps(reference, samples, temperature).logps',
        '"ref_logps": response_logps(policy, samples, temperature).logps',
    ),
    (
        "values after the token",
        "return values[:, :-1], values[:, -1]",
        "return values[:, 1:], values[:, -1]",
    ),
    (
        "returns from whitened advantages (stage)",
        '"returns": returns,',
        '"returns": losses.whiten(token_advantages, mask) + values,',
    ),
    (
        "advantages not whitened",
        '"advantages": losses.whiten(token_advantages, mask, unbiased=unbiased)',
        '"advantages": token_advantages',
    ),
    (
        "whitening never unbiased",
        "losses.whiten(token_advantages, mask, unbiased=unbiased)",
        "losses.whiten(token_advantages, mask)",
        "tests/stages/policy_options_test.py",
    ),
    (
        "rewards whitened with their mean gone",
        "paid_tokens, counted, shift_mean=False,",
        "paid_tokens, counted,",
        "tests/stages/policy_options_test.py",
    ),
    (
        "bootstrap of those that ended",
        'jnp.where(samples["ended"], 0.0, after)',
        "after",
        "tests/stages/policy_options_test.py",
    ),
    (
        "missing EOS costs nothing",
        "penalty=config.missing_eos_penalty, "
        "replace=config.missing_eos_score if config.replace_missing_eos else None",
        "penalty=0.0, replace=None",
    ),
    (
        "KL in the loss and in the reward",
        "kl_coef=kl_coef if in_reward else 0.0,",
        "kl_coef=kl_coef,",
        "tests/stages/policy_options_test.py -k paid",
    ),
    (
        "critic learns under the policy's mask",
        '"value": batch["value_mask"]',
        '"value": batch["mask"]',
        "tests/stages/policy_options_test.py",
    ),
    (
        "the first rows of pretraining text only",
        "at = (now % minibatches) * size",
        "at = 0 * now",
        "tests/stages/policy_options_test.py -k pretraining",
    ),
    (
        "pretraining loss on every token",
        'found["ptx"] = _ptx_targets(batch)[1]',
        'found["ptx"] = batch["ptx_segments"] > 0',
        "tests/stages/policy_options_test.py",
    ),
    (
        "critic at the policy's learning rate",
        '"value": config.value_lr_scale',
        '"value": 1.0',
        "tests/mutation_gaps_test.py -k critic",
    ),
    (
        "rows nobody could score teach",
        'samples["mask"] & scored[:, None]',
        'samples["mask"]',
        "tests/stages/policy_options_test.py -k score",
    ),
    (
        "KL coefficient adapts to the epochs",
        'batch_size=batch["order"].size // config.epochs',
        'batch_size=batch["order"].size',
        "tests/stages/policy_test.py -k adapts",
    ),
)

_GROUP = in_file(
    "stagecraft/stages/group_policy.py",
    "tests/stages/group_policy_test.py",
    (
        "no temperature in the update (group)",
        "temperature = config.sampling.temperature",
        "temperature = 1.0",
        dict(within="make_objective"),
    ),
    (
        "no temperature in the old policy (group)",
        "old = response_logps(model, drawn, config.sampling.temperature)",
        "old = response_logps(model, drawn, 1.0)",
    ),
    (
        "the reference is the policy (group)",
        "ref = response_logps(reference, samples, config.sampling.temperature)",
        "ref = response_logps(policy, samples, config.sampling.temperature)",
    ),
    (
        "groups that teach nothing are kept",
        "jnp.argsort(~teaches, stable=True)",
        "jnp.argsort(teaches, stable=True)",
        "tests/stages/group_policy_test.py -k keeps",
    ),
    (
        "oversampled groups in any order",
        "jnp.argsort(~teaches, stable=True)",
        "jnp.argsort(~teaches, stable=True, descending=True)",
        "tests/stages/group_policy_test.py -k keeps",
    ),
    (
        "cut off completions teach",
        'mask = losses.overlong_filter(mask, drawn["ended"])',
        "mask = 1 * mask > 0",
    ),
    (
        "KL in the reward ignored",
        "scores = scores - penalty.sum(axis=1)",
        "scores = scores - 0 * penalty.sum(axis=1)",
    ),
    (
        "KL in the reward is paid",
        "paid -= penalty",
        "paid += penalty",
        "tests/stages/group_policy_test.py -k baseline",
    ),
    (
        "minibatches ignored (group)",
        "update.shuffled_minibatches(config, len(mask), key)",
        "update.shuffled_minibatches(config, len(mask), key)"
        ".reshape(config.epochs, -1)",
    ),
    (
        "aggregation by the batch's longest",
        "max_length=config.sampling.max_new_tokens",
        'max_length=batch["mask"].sum(-1).max()',
        "tests/stages/group_policy_test.py -k aggregation",
    ),
    (
        "returns not whitened",
        "return losses.whiten(returns, mask & scored[:, None])",
        "return returns",
        "tests/stages/group_policy_test.py -k 'baseline or advantage'",
    ),
)

_ONLINE = in_file(
    "stagecraft/stages/online_preference.py",
    "tests/stages/online_preference_test.py",
    (
        "the worse of two is chosen",
        "first = (paid[:, 0] >= paid[:, 1])[:, None]",
        "first = (paid[:, 0] <= paid[:, 1])[:, None]",
    ),
    (
        "the second of equals is chosen",
        "first = (paid[:, 0] >= paid[:, 1])[:, None]",
        "first = (paid[:, 0] > paid[:, 1])[:, None]",
    ),
    (
        "ranked before the missing EOS is charged",
        "paid, both = paid.reshape(-1, 2), scored.reshape(-1, 2).all(axis=1)",
        "paid, both = scores.reshape(-1, 2), scored.reshape(-1, 2).all(axis=1)",
    ),
)

_APART = in_file(
    "stagecraft/stages/apart.py",
    "tests/stages/apart_test.py -k 'numpy or once or weights'",
    (
        "norms are cast before they are gathered",
        "len(axes) > 1",
        "len(axes) > 0",
        "tests/stages/apart_test.py -k gathered",
    ),
    (
        "weights are gathered and stay split",
        "rest = [None if sharding.RULES[axis] == 'fsdp' else axis for axis in axes]",
        "rest = list(axes)",
        "tests/stages/apart_test.py -k gathered",
    ),
    (
        "old tokens count without a cap",
        "jnp.minimum(ratio, cap)",
        "ratio",
    ),
    (
        "the ratio of old tokens upside down",
        "masked.clear(old_logps, mask) - behaviour",
        "behaviour - masked.clear(old_logps, mask)",
    ),
    (
        "old tokens count as new ones",
        "return loss * batch['importance'] if 'importance' in batch else loss",
        "return loss",
    ),
    (
        "the sampling devices keep their first weights",
        "leaf is last",
        "last is not None",
    ),
) + in_file(
    "stagecraft/train.py",
    "tests/train_test.py -k begun",
    (
        "a rollout is begun with the key of the step before",
        "later, own = self.data.batch_at(step), jax.random.fold_in(key, step)",
        "later, own = self.data.batch_at(step), jax.random.fold_in(key, self.step)",
    ),
    (
        "rollouts are begun a step too early",
        "min(self.step + self.config.staleness + 1, self.config.steps)",
        "min(self.step + self.config.staleness + 2, self.config.steps)",
    ),
)

MUTANTS = _FOLDING + _ROLLOUT + _POLICY + _GROUP + _ONLINE + _APART
