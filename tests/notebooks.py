"""Runs the notebooks and stores what they show.

    python -m tests.notebooks [NAME ...]

Stored with each notebook is a digest of its code, by which a test says when the outputs
are another code's. Those that read a finished quickstart are stored only where there is
one, in runs/quickstart: of a tiny one the figures would mean nothing. Not collected by
pytest.
"""

import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from experiments import common

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+")


def code_digest(notebook) -> str:
    """Returns the SHA-256 of a notebook's code cells."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def reads_quickstart(notebook) -> bool:
    """Whether a notebook reads a finished quickstart."""
    return any(common.finished_quickstart.__name__ in c.source for c in notebook.cells)


def execute(path, workdir=""):
    """Returns a notebook as it is after a run from top to bottom, on one device.

    Args:
        path: the notebook.
        workdir: a finished quickstart, for those that read one; "" for runs/quickstart.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    own = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    own |= {common.WORKDIR: str(workdir)}
    client.execute(env=dict(os.environ) | own)
    return notebook


def store(path):
    """Runs a notebook and writes it with its outputs, times and widths left out."""
    summary = ROOT / "runs" / "quickstart" / "summary.json"
    if reads_quickstart(nbformat.read(path, as_version=4)) and not summary.exists():
        sys.exit(
            f"{path.name} reads runs/quickstart, which is not finished: make it "
            "with make quickstart"
        )
    notebook = execute(path)
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "text" in output:
                output.text = _cleaned(output.text)
            if "text/html" in output.get("data", {}):
                output.data.pop("text/plain", None)  # the same again
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
    return _TEMPORARY.sub("RUN", _ANSI.sub("", text)).replace(f"{ROOT}/", "")


if __name__ == "__main__":
    for notebook_ in NOTEBOOKS:
        if len(sys.argv) == 1 or notebook_.stem in sys.argv[1:]:
            print(notebook_.name)
            store(notebook_)
