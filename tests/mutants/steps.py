"""Mistakes in the stages: who acts when, on what, and how it is added up."""

from tests.mutants.mutant import in_file

_STAGE = in_file(
    "stagecraft/stages/stage.py",
    "tests/stages/update_test.py",
    (
        "mean of each micro-batch",
        "share = part.sum(values) / totals[name]",
        "share = part.sum(values) / part.total() / micro_batches",
        "tests/stages/update_test.py -k random",
    ),
    (
        "only the last micro-batch's gradient",
        "jax.tree.map(jnp.add, grads0, grads)",
        "jax.tree.map(lambda old, new: new, grads0, grads)",
        "tests/stages/update_test.py -k random",
    ),
    (
        "terms without their weights",
        "loss += objective.weights.get(name, 1.0) * share",
        "loss += share",
        "tests/stages/policy_options_test.py -k 'gradient or kl_in_the_loss'",
    ),
    (
        "EMA starts and stays",
        'carried["ema"] = optim.ema(state.extra["ema"], model, ema_decay)',
        'carried["ema"] = state.extra["ema"]',
        "tests/stages/preference_test.py -k average",
    ),
    (
        "the child shares its parent's buffers",
        "jax.jit(lambda m: jax.tree.map(jnp.copy, m), out_shardings=shardings)",
        "lambda m: m",
        "tests/stages/preference_test.py tests/stages/policy_test.py",
    ),
)

_OBJECTIVE = in_file(
    "stagecraft/stages/objective.py",
    "tests/stages/objective_test.py",
    (
        "objective_weights ignored",
        "values = part.weight * values",
        "values = 1.0 * values",
    ),
    (
        "losses at one place overwrite each other",
        "total[place] = total[place] + values if place in total else values",
        "total[place] = values",
    ),
    (
        "a _max metric is averaged",
        'state = masked.Max if name.endswith("_max") else masked.Mean',
        "state = masked.Mean",
    ),
)

_LANGUAGE = in_file(
    "stagecraft/stages/language_model.py",
    "tests/stages/update_test.py tests/data/stage_data_test.py",
    (
        "z-loss of the log-probabilities",
        '"log_z": stats.log_z',
        '"log_z": stats.logps',
        "tests/mutation_gaps_test.py -k tokens",
    ),
    (
        "weights of the token before",
        "weight = jnp.concatenate([weight[:, 1:], jnp.zeros_like(weight[:, :1])], 1)",
        "weight = 1.0 * weight",
        "tests/mutation_gaps_test.py -k tokens",
    ),
)

_REWARD = in_file(
    "stagecraft/stages/reward.py",
    "tests/stages/pairs_test.py tests/stages/reward_test.py",
    (
        "a row with one answer is a pair",
        "return mask[:, :2].any(-1).all(-1)",
        "return mask[:, :2].any(-1).any(-1)",
        "tests/stages/reward_test.py tests/stages/preference_test.py",
    ),
    (
        "reward stage swaps the sides",
        'return scores(model, **flat).reshape(batch["ids"].shape[:2])',
        'return scores(model, **flat).reshape(batch["ids"].shape[:2])[:, ::-1]',
    ),
    (
        "demonstrations get twice their mean",
        "model.bias[...] - total.compute()",
        "model.bias[...] + total.compute()",
        "tests/stages/reward_test.py -k demonstrations",
    ),
    (
        "certainty of the verdict ignored",
        "confidence = jax.nn.sigmoid(jnp.abs(difference))",
        "confidence = jax.nn.sigmoid(difference)",
        "tests/stages/reward_test.py -k 'calibration or certain'",
    ),
)

