"""A comparison as a Markdown table, for a page of results."""

from stagecraft.report import compare


def table(comparison: dict) -> str:
    """Returns the means of each arm, marked where they differ from the baseline's.

    Args:
        comparison: what `compare.compare` returned.
    """
    columns = comparison["columns"]
    lines = [
        _row(["arm", "seeds", *(column["title"] for column in columns)]),
        _row(["---"] * (2 + len(columns))),
    ]
    for arm in comparison["arms"]:
        cells = [f"`{arm['arm']}`", str(len(arm["samples"]))]
        lines.append(_row([*cells, *(_cell(arm, column) for column in columns)]))
    notes = [*compare.contents(comparison), *compare.legend(comparison)]
    return "\n".join([*lines, "", *(f"{note}.\n" for note in notes)]).rstrip()


def _cell(arm, column):
    """Returns a mean with its interval and the mark of its difference."""
    against = arm["against"].get(column["key"])
    mark = compare.MARKS.get(against["verdict"], "") if against else ""
    return compare.mean_text(arm, column) + mark


def _row(cells):
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
