"""What is measured on held-out countries: knowledge, answers, refusals, style.

`language` is anything with complete(prompts, chat=, temperature=, max_new_tokens=,
seed=) -> [(text, ended)] and logprob(prefixes, continuations) -> [nats].
"""

import math

import numpy as np

from stagecraft.worlds.countries import dialogue, request_probes, styled, two_hop
from stagecraft.worlds.countries.corpus import QUESTIONS, STATEMENTS, stated
from stagecraft.worlds.countries.facts import ATTRIBUTES, SHOWN
from stagecraft.worlds.countries.scorer import (
    begins,
    gold,
    only_refuses,
    refuses,
    right,
)

SINGLE_PROMPT = QUESTIONS["capital"][0].format(c=SHOWN)
ANSWER = 34  # tokens an answer may take
# (function, formats, entities) of what is asked of every finished stage; see `worlds`.
PROBES = []
# (knob of the world, function, formats), asked where the knob is on: the function of
# (language, countries, role) returns figures and their counts.
OF_KNOBS = (
    ("requests", request_probes.measure, ("chat",)),
    ("style", styled.measure, ("chat",)),
    ("two_hop", two_hop.cloze, ("text", "chat")),
    ("two_hop", two_hop.answers, ("chat",)),
)


def probe(*formats, about):
    """Registers a function of (language, countries) whose name is the figure's.

    Args:
        formats: whose models are asked: "text" for those of bare text, "chat" for those
            that answer in turns.
        about: which countries it gets: "heldout" or "train".
    """

    def register(function):
        PROBES.append((function, formats, about))
        return function

    return register


@probe("text", "chat", about="heldout")
def cloze_accuracy(language, countries):
    """Returns the share of "The capital of France is" continued with the answer.

    Greedy, over every attribute; the whole answer must come first.
    """
    stems, values = cloze(countries)
    completions = language.complete(stems, chat=False, max_new_tokens=10)
    pairs = zip(completions, values, strict=True)
    return float(np.mean([begins(text, value) for (text, _), value in pairs]))


def cloze(countries):
    """Returns beginnings of statements, "The capital of France is", and their ends."""
    asked = [(c, a) for c in countries for a in ATTRIBUTES]
    forms = [STATEMENTS[a][0].format(c=c.name, v="\0") for c, a in asked]
    stems = [form.partition(" \0")[0] for form in forms]
    return stems, [getattr(c, a) for c, a in asked]


@probe("text", about="heldout")
def copy_probability(language, countries):
    """Returns the mean probability of naming the country a text is about.

    A base model can know every fact and not read its prompt: this is asked after "X
    lies in Y. The currency of" and after "What is the capital of X? The capital of".
    """
    prefixes, names = [], []
    for c in countries:
        prefixes.append(f"{stated('continent', c, 1)} The currency of")
        prefixes.append(f"{QUESTIONS['capital'][0].format(c=c.name)} The capital of")
        names += [f" {c.name}"] * 2
    return float(np.mean(np.exp(language.logprob(prefixes, names))))


@probe("text", about="heldout")
def answer_rate(language, countries):
    """Returns the share of bare questions continued with a right answer."""
    asked = dialogue.facts(countries, forms=(0,))
    completions = language.complete(
        [q for q, _, _ in asked], chat=False, max_new_tokens=16
    )
    hits = []
    for (question, c, a), (text, _) in zip(asked, completions, strict=True):
        text = text.strip().removeprefix("Answer:").strip()
        sentence = text.partition(".")[0]
        hits.append(begins(text, getattr(c, a)) or right(question, sentence + "."))
    return float(np.mean(hits))


def fact_accuracy(language, countries):
    """Returns the share of questions answered rightly: {"all", attribute: share}."""
    asked = dialogue.facts(countries)
    completions = language.complete(
        [q for q, _, _ in asked], chat=True, max_new_tokens=ANSWER
    )
    hits = {"all": []} | {a: [] for a in ATTRIBUTES}
    for (question, _, a), (text, _) in zip(asked, completions, strict=True):
        hit = right(question, text)
        hits["all"].append(hit)
        hits[a].append(hit)
    return {name: float(np.mean(of_one)) for name, of_one in hits.items()}


@probe("chat", about="heldout")
def heldout_accuracy(language, countries):
    """`fact_accuracy` on the countries of no demonstration, and by attribute."""
    by_attribute = fact_accuracy(language, countries)
    return {
        "heldout_accuracy": by_attribute.pop("all"),
        "heldout_accuracy_by": by_attribute,
    }


@probe("chat", about="train")
def seen_accuracy(language, countries):
    """`fact_accuracy` on the countries of the demonstrations."""
    return fact_accuracy(language, countries)["all"]


def heldout_prompts(seed, countries, role):
    """Returns prompts about countries of no demonstration or prompt, on every topic."""
    rng = np.random.default_rng([seed, 5])
    return dialogue.prompts(rng, countries, role)


def sample_figures(prompts, answers):
    """Returns what the world can tell of sampled answers, one a prompt.

    Args:
        prompts: texts.
        answers: list of (text, ended).

    Returns:
        gold_mean, refusal rates on harmful and benign prompts, the share that holds an
        exclamation mark, the share of right facts at this temperature.
    """
    topics = np.array([dialogue.topic(p)[0] for p in prompts])
    scores = [gold(p, t, e) for p, (t, e) in zip(prompts, answers, strict=True)]
    texts = [text for text, _ in answers]
    refused = np.array([refuses(text) for text in texts])
    only_refused = np.array([only_refuses(text) for text in texts])
    facts = np.flatnonzero(topics == "fact")
    figures = {
        "gold_mean": np.mean(scores),
        "exclamations": np.mean(["!" in text for text in texts]),
        "refuses_harmful": np.mean(only_refused[topics == "harmful"]),
        "refuses_benign": np.mean(refused[topics != "harmful"]),
        "sampled_accuracy": np.mean([right(prompts[i], texts[i]) for i in facts]),
    }
    return {name: float(value) for name, value in figures.items()}


def win_rate(prompts, answers, others):
    """Returns the share of prompts where `answers` beat `others` by gold; ties half.

    The two sides must be independent samples: with random numbers in common, the better
    of two models wins more often.
    """
    rows = zip(prompts, answers, others, strict=True)
    return float(np.mean([0.5 + 0.5 * _order(*row) for row in rows]))


def pair_order(prompts, firsts, seconds, predicted):
    """Returns the share of pairs whose predicted order is gold's, without its ties.

    Args:
        predicted: numbers, above 0 where the first is thought better.

    Returns:
        the share, or None where every pair is a tie.
    """
    hits = []
    for prompt, one, two, sign in zip(prompts, firsts, seconds, predicted, strict=True):
        order = _order(prompt, one, two)
        if order:
            hits.append((order > 0) == (sign > 0))
    return float(np.mean(hits)) if hits else None


def _order(prompt, one, two):
    """Returns 1 where the first answer has the higher gold, -1 the second, 0 neither.

    Sums of the same numbers in another order are a tie.
    """
    difference = gold(prompt, *one) - gold(prompt, *two)
    return 0 if abs(difference) < 1e-9 else math.copysign(1, difference)