_PREFERENCE = in_file(
    "stagecraft/stages/preference.py",
    "tests/stages/preference_test.py tests/stages/pairs_test.py",
    (
        "preference stage swaps the policy's sides",
        '"policy_logps": summed(stats.logps, mask, config),',
        '"policy_logps": summed(stats.logps, mask, config)[:, ::-1],',
        "tests/stages/pairs_test.py tests/stages/preference_test.py",
    ),
    (
        "the reference is the policy",
        "known = score(reference, batch)",
        "known = score(state.model, batch)",
    ),
    (
        "reference moves the wrong way",
        "(ref + alpha * (new - ref))",
        "(new + alpha * (ref - new))",
        "tests/stages/preference_test.py -k reference_moves",
    ),
    (
        "reference moves a step late",
        "due = (state.step + 1) % config.sync_every == 0",
        "due = state.step % config.sync_every == 0",
        "tests/stages/preference_test.py -k reference_moves",
    ),
    (
        "reference cache by place in the batch",
        "found[0][np.asarray(index)]",
        "found[0][np.arange(len(index))]",
        "tests/stages/preference_test.py -k twice",
    ),
    (
        "reference cache used for held-out rows",
        "index is None or index.min() < 0 or index.max() >= dataset.rows",
        "index is None or index.min() < 0",
        "tests/stages/preference_test.py -k held_out",
    ),
    (
        "reference without LD-DPO",
        "return summed(stats.logps, mask, config)\n",
        "return losses.sequence_logps(stats.logps, mask)\n",
        "tests/stages/preference_test.py -k options",
    ),
    (
        "f-divergence of the stage ignored",
        "f_divergence=config.f_divergence,",
        'f_divergence="reverse_kl",',
        "tests/stages/preference_test.py -k scores",
    ),
    (
        "WPO weights ignored",
        'loss["rows"] *= losses.wpo_weights(stats.logps, stats.log_p2, mask)',
        "pass",
        "tests/stages/preference_test.py -k options",
    ),
    (
        "lengths count the prompt",
        '"lengths": mask.sum(-1).astype(jnp.float32)',
        '"lengths": (batch["segments"] > 0).sum(-1).astype(jnp.float32)',
        "tests/stages/preference_test.py tests/stages/every_objective_test.py",
    ),
    (
        "orpo's likelihood over the chosen tokens",
        'places["document"] = document',
        'places["document"] = chosen',
        "tests/stages/preference_test.py -k orpo",
    ),
    (
        "likelihood of the rejected one",
        '"chosen_logps": masked.clear(stats.logps[:, 0], chosen)',
        '"chosen_logps": masked.clear(stats.logps[:, 1], chosen)',
        "tests/stages/preference_test.py -k cpo",
    ),
)

_UNPAIRED = in_file(
    "stagecraft/stages/unpaired_preference.py",
    "tests/stages/unpaired_preference_test.py",
    (
        "kto rotates by nothing",
        "(jnp.arange(rows) - 1) % count",
        "jnp.arange(rows) % count",
        "tests/stages/unpaired_preference_test.py -k 'rotated or kto'",
    ),
    (
        "kto rotates padding in",
        "count = jnp.maximum(real.sum(), 1)",
        "count = rows",
        "tests/stages/unpaired_preference_test.py -k 'rotated or padding or clamp'",
    ),
    (
        "kto's z not clamped",
        'return jnp.maximum(masked.mean(ratio, batch["mask"].any(-1)), 0.0)',
        'return masked.mean(ratio, batch["mask"].any(-1))',
        "tests/stages/unpaired_preference_test.py -k 'clamp or kto'",
    ),
    (
        "kto's z counts padding",
        'return jnp.maximum(masked.mean(ratio, batch["mask"].any(-1)), 0.0)',
        "return jnp.maximum(ratio.mean(), 0.0)",
        "tests/stages/unpaired_preference_test.py -k 'clamp or padding'",
    ),
    (
        "bco's delta forgets the past",
        "return mean + added / jnp.maximum(total, 1.0), total",
        "return mean + added / jnp.maximum(masked.count(mask), 1.0), total",
        "tests/stages/unpaired_preference_test.py -k running",
    ),
)

_ROLLOUT = in_file(
    "stagecraft/stages/rollout.py",
    "tests/stages/group_policy_test.py tests/stages/policy_test.py",
    (
        "masks from the ids",
        "seen = jnp.concatenate([prompt_mask, got.mask], axis=1)",
        "seen = jnp.concatenate([prompt_ids, got.tokens], axis=1) != 0",
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
        "jnp.repeat(raw[k], samples, axis=0)",
        "jnp.tile(raw[k], (samples, 1))",
    ),
    (
        "verifiers get tiled prompts",
        "np.repeat(np.asarray(index), samples)",
        "np.tile(np.asarray(index), samples)",
        "tests/stages/group_policy_test.py -k rewards",
    ),
    (
        "reward weights ignored",
        "weighted = rewards * jnp.asarray(weights, rewards.dtype)[None, :]",
        "weighted = 1.0 * rewards",
        "tests/stages/group_policy_test.py -k rewards",
    ),
    (
        "one source suffices",
        "jnp.isfinite(rewards).all(axis=1)",
        "jnp.isfinite(rewards).any(axis=1)",
        "tests/stages/group_policy_test.py -k rewards tests/mutation_gaps_test.py",
        dict(within="total"),
    ),
    (
        "log-probs of the token after",
        "before = hidden[:, -new - 1 : -1]",
        "before = hidden[:, -new:]",
        "tests/stages/policy_test.py -k agree",
    ),
)

