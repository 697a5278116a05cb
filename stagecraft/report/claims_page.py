"""Writes claims.html: the verdict on each claim, with the figures of every seed."""

import math
from collections.abc import Sequence
from pathlib import Path

from stagecraft import process, storage
from stagecraft.anatomy import claims
from stagecraft.errors import UserError
from stagecraft.report import render
from stagecraft.report.findings import show

PAGE = "claims.html"
WIDTH, PAD, APART = 560, 14, 56  # of a picture and its labels, in its own units
# Verdicts in the order of the first table.
ORDER = (claims.HOLDS, claims.REFUTED, claims.UNDECIDED, claims.NOT_HERE, claims.NONE)


def write(root: Path, asked: Sequence, seeds: int) -> Path:
    """Writes ROOT/claims.html; returns its path.

    Args:
        root: the work directory.
        asked: what `claims_lab.ask` returned.
        seeds: chains that were asked.
    """
    counts = {verdict: 0 for verdict in ORDER}
    for one in asked:
        counts[one.outcome.verdict] += 1
    holm = claims.holm([one.outcome.p for one in asked])
    text = render.render(
        "claims.html.jinja",
        answer=_answer(counts, seeds),
        claims=[_shown(one, mark) for one, mark in zip(asked, holm, strict=True)],
        provenance=process.made_with(),
    )
    storage.write_text(root / PAGE, text)
    return root / PAGE


def read(folder: Path) -> list[dict]:
    """Reads verdicts back, as a page's table shows them; [] where there are none.

    Raises:
        UserError: FOLDER/claims.json is damaged.
    """
    path = folder / claims.VERDICTS
    table = storage.read_json(path, {"claims": []})
    try:
        return [
            {
                "claim": row,
                "outcome": row,
                "effect": _effect(row["effect"], row["alike"]),
                "interval": interval(outcome),
                "needed": needed(outcome),
            }
            for row in table["claims"]
            for outcome in [claims.Outcome(*map(row.get, claims.Outcome._fields))]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not what `stagecraft claims` writes; ask them again"
        ) from error


def _effect(size, alike):
    return f"within ±{size:g}" if alike else f"beyond {size:g}"


def _answer(counts, seeds):
    parts = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    return f"Of {sum(counts.values())} claims over {seeds} seeds: {', '.join(parts)}."


def _shown(one, holm):
    claim, outcome = one.claim, one.outcome
    return {
        "claim": claim,
        "outcome": outcome,
        "effect": _effect(claim.effect, claim.alike),
        "interval": interval(outcome),
        "needed": needed(outcome),
        "holm": holm,
        "registered": one.registered[:12],
        "seconds": one.seconds,
        "values": [show(value) for value in one.values],
        "controls": [show(value) for value in one.controls],
        "picture": picture(claim, outcome, one.values, one.controls),
        "also": [
            (name, show(mean), show(half) if half is not None else "")
            for name, (mean, half) in one.also.items()
        ],
    }


def interval(outcome: claims.Outcome) -> str:
    """Returns a mean and its interval in words; "" where there is none."""
    if outcome.mean is None:
        return ""
    if outcome.low is None or outcome.low == outcome.high:
        return show(outcome.mean)
    return f"{show(outcome.mean)} ({show(outcome.low)} to {show(outcome.high)})"


def needed(outcome: claims.Outcome) -> str:
    """Returns what an undecided claim would need in words; "" for any other."""
    if outcome.verdict != claims.UNDECIDED:
        return ""
    seeds = outcome.seeds_needed
    return f"{seeds} seeds would do" if seeds else "over 1,000 seeds would be needed"


def picture(claim, outcome, values, controls) -> dict | None:
    """Returns where the marks of a claim's picture stand; None without a value.

    Returns:
        zero, effects: x of lines. low, high: x of the interval's ends, None without
        one. values, controls: x of dots, one a seed. ticks: (x, text) of the axis.
    """
    effects = [-claim.effect, claim.effect] if claim.alike else [claim.effect]
    ends = [end for end in (outcome.low, outcome.high) if end is not None]
    numbers = [*values, *controls, *effects, *ends, 0.0]
    numbers = [number for number in numbers if math.isfinite(number)]
    if not values or max(numbers) == min(numbers):
        return None
    low, high = min(numbers), max(numbers)

    def place(number):
        return round(PAD + (WIDTH - 2 * PAD) * (number - low) / (high - low), 1)

    known = outcome.low is not None and outcome.low != outcome.high
    return {
        "width": WIDTH,
        "zero": place(0.0),
        "effects": [place(effect) for effect in effects],
        "low": place(outcome.low) if known else None,
        "high": place(outcome.high) if known else None,
        "values": [place(value) for value in values],
        "controls": [place(value) for value in controls],
        "ticks": _ticks([*effects, 0.0, low, high], place),
    }


def _ticks(numbers, place):
    """Labels of an axis, the first of those that would touch: (x, text, anchor)."""
    ticks = []
    for number in numbers:
        x = place(number)
        if all(abs(x - other) >= APART for other, _, _ in ticks):
            near = "start" if x < APART / 2 else "middle"
            near = "end" if x > WIDTH - APART / 2 else near
            ticks.append((x, show(number) if number else "0", near))
    return ticks


def markdown(asked: Sequence) -> str:
    """Returns the verdicts as a Markdown table, for a page of results."""
    rows = ["| number | claim | verdict | primary | control |", "|---|---|---|---|---|"]
    for one in asked:
        claim, outcome = one.claim, one.outcome
        notes = "; ".join(filter(None, (outcome.reason, needed(outcome))))
        effect = _effect(claim.effect, claim.alike)
        measured = f"{interval(outcome) or '–'}; {effect}?"
        control = show(sum(one.controls) / len(one.controls)) if one.controls else "–"
        verdict = f"**{outcome.verdict}**" + (f": {notes}" if notes else "")
        cells = (str(claim.number), claim.claim, verdict, measured, control)
        rows.append(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        )
    return "\n".join(rows)
