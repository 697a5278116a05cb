"""Runs the notebooks and stores what they show.

    python -m tests.notebooks [NAME ...]

Stored with each notebook is a digest of its code, by which a test says when the outputs
are another code's. Not collected by pytest.
"""

import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+")


def code_digest(notebook) -> str:
    """Returns the SHA-256 of a notebook's code cells."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def execute(path):
    """Returns a notebook as it is after a run from top to bottom, on one device."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    own = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    client.execute(env=dict(os.environ) | own)
    return notebook


def store(path):
    """Runs a notebook and writes it with its outputs, times and widths left out."""
    notebook = execute(path)
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "text" in output:
                output.text = _cleaned(output.text)
            for kind, text in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = _cleaned(text)
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
        "code_digest": code_digest(notebook),
    }
    nbformat.write(notebook, path)


def _cleaned(text):
    return _TEMPORARY.sub("RUN", _ANSI.sub("", text))


if __name__ == "__main__":
    for notebook_ in NOTEBOOKS:
        if len(sys.argv) == 1 or notebook_.stem in sys.argv[1:]:
            print(notebook_.name)
            store(notebook_)
