"""Pieces are found by syntax: formatting and local names may differ, nothing else."""

import ast
import textwrap

import pytest

from tests.mutants.mutant import Mutant

SOURCE = '''\
"""Ein Beispiel: größer."""
from arrays import jnp, masked

LIMIT = {"low": -1, "high": 3}


def scaled(logps, mask, *, beta=0.1):
    ratio = jnp.exp(
        beta * logps,  # nats
    )
    if mask is None:  # a head: with a colon in its comment
        return ratio
    total = masked.sum(ratio, mask, axis=1)
    return total / jnp.maximum(mask.sum(1), 1.0), {"ratio": ratio, "total": total}


class Reader:
    def rows(self, lines):
        for line in lines:
            yield line.strip()

    def count(self, lines):
        kept = [part for part in lines if part and part != "#"]
        return len(kept)
'''


def broken(old, new, source=SOURCE, **fields):
    return Mutant("it", "a.py", old, new, "a_test.py", **fields).apply(source)


def same(one, other):
    return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))


@pytest.mark.parametrize(
    "old, new",
    [
        ("jnp.exp(beta * logps)", "jnp.exp(logps)"),  # over several lines there
        ("total = masked.sum(ratio, mask, axis=1)", "total = ratio"),
        ("return len(kept)", "pass"),
        ("axis=1", "axis=0"),
        ("mask, axis=1", "mask, axis=0"),
        ("mask, axis=1", "mask"),
        ("'total': total", "'total': 0"),
        ('"low": -1', '"low": 1'),
        ("if mask is None:", "if True:"),
        ("for line in lines:", "for line in []:"),
        ("beta * logps", "beta + logps"),
        ('[part for part in lines if part and part != "#"]', "lines"),
        ("LIMIT = {'low': -1, 'high': 3}", "LIMIT = {}"),
    ],
)
def test_only_the_piece_changes(old, new):
    after = broken(old, new)
    assert after != SOURCE
    ast.parse(after)
    start = next(
        i for i, (a, b) in enumerate(zip(SOURCE, after, strict=False)) if a != b
    )
    behind = next(
        i
        for i, (a, b) in enumerate(zip(SOURCE[::-1], after[::-1], strict=False))
        if a != b
    )
    changed = SOURCE[start : len(SOURCE) - behind]
    assert changed.count("\n") <= 2 and "größer" in after


@pytest.mark.parametrize(
    "old, new, there, put",
    [
        # parameters, assignments and comprehensions, each throughout the piece
        ("scale * values", "values", "beta * logps", "logps"),
        (
            "added = masked.sum(r, m, axis=1)",
            "added = masked.sum(m, r, axis=1)",
            "masked.sum(ratio, mask, axis=1)",
            "masked.sum(mask, ratio, axis=1)",
        ),
        (
            "[x for x in xs if x and x != '#']",
            "[x for x in xs]",
            ' if part and part != "#"',
            "",
        ),
        ('"total": summed', '"total": -summed', '"total": total', '"total": -total'),
        ("if m is None:", "if m:", "if mask is None:", "if mask:"),
    ],
)
def test_local_variables_may_be_renamed(old, new, there, put):
    expected = SOURCE.replace(there, put)
    assert expected != SOURCE and same(broken(old, new), expected)


@pytest.mark.parametrize(
    "old",
    [
        "jnp.log(beta * logps)",  # an attribute
        "np.exp(beta * logps)",  # a global name
        "masked.sum(ratio, mask, dim=1)",  # a keyword
        "masked.sum(ratio, mask, axis=2)",  # a number
        "masked.sum(ratio, mask, axis=True)",  # equal, but another thing
        '"sum": total',  # a string
        "jnp.exp(beta + logps)",  # an operator
        "jnp.exp(a * a)",  # one name for two
        "masked.sum(len, mask, axis=1)",  # what is built in stays
        "masked.sum(LIMIT, mask, axis=1)",  # so do names of the module
        "masked.sum(ratio, mask)",  # not a part of the call
    ],
)
def test_anything_else_must_agree(old):
    with pytest.raises(ValueError, match=r"^it: 0 places in a.py, expected 1$"):
        broken(old, old)


def test_two_names_are_not_one():
    source = "def f(a):\n    return a * a\n"
    with pytest.raises(ValueError, match="0 places"):
        broken("x * y", "x", source)
    assert same(broken("x * x", "x", source), "def f(a):\n    return a\n")


def test_equal_names_go_before_renamed_ones():
    source = "def f(a, b):\n    return g(a), g(b)\n"
    assert same(broken("g(b)", "b", source), "def f(a, b):\n    return g(a), b\n")
    with pytest.raises(
        ValueError, match=r"2 places in a.py, expected 1 \(lines 2, 2\)"
    ):
        broken("g(c)", "c", source)


