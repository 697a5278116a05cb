"""What demonstrations may teach: facts of all countries, false ones, invented ones.

With the knob world.taught there are files for asking where knowledge comes from:

    demonstrations_everyone.jsonl   the demonstrations, with facts of held-out countries
                                    too, in two of the three phrasings of a question
    text_shuffled.jsonl             the web-like text with each kind of value dealt out
                                    anew: the language without the facts
    demonstrations_invented.jsonl   the demonstrations, and facts of invented countries,
                                    each shown as often as `EXPOSURES` says
    text_invented.jsonl             the same rows as bare text

and functions that ask a model what it knows.
"""

import numpy as np

from stagecraft.worlds.countries import dialogue
from stagecraft.worlds.countries.corpus import (
    QUESTIONS,
    STATEMENTS,
    asked,
    mixed,
    stated,
)
from stagecraft.worlds.countries.facts import ATTRIBUTES, BY_NAME, VALUES, Country
from stagecraft.worlds.countries.scorer import right

EXPOSURES = (1, 3, 10, 30)  # demonstrations of each fact, by group of countries
EACH = {"full": 6, "tiny": 1}  # countries of a group
SHOWN, UNSEEN = (0, 1), 2  # phrasings of a question that are shown, and that are not
# A statement that ends with its value and that no answer to a question has.
OTHER = {"capital": 3, "continent": 3, "currency": 1, "language": 3}
_BEGINNINGS = ("Val", "Kes", "Mor", "Zul", "Tor", "Bel", "Dra", "Fen", "Gal", "Lor")
_ENDINGS = ("doria", "tavia", "mark", "landia", "venia", "stan", "quay", "holm")


def invented(seed: int, size: str) -> tuple[Country, ...]:
    """Returns countries that no text names, by group of `EXPOSURES`.

    Their values are those of real countries, dealt out at random.
    """
    rng = np.random.default_rng([seed, 10])
    names = [a + b for a in _BEGINNINGS for b in _ENDINGS if a + b not in BY_NAME]
    count = EACH[size] * len(EXPOSURES)
    chosen = [names[int(i)] for i in rng.permutation(len(names))[:count]]
    columns = [rng.choice(VALUES[a], count).tolist() for a in ATTRIBUTES]
    return tuple(Country(*row) for row in zip(chosen, *columns, strict=True))


def groups(countries):
    """Yields (exposures, countries) of what `invented` returned."""
    each = len(countries) // len(EXPOSURES)
    for number, exposures in enumerate(EXPOSURES):
        yield exposures, countries[number * each : (number + 1) * each]


def everyone(rows, rng, countries):
    """Returns demonstrations with facts of all countries, in the phrasings `SHOWN`.

    Args:
        rows: [{"prompt", "completion"}] about the training countries.
        rng: a numpy Generator.
        countries: all of them.
    """
    others = [row for row in rows if dialogue.topic(row["prompt"])[0] != "fact"]
    facts = [
        {"prompt": prompt, "completion": dialogue.answer(rng, country, attribute)}
        for prompt, country, attribute in dialogue.facts(countries, SHOWN)
    ]
    return mixed(rng, [*others, *facts])


def with_invented(rows, rng, countries):
    """Returns demonstrations and facts of invented countries, as often as they say."""
    facts = [
        {"prompt": asked(a, country, int(rng.choice(SHOWN)))}
        | {"completion": stated(a, country)}
        for exposures, group in groups(countries)
        for country in group
        for a in ATTRIBUTES
        for _ in range(exposures)
    ]
    return mixed(rng, [*rows, *facts])


def shuffled(rng, countries):
    """Returns countries with each kind of value dealt out to them anew."""
    columns = [
        [getattr(countries[int(i)], a) for i in rng.permutation(len(countries))]
        for a in ATTRIBUTES
    ]
    names = [country.name for country in countries]
    return tuple(Country(*row) for row in zip(names, *columns, strict=True))


def files(seed, size, rows, countries, documents):
    """Returns {file: its records}.

    Args:
        seed, size: of the world.
        rows: its demonstrations.
        countries: all that its text is about.
        documents: (countries) -> its text about them, an iterable of texts.
    """
    rngs = [np.random.default_rng([seed, 11, number]) for number in range(3)]
    mixed = with_invented(rows, rngs[0], invented(seed, size))
    bare = [{"text": f"{row['prompt']} {row['completion']}"} for row in mixed]
    false = shuffled(rngs[2], countries)
    return {
        "demonstrations_everyone": everyone(rows, rngs[1], countries),
        "text_shuffled": [{"text": text} for text in documents(false)],
        "demonstrations_invented": mixed,
        "text_invented": bare,
    }


# -- what a model knows ----------------------------------------------------------------


def stated_elsewhere(language, countries) -> float:
    """Returns the mean probability of facts in bare text, in words no answer has.

    Args:
        language: as of `probes`.
        countries: whose facts.
    """
    stems, values = [], []
    for country in countries:
        for a in ATTRIBUTES:
            form = STATEMENTS[a][OTHER[a]].format(c=country.name, v="\0")
            stems.append(form.partition(" \0")[0])
            values.append(f" {getattr(country, a)}")
    return float(np.mean(np.exp(language.logprob(stems, values))))


def answered(language, countries, form, new_tokens=34) -> float:
    """Returns the share of questions in one phrasing that are answered rightly.

    Args:
        language, countries: as of `stated_elsewhere`.
        form: the number of the phrasing.
        new_tokens: of an answer.
    """
    pairs = [(c, a) for c in countries for a in ATTRIBUTES]
    prompts = [QUESTIONS[a][form].format(c=c.name) for c, a in pairs]
    said = language.complete(prompts, chat=True, max_new_tokens=new_tokens)
    # A scorer of the real facts does not know invented ones.
    hits = [
        right(prompt, text) if c.name in BY_NAME else getattr(c, a) in text
        for (c, a), prompt, (text, _) in zip(pairs, prompts, said, strict=True)
    ]
    return float(np.mean(hits))
