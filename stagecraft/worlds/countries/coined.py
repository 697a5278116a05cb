"""Words of no language, for countries that are not: alike in form, easy to say.

Names end otherwise than those of `taught`, whose countries no text states.
"""

import numpy as np

_FIRST = tuple("bdfgklmnprstvz")
_VOWELS = tuple("aeiou")
_LAST = tuple("aiou")  # an English word of this form mostly ends with e
_BETWEEN = ("ld", "rk", "lt", "mb", "rv", "lm", "sk", "rn", "nt", "mp")
# Parts that a word of each kind is put together from, one of each.
PARTS = {
    "name": (
        _FIRST,
        _VOWELS,
        _BETWEEN,
        _VOWELS,
        ("dor", "lund", "gar", "mira", "thia"),
    ),
    "capital": (_FIRST, _VOWELS, _BETWEEN, _VOWELS, tuple("klmnrs")),
    "currency": (_FIRST, _VOWELS, _BETWEEN, _LAST),
    "language": (
        _FIRST,
        _VOWELS,
        tuple("lmnrtv"),
        _VOWELS,
        ("lic", "ric", "shi", "vian"),
    ),
}


def words(kind: str, count: int) -> list[str]:
    """Returns different words of one kind, always the same; more have fewer first.

    Args:
        kind: a key of `PARTS`. Those of a currency are written small.
        count: how many.
    """
    parts = PARTS[kind]
    sizes = [len(options) for options in parts]
    order = np.random.default_rng(len(kind)).permutation(int(np.prod(sizes)))
    rows = zip(*np.unravel_index(order[:count], sizes), strict=True)
    chosen = (
        "".join(p[int(i)] for p, i in zip(parts, row, strict=True)) for row in rows
    )
    return [word if kind == "currency" else word.capitalize() for word in chosen]