def test_a_function_narrows():
    function = "def f(a):\n    return a + 1\n"
    source = f"{function}\n\nclass C:\n" + textwrap.indent(function, "    ")
    with pytest.raises(ValueError, match=r"\(lines 2, 7\)"):
        broken("a + 1", "a", source)
    with pytest.raises(ValueError, match="2 places"):
        broken("a + 1", "a", source, within="f")
    after = broken("a + 1", "a", source, within="C.f")
    assert after == source.removesuffix(" + 1\n") + "\n"
    assert broken("a + 1", "a", source, within="C") == after
    with pytest.raises(ValueError, match="0 places"):
        broken("a + 1", "a", source, within="h")


def test_statements_in_a_row():
    source = (
        "def f(x):\n    if x:\n        a = 1  # one\n\n        b = (a)\n        c = b\n"
    )
    after = broken("a = 1\nb = a", "b = 2\na = b", source)
    assert after == source.replace(
        "a = 1  # one\n\n        b = (a)", "b = 2\n        a = b"
    )
    assert broken("q = 1\nr = q", "", source) == source.replace(
        "a = 1  # one\n\n        b = (a)", "pass"
    )
    with pytest.raises(ValueError, match="0 places"):
        broken("a = 1\nc = b", "pass", source)


@pytest.mark.parametrize(
    "old, after",
    [
        ("x", "f(b=1, **c)"),
        ("x, b=1, **c", "f()"),
        ("b=1", "f(x, **c)"),
        ("**c", "f(x, b=1)"),
        ("x, b=1", "f(**c)"),
    ],
)
def test_arguments_go_with_their_comma(old, after):
    source = "f(x, b = 1, **c)\n"
    assert same(broken(old, "", source), after)


def test_items_go_with_their_comma():
    source = 'd = {"a": 1, "b": [\n    2], **c, "d": 3,}\n'
    assert same(broken('"b": [2]', "", source), 'd = {"a": 1, **c, "d": 3}')
    assert same(broken('"d": 3', "", source), 'd = {"a": 1, "b": [2], **c}')
    last = 'd = {"a": 1, "d": 3}\n'
    assert same(broken('"d": 3', "", last), 'd = {"a": 1}')


@pytest.mark.parametrize(
    "old, new, after",
    [
        ("a + b", "a - b", "y = (a - b) * c"),
        ("(a + b) * c", "a", "y = a"),
        ("c", "c + 1", "y = (a + b) * (c + 1)"),
    ],
)
def test_what_is_put_in_stays_together(old, new, after):
    assert same(broken(old, new, "y = (a + b) * c\n"), after)


def test_indices():
    source = "y = x[:, a : a + n] + f(b[0])\n"
    assert same(broken(":, a:a + n", ":, :n", source), "y = x[:, :n] + f(b[0])")
    assert same(broken("x[:, a:a + n]", "x", source), "y = x + f(b[0])")
    assert same(broken("b[0]", "b[1]", source), "y = x[:, a : a + n] + f(b[1])")


def test_strings_with_values_are_one_piece():
    source = 'def f(a, b):\n    return f"{a}: {b!r}"\n'
    after = broken('f"{x}: {y!r}"', 'f"{y}"', source)
    assert same(after, 'def f(a, b):\n    return f"{b}"\n')
    with pytest.raises(ValueError, match="0 places"):
        broken('f"{x}: {y}"', "''", source)


def test_functions_in_an_expression():
    source = "def f(xs):\n    return sorted(xs, key=lambda row: -row.n)\n"
    after = broken("lambda r: -r.n", "lambda r: r.n", source)
    assert same(after, source.replace("-row", "row"))


def test_a_decorator():
    source = "@cache(size=3)\ndef f():\n    pass\n"
    assert same(
        broken("cache(size=3)", "cache", source), source.replace("(size=3)", "")
    )


def test_names_that_the_place_does_not_know_are_refused():
    source = "import numpy as np\n\n\ndef f(rows, weight):\n    return rows.sum()\n"
    with pytest.raises(ValueError, match=r"^it: no mask at line 5$"):
        broken("x.sum()", "(x * mask).sum()", source)
    for fine in ("np.sum(x * weight)", "max(i for i in x)", "(lambda k: k)(x)"):
        broken("x.sum()", fine, source)


@pytest.mark.parametrize("old", ["return f(", "& a", "for x in y", ""])
def test_a_piece_that_is_no_python_is_refused(old):
    with pytest.raises(ValueError, match="it: neither Python nor a part of it"):
        broken(old, "x", "y = f(a)\n")
