"""Mutants of models, sampling, runs, optimizers, the loop, and what is reported."""

from tests.mutants.mutant import in_file

_MODEL = in_file(
    "stagecraft/models/attention.py",
    "tests/models/transformer_test.py",
    (
        "attention across documents",
        "visible = segments[:, rows, None] == segments[:, None, seen]",
        "visible = segments[:, rows, None] > 0",
    ),
    (
        "attention sees what comes",
        "index[rows, None] >= index[None, seen]",
        "index[rows, None] >= index[None, seen] - 1",
    ),
)

_ATTENTION = in_file(
    "stagecraft/models/attention.py",
    "tests/models/attention_test.py",
    (
        "gradient of a softmax without its mean",
        '_product("bkgtc,bksc->bkgts", d_out, values) - mean',
        '_product("bkgtc,bksc->bkgts", d_out, values)',
    ),
    (
        "gradient of a soft-cap left out",
        "1 - jnp.square(capped / softcap)",
        "1",
    ),
    (
        "gradient of values from undivided weights",
        "d_out = d_out.astype(jnp.float32) / total",
        "d_out = d_out.astype(jnp.float32)",
    ),
)

_WIDTHS = in_file(
    "stagecraft/models/transformer.py",
    "tests/stages/sizes_test.py -k bfloat16",
    (
        "feed-forward activations in float32",
        "gate = _project(x, self.gate, self.gate_bias)",
        "gate = _project(x, self.gate, self.gate_bias).astype(jnp.float32)",
    ),
    (
        "norms and activations are kept for the backward pass",
        "jax.checkpoint(part)",
        "part",
        "tests/models/kept_activations_test.py",
    ),
)

_SCORES = in_file(
    "stagecraft/models/scores.py",
    "tests/stages/pairs_test.py tests/models/language_test.py",
    (
        "score read one token early",
        "last = length - 1 - jnp.argmax(mask[..., ::-1], axis=-1)",
        "last = length - 2 - jnp.argmax(mask[..., ::-1], axis=-1)",
    ),
    (
        "score read in the last column",
        "jnp.where(mask.any(-1), last, 0)",
        "jnp.full_like(last, length - 1)",
    ),
)

_HEADS = in_file(
    "stagecraft/models/heads.py",
    "tests/models/heads_test.py",
    (
        "log-normaliser less its maximum",
        "log_z=lse + top / options.temperature",
        "log_z=lse",
    ),
    ("entropy without the maximum", "entropy = lse - expected", "entropy = -expected"),
    (
        "no gradient of the normaliser",
        "rest = rest + gradient.log_z",
        "rest = rest + 0",
    ),
    (
        "logits held whatever their size",
        "count * vocab <= HELD_ELEMENTS",
        "count * vocab > 0",
    ),
    (
        "gradient without the temperature",
        "out = out / options.temperature",
        "out = out",
    ),
)

_SAMPLING = in_file(
    "stagecraft/models/sampling.py",
    "tests/models/sampling_test.py",
    (
        "the stop token is masked out",
        "mask=_write(sample.mask, step, live)",
        "mask=_write(sample.mask, step, live & ~ended)",
    ),
    (
        "stops at the wrong token",
        "jnp.array(params.stop_ids, jnp.int32)",
        "1 + jnp.array(params.stop_ids, jnp.int32)",
    ),
    ("stops at the first id alone", "now.any(axis=1)", "now[:, :1].any(axis=1)"),
    (
        "rows that go on are left behind",
        "jnp.argsort(apart(state.sample.ended), axis=1, stable=True)[:, :half]",
        "jnp.argsort(apart(state.sample.ended), axis=1, stable=True)[:, half:]",
        "tests/models/halving_test.py",
    ),
    (
        "a row's key after the batch was halved is its place's",
        "draws.draw(jax.random.fold_in(key, step), row, logits, *choice)",
        "draws.draw(jax.random.fold_in(key, step), jnp.arange(len(row)), logits, "
        "*choice)",
        "tests/models/halving_test.py",
    ),
    (
        "halves once a row of one device can be left out",
        "(going_on > fewest).any()",
        "(going_on > fewest).all()",
        "tests/models/halving_test.py",
    ),
    (
        "halving gathers the heads of the cache",
        "'kv_heads' if x.ndim == 4 else None",
        "None",
        "tests/models/halving_test.py -k crosses",
    ),
    (
        "no batch is halved",
        "(going_on > fewest).any()",
        "(going_on > 0).any()",
        "tests/models/halving_test.py",
    ),
    (
        "completions of what went on are not put back",
        "jax.tree.map(put, state.sample, rest)",
        "state.sample",
        "tests/models/halving_test.py",
    ),
    (
        "a batch of short answers is halved",
        "params.max_new_tokens >= HALVED_FROM",
        "True",
        "tests/models/halving_test.py",
    ),
)

