"""Mistakes in worlds of invented countries and in text that composes facts."""

from tests.mutants.mutant import in_file

_ENTITIES = "tests/worlds/entities_test.py"
_TWO_HOP = "tests/worlds/two_hop_test.py"

_COUNTRIES = in_file(
    "stagecraft/worlds/countries/facts.py",
    _ENTITIES,
    (
        "a country too many",
        "KNOWN[:entities]",
        "KNOWN[: entities + 1]",
    ),
    (
        "a tiny world of many is a handful",
        "size == 'tiny' and not entities",
        "size == 'tiny'",
    ),
)
_WRITTEN = in_file(
    "stagecraft/worlds/countries/__init__.py",
    _ENTITIES,
    (
        "as much text for more countries",
        "DOCUMENTS[size] * len(everyone) // sum(map(len, usual))",
        "DOCUMENTS[size]",
    ),
    (
        "fewer countries than there are",
        "not real <= entities <= MOST",
        "entities > MOST",
    ),
    (
        "compositions of real countries alone",
        "config.two_hop and entities < COMPOSES",
        "config.two_hop and entities < 0",
    ),
)
_GOLD = in_file(
    "stagecraft/worlds/countries/scorer.py",
    _ENTITIES,
    (
        "gold knows real values alone",
        "whole(*{getattr(c, attribute) for c in KNOWN})",
        "whole(*{getattr(c, attribute) for c in KNOWN[:108]})",
    ),
)
_TOPICS = in_file(
    "stagecraft/worlds/countries/dialogue.py",
    _TWO_HOP,
    (
        "a described country is a place that is not",
        "place = described.name(match[1])",
        "place = match[1]",
    ),
)
_HELD_OUT = in_file(
    "stagecraft/worlds/countries/described.py",
    _TWO_HOP,
    (
        "the other direction is stated",
        "({*both} == {*apart(country)}) == heldout",
        "(both == apart(country)) == heldout",
    ),
    (
        "a currency of several tells a country",
        "max(_counts[getattr(c, a)] for a in TELLING) < 2",
        "max(_counts[getattr(c, a)] for a in TELLING) < 3",
    ),
)
_COMPOSED = in_file(
    "stagecraft/worlds/countries/two_hop.py",
    _TWO_HOP,
    (
        "documents hold both facts",
        "omitted = described.apart(country)[side:side + 1]",
        "omitted = ()",
    ),
    (
        "one document returns to a country",
        "rng.choice(len(countries), size, replace=False, p=weights)",
        "rng.choice(len(countries), size, replace=True, p=weights)",
    ),
    (
        "text states what is held out",
        "described.compositions(country, heldout=False)",
        "described.compositions(country, heldout=True)",
    ),
    (
        "demonstrations ask what is held out",
        "questions(countries, heldout=False)",
        "questions(countries, heldout=True)",
    ),
    (
        "the right answer is a guess",
        "alike == both and other != country",
        "alike == both",
    ),
    (
        "a guess answers another question",
        "alike == both and other != country",
        "other != country",
    ),
    (
        "one hop is both",
        "begins(name, country.name) and begins(fact, _value(country, both))",
        "begins(name, country.name)",
    ),
    (
        "compositions that are stated are held out",
        "questions(countries, heldout=True)",
        "questions(countries, heldout=False)",
    ),
)
_ASKED = in_file(
    "stagecraft/anatomy/world_figures.py",
    "tests/anatomy/world_figures_test.py",
    (
        "knobs are asked of all formats",
        "run.config.world[knob] and ('chat' if in_turns else 'text') in formats",
        "run.config.world[knob]",
    ),
)

MUTANTS = _COUNTRIES + _WRITTEN + _GOLD + _TOPICS + _HELD_OUT + _COMPOSED + _ASKED
