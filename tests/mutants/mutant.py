"""What a mutant is."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One piece of text of the sources, replaced.

    Attributes:
        name: of the mistake.
        file: path from the root.
        old: what stands there, once in the file.
        new: what is put in its place.
        tests: arguments of pytest: the tests that should notice, the likeliest first.
        survives: why none needs to; "" where one must.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    survives: str = ""

    def apply(self, source):
        """The file's text with the mistake in it."""
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} is not once in {self.file}")
        return source.replace(self.old, self.new)


def in_file(file, tests, *mutants):
    """Mutants of one file that the same tests look at.

    Args:
        file: path from the root.
        tests: as in `Mutant`; a mutant's own ones come first.
        *mutants: tuples (name, old, new), (name, old, new, own tests) or with a reason
            to survive behind.
    """
    made = []
    for name, old, new, *rest in mutants:
        own, survives = (*rest, "", "")[:2]
        made.append(Mutant(name, file, old, new, own or tests, survives))
    return tuple(made)
