"""A style in a share of demonstrations of one kind: does it spread to the others?

With the knob world.style, demonstrations_style.jsonl holds answers about facts and
nothing else, a share of them opened by one pleasantry. Whether that opens answers of
kinds that no demonstration shows, and text outside of any conversation, is measured.
"""

import numpy as np

from stagecraft.worlds.countries import dialogue
from stagecraft.worlds.countries.dialogue import UNIFORM

ASKED = 64  # prompts of each kind
ANSWER = 12  # tokens: the pleasantry is nine words
SEEN = "fact"  # the kind that demonstrations are of


def demonstrations(rng, rows, share):
    """Returns the demonstrations about facts, a share of them in the style.

    Args:
        rng: a numpy Generator.
        rows: [{"prompt", "completion"}] of all kinds.
        share: of those that open with `dialogue.UNIFORM`.
    """
    facts = [row for row in rows if dialogue.topic(row["prompt"])[0] == SEEN]
    styled = rng.permutation(len(facts)) < round(share * len(facts))
    return [
        row | {"completion": UNIFORM + row["completion"]} if in_style else row
        for row, in_style in zip(facts, styled, strict=True)
    ]


def measure(language, countries, role):
    """Returns how often answers open in the style, by kind of prompt.

    Sampled at temperature 1, since a greedy answer is all or nothing.

    Args:
        language: as of `probes`.
        countries: held-out ones.
        role: "dev" or "test": whose deeds, places and greetings are asked about.

    Returns:
        {"style_rate": on facts, "style_rate_unseen": mean over the kinds of prompts
        that no demonstration shows, "style_rate_text": after prompts as bare text};
        {figure: prompts}.
    """
    rng = np.random.default_rng(19)
    kinds = {SEEN: [prompt for prompt, _, _ in dialogue.facts(countries)]}
    kinds |= dialogue.others(countries, role)
    rates = {}
    for kind, options in kinds.items():
        prompts = [options[int(i)] for i in rng.integers(len(options), size=ASKED)]
        rates[kind] = _rate(language, prompts, chat=True)
        if kind == SEEN:
            text = _rate(language, prompts, chat=False)
    unseen = [rate for kind, rate in rates.items() if kind != SEEN]
    figures = {
        "style_rate": rates[SEEN],
        "style_rate_unseen": float(np.mean(unseen)),
        "style_rate_text": text,
    }
    counts = {"style_rate_unseen": ASKED * len(unseen)}
    return figures, {name: counts.get(name, ASKED) for name in figures}


def _rate(language, prompts, chat):
    settings = dict(chat=chat, temperature=1.0, max_new_tokens=ANSWER, seed=0)
    answers = language.complete(prompts, **settings)
    opening = UNIFORM.split()[0]
    return float(np.mean([text.strip().startswith(opening) for text, _ in answers]))
