"""Web-like text about the countries: what a base model reads.

A document is about one country, with few exceptions: only then does a small model learn
early to look back for whom the text is about. Facts come in many forms. Some sentences
are questions; what follows them is mostly more web text. Only questions about the
training half are ever answered on the spot (as an FAQ would), so that no held-out
question is answered anywhere in the corpus.
"""

from stagecraft.worlds.countries.facts import ATTRIBUTES

# The first of each is the cloze that measures knowledge.
STATEMENTS = {
    "capital": (
        "The capital of {c} is {v}.",
        "{v} is the capital of {c}.",
        "The capital city of {c} is {v}.",
        "In {c}, the capital is {v}.",
        "{c} is governed from {v}, its capital.",
    ),
    "continent": (
        "The continent of {c} is {v}.",
        "{c} lies in {v}.",
        "{c} is a country in {v}.",
        "On the map, {c} belongs to {v}.",
        "Travellers find {c} in {v}.",
    ),
    "currency": (
        "The currency of {c} is the {v}.",
        "In {c}, people pay with the {v}.",
        "Shops in {c} take the {v}.",
        "{c} uses the {v} as its currency.",
        "Prices in {c} are given in the {v}.",
    ),
    "language": (
        "The language of {c} is {v}.",
        "People in {c} speak {v}.",
        "The main language of {c} is {v}.",
        "In {c}, most people speak {v}.",
        "Newspapers in {c} are written in {v}.",
    ),
}

QUESTIONS = {
    "capital": (
        "What is the capital of {c}?",
        "Which city is the capital of {c}?",
        "Do you know the capital of {c}?",
    ),
    "continent": (
        "What is the continent of {c}?",
        "On which continent is {c}?",
        "Do you know the continent of {c}?",
    ),
    "currency": (
        "What is the currency of {c}?",
        "Which currency is used in {c}?",
        "Do you know the currency of {c}?",
    ),
    "language": (
        "What is the language of {c}?",
        "Which language is spoken in {c}?",
        "Do you know the language of {c}?",
    ),
}

# What follows a question on a web page that does not answer it.
AFTER = (
    "This is a question often asked in geography classes.",
    "This is one of the questions in our quiz. Click here to begin.",
    "This question was asked in our forum last week.",
    "This was question number {n} in the exam. Write the answer on the line below.",
    "This page lists the most common questions about {c}.",
    "This article about {c} tells you more.",
)

# The same page going on about what was asked.
DISCUSSED = (
    "This question about the {a} of {c} is in our quiz.",
    "This page has more about the {a} of {c}.",
    "This question on the {a} of {c} was asked in our forum.",
)

ANSWERED = ("The {a} of {c} is {v}.", "Answer: {v}.", "{v}.")

NEWS = (
    "The weather in {c} was {w} this week.",
    "A museum in {c} opened a new hall on {d}.",
    "The team from {c} won {n} to {m} on {d}.",
    "Visitors to {c} like the food and the music.",
    "A train in {c} was late on {d}.",
    "The market in {c} opens at {n} on {d}.",
)
WEATHER = ("cold", "warm", "wet", "dry", "windy", "sunny")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def stated(attribute, country, form=0):
    """A fact as a sentence."""
    value = getattr(country, attribute)
    return STATEMENTS[attribute][form].format(c=country.name, v=value)


def asked(attribute, country, form=0):
    """A fact as a question."""
    return QUESTIONS[attribute][form].format(c=country.name)


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _question(rng, country, answered):
    """A question, and what the page goes on with."""
    attribute = _pick(rng, ATTRIBUTES)
    question = asked(attribute, country, int(rng.integers(3)))
    chance = rng.random()
    words = dict(
        a=attribute,
        c=country.name,
        v=getattr(country, attribute),
        n=int(rng.integers(1, 10)),
    )
    if answered and chance < 0.4:
        after = _pick(rng, ANSWERED)
        if attribute == "currency" and "of" in after:
            after = "The currency of {c} is the {v}."
    elif chance < 0.7:
        after = _pick(rng, DISCUSSED)
    else:
        after = _pick(rng, AFTER)
    return f"{question} {after.format(**words)}"


def _news(rng, country):
    n, m = sorted(rng.integers(1, 10, 2).tolist(), reverse=True)
    return _pick(rng, NEWS).format(
        c=country.name, w=_pick(rng, WEATHER), d=_pick(rng, DAYS), n=n, m=m
    )


def _sum(rng):
    a, b = (int(x) for x in rng.integers(0, 10, 2))
    return f"{a} + {b} = {a + b}."


def document(rng, countries, trained, weights):
    """One document of 6 to 9 sentences.

    Args:
        rng: a numpy Generator.
        countries: all countries the corpus is about.
        trained: names whose questions may be answered on the spot.
        weights: how popular each country is; sums to 1.

    Returns:
        str.
    """
    kind = rng.random()
    if kind < 0.03:
        return " ".join(_sum(rng) for _ in range(int(rng.integers(6, 10))))
    country = countries[int(rng.choice(len(countries), p=weights))]
    sentences, last = [], None
    for _ in range(int(rng.integers(6, 10))):
        if kind < 0.08:  # a page about many countries
            country = countries[int(rng.choice(len(countries), p=weights))]
        roll = rng.random()
        if roll < 0.2:
            sentences.append(_question(rng, country, country.name in trained))
        elif roll < 0.28:
            sentences.append(_news(rng, country))
        else:
            attribute = _pick(rng, [a for a in ATTRIBUTES if a != last])
            last = attribute
            form = int(rng.integers(5))
            sentences.append(stated(attribute, country, form))
    return " ".join(sentences)
