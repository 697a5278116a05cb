"""Mistakes in what verifiers pay for."""

from tests.mutants.mutant import in_file

_NUMBER = in_file(
    "stagecraft/signals/verify/number.py",
    "tests/signals/verify/number_test.py",
    (
        "a part of an expression is a number",
        "match is None or _GOES_ON.match(rest, match.end())",
        "match is None",
    ),
    (
        "the sign is lost",
        'Decimal(minus + match["digits"].replace(",", ""))',
        'Decimal(match["digits"].replace(",", ""))',
    ),
    (
        "the right number anywhere is right",
        "match = _NUMBER.match(rest)",
        "match = _NUMBER.search(rest)",
    ),
    (
        "thinking that did not end is read",
        "float(text is not None and read(text, pattern) == gold)",
        "float(read(text or completion, pattern) == gold)",
    ),
    (
        "a number that is not finite is an answer",
        "number = number if number.is_finite() else None",
        "",
    ),
)
_ANSWERS = in_file(
    "stagecraft/signals/verify/answers.py",
    "tests/signals/verify/number_test.py tests/signals/verify/choice_test.py",
    ("the first marker counts", "text[ends[-1]:]", "text[ends[0]:]"),
    (
        "thinking is read with the reply",
        "last = text_of(completion).rpartition(CLOSING)[2]",
        "last = text_of(completion)",
    ),
)
_CHOICE = in_file(
    "stagecraft/signals/verify/choice.py",
    "tests/signals/verify/choice_test.py",
    (
        "several letters are a choice",
        "match is None or self.goes_on.match(rest, match.end())",
        "match is None",
    ),
    (
        "a word is a letter",
        "(self.marked if marked else self.bare).match(rest)",
        "self.marked.match(rest)",
    ),
)
_MATHEMATICS = in_file(
    "stagecraft/signals/verify/mathematics.py",
    "tests/signals/verify/mathematics_test.py",
    (
        "an expression that is not worked out equals its value",
        "number.read(gold, plain) is not None and _OPERATOR.search(box)",
        "False",
    ),
    ("the first box counts", r'text.rfind(r"\boxed{")', r'text.find(r"\boxed{")'),
    (
        "a box of any length",
        "box is None or len(box) > LONGEST",
        "box is None",
    ),
    (
        "what took too long is wrong",
        "FAILED if equal is None else float(equal)",
        "float(bool(equal))",
    ),
    (
        "a batch without a budget",
        "child.equal(gold, box, left) if left > 0 else None",
        "child.equal(gold, box, 600.0)",
    ),
)
_FORM = in_file(
    "stagecraft/signals/verify/form.py",
    "tests/signals/verify/form_test.py",
    ("a part of the reply matches", "compiled.fullmatch", "compiled.search"),
    ("a pattern without a limit", "text.strip(), timeout=SECONDS", "text.strip()[:20]"),
    ("a key twice", "len(value) != len(pairs)", "False"),
    ("NaN is JSON", "parse_constant=_refuse,", ""),
    ("infinity is JSON", "parse_float=_finite,", ""),
    ("brackets of any depth", "depth > DEEPEST", "False"),
    (
        "a schema is fetched",
        "limited(rules, registry=referencing.Registry())",
        "limited(rules)",
    ),
    (
        "short texts have a language",
        'name == "unknown" or size < (LETTERS if by_letters else WORDS)',
        "False",
    ),
    ("a reward below 0", "max(0.0, 2 - size / most)", "2 - size / most"),
    (
        "thinking twice",
        "text.count(opening) == text.count(closing) == 1",
        "text.count(opening) > 0",
    ),
    ("an empty section", "all(map(str.strip, match.groups()))", "True"),
)
_TABLE = in_file(
    "stagecraft/signals/verifiers.py",
    "tests/signals/verifiers_test.py tests/experiment_refusals_test.py",
    (
        "settings that no verifier takes",
        "key not in known",
        "False",
    ),
    (
        "settings change no identity",
        '[v.settings, getattr(v.function, "reads", "")] if v.settings else []',
        "[]",
    ),
)

_ATTEMPTS = in_file(
    "stagecraft/anatomy/attempts.py",
    "tests/anatomy/attempts_test.py",
    (
        "pass@k with its bias",
        "np.where(wrong < k, 1.0, 1.0 - np.exp(ratio))",
        "1.0 - (wrong / attempts) ** k",
    ),
    (
        "guesses add up",
        "1.0 - (1.0 - np.asarray(chances, float)) ** k",
        "k * np.asarray(chances, float)",
    ),
    (
        "an error that forgets the draws",
        "(attempts - 1) * np.var(without)",
        "np.var(without)",
    ),
)
_GUESSES = in_file(
    "stagecraft/anatomy/heldout_figures.py",
    "tests/anatomy/attempts_test.py",
    ("a guess knows the prompt", "(i + shift) % prompts", "i"),
)
_SUMS = in_file(
    "stagecraft/worlds/countries/sums.py",
    "tests/worlds/sums_test.py",
    ("no carry", "carry = step // 10", "carry = 0"),
    ("held-out sums are trained on", "order[few:][:train]", "order[:train]"),
)

MUTANTS = (
    _ATTEMPTS
    + _GUESSES
    + _SUMS
    + _NUMBER
    + _ANSWERS
    + _CHOICE
    + _MATHEMATICS
    + _FORM
    + _TABLE
)
