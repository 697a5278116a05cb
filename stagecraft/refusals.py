"""What a stage refuses, by a detector whose error is measured first."""

from collections.abc import Callable
from pathlib import Path

import jax

from stagecraft import schema, storage
from stagecraft.anatomy import agreement, behaviour, refusal
from stagecraft.data import readers
from stagecraft.errors import UserError
from stagecraft.run import open_run

ROWS = 32  # prompts answered at once


def detector(path: str = "") -> Callable[[str], str]:
    """Returns the rules, or a detector by the opening phrases in a file, one a line."""
    if not path:
        return refusal.rules
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--phrases={path}: cannot be read as text ({error})") from None
    openings = [line for line in lines if line.strip()]
    if not openings:
        raise UserError(f"--phrases={path}: holds no phrase; expected one a line")
    return refusal.phrases(openings)


def error(labelled: str, detect, by: str = "") -> dict[str, refusal.Error]:
    """Measures a detector on labelled answers: {"": of all, value: of those with it}.

    Args:
        labelled: files, as of `refusal.read_labelled`.
        detect: answer -> class.
        by: a key of the records whose values are measured apart; "" for none.
    """
    rows = refusal.read_labelled(labelled)
    groups = {"": [(said, text) for _, said, text in rows]}
    for record, said, text in rows if by else ():
        groups.setdefault(_group(record, by, labelled), []).append((said, text))
    return {name: refusal.measure(part, detect) for name, part in groups.items()}


def ask(
    root: str | Path,
    stage: str,
    prompts: str,
    detect,
    *,
    fields: str = "",
    by: str = "",
    max_new_tokens: int = 128,
    out: str = "",
) -> dict[str, dict[str, agreement.Rate]]:
    """Asks a finished stage, greedily, and says what it refuses.

    Args:
        root, stage: a work directory and a stage of it that writes text.
        prompts: files of prompts; `fields` renames their keys, as data.fields does.
        detect: answer -> class.
        by: a key of the records whose values are counted apart; "" for none.
        max_new_tokens: longest answer.
        out: a file for the answers, or "".

    Returns:
        {"" for all, or a value of `by`: {class: `Rate`}}.
    """
    run = open_run(root)
    speaking = behaviour.speaking_stages(run)
    if stage not in speaking:
        raise UserError(
            f"--stage={stage}: {schema.hint(stage, speaking)}expected a finished stage "
            f"that writes text: {', '.join(speaking) or 'there is none yet'}"
        )
    asked = readers.prompts(prompts, readers.fields(fields))
    groups = [_group(one.record, by, one.where) if by else "" for one in asked]
    with jax.set_mesh(run.mesh()):
        answers = run.language(stage, ROWS).complete(
            [one.prompt for one in asked],
            chat=run.chat_format(stage),
            max_new_tokens=max_new_tokens,
        )
    said = [detect(text) for text, _ in answers]
    if out:
        rows = zip(asked, answers, said, strict=True)
        lines = [
            {"prompt": one.prompt, "completion": text, "ended": ended, "refusal": word}
            for one, (text, ended), word in rows
        ]
        storage.write_text(
            Path(out), "".join(storage.to_json(line) + "\n" for line in lines)
        )
    rates = {}
    for name in dict.fromkeys(["", *groups]):
        own = [w for w, group in zip(said, groups, strict=True) if name in ("", group)]
        rates[name] = {
            word: agreement.rate(own.count(word), len(own)) for word in refusal.CLASSES
        }
    return rates


def _group(record, by, where):
    if by not in record:
        raise UserError(
            f"--by={by}: not a key of {where}; its keys are "
            f"{', '.join(map(str, record))}"
        )
    return str(record[by])
