"""The page of a plan: plan.html beside plan.json, complete in itself."""

from pathlib import Path
from typing import Any

from stagecraft import chips, storage
from stagecraft.pods.show import ASSUMPTIONS
from stagecraft.report import render


def write(folder: str | Path, plan: dict[str, Any]) -> Path:
    """Writes FOLDER/plan.json and FOLDER/plan.html.

    Args:
        folder: made where it is not there.
        plan: of `plan.as_json`.

    Returns:
        the page.
    """
    folder = Path(folder)
    storage.write_json(folder / "plan.json", plan)
    html = render.render(
        "plan.html.jinja", plan=plan, gib=chips.GIB, assumptions=ASSUMPTIONS
    )
    storage.write_text(folder / "plan.html", html)
    return folder / "plan.html"
