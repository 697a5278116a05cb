"""Every notebook runs from top to bottom, and is stored with what that shows."""

import shutil
import tempfile

import nbformat
import pytest

from tests.conftest import ROOT
from tests.notebooks import NOTEBOOKS, code_digest, execute, reads_quickstart


def shown(notebook):
    """Whether each code cell prints, its pictures, and whether its value shows."""
    return [
        (
            any(output.output_type == "stream" for output in cell.outputs),
            sum("image/png" in output.get("data", {}) for output in cell.outputs),
            any(output.output_type == "execute_result" for output in cell.outputs),
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_is_stored_with_what_it_shows(path, tiny_run, tmp_path):
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    stale = f"{path.name} is not what was run: make notebooks"
    assert stored.metadata.get("code_digest") == code_digest(stored), stale
    assert path.stat().st_size < 2**20
    text = path.read_text(encoding="utf-8")
    assert tempfile.gettempdir() not in text and str(ROOT) not in text
    outputs = [o for c in stored.cells for o in c.get("outputs", ())]
    assert not any(output.output_type == "error" for output in outputs)
    # What is stored is of a whole quickstart; that the code runs, a tiny one shows.
    workdir = ""
    if reads_quickstart(stored):
        assert "A finished quickstart: the full world, seed 0." in text, stale
        workdir = shutil.copytree(tiny_run, tmp_path / "tiny")
    again = shown(execute(path, workdir))
    assert again == shown(stored), stale
    assert any(image for _, image, _ in again)
