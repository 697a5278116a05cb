"""Measures a judge, or a person, on a file of compared pairs; asks a judge about one.

A line that holds a verdict is as a comparisons stage writes it: "chosen" and
"rejected", perhaps "probability" (that chosen is better), "first" (which of the two
was in the first slot), "logps" (both orders' log-probabilities of the labels), "gold"
and "own" ("chosen" or "rejected": the better one by what the rater is held against, and
the one that it wrote itself).
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from stagecraft import defaults, runs, sharding, storage, worlds
from stagecraft.anatomy import bias
from stagecraft.anatomy.bias import Rated
from stagecraft.data import readers
from stagecraft.errors import UserError
from stagecraft.metrics import Progress
from stagecraft.models import locate
from stagecraft.signals import endpoint, judge, protocol, template
from stagecraft.signals.protocol import Verdict
from stagecraft.stages import records

SIDES = ("chosen", "rejected")
BATCH = 16  # pairs between two lines of the journal


def measure(path: str | Path, world: str = "") -> tuple[dict, list[Rated]]:
    """Measures the verdicts in a file.

    Args:
        path: a .jsonl file of records, of a comparisons stage or of `ask`; pairs
            without a verdict are read from NAME_unrated.jsonl beside it.
        world: name of an embedded world, whose gold score the rater is held against.

    Returns:
        ({figure: `bias.Figure`}, what was read).
    """
    path = Path(path)
    rows = [_rated(where, row, world) for where, row in _lines(path)]
    beside = _unrated(path)
    if beside.exists():
        rows += [_rated(where, row, world) for where, row in _lines(beside)]
    if not rows:
        raise UserError(f"{path}: holds no pair; nothing to measure")
    if all(row.probability in (None, 0.5) for row in rows):
        raise UserError(
            f"{path}: holds ties alone, or no verdict: nothing says what its rater "
            "goes by"
        )
    return bias.measure(rows), rows


def _unrated(path):
    return path.with_name(f"{path.stem}_unrated.jsonl")


def _lines(path):
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not a line of JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object, as {{...}}")
            yield where, row


def _rated(where, row, world):
    """Returns a line as a `Rated`, its first slot first."""
    if "answers" in row and "chosen" not in row:  # a pair without a verdict
        answers = tuple(map(str, row["answers"]))
        return Rated((*answers, "", "")[:2], None, str(row.get("reason", "unscored")))
    texts = [_text(where, row, side) for side in SIDES]
    first = _side(where, row, "first") or 0
    p = row.get("probability", row.get("preference", 1.0))
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UserError(f"{where}: probability={p!r}: expected a number from 0 to 1")
    gold = _side(where, row, "gold")
    if world:
        gold = _by_world(world, row.get("prompt"), texts)
    places = [
        None if x is None else x ^ first for x in (gold, _side(where, row, "own"))
    ]
    return Rated(
        (texts[first], texts[1 - first]),
        1 - p if first else float(p),
        logps=_logps(where, row),
        gold=places[0],
        own=places[1],
    )


def _text(where, row, side):
    value = row.get(side)
    if isinstance(value, list):
        value = "\n".join(str(m.get("content")) for m in value if isinstance(m, dict))
    if not isinstance(value, str):
        raise UserError(f"{where}: {side}: is missing, or neither text nor messages")
    return value


def _side(where, row, key):
    """Returns 0 of "chosen", 1 of "rejected", None without the key."""
    if row.get(key) is None:
        return None
    if row[key] not in SIDES:
        raise UserError(f"{where}: {key}={row[key]!r}: expected 'chosen' or 'rejected'")
    return SIDES.index(row[key])


def _logps(where, row):
    table = row.get("logps") or ()
    fit = isinstance(table, list | tuple) and all(
        isinstance(order, list)
        and len(order) == 2
        and all(isinstance(x, int | float) and math.isfinite(x) for x in order)
        for order in table
    )
    if not fit or len(table) > 2:
        raise UserError(
            f"{where}: logps: expected one or two orders of two log-probabilities"
        )
    return tuple(map(tuple, table))


def _by_world(world, prompt, texts):
    """Returns the answer that a world's gold score prefers; None for a tie."""
    scores = [worlds.get(world).gold(template.as_text(prompt), text) for text in texts]
    return None if scores[0] == scores[1] else int(scores[1] > scores[0])


