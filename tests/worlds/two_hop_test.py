"""Held-out compositions: known from their hops alone, and by no shorter way."""

import collections
import json
import re

import numpy as np
import pytest

from stagecraft import worlds
from stagecraft.anatomy import figures
from stagecraft.worlds import countries as world
from stagecraft.worlds.countries import corpus, described, dialogue, scorer, two_hop
from stagecraft.worlds.countries.described import DESCRIPTIONS, PAIRS, TELLING
from stagecraft.worlds.countries.facts import BY_NAME, countries, split

WORLD = countries(200)
UNIQUE = described.unique(WORLD)
WORDS = scorer.whole(*(getattr(c, a) for c in UNIQUE for a in TELLING))
FACTS = {getattr(c, a): (c.name, a) for c in UNIQUE for a in TELLING}
HELD_OUT, STATED = (
    [(c, both) for c in UNIQUE for both in described.compositions(c, heldout)]
    for heldout in (True, False)
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "world"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(world.DOCUMENTS, "tiny", 240)
        worlds.write("countries", folder, 3, "tiny", entities=200, two_hop=True)
        worlds.write("countries", folder.with_name("off"), 3, "tiny", entities=200)
    return folder


def texts(folder, name):
    """The texts of a file, one a record."""
    records = map(json.loads, (folder / f"{name}.jsonl").open())
    return [" ".join(record.values()) for record in records]


def sentences(text):
    return re.split(r"(?<=[.?!]) ", text)


def shared(units):
    """How often two facts of one country stand in one unit: {(name, two): count}."""
    counts = collections.Counter()
    for unit in units:
        named = {FACTS[word] for word in WORDS.findall(unit)}
        counts.update(
            (one, frozenset((a, b)))
            for one, a in named
            for other, b in named
            if one == other and a < b
        )
    return counts


def withheld():
    return {(c.name, frozenset(described.apart(c))) for c in UNIQUE}


def test_the_knob_moves_no_other_file(written):
    off, on = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (written.with_name("off"), written)
    )
    assert off.items() <= on.items()
    added = {"two_hop_text.jsonl", "two_hop_demonstrations.jsonl"}
    assert on.keys() - off.keys() == added


def test_each_country_holds_out_one_pair_and_states_both_of_its_hops():
    assert len(UNIQUE) == 200 - 108 + 30
    values = [getattr(c, a) for c in UNIQUE for a in TELLING]
    everywhere = [getattr(c, a) for c in WORLD for a in TELLING]
    assert all(everywhere.count(value) == 1 for value in values)
    usual = collections.Counter(described.apart(c) for c in UNIQUE)
    assert usual.keys() == {*PAIRS} and max(usual.values()) - min(usual.values()) <= 1
    for country in UNIQUE:
        out = described.compositions(country, heldout=True)
        stated = described.compositions(country, heldout=False)
        assert len(out) == 2 and len(stated) == 4 and out[0] == out[1][::-1]
        assert not {*out} & {*stated}
        for one, two in out:
            assert one in {a for a, _ in stated} and two in {b for _, b in stated}


def test_no_heldout_composition_is_in_any_file(written):
    """In no sentence of any file, in no form, in neither direction."""
    spelled = {
        form.format(v=getattr(c, one)).partition(" ")[2]: (c, two)
        for c, (one, two) in HELD_OUT
        for form in DESCRIPTIONS[one]
    }
    asks = {a: re.compile("|".join(ways)) for a, ways in ASKED.items()}
    files = sorted(path.stem for path in written.iterdir())
    assert len(files) == 7
    pattern, seen = scorer.whole(*spelled), 0
    for name in files:
        units = [unit for text in texts(written, name) for unit in sentences(text)]
        assert not withheld() & shared(units).keys()
        for unit in units:
            for description in pattern.findall(unit):
                seen += 1
                assert not asks[spelled[description][1]].search(
                    unit.replace(description, "")
                ), unit
    assert seen > 1000  # of descriptions, with what is not held out


# Words by which a sentence or question of the world speaks of an attribute.
ASKED = {
    "capital": ("capital", "governed"),
    "currency": ("currency", "pay", "Shops", "Prices"),
    "language": ("language", "speak", "Newspapers"),
}


