"""What `run.run` returns, as a notebook shows it."""

import html
from pathlib import Path

from stagecraft import runs
from stagecraft.report import terminal


class Summary(dict):
    """A run's summary; a notebook shows its figures, stages across, and the verdict.

    Attributes:
        folder: the work directory, where the report lies.
    """

    def __init__(self, figures: dict, folder: Path):
        super().__init__(figures)
        self.folder = folder

    def _repr_html_(self) -> str:
        stages, rows = terminal.summary_rows(self)
        cells = [
            [title, *(texts.get(name, "") for name in stages)] for title, texts in rows
        ]
        text, _ = terminal.summary_answer(self)
        report = html.escape(str(self.folder / "report.html"))
        return (
            runs.html_table(["", *stages], cells, 1)
            + f"<p>{html.escape(text)} Report: <code>{report}</code></p>"
        )
