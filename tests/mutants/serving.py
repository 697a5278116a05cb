"""Mistakes of the server of models, and of reading GGUF files."""

from tests.mutants.mutant import in_file

_ANSWERS = "tests/serve/server_answers_test.py"
_REQUESTS = "tests/serve/server_requests_test.py"

_SLOTS = in_file(
    "stagecraft/models/slots.py",
    _ANSWERS,
    (
        "a token does not see itself in its row",
        "visible = slots <= rows.length[:, None]",
        "visible = slots < rows.length[:, None]",
    ),
    (
        "each step of a row draws alike",
        "keys = jax.vmap(jax.random.fold_in)(keys, draws.step)",
        "keys = jax.vmap(jax.random.fold_in)(keys, 0 * draws.step)",
    ),
    (
        "a neighbour's top_p cuts all rows",
        "jnp.where(cut, near, token)",
        "jnp.where(cut | True, near, token)",
    ),
    (
        "an echo scores each token by itself",
        "targets = jnp.roll(ids, -1, axis=1)",
        "targets = ids",
    ),
    (
        "padding says what follows a prompt",
        "last = (mask.sum(axis=1) - 1)[:, None, None]",
        "last = (0 * mask.sum(axis=1) - 1)[:, None, None]",
    ),
    (
        "a row goes on behind its end",
        "left=jnp.where(ended, 0, rows.left - live)",
        "left=rows.left - live",
    ),
)

_ENGINE = (
    *in_file(
        "stagecraft/serve/engine.py",
        _ANSWERS,
        (
            "a prompt's first token is thought likely",
            "Token(asked.ids[0], None, [])",
            "Token(asked.ids[0], 0.0, [])",
        ),
        ("the cache does not grow", "while room < least:", "while False:"),
    ),
    *in_file(
        "stagecraft/serve/engine.py",
        _REQUESTS,
        ("who hung up keeps the row", "self._leave()", "pass"),
        (
            "a broken device leaves its cache",
            "self._live, self._cache, self._room = {}, None, 0",
            "self._live = {}",
        ),
        (
            "any number may wait",
            "len(self._waiting) + len(completions) > WAITING",
            "False",
        ),
    ),
    *in_file(
        "stagecraft/serve/answering.py",
        _ANSWERS,
        ("choices draw alike", "_seed(asked.seed, index)", "_seed(asked.seed, 0)"),
        ("tokens behind a stop are counted", "if writer.stopped:\n    break", ""),
    ),
    *in_file(
        "stagecraft/serve/model_app.py",
        _REQUESTS,
        ("nobody sees a client go", "answer.give_up()", "pass"),
    ),
)

_TEXT = (
    *in_file(
        "stagecraft/serve/writing.py",
        _ANSWERS,
        ("half of a character is written", "not text.endswith(HALF)", "True"),
        ("the beginning of a stop is written", "return count", "return 0"),
        ("the last stop ends a text", "min(places)", "max(places)"),
    ),
    *in_file(
        "stagecraft/serve/replies.py",
        _ANSWERS,
        (
            "the chosen token is not in the table",
            "(*token.top, (token.id, token.logp))",
            "token.top",
        ),
    ),
    *in_file(
        "stagecraft/serve/requests.py",
        _REQUESTS,
        ("unknown fields are left out", "name not in known", "False"),
        ("a context holds one more", "room = context - longest", "room = context"),
        ("what is not supported is left out", "value in NEUTRAL[name]", "True"),
    ),
    *in_file(
        "stagecraft/serve/guard.py",
        _REQUESTS,
        (
            "any key opens",
            "hmac.compare_digest(given, self.token.encode())",
            "bool(given)",
        ),
    ),
)

_GGUF = (
    *in_file(
        "stagecraft/models/gguf.py",
        "tests/models/gguf_test.py",
        (
            "rows stay permuted",
            "array.reshape(self.heads, -1, 2, *self.shape[1:])",
            "array.reshape(self.heads, 2, -1, *self.shape[1:])",
        ),
        (
            "all architectures are permuted",
            "heads.get(part, 0) if ARCHITECTURES[name] else 0",
            "heads.get(part, 0)",
        ),
        (
            "settings that are not known are left out",
            "key not in KEYS and key not in OTHERS",
            "False",
        ),
    ),
    *in_file(
        "stagecraft/text/tokenizer_gguf.py",
        "tests/models/gguf_test.py",
        (
            "control tokens are letters",
            "kind in (CONTROL, USER_DEFINED)",
            "kind == USER_DEFINED",
        ),
        ("digits stay together", "if cut.digits:", "if False:"),
        (
            "characters stay decomposed",
            '{"type": "NFC"} if cut.composed else None',
            "None",
        ),
    ),
)

MUTANTS = (*_SLOTS, *_ENGINE, *_TEXT, *_GGUF)
