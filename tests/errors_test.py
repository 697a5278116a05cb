"""The command in an error message works from where the user is."""

import sys
from pathlib import Path

import pytest

from stagecraft import errors

ROOT = Path(__file__).parents[1]


def test_in_the_clone_and_outside(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert errors.install("data").endswith(" -m pip install -e '.[data]'")
    monkeypatch.chdir(tmp_path)
    assert errors.install("data").endswith(f" -m pip install -e '{ROOT}[data]'")


@pytest.mark.parametrize(
    "python, says",
    [(".venv/bin/python", ".venv/bin/python"), ("../python", "{}/python")],
)
def test_installed_from_the_registry(monkeypatch, tmp_path, python, says):
    """The module's own folder has no pyproject.toml beside it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site/stagecraft/errors.py"))
    executable = tmp_path / "python" if python.startswith("..") else here / python
    monkeypatch.setattr(sys, "executable", str(executable))
    expected = f"{says.format(tmp_path)} -m pip install 'stagecraft-lm[data]'"
    assert errors.install("data") == expected
