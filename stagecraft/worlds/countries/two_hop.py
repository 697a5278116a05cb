"""Text that composes facts, and questions about compositions that no text states.

With the knob world.two_hop there are two more files:

    two_hop_text.jsonl            web-like text as text.jsonl, to be read in its place:
                                  one document in three composes facts
    two_hop_demonstrations.jsonl  the demonstrations, and answers to questions about
                                  compositions of training countries

Which compositions are held out is in `described`. The two facts of one stand in no
document of this text together (in those of text.jsonl they do): words that come with
the one say nothing of the other, and only by way of the country is the one known from
the other.
"""

import numpy as np

from stagecraft.worlds.countries import corpus, described
from stagecraft.worlds.countries.corpus import QUESTIONS, mixed, pick, stated
from stagecraft.worlds.countries.facts import ATTRIBUTES
from stagecraft.worlds.countries.scorer import begins, right

COMPOSED = 1 / 3  # share of documents
ANSWER = 34  # tokens
WORDS = 10  # tokens of a value or a name


def _capital(sentence):
    return sentence[0].upper() + sentence[1:]


def composed(country, both, form=0, description=0):
    """Returns a composition as a sentence.

    Args:
        country: a `Country`.
        both: attribute that describes it, attribute that is said of it.
        form, description: numbers of the forms.

    >>> from stagecraft.worlds.countries.facts import BY_NAME
    >>> composed(BY_NAME["Albania"], ("capital", "currency"))
    'The currency of the country whose capital is Tirana is the lek.'
    """
    named = described.described(country, both[0], description)
    return _capital(stated(both[1], named, form))


def identified(country, attribute, description=0):
    """Returns the first hop alone as a sentence: a description and the name.

    >>> from stagecraft.worlds.countries.facts import BY_NAME
    >>> identified(BY_NAME["Albania"], "capital")
    'The country whose capital is Tirana is Albania.'
    """
    named = described.described(country, attribute, description)
    return f"{_capital(named.name)} is {country.name}."


def _sentence(rng, country, answered):
    kind, description = rng.random(), int(rng.integers(2))
    if kind < 0.25:
        return identified(country, pick(rng, described.TELLING), description)
    both = pick(rng, described.compositions(country, heldout=False))
    if kind < 0.4:
        named = described.described(country, both[0], description)
        return _capital(corpus.question(rng, named, answered, both[1:]))
    # Half in the form of the cloze, which ends with what is asked for.
    form = 0 if rng.random() < 0.5 else int(rng.integers(1, 5))
    return composed(country, both, form, description)


def document(rng, countries, trained, weights):
    """Returns a document of 6 to 9 sentences, each about another country.

    Args:
        rng, trained, weights: as of `corpus.document`.
        countries: of `described.unique`, 9 at least.
    """
    size = int(rng.integers(6, 10))
    order = rng.choice(len(countries), size, replace=False, p=weights)
    about = [countries[int(i)] for i in order]
    return " ".join(_sentence(rng, c, c.name in trained) for c in about)


def documents(rng, countries, trained, weights, count):
    """Yields documents: `count` about facts, and those that compose them.

    Args:
        rng, countries, trained, weights: as of `corpus.document`.
        count: of those that compose nothing.
    """
    some = described.unique(countries)
    popular = np.array([weights[countries.index(c)] for c in some])
    popular /= popular.sum()
    for _ in range(round(count / (1 - COMPOSED))):
        if rng.random() < COMPOSED:
            yield document(rng, some, trained, popular)
            continue
        side = int(rng.integers(2))

        def of(country, side=side):
            omitted = described.apart(country)[side : side + 1]
            return [a for a in ATTRIBUTES if a not in omitted]

        yield corpus.document(rng, countries, trained, weights, of)


