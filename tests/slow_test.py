"""The list of slow tests names tests that exist."""

import ast

from tests.conftest import ROOT, slow_tests


def test_every_slow_test_exists():
    gone = []
    for name in slow_tests():
        file, _, function = name.partition("::")
        path, defined = ROOT / file, {""}
        if path.exists():
            body = ast.parse(path.read_text(encoding="utf-8")).body
            defined |= {n.name for n in body if isinstance(n, ast.FunctionDef)}
        if not path.exists() or function not in defined:
            gone.append(name)
    assert gone == []
