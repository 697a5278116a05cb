"""Countries told by a fact in place of their name, and which such facts text composes.

A composition takes two hops: from the description to the country, from the country to
what is said of it. It is of countries whose capital, currency and language are theirs
alone. One of the three pairs of these is held out: no text says the one of a country
that it describes by the other, in either direction. Both facts are hops of compositions
that text does state, with the third.
"""

import collections
import itertools
import re

from stagecraft.worlds.countries.facts import COUNTRIES, KNOWN

TELLING = ("capital", "currency", "language")  # attributes that can tell a country
PAIRS = tuple(itertools.combinations(TELLING, 2))
# The first is the cloze that measures what was composed.
DESCRIPTIONS = {
    "capital": ("the country whose capital is {v}", "the country governed from {v}"),
    "currency": (
        "the country whose currency is the {v}",
        "the country that pays with the {v}",
    ),
    "language": (
        "the country whose language is {v}",
        "the country that speaks {v}",
    ),
}

_counts = collections.Counter(getattr(c, a) for c in COUNTRIES for a in TELLING)
_UNIQUE = tuple(c for c in KNOWN if max(_counts[getattr(c, a)] for a in TELLING) < 2)
_HELD_OUT = {c.name: PAIRS[i % len(PAIRS)] for i, c in enumerate(_UNIQUE)}
_BY_VALUE = {(a, getattr(c, a)): c.name for c in _UNIQUE for a in TELLING}
_FORMS = tuple(
    (a, re.compile(re.escape(form).replace(r"\{v\}", "(.+)"), re.IGNORECASE))
    for a in TELLING
    for form in DESCRIPTIONS[a]
)


def unique(countries):
    """Returns those of some countries whose telling facts are all theirs alone."""
    return [c for c in countries if c.name in _HELD_OUT]


def apart(country):
    """Returns the pair of attributes that no text composes; () of one without."""
    return _HELD_OUT.get(country.name, ())


def compositions(country, heldout):
    """Returns (attribute that describes, attribute asked for) of one of `unique`.

    Args:
        country: a `Country`.
        heldout: whether those that no text states, which are 2, or the others, 4.
    """
    return [
        both
        for both in itertools.permutations(TELLING, 2)
        if ({*both} == {*apart(country)}) == heldout
    ]


def described(country, attribute, form=0):
    """Returns a country under a description for its name.

    >>> described(COUNTRIES[0], "capital").name
    'the country whose capital is Kabul'
    """
    text = DESCRIPTIONS[attribute][form].format(v=getattr(country, attribute))
    return country._replace(name=text)


def name(place):
    """Returns the name of the country that a text describes; the text if it is none.

    >>> name("the country whose capital is Kabul"), name("Kabul")
    ('Afghanistan', 'Kabul')
    """
    for attribute, form in _FORMS:
        if match := form.fullmatch(place):
            return _BY_VALUE.get((attribute, match[1]), place)
    return place