def test_no_document_of_its_text_holds_both_facts(written):
    together = shared(texts(written, "two_hop_text"))
    assert not withheld() & together.keys()
    # Every other pair, and in the usual text these too.
    assert len(together) == 2 * len(UNIQUE)
    assert len(withheld() & shared(texts(written, "text")).keys()) == len(UNIQUE)


def accuracy(guess, rows):
    hits = [guess(c, both) == getattr(c, both[1]) for c, both in rows]
    return float(np.mean(hits))


def test_no_guess_knows_the_heldout_compositions(written):
    """Chance is one country in all; the same guesses know what is stated."""
    documents = texts(written, "two_hop_text")
    chance, units = 1 / len(UNIQUE), [u for d in documents for u in sentences(d)]

    # The answer given most often to a question of the kind: no hop at all.
    usual = collections.defaultdict(collections.Counter)
    # The word after the two before it, as the sentence of the cloze ends: one hop.
    bigrams = collections.defaultdict(collections.Counter)
    # Values of the kind in documents with the one that describes: no country.
    beside = collections.defaultdict(collections.Counter)
    for unit in units:
        words = unit.rstrip(".?!").split()
        for one, two, word in zip(words, words[1:], words[2:], strict=False):
            bigrams[one, two][word] += 1
        for word in WORDS.findall(unit):
            usual[FACTS[word][1]][word] += 1
    for document in documents:
        values = {*WORDS.findall(document)}
        for one in values:
            beside[one].update(values - {one})

    def most(counts, attribute):
        words = [w for w in counts if FACTS.get(w, "  ")[1] == attribute]
        return max(words, key=counts.get, default="")

    def majority(country, both):
        return most(usual[both[1]], both[1])

    def bigram(country, both):
        words = two_hop.composed(country, both).rstrip(".").split()
        last = getattr(country, both[1]).split()
        return most(bigrams[tuple(words[: -len(last)][-2:])], both[1])

    def cooccurring(country, both):
        return most(beside[getattr(country, both[0])], both[1])

    for guess in (majority, bigram, cooccurring):
        assert accuracy(guess, HELD_OUT) <= 4 * chance, guess.__name__
    assert accuracy(cooccurring, STATED) > 0.95


def test_both_hops_together_know_them_all(written):
    """From sentences alone: who is described, and what is said of who it is."""
    names, facts = {}, {}
    units = {u for d in texts(written, "two_hop_text") for u in sentences(d)}
    for c in UNIQUE:
        for a in TELLING:
            if units & {two_hop.identified(c, a, form) for form in (0, 1)}:
                names[a, getattr(c, a)] = c.name
            if units & {corpus.stated(a, c, form) for form in range(5)}:
                facts[c.name, a] = getattr(c, a)

    def chained(country, both):
        name = names.get((both[0], getattr(country, both[0])))
        return facts.get((name, both[1]))

    assert accuracy(chained, HELD_OUT) > 0.99
    # All that is stated is composed somewhere, mostly in several ways.
    stated = [
        units & {two_hop.composed(c, b, f, d) for f in range(5) for d in (0, 1)}
        for c, b in STATED
    ]
    assert np.mean([bool(ways) for ways in stated]) > 0.97


def test_demonstrations_compose_what_the_text_states_of_training_countries(written):
    records = list(map(json.loads, (written / "two_hop_demonstrations.jsonl").open()))
    plain = list(map(json.loads, (written / "demonstrations.jsonl").open()))
    added = [r for r in records if "the country" in r["prompt"]]
    train = described.unique(split(3, "tiny", 200).train)
    assert len(added) == 3 * 4 * len(train) == len(records) - len(plain)
    key = json.dumps
    assert {*map(key, plain)} == {*map(key, records)} - {*map(key, added)}
    for record in added:
        what, name, _ = dialogue.topic(record["prompt"])
        assert what == "fact" and BY_NAME[name] in train
        assert scorer.gold(record["prompt"], record["completion"]) == 3


def test_a_description_of_nobody_is_a_place_that_is_not():
    asked = corpus.QUESTIONS["currency"][0].format(c="the country whose capital is Oz")
    assert dialogue.topic(asked)[0] == "unknown"


# -- what a model composes -------------------------------------------------------------


class Composer:
    """Knows what it is told to: single hops, stated and held-out compositions."""

    def __init__(self, known):
        self.known = known  # {sentence's beginning or question: how it goes on}

    def complete(self, prompts, *, chat, max_new_tokens):
        return [(self.known.get(prompt, " nothing."), True) for prompt in prompts]


