"""Mistakes in token shifts, gradients of objectives, and steps along directions."""

from tests.mutants.mutant import in_file

_SHIFT = in_file(
    "stagecraft/anatomy/token_shift.py",
    "tests/anatomy/token_shift_test.py",
    ("ties take the worse rank", "logits > own", "logits >= own"),
    (
        "ranks from 0",
        "1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32)",
        "jnp.sum(logits > own, axis=-1, dtype=jnp.int32)",
    ),
    ("the writer reads itself", "ranks(q, targets)", "ranks(p, targets)"),
    ("the divergence turned round", "divergence(p, q)", "divergence(q, p)"),
    ("rank 3 counts as shifted", "rank <= MARGINAL", "rank < MARGINAL"),
    ("tokens of the prompt count", "column[mask]", "column[mask | True]"),
)
_READINGS = in_file(
    "stagecraft/anatomy/readings.py",
    "tests/anatomy/readings_test.py",
    ("parents come first", "reversed(names)", "list(names)"),
    ("the reader is the root alone", "chain[:1]", "chain[:0]"),
    (
        "the place of a token, not the one before",
        "np.int32(len(asked))",
        "np.int32(len(asked) + 1)",
    ),
    ("alternatives are spelled at the start", "before = ids[:place]", "before = []"),
    ("half a character is text", "added.endswith(HALF)", "False"),
    (
        "control tokens are text",
        "ids | {*tokenizer.stops, *tokenizer.control_ids}",
        "{None}",
    ),
)
_READ = in_file(
    "stagecraft/anatomy/token_shift.py",
    "tests/anatomy/readings_test.py",
    ("a token is an alternative to itself", "logits.at[own].set(-jnp.inf)", "logits"),
    (
        "alternatives have the probability of what was written",
        "jnp.take_along_axis(probabilities, others, axis=-1)",
        "jnp.broadcast_to(probabilities[own][:, None], others.shape)",
    ),
    (
        "the reader's divergence",
        "divergence(written, logits)",
        "divergence(logits, written)",
    ),
    ("the writer's ranks", "ranks(logits, tokens)", "ranks(written, tokens)"),
)
_GRADIENTS = in_file(
    "stagecraft/anatomy/gradients.py",
    "tests/anatomy/gradients_test.py",
    ("rejected answers are demonstrations", "v[0::2]", "v[1::2]"),
    (
        "answers of two prompts as a pair",
        "jnp.sum(logps * mask, axis=1).reshape(-1, 2)",
        "jnp.sum(logps * mask, axis=1).reshape(2, -1).T",
    ),
    (
        "a reference that moves",
        "losses.dpo(both, jax.lax.stop_gradient(both), beta=BETA)",
        "losses.dpo(both, both, beta=BETA)",
    ),
    (
        "halves that share their noise",
        "(cosine(a[one], b[other]) + cosine(b[one], a[other])) / 2",
        "(cosine(a[one], a[other]) + cosine(b[one], b[other])) / 2",
    ),
    ("no root of the reliabilities", "math.sqrt(own[0] * own[1])", "own[0] * own[1]"),
)
_STEPS = in_file(
    "stagecraft/anatomy/sensitivity.py",
    "tests/anatomy/sensitivity_test.py",
    ("backwards", "a + factor * d", "a - factor * d"),
    ("a step of its own norm", "size * norm(model) / norm(direction)", "size"),
    ("one noise for all seeds", "jax.random.key(seed)", "jax.random.key(0)"),
    (
        "the divergence of a step turned round",
        "causes.divergence(moved, model, said.batch)",
        "causes.divergence(model, moved, said.batch)",
    ),
)
_STYLE = in_file(
    "stagecraft/worlds/countries/styled.py",
    "tests/worlds/styled_test.py",
    (
        "every kind is demonstrated in the style",
        "[row for row in rows if dialogue.topic(row['prompt'])[0] == SEEN]",
        "list(rows)",
    ),
    (
        "what was shown counts as unseen",
        "[rate for kind, rate in rates.items() if kind != SEEN]",
        "list(rates.values())",
    ),
    ("bare text is asked as turns", "chat=False", "chat=True"),
)
MUTANTS = _SHIFT + _READINGS + _READ + _GRADIENTS + _STEPS + _STYLE
