"""The lists of slow and whole tests name tests that exist."""

import ast

import pytest

from tests.conftest import ROOT, SLOW, WHOLE, listed


@pytest.mark.parametrize("path", [SLOW, WHOLE], ids=lambda path: path.stem)
def test_every_listed_test_exists(path):
    gone = []
    for name in listed(path):
        file, _, function = name.partition("::")
        source, defined = ROOT / file, {""}
        if source.exists():
            body = ast.parse(source.read_text(encoding="utf-8")).body
            defined |= {n.name for n in body if isinstance(n, ast.FunctionDef)}
        if not source.exists() or function not in defined:
            gone.append(name)
    assert gone == []
