"""What a mutant is."""

from typing import NamedTuple

from tests.mutants import matching


class Mutant(NamedTuple):
    """One piece of the sources, replaced.

    Attributes:
        name: of the mistake.
        file: path from the root.
        old: what stands there, at one place of the file. It is compared by syntax, as
            `tests.mutants.matching` says: formatting and names of local variables may
            differ.
        new: what is put in its place; "" removes statements, items and arguments.
        tests: arguments of pytest: the tests that should notice, the likeliest first.
        survives: why none needs to; "" where one must.
        within: the function or class that `old` stands in; "" for the whole file.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    survives: str = ""
    within: str = ""

    def place(self, source):
        """The only `matching.Place` of the mistake.

        Raises:
            ValueError: there is none, there are several, or `old` is no Python.
        """
        places = matching.places(source, self.old, self.new, self.within)
        if len(places) != 1:
            lines = ", ".join(str(p.line) for p in places)
            lines = f" (lines {lines})" if lines else ""
            raise ValueError(f"{len(places)} places in {self.file}, expected 1{lines}")
        return places[0]

    def apply(self, source):
        """The file's text with the mistake in it.

        Raises:
            ValueError: as of `place`, or `new` uses a name that is not known there.
        """
        try:
            return matching.replace(source, self.place(source), self.new)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


def in_file(file, tests, *mutants):
    """Mutants of one file that the same tests look at.

    Args:
        file: path from the root.
        tests: as in `Mutant`; a mutant's own ones come first.
        *mutants: tuples (name, old, new), (name, old, new, own tests) or with a reason
            to survive behind; at the end a dict may give further fields of `Mutant`.
    """
    rows = []
    for name, old, new, *rest in mutants:
        more = rest.pop() if rest and isinstance(rest[-1], dict) else {}
        own, survives = (*rest, "", "")[:2]
        rows.append(Mutant(name, file, old, new, own or tests, survives, **more))
    return tuple(rows)
