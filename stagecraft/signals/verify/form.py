"""Verifiers of form: tags, length, patterns, JSON, language. None needs an answer."""

import importlib.util
import json
import re
from pathlib import Path

from stagecraft.curate import language_id
from stagecraft.errors import UserError, install
from stagecraft.signals.verify import answers

FAILED = float("nan")  # no reward: it could not be told
SECONDS = 1.0  # a pattern may take
LONGEST = 20_000  # characters of JSON
DEEPEST = 64  # brackets of JSON within each other
WORDS, LETTERS = 20, 20  # below which no language is recognised


def _needs(name, module):
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"verifiers={name!r}: {module} is not installed: {install('verify')}"
        )


def _by_reply(score):
    """A verifier from a function of one reply; 0 where thinking did not end."""

    def verify(completions):
        replies = [answers.reply(one) for one in completions]
        return [0.0 if text is None else score(text) for text in replies]

    return verify


def thinking(*, opened: bool = False):
    """1 for <think>...</think> and then a reply, each once and none empty, else 0.

    Args:
        opened: the prompt's template writes <think> itself.
    """
    opening, closing = answers.OPENING, answers.CLOSING

    def score(text):
        text = opening * opened + text.lstrip()
        once = text.count(opening) == text.count(closing) == 1
        inside, _, reply = text.removeprefix(opening).partition(closing)
        return float(
            text.startswith(opening) and once and bool(inside.strip() and reply.strip())
        )

    def verify(completions):
        return [score(answers.text_of(one)) for one in completions]

    return verify


def tags(*, tags: str = "think,answer"):
    """1 where the completion is these sections, <TAG>...</TAG>, in order, else 0.

    Each comes once, none is empty, and nothing but space is between them.

    Args:
        tags: their names, with commas.
    """
    names = [name.strip() for name in tags.split(",")]
    if not all(re.fullmatch(r"[\w-]+", name) for name in names):
        raise UserError(f"verifier_args.tags={tags!r}: expected names with commas")
    marks = [mark for name in names for mark in (f"<{name}>", f"</{name}>")]
    whole = re.compile(
        "".join(rf"\s*<{name}>(.*?)</{name}>" for name in names) + r"\s*", re.DOTALL
    )

    def score(text):
        if any(text.count(mark) != 1 for mark in marks):
            return 0.0
        match = whole.fullmatch(text)
        return float(match is not None and all(map(str.strip, match.groups())))

    def verify(completions):
        return [score(answers.text_of(one)) for one in completions]

    return verify


def length(*, most: int, least: int = 0):
    """1 for `least` to `most` characters; falls to 0 at none and at twice as many.

    Args:
        most, least: characters, space at both ends not counted.
    """
    if not 0 <= least <= most or most < 1:
        raise UserError(
            f"verifier_args.most={most}, least={least}: expected 0 <= least <= most"
        )

    def score(text):
        size = len(text.strip())
        if size < least:
            return size / least
        return 1.0 if size <= most else max(0.0, 2 - size / most)

    def verify(completions):
        return [score(answers.text_of(one)) for one in completions]

    return verify


def regex(*, pattern: str):
    """1 where the pattern matches the whole reply, else 0.

    Args:
        pattern: as the `regex` package reads it; one that takes longer than a second on
            a reply fails on it.
    """
    _needs("regex", "regex")
    import regex as engine

    try:
        compiled = engine.compile(pattern)
    except engine.error as error:
        line = f"verifier_args.pattern={pattern!r}: no pattern ({error})"
        raise UserError(line) from error

    def score(text):
        try:
            return float(compiled.fullmatch(text.strip(), timeout=SECONDS) is not None)
        except TimeoutError:
            return FAILED

    return _by_reply(score)


def language(*, language: str = "en"):
    """1 where the reply is in a language, 0 in another; abstains where it is unsure.

    Args:
        language: one of those that curation recognises.
    """
    if language not in language_id.NAMES:
        raise UserError(
            f"verifier_args.language={language!r}: expected one of "
            f"{', '.join(language_id.NAMES)}"
        )

    def score(text):
        name, _ = language_id.recognise(text)
        by_letters = name in language_id.SCRIPTS
        size = sum(map(str.isalpha, text)) if by_letters else len(text.split())
        if name == "unknown" or size < (LETTERS if by_letters else WORDS):
            return None
        return float(name == language)

    return _by_reply(score)


# -- JSON ------------------------------------------------------------------------------


def schema(*, schema: str):
    """1 where the reply is JSON, and nothing else, that a schema allows; else 0.

    NaN and infinite numbers, a key twice, more than 64 brackets within each other and
    more than 20,000 characters are refused. Nothing is fetched.

    Args:
        schema: the file of a JSON schema. Its patterns are searched by the `regex`
            package, within a second.
    """
    _needs("schema", "jsonschema")
    _needs("schema", "regex")
    rules = _read_schema(schema)
    validator = _validator(schema, rules)

    def score(text):
        try:
            value = parsed(text)
        except ValueError:
            return 0.0
        try:
            return float(validator.is_valid(value))
        except TimeoutError:
            return FAILED

    verify = _by_reply(score)
    verify.reads = json.dumps(rules, sort_keys=True)
    return verify


def parsed(text):
    """Returns the JSON value of a text.

    Raises:
        ValueError: it is none, or one that readers disagree about.

    >>> parsed('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    depth = 0
    for part in re.findall(r'"(?:[^"\\]|\\.)*+"|[\[{\]}]', text):
        depth += (part in "[{") - (part in "]}")
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} brackets within each other")
    return json.loads(
        text,
        parse_constant=_refuse,
        parse_float=_finite,
        object_pairs_hook=_once,
    )


def _refuse(name):
    raise ValueError(f"{name} is no JSON")


def _finite(text):
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return value


def _once(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def _read_schema(path):
    where = f"verifier_args.schema={str(path)!r}"
    try:
        rules = parsed(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: cannot read it ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{where}: no JSON ({error})") from error
    if '"patternProperties"' in json.dumps(rules):
        raise UserError(
            f"{where}: patternProperties has no limit on time; name the properties"
        )
    return rules


def _validator(path, rules):
    import jsonschema
    import referencing
    import regex as engine

    def pattern(validator, pattern, value, schema):
        text = validator.is_type(value, "string")
        if text and not engine.search(pattern, value, timeout=SECONDS):
            yield jsonschema.ValidationError(f"does not match {pattern}")

    base = jsonschema.validators.validator_for(rules)
    try:
        base.check_schema(rules)
    except jsonschema.SchemaError as error:
        line = f"verifier_args.schema={str(path)!r}: no schema ({error.message})"
        raise UserError(line) from error
    limited = jsonschema.validators.extend(base, {"pattern": pattern})
    # Without a registry of its own it would fetch what "$ref" names.
    return limited(rules, registry=referencing.Registry())
