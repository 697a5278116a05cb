"""The verifiers by their names in a config."""

from stagecraft.errors import UserError
from stagecraft.signals.verify import choice, form, mathematics, number

VERIFIERS = {
    "number": number.number,
    "math": mathematics.math,
    "choice": choice.choice,
    "regex": form.regex,
    "tags": form.tags,
    "thinking": form.thinking,
    "length": form.length,
    "schema": form.schema,
    "language": form.language,
}
RUNS_CODE = ("code", "python", "unit_tests", "sandbox")


def refuse_code(name):
    """Refuses a verifier that would run what a model writes."""
    if name in RUNS_CODE:
        raise UserError(
            f"verifiers={name!r}: a model's code is never run here: no sandbox that "
            "holds can be promised; score it elsewhere, or use 'regex' or a function "
            "of yours"
        )
