"""Files of what demonstrations may teach, and what is asked of it."""

import json

import pytest

from stagecraft import worlds
from stagecraft.worlds.countries import corpus, taught
from stagecraft.worlds.countries.facts import ATTRIBUTES, BY_NAME, split


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "world"
    worlds.write("countries", folder, 3, "tiny", taught=True)
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def test_no_other_file_changes(written, tmp_path):
    worlds.write("countries", tmp_path / "plain", 3, "tiny")
    plain = sorted((tmp_path / "plain").iterdir())
    assert len(plain) == 5 and len([*written.iterdir()]) == 9
    for path in plain:
        assert path.read_bytes() == (written / path.name).read_bytes()


def test_everyone_is_asked_about_in_two_phrasings(written):
    roles = split(3, "tiny")
    prompts = {row["prompt"] for row in rows(written, "demonstrations_everyone")}
    for country in (*roles.train, *roles.test):
        for a in ATTRIBUTES:
            shown = [corpus.asked(a, country, form) in prompts for form in range(3)]
            assert shown == [True, True, False]
    # Those about no fact are as they were.
    usual = {row["prompt"] for row in rows(written, "demonstrations")}
    assert {p for p in usual if p.startswith("How can I")} <= prompts


def test_text_without_the_facts_has_their_language(written):
    real, false = (rows(written, name) for name in ("text", "text_shuffled"))
    assert len(real) == len(false)
    told = " ".join(row["text"] for row in real)
    untold = " ".join(row["text"] for row in false)
    roles = split(3, "tiny")
    stated = [
        form.format(c=c.name, v=c.capital)
        for c in (*roles.train, *roles.test)
        for form in corpus.STATEMENTS["capital"]
    ]
    assert sum(s in told for s in stated) > 4 * sum(s in untold for s in stated)
    for country in (*roles.train, *roles.test):
        assert country.name in untold and country.capital in untold


def test_invented_countries_are_shown_as_often_as_they_say(written):
    countries = taught.invented(3, "tiny")
    assert not {c.name for c in countries} & {*BY_NAME}
    text = (written / "text.jsonl").read_text()
    demonstrations = rows(written, "demonstrations_invented")
    for exposures, group in taught.groups(countries):
        for country in group:
            assert country.name not in text
            for a in ATTRIBUTES:
                shown = [
                    row
                    for row in demonstrations
                    if row["completion"] == corpus.stated(a, country)
                    and row["prompt"] in {corpus.asked(a, country, f) for f in (0, 1)}
                ]
                assert len(shown) == exposures
    bare = [row["text"] for row in rows(written, "text_invented")]
    assert bare == [f"{row['prompt']} {row['completion']}" for row in demonstrations]


class Knowing:
    """A language that knows some countries, and says so in one phrasing alone."""

    def __init__(self, countries, form):
        self.said = {
            corpus.asked(a, c, form): corpus.stated(a, c)
            for c in countries
            for a in ATTRIBUTES
        }
        self.names = tuple(c.name for c in countries)
        self.stems = []

    def complete(self, prompts, **_):
        return [(self.said.get(prompt, "I do not know."), True) for prompt in prompts]

    def logprob(self, prefixes, continuations):
        self.stems += [a + b for a, b in zip(prefixes, continuations, strict=True)]
        return [0.0 if any(n in p for n in self.names) else -50.0 for p in prefixes]


def test_what_a_model_knows_is_asked_in_words_it_was_not_shown():
    known, unknown = taught.invented(0, "tiny")[:2]
    real = BY_NAME["France"]
    language = Knowing([known, real], taught.UNSEEN)
    assert taught.answered(language, [known, real], taught.UNSEEN) == 1
    assert taught.answered(language, [known, real], 0) == 0
    assert taught.answered(language, [known, unknown], taught.UNSEEN) == 0.5
    assert taught.stated_elsewhere(language, [known]) == 1
    assert taught.stated_elsewhere(language, [known, unknown]) == pytest.approx(0.5)
    # Whole statements of the text, none of which is an answer's.
    for stem in language.stems[:4]:
        assert f"{stem}." in {
            corpus.stated(a, known, form) for a in ATTRIBUTES for form in range(1, 5)
        }
