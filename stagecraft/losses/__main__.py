"""Writes the table of objectives into a Markdown file, between its two markers.

python -m stagecraft.losses docs/objectives.md
"""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from stagecraft import losses

START = "<!-- objectives: python -m stagecraft.losses docs/objectives.md -->"
END = "<!-- end of objectives -->"


def table() -> str:
    """Returns the Markdown table: name, what it is, what it takes, its source."""
    lines = ["| objective | what it is | takes | source |", "|---|---|---|---|"]
    for title, family in losses.TABLES.items():
        lines.append(f"| **{title}** | | | |")
        for loss in dict.fromkeys(family.values()):
            names = [f"`{name}`" for name, other in family.items() if other is loss]
            cells = (" = ".join(names), *_described(loss))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _described(loss: Callable) -> tuple[str, str, str]:
    """Returns a loss's first line, its parameters, and a link to its first paper."""
    text = inspect.getdoc(loss) or ""
    parameters = inspect.signature(inspect.unwrap(loss)).parameters.values()
    takes = [
        p.name if p.default in (p.empty, None) else f"{p.name}={p.default!r}"
        for p in parameters
    ]
    paper = re.search(r"arxiv\.org/abs/([\d.]+\d)", text)
    source = f"[{paper[1]}](https://{paper[0]})" if paper else ""
    return text.partition("\n")[0].rstrip("."), f"`{', '.join(takes)}`", source


def written(text: str) -> str:
    """Returns a page with the table between its markers brought up to date."""
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"the page lacks {START!r} or {END!r}")
    return f"{head}{START}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