_DRAWS = in_file(
    "stagecraft/models/draws.py",
    "tests/models/sampling_test.py",
    (
        "temperature multiplies",
        "logits = logits if greedy else logits / temperature",
        "logits = logits if greedy else logits * temperature",
    ),
)

_RUN = in_file(
    "stagecraft/run.py",
    "tests/mutation_gaps_test.py tests/run_test.py",
    (
        "missing EOS on the document's end",
        "stop_ids=tokenizer.stops",
        "stop_ids=(tokenizer.eos,)",
    ),
    (
        "what a kind does at the end is left out",
        "kind.finish and kind.finish(stage, data, functions.frozen)",
        "None",
        "tests/stages/lora_test.py -k reads_back",
    ),
    (
        "every model is asked in chat turns",
        "format=kinds.of(stage).format(stage)",
        'format="chat"',
        "tests/stages/lora_test.py -k reads_back",
    ),
)

_MASKED = in_file(
    "stagecraft/masked.py",
    "tests/masked_test.py",
    (
        "means count padding",
        "total / jnp.maximum(count(mask, axis), 1.0).astype(total.dtype)",
        "total / jnp.maximum(count(mask == mask, axis), 1.0).astype(total.dtype)",
    ),
    (
        "merged means of means",
        "return Mean(self.total + other.total, self.count + other.count)",
        "return Mean((self.compute() + other.compute()) / 2, 1 + 0 * self.count)",
    ),
    (
        "NaN times zero",
        "return jnp.where(mask, x, jnp.zeros_like(x))",
        "return x * mask.astype(x.dtype)",
    ),
)

_OPTIMIZER = in_file(
    "stagecraft/optim.py",
    "tests/optim",
    (
        "norms and biases decay",
        "optax.add_decayed_weights(config.weight_decay, mask=decayed)",
        "optax.add_decayed_weights(config.weight_decay, mask=None)",
    ),
    (
        "EMA decay swapped",
        "optax.incremental_update(params, average, 1.0 - decay)",
        "optax.incremental_update(params, average, decay)",
    ),
    (
        "ascends",
        "(-rate * x).astype",
        "(rate * x).astype",
    ),
    ("parts at one learning rate", "(-rate * factor * x)", "(-rate * x)"),
    (
        "warm-up starts at 0",
        "ramp = (step + 1).astype(jnp.float32) / max(warm, 1)",
        "ramp = step.astype(jnp.float32) / max(warm, 1)",
    ),
)

