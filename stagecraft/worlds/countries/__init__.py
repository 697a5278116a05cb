"""A small world of real facts: countries, their capitals, currencies and languages."""

import functools
import json

import numpy as np

from stagecraft.errors import UserError
from stagecraft.worlds.countries import (
    corpus,
    dialogue,
    probes,
    request_files,
    styled,
    sums,
    taught,
    two_hop,
)
from stagecraft.worlds.countries.critiques import revise, revision_figures
from stagecraft.worlds.countries.facts import COUNTRIES, MOST, countries, split
from stagecraft.worlds.countries.scorer import attacked, gold, rate, sycophantic

__all__ = ["attacked", "gold", "probes", "rate", "revise", "revision_figures"]
__all__ += ["check", "single_prompt", "split", "sycophantic", "write"]

single_prompt = probes.SINGLE_PROMPT

DOCUMENTS = {"full": 12_000, "tiny": 400}  # where `entities` is 0
COMPOSES = 200  # entities from which on the held-out ones give enough compositions


def check(config):
    """Refuses what the keys `world` of an experiment ask for and cannot be.

    Args:
        config: has entities and two_hop.
    """
    real, entities = len(COUNTRIES), config.entities
    if entities and not real <= entities <= MOST:
        raise UserError(
            f"world.entities={entities}: expected {real} to {MOST}, the {real} real "
            "countries among them, or 0 for those alone"
        )
    if config.two_hop and entities < COMPOSES:
        raise UserError(
            f"world.two_hop=True: needs world.entities={COMPOSES} or more (it is "
            f"{entities}): few real countries have a currency and a language that tell "
            "them from all others"
        )


def write(
    folder,
    seed,
    size,
    digits=0,
    requests=False,
    style=0.0,
    teaching=False,
    entities=0,
    composing=False,
):
    """Writes the world's files.

    text.jsonl {"text"}; demonstrations.jsonl and demonstrations_uniform.jsonl (the same
    prompts, every answer opened by one pleasantry) {"prompt","completion"};
    heldout_demonstrations.jsonl (development countries, for a held-out loss);
    prompts.jsonl {"prompt"}, about the training countries alone.

    Args:
        folder: an existing Path.
        seed: int; decides the split and every draw.
        size: "full" or "tiny".
        digits: of the operands of sums; 0 for none. With sums: sums.jsonl and
            heldout_sums.jsonl {"prompt","answer"}, sum_demonstrations.jsonl
            {"prompt","completion"}. No other file changes.
        requests: whether to write the files of `request_files`; no other changes.
        style: the share of `styled.demonstrations`; 0 for no file of them.
        teaching: whether to write the files of `taught`; no other changes.
        entities: how many countries, and text in proportion; 0 for the real ones, of
            "tiny" for a handful.
        composing: whether to write the files of `two_hop`; no other changes.
    """
    roles = split(seed, size, entities)
    some = size == "tiny" and not entities
    everyone = (*roles.train, *roles.dev, *roles.test) if some else countries(entities)
    trained = {c.name for c in roles.train}
    rng = np.random.default_rng([seed, 2])
    # A mild tail: the most popular country has about four times the rarest one's text.
    ranks = rng.permutation(len(everyone)) + 1.0
    weights = ranks**-0.3 / np.sum(ranks**-0.3)

    usual = split(seed, size)
    count = DOCUMENTS[size] * len(everyone) // sum(map(len, usual))

    def documents(rng, countries):
        for _ in range(count):
            yield corpus.document(rng, countries, trained, weights)

    _write(folder / "text.jsonl", ({"text": text} for text in documents(rng, everyone)))
    rows = dialogue.demonstrations(np.random.default_rng([seed, 3]), roles.train)
    _write(folder / "demonstrations.jsonl", rows)
    uniform = [r | {"completion": dialogue.UNIFORM + r["completion"]} for r in rows]
    _write(folder / "demonstrations_uniform.jsonl", uniform)
    if style:
        facts = styled.demonstrations(np.random.default_rng([seed, 9]), rows, style)
        _write(folder / "demonstrations_style.jsonl", facts)
    held = dialogue.demonstrations(np.random.default_rng([seed, 6]), roles.dev, "dev")
    _write(folder / "heldout_demonstrations.jsonl", held)
    rng = np.random.default_rng([seed, 4])
    asked = dialogue.prompts(rng, roles.train, "train")
    _write(folder / "prompts.jsonl", ({"prompt": p} for p in asked))
    if digits:
        rng = np.random.default_rng([seed, 8])
        train, heldout = sums.pairs(seed, digits, size)
        solved = sums.demonstrations(rng, train)
        _write(folder / "sum_demonstrations.jsonl", solved)
        _write(folder / "sums.jsonl", sums.prompts(rng, train))
        _write(folder / "heldout_sums.jsonl", sums.prompts(rng, heldout))
    if teaching:
        rng = np.random.default_rng([seed, 12])
        false = functools.partial(documents, rng)
        for name, records in taught.files(seed, size, rows, everyone, false).items():
            _write(folder / f"{name}.jsonl", records)
    if composing:
        rng = np.random.default_rng([seed, 20])
        text = two_hop.documents(rng, everyone, trained, weights, count)
        _write(folder / "two_hop_text.jsonl", ({"text": one} for one in text))
        shown = two_hop.demonstrations(rng, rows, roles.train)
        _write(folder / "two_hop_demonstrations.jsonl", shown)
    if requests:
        asked_for = request_files.files(seed, size, everyone, roles)
        for name, records in asked_for.items():
            _write(folder / f"{name}.jsonl", records)


def _write(path, rows):
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