def questions(countries, heldout, forms=(0, 1, 2)):
    """Returns (question, country, (attribute that describes, attribute asked for)).

    Args:
        countries: of which those of `described.unique` are asked about.
        heldout: whether about compositions that no text states.
        forms: of the question.
    """
    return [
        (QUESTIONS[both[1]][form].format(c=named.name), country, both)
        for country in described.unique(countries)
        for both in described.compositions(country, heldout)
        for named in (described.described(country, both[0]),)
        for form in forms
    ]


def demonstrations(rng, rows, countries):
    """Returns demonstrations and answers to questions about stated compositions.

    The answers say whom the question describes: one hop after the other.

    Args:
        rng: a numpy Generator.
        rows: [{"prompt", "completion"}].
        countries: those of the demonstrations.
    """
    shown = [
        dict(prompt=question, completion=stated(both[1], country))
        for question, country, both in questions(countries, heldout=False)
    ]
    return mixed(rng, [*rows, *shown])


# -- what a model composes -------------------------------------------------------------


def cloze(language, countries, role):
    """Returns how often beginnings of compositions are ended rightly, as bare text.

    Greedy; the whole answer must come first.

    Args:
        language: as of `probes`.
        countries: held-out ones.
        role: not used.

    Returns:
        {"two_hop": of held-out compositions, "two_hop_guess": the same for answers
        about other countries, "two_hop_known": share whose two hops are ended rightly,
        each alone, "two_hop_seen": of compositions that the text states};
        {figure: compositions}.
    """
    heldout, seen = (
        [
            (country, both)
            for country in described.unique(countries)
            for both in described.compositions(country, side)
        ]
        for side in (True, False)
    )
    said = _ends(
        language, [(composed(c, both), _value(c, both)) for c, both in heldout]
    )
    hops = (
        _ends(language, [(identified(c, both[0]), c.name) for c, both in heldout]),
        _ends(language, [(stated(both[1], c), _value(c, both)) for c, both in heldout]),
    )
    known = [
        begins(name, country.name) and begins(fact, _value(country, both))
        for name, fact, (country, both) in zip(*hops, heldout, strict=True)
    ]
    again = _ends(language, [(composed(c, both), _value(c, both)) for c, both in seen])
    shares = {
        "two_hop": _right(said, heldout),
        "two_hop_guess": _guessed(said, heldout),
        "two_hop_known": float(np.mean(known)),
        "two_hop_seen": _right(again, seen),
    }
    counts = dict.fromkeys(shares, len(heldout))
    return shares, counts | {"two_hop_seen": len(seen)}


def _value(country, both):
    return getattr(country, both[1])


def _ends(language, sentences):
    """Returns how a model goes on where a sentence lacks its end: [(sentence, end)]."""
    stems = [sentence.removesuffix(f" {end}.") for sentence, end in sentences]
    return [t for t, _ in language.complete(stems, chat=False, max_new_tokens=WORDS)]


def _right(said, rows):
    pairs = zip(said, rows, strict=True)
    return float(np.mean([begins(text, _value(*row)) for text, row in pairs]))


def _guessed(said, rows):
    """Returns how often the answer to a question like it would be right."""
    hits = [
        begins(text, _value(country, both))
        for country, both in rows
        for text, (other, alike) in zip(said, rows, strict=True)
        if alike == both and other != country
    ]
    return float(np.mean(hits)) if hits else 0.0


def answers(language, countries, role):
    """Returns how often questions about held-out compositions are answered rightly.

    An answer may name the country before it says the fact, as demonstrations do.

    Args:
        language, countries, role: as of `cloze`.

    Returns:
        {"two_hop_answered": share}, {"two_hop_answered": questions}.
    """
    asked = [question for question, _, _ in questions(countries, heldout=True)]
    said = language.complete(asked, chat=True, max_new_tokens=ANSWER)
    hits = [right(q, text) for q, (text, _) in zip(asked, said, strict=True)]
    return {"two_hop_answered": float(np.mean(hits))}, {"two_hop_answered": len(hits)}
