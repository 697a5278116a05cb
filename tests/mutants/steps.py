"""Mistakes in the stages: who acts when, on what, and how it is added up."""

from tests.mutants.mutant import in_file

_UPDATE = in_file(
    "stagecraft/stages/update.py",
    "tests/stages/update_test.py",
    (
        "mean of each micro-batch",
        "share = part.sum(values) / totals[name]",
        "share = part.sum(values) / part.total() / micro_batches",
        "tests/stages/update_test.py -k random",
    ),
    (
        "the second minibatch counts as unmoved",
        'part["unmoved"] = number == 0',
        'part["unmoved"] = number <= 1',
        "tests/stages/unmoved_test.py -k second_minibatch",
    ),
    (
        "the reference is the policy at every step",
        'rows["unmoved"] = state.step == 0',
        'rows["unmoved"] = state.step >= 0',
        "tests/stages/unmoved_test.py -k 'prefers_nothing and dpo'",
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
        'extra["ema"] = optim.ema(state.extra["ema"], model, config.ema_decay)',
        'extra["ema"] = state.extra["ema"]',
        "tests/stages/preference_test.py -k average",
    ),
    (
        "scheduler steps each minibatch",
        "step(now, part, state.step, frozen, key)",
        "step(now, part, state.step + number, frozen, key)",
        "tests/stages/policy_test.py -k one_learning_rate",
    ),
    (
        "minibatches ignored",
        "order.reshape(config.epochs * config.minibatches, -1)",
        "order.reshape(config.epochs, -1)",
        "tests/stages/policy_test.py -k optimizer_step",
    ),
    (
        "one order for all epochs",
        "order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)",
        "order = jnp.tile(jax.random.permutation(key, rows), (config.epochs, 1))",
        "tests/stages/policy_test.py -k epoch",
    ),
    (
        "minibatches start from the same weights",
        "return (model, opt_state), metrics",
        "return (carry[0], opt_state), metrics",
        "tests/stages/policy_test.py",
        dict(within="minibatch"),
    ),
)

_BEGIN = in_file(
    "stagecraft/stages/stage.py",
    "tests/stages/preference_test.py tests/stages/policy_test.py",
    (
        "the child shares its parent's buffers",
        "jit(lambda m: jax.tree.map(jnp.copy, m), placement)",
        "lambda m: m",
        "",
        "the program that places the state makes arrays of its own, too",
    ),
    (
        "a moving reference shares its parent's buffers",
        "return _offload(place(model, _reference(model), key))",
        "state = place(model, _reference(model), key)\n"
        "if moves:\n"
        '    state.extra["reference"] = _reference(model)\n'
        "return state",
        "tests/stages/preference_test.py -k moving_reference",
    ),
    (
        "rows of programs lie on no device",
        "sharding.with_shardings(arrays, sharding.batch_sharding(mesh))",
        "{k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in arrays.items()}",
        "tests/stages/programs_test.py",
    ),
    (
        "rows of programs lie on every device",
        "sharding.with_shardings(arrays, sharding.batch_sharding(mesh))",
        "sharding.with_shardings(arrays, sharding.whole(mesh))",
        "tests/stages/programs_test.py",
    ),
)

_KIND = in_file(
    "stagecraft/stages/kind.py",
    "tests/stages/lora_test.py -k reads_back",
    ("chat turns are text", 'config.data.get("render", "chat")', '"text"'),
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
    (
        "how sure a verdict is, on the scale of all probabilities",
        "(confidence - 0.5) / 0.5 * BUCKETS",
        "confidence * BUCKETS",
        "tests/stages/reward_test.py -k calibration",
    ),
)

_REFERENCE = in_file(
    "stagecraft/stages/reference.py",
    "tests/stages/preference_test.py tests/stages/pairs_test.py",
    (
        "the reference is the policy",
        "return self._jitted(self.model(state), batch)",
        "return self._jitted(state.model, batch)",
    ),
    (
        "reference moves the wrong way",
        "(ref + alpha * (new - ref))",
        "(new + alpha * (ref - new))",
        "tests/stages/preference_test.py -k reference_moves",
    ),
    (
        "reference moves a step late",
        "due = (state.step + 1) % self.config.sync_every == 0",
        "due = state.step % self.config.sync_every == 0",
        "tests/stages/preference_test.py -k reference_moves",
    ),
    (
        "reference cache by place in the batch",
        "self._every_row()[np.asarray(index)]",
        "self._every_row()[np.arange(len(index))]",
        "tests/stages/preference_test.py -k twice",
    ),
    (
        "reference cache used for held-out rows",
        "own and index.min() >= 0 and index.max() < self.dataset.rows",
        "own and index.min() >= 0",
        "tests/stages/preference_test.py -k held_out",
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
        "a mean of rounding before the first step",
        'own = {"ref_logps": logps, "kl": 0.0, "delta": 0.0}',
        'own = given | {"ref_logps": logps}',
        "tests/stages/unmoved_test.py -k 'adapters and unpaired'",
        "on a CPU two forward passes of one model agree bit for bit",
    ),
    (
        "bco's delta forgets the past",
        "return mean + added / jnp.maximum(total, 1.0), total",
        "return mean + added / jnp.maximum(masked.count(mask), 1.0), total",
        "tests/stages/unpaired_preference_test.py -k running",
    ),
)

_CHECKS = in_file(
    "stagecraft/stages/checks.py",
    "tests/experiment_refusals_test.py",
    (
        "settings of other raters are let through",
        "others & {key, key.partition('.')[0]}",
        "others & {key}",
        "tests/signals/protocol_test.py",
    ),
    (
        "what the own rater reads is refused",
        "{key for name in raters.RATERS for key in raters.reads(name)} - {*own}",
        "{key for name in raters.RATERS for key in raters.reads(name)}",
        "tests/signals/protocol_test.py",
    ),
    (
        "keys without an effect are let through",
        "values[key] != default[key]",
        "False",
        "tests/experiment_refusals_test.py -k nothing",
    ),
    (
        "float16 is trained",
        'shape.dtype == "float16"',
        "False",
        "tests/experiment_refusals_test.py -k half",
    ),
    (
        "dropout where log-probabilities are compared",
        'config.lora.dropout and "reference" in kind.roles',
        "False",
        "tests/experiment_refusals_test.py -k settings",
    ),
    (
        "truncated samples are learned from",
        "chosen[key] != unset",
        "False",
        "tests/experiment_refusals_test.py -k settings",
    ),
    (
        "stretched positions of another run are not looked at",
        'return locate.locate(config.start_from).info()["model"]',
        "return None",
        "tests/experiment_refusals_test.py -k samples",
    ),
)

MUTANTS = (
    *(_UPDATE + _BEGIN + _KIND + _OBJECTIVE),
    *(_LANGUAGE + _REWARD + _REFERENCE + _PREFERENCE + _UNPAIRED + _CHECKS),
)
