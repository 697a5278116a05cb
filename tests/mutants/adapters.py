"""Mistakes in adapters: what they compute, what is trained, what lies on disk."""

from tests.mutants.mutant import in_file

_LORA = in_file(
    "stagecraft/models/lora.py",
    "tests/models/lora_test.py tests/stages/lora_test.py",
    (
        "rslora ignored",
        "(self.rank**0.5 if self.rslora else self.rank)",
        "self.rank",
    ),
    (
        "B does not start at zero",
        "b = jnp.zeros((*stack, rank, *shape[contracted:]), jnp.float32)",
        "b = jnp.ones((*stack, rank, *shape[contracted:]), jnp.float32)",
    ),
    (
        "A drawn over one of its inputs' axes",
        "bound = math.prod(shape[:contracted]) ** -0.5",
        "bound = shape[0] ** -0.5",
    ),
    (
        "a head shared with its parent",
        "jax.tree.map(jnp.copy, v)",
        "jax.tree.map(jnp.asarray, v)",
    ),
    (
        "merged without its scale",
        "return weight + scale * product(a, b)",
        "return weight + product(a, b)",
    ),
    (
        "every target drops alike",
        "_dropout_keys(jax.random.fold_in(key, number), weight, part)",
        "_dropout_keys(key, weight, part)",
    ),
    (
        "every layer drops alike",
        "jax.random.split(key, stack) if stack else key",
        "jnp.broadcast_to(key, stack) if stack else key",
    ),
    (
        "a trained head is not put in",
        "_put(module, name, part)",
        "",
        dict(within="join"),
    ),
)
_LINEAR = in_file(
    "stagecraft/models/linear.py",
    "tests/models/lora_test.py",
    (
        "the path beside without its scale",
        "return self.scale * project(inner, self.b)",
        "return project(inner, self.b)",
    ),
    (
        "dropout without its rescaling",
        "jnp.where(kept, x / (1 - self.dropout), 0)",
        "jnp.where(kept, x, 0)",
    ),
)
_STAGES = in_file(
    "stagecraft/stages/update.py",
    "tests/stages/lora_test.py",
    (
        "dropout never reaches an update",
        "objective.terms(lora.join(frozen, model, key), micro)",
        "objective.terms(lora.join(frozen, model), micro)",
    ),
    (
        "every step drops alike",
        "return jax.random.fold_in(key, state.step)",
        "return key",
    ),
    (
        "the base is not handed to an update",
        "jitted(state, batch, frozen)",
        "jitted(state, batch, None)",
        dict(within="assemble"),
    ),
)
_PEFT = in_file(
    "stagecraft/models/peft.py",
    "tests/models/peft_test.py",
    (
        "patterns of alpha not read",
        'alpha = of("alpha_pattern", config.get("lora_alpha", 8))',
        'alpha = config.get("lora_alpha", 8)',
    ),
    (
        "patterns of rank not read",
        'rank = of("rank_pattern", config.get("r", 8))',
        'rank = config.get("r", 8)',
    ),
    (
        "every part of a module gets B whole",
        "_sides(place, shapes).region",
        "slice(None)",
    ),
    (
        "a module of parts keeps its alpha",
        "alphas[short(module)] = more * settings.alpha",
        "alphas[short(module)] = settings.alpha",
    ),
    ("the constant of a reward left out", "{BIAS: bias} if bias else {}", "{}"),
)
_DISK = in_file(
    "stagecraft/models/locate.py",
    "tests/stages/lora_test.py -k reads_back",
    ("another base is not noticed", 'if digest != record.base["id"]:', "if False:"),
)
_RUN = in_file(
    "stagecraft/run.py",
    "tests/stages/lora_test.py -k reads_back",
    (
        "the reward's constant of another model",
        "kind.finish(stage, data, functions.frozen)",
        "kind.finish(stage, data, None)",
    ),
)
MUTANTS = _LORA + _LINEAR + _STAGES + _PEFT + _DISK + _RUN
