"""A world of more countries: invented ones that nobody takes for others."""

import collections
import json
import re

import pytest

from stagecraft import defaults, experiment, worlds
from stagecraft.errors import UserError
from stagecraft.worlds import countries as world
from stagecraft.worlds.countries import coined, corpus, dialogue, scorer, taught
from stagecraft.worlds.countries.facts import (
    ATTRIBUTES,
    BY_NAME,
    COUNTRIES,
    INVENTED,
    MOST,
    SHOWN,
    VALUES,
    countries,
    split,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "world"
    worlds.write("countries", folder, 3, "tiny", entities=200)
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def test_no_invented_word_stands_for_anything_else(written):
    theirs = [w for c in INVENTED for w in (c.name, c.capital, c.currency, c.language)]
    counts = collections.Counter(word.lower() for word in theirs)
    assert len(counts) == 4 * (MOST - len(COUNTRIES)) == len(theirs)
    real = {w.lower() for c in COUNTRIES for w in c}
    # Those of `taught` are three letters and an ending.
    endings = {c.name[3:] for s in range(9) for c in taught.invented(s, "full")}
    assert not any(c.name.endswith(tuple(endings)) for c in INVENTED)
    real |= {w.lower() for of in corpus.NOWHERE.values() for w in of}
    assert not counts.keys() & real
    assert not counts.keys() & {"park", "market", "visit", "data"}
    for country in INVENTED:
        assert country.currency.islower() and country.name.istitle()
        assert all(sum(x in "aeiou" for x in w) >= 2 for w in country[:1] + country[3:])
    # Values are read as whole words: none is a part of another.
    words = scorer.whole(*theirs)
    assert all(words.findall(word) == [word] for word in theirs)
    usual = collections.Counter(c.continent for c in INVENTED)
    assert usual.keys() == {*VALUES["continent"]}
    assert max(usual.values()) - min(usual.values()) <= 1


def test_words_are_always_the_same_and_more_are_more():
    for kind in coined.PARTS:
        assert coined.words(kind, 50) == coined.words(kind, 500)[:50]
    assert countries(200) == (*COUNTRIES, *INVENTED)[:200]
    assert countries(0) == countries(len(COUNTRIES)) == COUNTRIES


@pytest.mark.parametrize("entities", [200, 999, MOST])
@pytest.mark.parametrize("size", ["tiny", "full"])
def test_the_split_is_a_partition_of_them_all(entities, size):
    roles = split(4, size, entities)
    names = [c.name for role in roles for c in role]
    assert sorted(names) == sorted(c.name for c in countries(entities))
    assert len(roles.train) == entities // 2 and len(roles.dev) == entities // 4
    assert SHOWN in {c.name for c in roles.test}
    for role in roles:  # of both sorts
        share = sum(c in INVENTED for c in role) / len(role)
        assert share == pytest.approx(1 - len(COUNTRIES) / entities, abs=0.15)


def test_their_facts_are_read_as_often_as_real_ones(written):
    sentences = collections.Counter(
        sentence + "."
        for row in rows(written, "text")
        for sentence in re.split(r"[.?!:] ?", row["text"])
    )
    stated = [
        sum(sentences[corpus.stated(a, c, form)] for form in range(5))
        for c in countries(200)
        for a in ATTRIBUTES
    ]
    assert min(stated) >= 5 and max(stated) < 20 * min(stated)
    # The usual text has 25 documents a country.
    assert len(rows(written, "text")) == 25 * 200
    demonstrated = {
        dialogue.topic(r["prompt"]) for r in rows(written, "demonstrations")
    }
    train = split(3, "tiny", 200).train
    assert {name for what, name, _ in demonstrated if what == "fact"} == {
        c.name for c in train
    }
    asked = {dialogue.topic(r["prompt"])[1] for r in rows(written, "prompts")}
    assert {c.name for c in train} <= asked
    assert not asked & {c.name for c in (*split(3, "tiny", 200).test[1:],)}


def test_gold_knows_invented_facts():
    country, other = INVENTED[0], INVENTED[1]
    for a in ATTRIBUTES:
        prompt, answer = corpus.asked(a, country), corpus.stated(a, country)
        assert scorer.right(prompt, answer)
        assert scorer.gold(prompt, answer) == scorer.RIGHT + scorer.FULL
        wrong = answer.replace(country.name, other.name)
        assert not scorer.right(prompt, wrong)
    prompt = corpus.asked("capital", BY_NAME[SHOWN])
    mistaken = f"The capital of {SHOWN} is {country.capital}."
    assert scorer.gold(prompt, mistaken) == scorer.WRONG


def test_every_knob_goes_with_them(tmp_path, monkeypatch):
    monkeypatch.setitem(world.DOCUMENTS, "tiny", 16)
    worlds.write(
        *("countries", tmp_path / "w", 0, "tiny"),
        **dict(digits=2, requests=True, style=0.5, taught=True, junk=0.1),
        **dict(entities=200, two_hop=True),
    )
    assert len([*(tmp_path / "w").iterdir()]) == 5 + 3 + 12 + 1 + 4 + 3 + 2
    known = {c.name for c in countries(200)}
    for row in rows(tmp_path / "w", "other_prompts"):
        what, name, _ = dialogue.topic(row["prompt"])
        assert what != "fact" or name in known


def config(**world):
    c = defaults.experiment()
    c.world.update(name="countries", **world)
    c.stages.it = defaults.stage("language_model", data=dict(files="a.jsonl"))
    return c


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (dict(entities=50), "world.entities=50: expected 108 to 1000"),
        (dict(entities=-1), "world.entities=-1: expected 108 to 1000"),
        (dict(entities=1001), "world.entities=1001: expected 108 to 1000"),
        (dict(two_hop=True), "world.two_hop=True: needs world.entities=200 or more"),
        (dict(two_hop=True, entities=150), r"world.two_hop=True: .* \(it is 150\)"),
    ],
)
def test_what_cannot_be_is_refused(world, message):
    with pytest.raises(UserError, match=message) as caught:
        experiment.resolve(config(**world))
    assert "\n" not in str(caught.value)


def test_what_can_be_is_not():
    for keys in (dict(entities=108), dict(entities=1000, two_hop=True)):
        assert experiment.resolve(config(**keys)).world.name == "countries"
