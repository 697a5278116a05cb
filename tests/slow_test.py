"""The list of slow tests names tests that exist."""

import ast

from tests.conftest import ROOT, slow_tests


def test_every_slow_test_exists():
    gone = []
    for name in slow_tests():
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        gone += [name] * (function not in defined)
    assert gone == []