_TRAIN = in_file(
    "stagecraft/train.py",
    "tests/stages/preference_test.py tests/run_test.py",
    (
        "the average is never deployed",
        "lora.join(frozen, averaged(state).model)",
        "lora.join(frozen, state.model)",
    ),
    (
        "a line is of one step alone",
        "{key: total / count for key, (total, count) in self.since.items()}",
        "dict(values)",
        "tests/run_test.py -k line",
    ),
    (
        "a resumed line begins anew",
        'self.since = saved.get("since", {})',
        "self.since = {}",
        "tests/run_test.py -k line",
    ),
    (
        "asked to stop, it goes on",
        "if stop:\n    loop.stop(stop)",
        "pass",
        "tests/run_test.py -k asked_to_stop",
        "one process stops when the next step begins, several when the stage ends",
    ),
    (
        "asked to stop, it saves nothing",
        "loop.due(config.every.save) or late or stop",
        "loop.due(config.every.save) or late",
        "tests/run_test.py -k asked_to_stop",
    ),
    (
        "the saved step is on its way when it is looked at",
        "if last:\n            self.checkpoints.wait()",
        "pass",
        "tests/run_test.py -k looks_at",
        "a process that is killed then is not part of the tests",
    ),
    (
        "tokens seen are counted anew after a rest",
        'self.num_tokens = saved.get("num_tokens", 0.0)',
        "pass",
        "tests/run_test.py -k looks_at",
    ),
    (
        "one key for all held-out batches",
        "jax.random.fold_in(jax.random.key(0), number)",
        "jax.random.key(0)",
        "tests/stages/evaluate_test.py",
    ),
    (
        "every evaluation has other keys",
        "jax.random.fold_in(jax.random.key(0), number)",
        "jax.random.fold_in(jax.random.key(0), number + state.step)",
        "tests/stages/evaluate_test.py",
    ),
    (
        "the last step's hook is left out",
        "if not self.hooks.finish or self.checkpoints.latest() == self.config.steps:",
        "if True:",
        "tests/train_test.py",
    ),
    (
        "what is concluded was not saved before",
        "self._save(trained)",
        "pass",
        "tests/train_test.py",
    ),
    (
        "the whole held-out set is looked at before a stop",
        "if stopping:\n    return {}",
        "pass",
        "tests/train_test.py -k further",
    ),
    (
        "a step that is looked at is not saved when it stops",
        "self.last_saved != self.step",
        "False",
        "tests/train_test.py -k further",
    ),
)

_REPORTED = (
    *in_file(
        "stagecraft/metrics.py",
        "tests/run_test.py -k looks_at",
        (
            "a resumed step has its evaluation twice",
            "resume_step - (evaluated_again and evaluation)",
            "resume_step",
        ),
        (
            "a resumed step has its samples twice",
            "resume_step - sampled_again",
            "resume_step",
        ),
    ),
    *in_file(
        "stagecraft/stages/update.py",
        "tests/stages/deployed_test.py",
        (
            "the raw weights are evaluated",
            "evaluate(stage.averaged(state), raw, key)",
            "evaluate(state, raw, key)",
        ),
        (
            "padding counts as tokens seen",
            "(v > 0).sum()",
            "v.size",
            "tests/stages/counts_test.py",
        ),
    ),
    *in_file(
        "stagecraft/stages/unpaired_preference.py",
        "tests/stages/unpaired_preference_test.py -k bco",
        (
            "held-out rewards move the running mean",
            "functools.partial(prepare, trains=False)",
            "prepare",
        ),
    ),
    *in_file(
        "stagecraft/stages/group_policy.py",
        "tests/stages/counts_test.py -k groups",
        (
            "a shared prefill is counted for each completion",
            "prompts * prompt + rows * new",
            "rows * length",
        ),
        (
            "one scoring pass is counted for two",
            "needs_reference + (needs_reference or _needs_old(config))",
            "needs_reference + _needs_old(config)",
        ),
    ),
    *in_file(
        "stagecraft/models/locate.py",
        "tests/lengths_test.py",
        (
            "the parent's length alone counts",
            'key.endswith("_from")',
            'key == "start_from"',
        ),
        (
            "a stage's parent is not followed",
            "name = experiment.stages[name].start_from",
            'name = ""',
        ),
    ),
    *in_file(
        "stagecraft/data/dataset.py",
        "tests/data/heldout_test.py",
        (
            "rows of one prompt are split",
            "places.setdefault(prompt_of(row), [])",
            "places.setdefault(place, [])",
        ),
    ),
)

MUTANTS = (
    *_MODEL,
    *_ATTENTION,
    *_WIDTHS,
    *_SCORES,
    *_HEADS,
    *_SAMPLING,
    *_DRAWS,
    *_RUN,
    *_MASKED,
    *_OPTIMIZER,
    *_TRAIN,
    *_REPORTED,
)
