"""The answer of a run in a sentence, and its bounds, failed ones first."""

from stagecraft import bounds
from stagecraft.anatomy import figures
from stagecraft.metrics import is_number
from stagecraft.report.compare import number
from stagecraft.runs import part

_NAMED = 2  # figures, or bounds, that a sentence names


def rows_of(summary: dict) -> list[dict]:
    """Returns the bounds of a run as they are shown, failed ones first.

    Returns:
        [{"key", "title", "text" (the figure's value), "must" (in words), "short" (in
        numbers), "relative" (whether the two differ), "holds": True, False or None
        (unknown), "time": whether it is about seconds, which depend on the machine and
        say nothing of the method}].
    """
    rows = []
    for key, bound in part(summary, "bounds").items():
        if isinstance(bound, str):
            bound = {"must": bound}
        if not isinstance(bound, dict) or "must" not in bound:
            continue
        row = {
            "key": key,
            "title": figures.words(key),
            "text": value(summary, key),
            "must": " ".join(map(_in_words, bound["must"].split(" "))),
            "short": bound.get("short", bound["must"]),
            "relative": any(c.isalpha() for c in bound["must"]),
            "holds": bound.get("holds"),
            "time": key.startswith("seconds."),
        }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["holds"] is not False, row["time"]))


def value(summary: dict, key: str) -> str:
    """Returns the figure under a dotted key with half its interval, if it has one."""
    figure, (stage, _, name) = bounds.lookup(summary, key), key.rpartition(".")
    if not is_number(figure):
        return "–"
    digits = figures.figure(name).digits
    half = figures.half(part(summary, stage), name)
    return number(figure, digits) + ("" if half is None else f" ±{half:.{digits}f}")


def _in_words(word):
    word, comma = word.removesuffix(","), "," * word.endswith(",")
    is_key = "." in word and word[0].isalpha()
    return (figures.words(word) if is_key else word) + comma


def sentence(summary: dict, stages: list[str], *, named: int = _NAMED) -> dict:
    """Returns what a run shows, in a sentence.

    Args:
        summary: of the run.
        stages: its stages, parents first.
        named: most bounds that do not hold to be named.

    Returns:
        {"text", "holds": whether all bounds hold, None where there are none}. Bounds
        about time do not count.
    """
    rows = [row for row in rows_of(summary) if not row["time"]]
    failed = [row for row in rows if row["holds"] is False]
    if failed:
        verb = "does not hold" if len(failed) == 1 else "do not hold"
        what = "; ".join(
            f"{row['title']} is {row['text']}, must be {row['short']}"
            for row in failed[:named]
        )
        more = f"; and {len(failed) - named} more" if len(failed) > named else ""
        return {
            "text": f"{len(failed)} of {len(rows)} bounds {verb}: {what}{more}.",
            "holds": False,
        }
    telling = _telling(summary, stages)
    if rows:
        return {
            "text": f"{len(rows)} of {len(rows)} bounds hold{telling}.",
            "holds": True,
        }
    done = [name for name in stages if name in summary]
    count = f"{len(stages)} stage{'s' if len(stages) != 1 else ''}"
    if len(done) < len(stages):
        count += f", {len(done)} of them measured"
    order = f" ({', '.join(stages)})" if 0 < len(stages) <= 6 else ""
    return {"text": f"{count}{order}{telling}.", "holds": None}


def _telling(summary, stages):
    """Returns ": FIGURE VALUE after STAGE, ..." of the most telling figures, or ""."""
    parts = []
    for name in figures.SHORT:
        row = figures.figure(name)
        values = {s: part(summary, s).get(name) for s in stages}
        values = {s: value for s, value in values.items() if is_number(value)}
        if not row.better or not values:
            continue
        best = (max if row.better == "higher" else min)(values, key=values.get)
        title = row.title[0].lower() + row.title[1:]
        parts.append(f"{title} {value(summary, f'{best}.{name}')} after {best}")
    parts = parts[:_NAMED]
    return f": {'; '.join(parts)}" if parts else ""
