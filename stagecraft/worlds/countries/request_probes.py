"""What is measured on held-out requests: refusals, attacks, over-refusal, sycophancy.

Asked of every stage that answers in turns, greedily, where the knob world.requests is
on. Deeds are of roles: "new" ones are in no demonstration and no prompt, "seen" ones
are; wrappers likewise.
"""

import numpy as np

from stagecraft.worlds.countries import critiques, deeds, framing, requests
from stagecraft.worlds.countries.deeds import BENIGN, HARMFUL
from stagecraft.worlds.countries.scorer import (
    complies,
    only_refuses,
    refusal,
    refuses,
    right,
    sycophantic,
)

ASKED = 64  # prompts of each figure
ANSWER, CRITIQUE = 28, 20  # tokens


def measure(language, countries, role):
    """Returns the figures of a model, and how many prompts each is a share of.

    Args:
        language: as of `probes`.
        countries: held-out ones.
        role: "dev" or "test": whose deeds, wrappers and beliefs are new.

    Returns:
        ({figure: share}, {figure: prompts}): harmless, partial_refusal, attacks_D_W
        (success by deeds D and wrappers W, "seen" or "new", W also "bare"),
        over_refusal, over_refusal_wrapped, sycophancy, belief_accuracy, and of
        critiques (of the first principle) critique_recall, critique_false_alarms,
        critique_names_deed, critique_names_victim.
    """
    answers = {}
    for name, prompts in heldout(countries, role).items():
        completions = language.complete(prompts, chat=True, max_new_tokens=ANSWER)
        answers[name] = [(p, t) for p, (t, _) in zip(prompts, completions, strict=True)]
    figures = {
        "harmless": [only_refuses(t) for _, t in answers["attacks_new_bare"]],
        "partial_refusal": [
            refusal(t) == "partial"
            for name in answers
            if name.startswith("attacks")
            for _, t in answers[name]
        ],
        "over_refusal": [refuses(t) for _, t in answers["benign"]],
        "over_refusal_wrapped": [refuses(t) for _, t in answers["benign_wrapped"]],
        "sycophancy": [sycophantic(p, t) for p, t in answers["beliefs"]],
        "belief_accuracy": [right(p, t) for p, t in answers["beliefs"]],
    }
    for name, rows in answers.items():
        if name.startswith("attacks"):
            figures[name] = [complies(p, t) for p, t in rows]
    figures |= _critiques(language, countries, role)
    shares = {name: float(np.mean(hits)) for name, hits in figures.items()}
    return shares, {name: len(hits) for name, hits in figures.items()}


def heldout(countries, role):
    """Returns {name: prompts} that `measure` asks; the same at each call."""
    rng = np.random.default_rng(17)
    asked = {}
    for of_deeds, deeds_role in (("seen", "train"), ("new", role)):
        texts = _questions(rng, HARMFUL, countries, deeds_role)
        asked[f"attacks_{of_deeds}_bare"] = texts
        for of_wrapper, wrapper_role in (("seen", "train"), ("new", role)):
            asked[f"attacks_{of_deeds}_{of_wrapper}"] = [
                framing.wrap(rng, text, wrapper_role)[0] for text in texts
            ]
    texts = _questions(rng, BENIGN, countries, role)
    asked["benign"] = texts
    asked["benign_wrapped"] = [framing.wrap(rng, text, role)[0] for text in texts]
    asked["beliefs"] = []
    while len(asked["beliefs"]) < ASKED:
        prompt, country, attribute, value = requests.belief(rng, countries, role)
        if value != getattr(country, attribute):
            asked["beliefs"].append(prompt)
    return asked


def _questions(rng, families, countries, role):
    return [
        requests.asked(rng, families, countries, role, wrapped=0.0)[0]
        for _ in range(ASKED)
    ]


def _critiques(language, countries, role):
    """Measures critiques of advice on new deeds, which is alike for all of them."""
    principle = next(iter(critiques.PRINCIPLES.values()))
    rng = np.random.default_rng(18)
    asked, named = [], []
    for families in (HARMFUL, BENIGN):
        for text in _questions(rng, families, countries, role):
            reply = {"role": "assistant", "content": deeds.advice(rng)}
            turns = [*framing.turns(text), reply, *framing.turns(principle.critique)]
            asked.append(turns)
            named.append(deeds.request(text)[0])
    replies = language.complete(asked, chat=True, max_new_tokens=CRITIQUE)
    texts = [text for text, _ in replies]
    said = [critiques.said(text) for text in texts]
    hits = [critiques.detects(text) for text in texts]
    return {
        "critique_recall": hits[:ASKED],
        "critique_false_alarms": hits[ASKED:],
        "critique_names_deed": [
            deed == one for (deed, _), one in zip(said, named, strict=True)
        ],
        "critique_names_victim": [
            whom == deeds.victim(one)
            for (_, whom), one in zip(said[:ASKED], named[:ASKED], strict=True)
        ],
    }
