"""Mistakes in random numbers: a key that serves twice."""

from tests.mutants.mutant import in_file

_TESTS = "tests/random_numbers_test.py"

_TRAIN = in_file(
    "stagecraft/train.py",
    f"{_TESTS} -k each_step",
    (
        "one key for every step",
        "jax.random.fold_in(step_key, loop.step)",
        "step_key",
    ),
    (
        "the steps fold the key of the beginning",
        "init_key, step_key = jax.random.split(key)",
        "init_key = step_key = key",
    ),
)
_STAGE = in_file(
    "stagecraft/stages/stage.py",
    f"{_TESTS} -k adapters",
    (
        "the adapters of policy and critic start alike",
        "[key] * count if frozen is None else jax.random.split(key, count)",
        "[key] * count",
    ),
)
_ROLLOUT = in_file(
    "stagecraft/stages/rollout.py",
    f"{_TESTS} -k rollout",
    (
        "minibatches in an order of the samples' own numbers",
        "sample_key, judge_key = split(key)",
        "sample_key = judge_key = key",
    ),
    (
        "every rollout draws the same",
        "rollouts.sample(_policy(model), raw, sample_key)",
        "rollouts.sample(_policy(model), raw, jax.random.key(0))",
    ),
    (
        "every held-out batch draws the same",
        "samples = rollouts.sample(policy, raw, key)",
        "samples = rollouts.sample(policy, raw, jax.random.key(0))",
    ),
)
_UPDATE = in_file(
    "stagecraft/stages/update.py",
    f"{_TESTS} -k drops",
    (
        "every micro-batch drops alike",
        "jax.random.split(key, micro_batches)",
        "jnp.stack([key] * micro_batches)",
    ),
    (
        "every minibatch drops alike",
        "jax.random.split(key, count)",
        "jnp.stack([key] * count)",
    ),
)
_LANGUAGE = in_file(
    "stagecraft/models/language.py",
    f"{_TESTS} -k completions",
    (
        "one key for every batch of completions",
        "key = jax.random.fold_in(jax.random.key(seed), number)",
        "key = jax.random.key(seed)",
    ),
    (
        "a batch draws as the first one of the next seed",
        "key = jax.random.fold_in(jax.random.key(seed), number)",
        "key = jax.random.key(seed + number)",
    ),
)
_RECORDS = in_file(
    "stagecraft/stages/records.py",
    f"{_TESTS} -k prompts",
    (
        "one seed for every part of the prompts",
        'seed = header["seed"] + number',
        'seed = header["seed"]',
    ),
)
_HARNESS = in_file(
    "stagecraft/anatomy/harness.py",
    f"{_TESTS} -k harness",
    (
        "one key for every batch of the harness",
        "key = jax.random.fold_in(jax.random.key(self.seed), batches)",
        "key = jax.random.key(self.seed)",
    ),
    ("the harness counts no batches", "batches += 1", ""),
)
_RUN = in_file(
    "stagecraft/run.py",
    f"{_TESTS} -k each_stage",
    (
        "one key for every stage",
        "key = jax.random.fold_in(key, zlib.crc32(name.encode()))",
        "",
    ),
    (
        "a stage's own seed changes no key",
        "key = jax.random.fold_in(key, stage.seed)",
        "key = key",
    ),
)
MUTANTS = _TRAIN + _STAGE + _ROLLOUT + _UPDATE + _LANGUAGE + _RECORDS + _HARNESS + _RUN
