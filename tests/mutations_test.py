"""The table of mutants fits the sources, and the script says so when it does not."""

import pytest

from tests import mutations
from tests.mutants import MUTANTS, NOT_APPLICABLE
from tests.mutants.mutant import Mutant, in_file

ONE = Mutant("halved", "stagecraft/errors.py", "x + x", "x", "tests/schema_test.py")


def test_every_mutant_is_one_place_in_the_sources():
    assert mutations.check() == []


def test_every_mutant_says_what_should_notice():
    for mutant in MUTANTS:
        assert mutant.tests and mutant.old != mutant.new, mutant.name
    assert all(NOT_APPLICABLE.values())


@pytest.mark.parametrize("source", ["y", "x + x; x + x"])
def test_a_mutant_without_a_place_of_its_own_is_refused(source):
    assert ONE.apply("y = x + x") == "y = x"
    with pytest.raises(ValueError, match="halved"):
        ONE.apply(source)


def test_a_table_that_does_not_fit_is_told(monkeypatch, capsys):
    lost = ONE._replace(name="lost", file="stagecraft/nowhere.py")
    untested = ONE._replace(name="untested", tests="tests/nowhere_test.py")
    monkeypatch.setattr(mutations, "MUTANTS", (ONE, ONE, lost, untested))
    assert mutations.main([]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "halved: 0 places in stagecraft/errors.py, expected 1",
        "halved: two mutants of this name",
        "lost: there is no stagecraft/nowhere.py",
        "untested: 0 places in stagecraft/errors.py, expected 1",
        "untested: there is no tests/nowhere_test.py",
    ]


def test_what_was_renamed_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.py").write_text("def f(y):\n    return (y +\n            y)\n")
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    moved = ONE._replace(file="a.py", tests="-k nothing")
    monkeypatch.setattr(mutations, "MUTANTS", (moved,))
    assert mutations.main(["--check"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "halved: a.py:2: x is y",
        "all 1 mutants fit",
    ]
    (tmp_path / "a.py").write_text("def f(y):\n    return y - y\n")
    assert mutations.main(["--check"]) == 2


def test_mutants_of_one_file():
    first, second, third = in_file(
        *("a.py", "a_test.py"),
        ("one", "x", "y"),
        ("two", "x", "z", "b_test.py", "never reached"),
        ("three", "x", "", dict(within="f")),
    )
    assert first == Mutant("one", "a.py", "x", "y", "a_test.py", "")
    assert second == Mutant("two", "a.py", "x", "z", "b_test.py", "never reached")
    assert third == Mutant("three", "a.py", "x", "", "a_test.py", within="f")


def test_names_are_chosen_by_pattern(capsys):
    assert mutations.main(["--list", "--only=simpo*,BOS*"]) == 0
    told = capsys.readouterr().out
    assert "simpo: gamma times beta" in told and "BOS doubled" in told
    assert "EOS dropped" not in told and "not applicable" in told
    assert mutations.main(["--only=nothing of the kind"]) == 2