_POLICY = in_file(
    "stagecraft/stages/policy.py",
    "tests/stages/policy_test.py",
    (
        "no temperature in the old policy",
        'old = response_logps(model["policy"], drawn, temperature)',
        'old = response_logps(model["policy"], drawn, 1.0)',
    ),
    (
        "no temperature in the reference",
        "ref = response_logps(reference, drawn, temperature)",
        "ref = response_logps(reference, drawn, 1.0)",
    ),
    (
        "no temperature in the update",
        "temperature = config.sampling.temperature",
        "temperature = 1.0",
        dict(within="make_objective"),
    ),
    (
        "the reference is the policy (ppo)",
        "ref = response_logps(reference, drawn, temperature)",
        'ref = response_logps(model["policy"], drawn, temperature)',
    ),
    (
        "values after the token",
        "return values[:, -new - 1 : -1], values[:, -1]",
        "return values[:, -new:], values[:, -1]",
    ),
    (
        "returns from whitened advantages (stage)",
        '"returns": returns,',
        '"returns": losses.whiten(advantages, mask) + values,',
    ),
    (
        "advantages not whitened",
        '"advantages": losses.whiten(\n'
        "                advantages, mask, unbiased=config.unbiased_whitening\n"
        "            ),",
        '"advantages": advantages,',
    ),
    (
        "whitening never unbiased",
        "advantages, mask, unbiased=config.unbiased_whitening",
        "advantages, mask",
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
        "jnp.where(ended, 0.0, after)",
        "after",
        "tests/stages/policy_options_test.py",
    ),
    (
        "missing EOS costs nothing",
        "scores, ended, penalty=config.missing_eos_penalty, replace=replace",
        "scores, ended, penalty=0.0, replace=None",
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
        "scheduler steps each minibatch",
        "step(seen, part, state.step, frozen, key)",
        "step(seen, part, state.step + now, frozen, key)",
        "tests/stages/policy_test.py -k one_learning_rate",
    ),
    (
        "minibatches ignored",
        '"order": order.reshape(config.epochs * config.minibatches, -1)',
        '"order": order.reshape(config.epochs, -1)',
        "tests/stages/policy_test.py -k optimizer_step",
    ),
    (
        "one order for all epochs",
        "order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)",
        "order = jnp.tile(jax.random.permutation(key, rows), (config.epochs, 1))",
        "tests/stages/policy_test.py -k epoch tests/mutation_gaps_test.py",
    ),
    (
        "minibatches start from the same weights",
        "return (model, opt_state, now + 1), metrics",
        "return (carry[0], opt_state, now + 1), metrics",
        "tests/stages/policy_test.py",
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
        'mask = drawn["mask"] & scored[:, None]',
        'mask = drawn["mask"]',
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
        "ref = response_logps(reference, drawn, config.sampling.temperature)",
        "ref = response_logps(model, drawn, config.sampling.temperature)",
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
        "no gradient where the policy sampled itself",
        'old = batch.get("old_logps", jax.lax.stop_gradient(logps))',
        'old = batch.get("old_logps", logps)',
        "tests/mutation_gaps_test.py -k gradient",
    ),
    (
        "minibatches ignored (group)",
        '"order": order.reshape(config.epochs * config.minibatches, -1)',
        '"order": order.reshape(config.epochs, -1)',
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

MUTANTS = (
    *(_STAGE + _OBJECTIVE + _LANGUAGE + _REWARD + _PREFERENCE + _UNPAIRED),
    *(_ROLLOUT + _POLICY + _GROUP + _ONLINE),
)