def ask(path: str | Path, out: str | Path, name: str, settings: ConfigDict) -> dict:
    """Asks a judge about the pairs of a file, whose better answers are gold.

    Which answer is asked about first is drawn by the pair's text. A run that was killed
    goes on from OUT.journal.

    Args:
        path: comparisons in any form that a stage reads.
        out: the file of records to write.
        name: a finished stage's folder or "hf:FOLDER"; "" for settings.url.
        settings: the group `judge` of a stage's config.

    Returns:
        {"pairs", "unrated", "tokens"}.
    """
    out, config = Path(out), defaults.stage("comparisons", judge_from=name)
    config.judge = settings
    judge.check_settings("stagecraft", config, (2,))
    pairs = [
        pair
        for one in readers.comparisons(str(path))
        if (pair := _pair(one))[1][0] != pair[1][1]
    ]
    mesh = sharding.make_mesh(-1, 1, 1)
    with jax.set_mesh(mesh):
        rater = judge.Judge(_asked(name, settings, out, mesh), settings)
        header = {"judge": rater.identity, "pairs": storage.digest(pairs)}
        progress, rows = Progress("judge", -(-len(pairs) // BATCH), unit="pairs"), []
        failures = protocol.Failures("judge", settings.max_failed)
        path = out.with_name(f"{out.name}.journal")
        with contextlib.closing(progress), records.Journal(path, header) as journal:
            for start in range(0, len(pairs), BATCH):
                part = pairs[start : start + BATCH]
                entry, replayed = journal.once(_verdicts, rater, part, failures)
                said = [Verdict(*values) for values in entry["verdicts"]]
                rows += [_record(*both, rater) for both in zip(part, said, strict=True)]
                if not replayed:
                    progress.step(start // BATCH + 1, {}, len(part))
    rated = [row for row in rows if "chosen" in row]
    records.write(out.parent, rated, out.name)
    records.write(
        out.parent, [r for r in rows if "chosen" not in r], _unrated(out).name
    )
    return {
        "pairs": len(rated),
        "unrated": len(rows) - len(rated),
        "tokens": sum(row.get("tokens", 0) for row in rows),
    }


def _asked(name, settings, out, mesh):
    if settings.url:
        return endpoint.Endpoint(settings, out.parent)
    source = locate.locate(name)
    if source.where == "nowhere":
        raise UserError(
            f"--judge={name}: expected hf:FOLDER or the folder of a finished stage, "
            "as runs/a/sft"
        )
    rows = runs.whole_rows(settings.batch_size, mesh)
    return judge.of_source(source, source.load(mesh), rows, "")


def _pair(one):
    """Returns [prompt, [better text, worse text]] of a `data.records.Comparison`."""
    prompt: Any = one.prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]
    texts = [
        "\n".join(str(m["content"]) for m in answer)
        for answer in (one.answers[0], one.answers[-1])
    ]
    return [prompt, texts]


def _first(pair):
    """Returns which answer is asked about first, 0 or 1: a coin of the pair's own."""
    return int(storage.digest(pair)[0], 16) % 2


def _verdicts(rater, part, failures):
    shown = [texts[::-1] if _first([p, texts]) else texts for p, texts in part]
    pairs = [((one, True), (two, True)) for one, two in shown]
    verdicts = rater.rate([prompt for prompt, _ in part], pairs)
    failures.see(verdict.reason for verdict in verdicts)
    return {"verdicts": verdicts}


def _record(pair, verdict, rater):
    prompt, texts = pair
    first = _first(pair)  # of the gold order: which was shown first
    shown = texts[::-1] if first else texts
    source = {"signal": "judge", "judge": rater.identity}
    if verdict.probability is None:
        row = {"prompt": prompt, "answers": shown, "reason": verdict.reason}
        return row | source | (verdict.evidence or {})
    picked = int(verdict.probability < 0.5)
    sure = max(verdict.probability, 1 - verdict.probability)
    row = {"prompt": prompt, "chosen": shown[picked], "rejected": shown[1 - picked]}
    row |= {"probability": sure, "first": SIDES[picked]}
    row |= {"gold": SIDES[int(shown[picked] != texts[0])]}
    return row | source | (verdict.evidence or {})
