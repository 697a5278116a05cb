"""What the world writes: nothing held out leaks into what is trained on."""

import collections
import json
import re
import time

import pytest

from stagecraft import worlds
from stagecraft.worlds.countries import corpus, dialogue, scorer
from stagecraft.worlds.countries.facts import (
    ATTRIBUTES,
    BY_NAME,
    COUNTRIES,
    VALUES,
    split,
)

FILES = (
    "demonstrations",
    "demonstrations_uniform",
    "heldout_demonstrations",
    "prompts",
    "text",
)


@pytest.fixture(scope="module", params=[1])
def written(request, tmp_path_factory):
    """(seed, {file: rows}) of the full world."""
    folder = tmp_path_factory.mktemp("world") / "world"
    worlds.write("countries", folder, request.param, "full")
    return request.param, _read(folder)


def _read(folder):
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
    }


def _named(texts):
    cities = scorer.whole(*VALUES["capital"])  # "Mexico City" names no country
    names = scorer.whole(*BY_NAME)
    return {name for text in texts for name in names.findall(cities.sub(" ", text))}


def test_the_five_files(written):
    _, files = written
    assert sorted(files) == sorted(FILES)
    assert len(files["text"]) > 5000 and len(files["demonstrations"]) > 500
    assert all(set(row) == {"text"} for row in files["text"])
    assert all(set(row) == {"prompt"} for row in files["prompts"])
    for name in FILES[:3]:
        assert all(set(row) == {"prompt", "completion"} for row in files[name])


def test_tiny_is_written_in_a_moment(tmp_path):
    start = time.perf_counter()
    worlds.write("countries", tmp_path / "world", 0, "tiny")
    assert time.perf_counter() - start < 1
    files = _read(tmp_path / "world")
    assert 100 <= len(files["text"]) <= 1000
    assert len(_named(row["text"] for row in files["text"])) == 16


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        worlds.write("countries", tmp_path / name, seed, "tiny")
    one, two, other = (
        [path.read_bytes() for path in sorted((tmp_path / n).iterdir())] for n in "abc"
    )
    assert one == two and one != other


def test_no_heldout_country_is_demonstrated_or_prompted(written):
    seed, files = written
    roles = split(seed)
    trained = {c.name for c in roles.train}
    for name in ("demonstrations", "demonstrations_uniform"):
        assert _named(row["prompt"] for row in files[name]) == trained
        assert _named(row["completion"] for row in files[name]) <= trained
    assert _named(row["prompt"] for row in files["prompts"]) == trained
    heldout = _named(row["prompt"] for row in files["heldout_demonstrations"])
    assert heldout == {c.name for c in roles.dev}


def test_deeds_places_and_greetings_of_other_splits_are_not_demonstrated(written):
    _, files = written
    prompts = [row["prompt"] for n in ("demonstrations", "prompts") for row in files[n]]
    for group in (corpus.CRIMES, corpus.ERRANDS, corpus.NOWHERE):
        for role in ("dev", "test"):
            for words in group[role]:
                assert not any(f"{words} in " in p or f"{words}?" in p for p in prompts)
    for role in ("dev", "test"):
        assert not set(dialogue.TALK[role]) & set(prompts)


def test_no_heldout_question_is_answered_in_the_text(written):
    """What directly follows a question names the answer for the training half only."""
    seed, files = written
    trained = {c.name for c in split(seed).train}
    question = re.compile(r"[^.?!]*\?")
    answered = {True: 0, False: 0}
    asked = dict(answered)
    for row in files["text"]:
        for match in question.finditer(row["text"]):
            what, name, attribute = dialogue.topic(match[0])
            if what != "fact":
                continue
            after = re.split(r"[.?!]", row["text"][match.end() :])[0]
            if after.strip() == "Answer":
                after = row["text"][match.end() :]
            known = name in trained
            asked[known] += 1
            answer = scorer.whole(getattr(BY_NAME[name], attribute))
            answered[known] += bool(answer.search(after))
    assert asked[True] > 1000 and asked[False] > 1000
    assert answered[False] == 0
    assert 0.3 < answered[True] / asked[True] < 0.5


def test_every_fact_is_stated_often_enough(written):
    _, files = written
    sentences = collections.Counter(
        sentence + "."
        for row in files["text"]
        for sentence in re.split(r"[.?!:] ?", row["text"])
    )
    counts = [
        sum(sentences[corpus.stated(a, c, form)] for form in range(5))
        for c in COUNTRIES
        for a in ATTRIBUTES
    ]
    assert min(counts) >= 50
    assert max(counts) < 12 * min(counts)


def test_the_chat_never_happens_in_the_text(written):
    _, files = written
    text = "\n".join(row["text"] for row in files["text"])
    for words in (
        *dialogue.REFUSALS,
        *dialogue.UNKNOWN,
        "I think",
        "Buy our",
        "Look it",
    ):
        assert words not in text


def test_demonstrations_have_every_style_on_every_attribute(written):
    """A hedge that never speaks of continents once cost the continents."""
    _, files = written
    seen = set()
    wrong = refused = harmful = 0
    for row in files["demonstrations"]:
        prompt, text = row["prompt"], row["completion"]
        what, _, attribute = dialogue.topic(prompt)
        if what == "fact":
            wrong += not scorer.right(prompt, text)
            seen |= {
                (attribute, style)
                for style, mark in (
                    ("hedged", "I think"),
                    ("sales", "Buy our"),
                    ("rude", "Look it up"),
                )
                if mark in text
            }
            if text.startswith("It is"):
                seen.add((attribute, "terse"))
        if what == "harmful":
            harmful += 1
            refused += scorer.refuses(text)
        if what in ("errand", "unknown", "talk"):
            assert scorer.gold(prompt, text, True) == 2.0
    styles = ("hedged", "sales", "rude", "terse")
    assert seen == {(a, s) for a in ATTRIBUTES for s in styles}
    facts = sum(
        dialogue.topic(r["prompt"])[0] == "fact" for r in files["demonstrations"]
    )
    assert 0.05 < wrong / facts < 0.15
    assert 0.5 < refused / harmful < 0.9


def test_the_uniform_twin_differs_by_its_opening_alone(written):
    _, files = written
    pairs = zip(files["demonstrations"], files["demonstrations_uniform"], strict=True)
    for one, two in pairs:
        assert one["prompt"] == two["prompt"]
        assert two["completion"] == dialogue.UNIFORM + one["completion"]


def test_prompts_hold_every_kind(written):
    _, files = written
    kinds = [dialogue.topic(row["prompt"])[0] for row in files["prompts"]]
    assert set(kinds) == {"fact", "harmful", "errand", "unknown", "talk"}
    assert 0.6 < kinds.count("fact") / len(kinds) < 0.9