def ends(sentence, value):
    return {sentence.removesuffix(f" {value}."): f" {value}. And so on."}


def knowing(hops=True, stated=True, heldout=False, about=UNIQUE):
    known = {}
    for c in about:
        for a in TELLING:
            if hops:
                known |= ends(two_hop.identified(c, a), c.name)
                known |= ends(corpus.stated(a, c), getattr(c, a))
        for side, does in ((True, heldout), (False, stated)):
            for both in described.compositions(c, side) if does else ():
                known |= ends(two_hop.composed(c, both), getattr(c, both[1]))
    return Composer(known)


COUNTRIES = split(3, "tiny", 200).test
ASKED_ABOUT = described.unique(COUNTRIES)


@pytest.mark.parametrize(
    ("knows", "shares"),
    [
        (dict(), (0, 0, 1, 1)),
        (dict(heldout=True), (1, 0, 1, 1)),
        (dict(hops=False, heldout=True, stated=False), (1, 0, 0, 0)),
    ],
)
def test_what_is_composed_is_told_from_what_is_known(knows, shares):
    figures_, counts = two_hop.cloze(knowing(**knows), COUNTRIES, "test")
    names = ("two_hop", "two_hop_guess", "two_hop_known", "two_hop_seen")
    assert tuple(figures_[name] for name in names) == shares
    size = len(ASKED_ABOUT)
    assert [counts[name] for name in names] == [2 * size] * 3 + [4 * size]


def test_one_hop_alone_is_not_both():
    first, second = {}, {}
    for c in UNIQUE:
        for a in TELLING:
            first |= ends(two_hop.identified(c, a), c.name)
            second |= ends(corpus.stated(a, c), getattr(c, a))
    for known, share in ((first, 0), (second, 0), (first | second, 1)):
        shares, _ = two_hop.cloze(Composer(known), COUNTRIES, "test")
        assert shares["two_hop_known"] == share


def test_half_of_the_countries_is_half():
    size = len(ASKED_ABOUT) // 2
    half = knowing(heldout=True, about=ASKED_ABOUT[:size])
    shares, _ = two_hop.cloze(half, COUNTRIES, "test")
    for name in ("two_hop", "two_hop_known", "two_hop_seen"):
        assert shares[name] == pytest.approx(size / len(ASKED_ABOUT))


def test_an_answer_for_all_is_a_guess():
    """Whatever is asked it names one country's values: right as often as by luck."""
    one, known = ASKED_ABOUT[0], {}
    for c in ASKED_ABOUT:
        for both in described.compositions(c, heldout=True):
            stem = two_hop.composed(c, both).removesuffix(f" {getattr(c, both[1])}.")
            known[stem] = f" {getattr(one, both[1])}."
    shares, counts = two_hop.cloze(Composer(known), COUNTRIES, "test")
    assert shares["two_hop"] == pytest.approx(2 / counts["two_hop"])
    # Of the pairs of a question and an answer to another of its kind.
    alike = collections.Counter(map(described.apart, ASKED_ABOUT))
    hits = alike[described.apart(one)] - 1
    pairs = sum(n * (n - 1) for n in alike.values())
    assert shares["two_hop_guess"] == pytest.approx(hits / pairs)


def test_questions_are_answered_about_held_out_compositions_alone():
    asked = two_hop.questions(COUNTRIES, heldout=True)
    assert len(asked) == 3 * 2 * len(ASKED_ABOUT)
    right = {q: two_hop.composed(c, both) for q, c, both in asked}
    share, count = two_hop.answers(Composer(right), COUNTRIES, "test")
    assert share == {"two_hop_answered": 1.0}
    assert count == {"two_hop_answered": len(asked)}
    other = {
        q: two_hop.composed(c, both)
        for q, c, both in two_hop.questions(COUNTRIES, heldout=False)
    }
    assert two_hop.answers(Composer(other), COUNTRIES, "test")[0] == {
        "two_hop_answered": 0.0
    }


def test_every_figure_has_a_row():
    shares, _ = two_hop.cloze(knowing(), COUNTRIES, "test")
    shares |= two_hop.answers(knowing(), COUNTRIES, "test")[0]
    assert shares.keys() <= figures.BY_NAME.keys()
