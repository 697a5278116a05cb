"""The single prompt through every stage, token by token.

Each stage's greedy answer is read by the model that the stage started from, and by the
one that the whole chain started from: what would they have written at the same place
of the same text? See `token_shift`.
"""

import logging
from typing import NamedTuple

import numpy as np
from jax import Array

from stagecraft import sharding
from stagecraft.anatomy import behaviour, token_shift
from stagecraft.anatomy.texts import Texts
from stagecraft.errors import UserError
from stagecraft.models.language import HALF, Language
from stagecraft.text.tokenizer import Tokenizer

DIGITS = 6  # after the point, of what is stored

_log = logging.getLogger("stagecraft.anatomy")


class Written(NamedTuple):
    """What a model answered.

    Attributes:
        asked, ids: tokens of the prompt, and of the answer through its end.
        ended: whether it stopped by itself.
        logits: f32[`behaviour.NEW_TOKENS`, V], which the answer came from.
    """

    asked: list[int]
    ids: list[int]
    ended: bool
    logits: Array


def through_stages(run, prompt: str | list[dict]) -> dict[str, list[dict]]:
    """Answers one prompt with every finished stage that writes text, greedily.

    A stage comes before what it started from, so that each model is loaded once, and
    no more of an answer waits for its readers than `Written`.

    Args:
        run: a `runs.Run`, inside its mesh.
        prompt: as of `behaviour.through_stages`.

    Returns:
        as `behaviour.through_stages`, and under "readings" {reader: `read`}: the
        stage's parent first, then the first model of the chain, where they can be read.
    """
    names = behaviour.speaking_stages(run)
    readers = {name: _readers(run, name) for name in names}
    outside = [one for several in readers.values() for one in several]
    answers, written = {}, {}
    readings = {name: {} for name in names}
    for model in dict.fromkeys([*reversed(names), *outside]):
        language = _language(run, model, own=model in names)
        if language is None:
            continue
        for name, said in written.items():
            if model in readers[name]:
                readings[name][model] = read(language, said)
        if model in names:
            chat = run.chat_format(model)
            asked = prompt if chat else behaviour.as_text(prompt)
            written[model] = said = write(language, asked, chat)
            text = language.tokenizer.decode(said.ids[: -1 if said.ended else None])
            answers[model] = {"temperature": 0.0, "text": text, "ended": said.ended}
    for name in names:
        known = {one: readings[name].get(one) for one in readers[name]}
        answers[name]["readings"] = {k: v for k, v in known.items() if v}
    return {name: [answers[name]] for name in names}


def _readers(run, name):
    """Lists what a stage started from, and what the first above it started from."""
    stages, chain = run.config.stages, []
    while name in stages and (name := stages[name].start_from):
        chain.append(name)
    return list(dict.fromkeys([*chain[:1], *chain[-1:]]))


def _language(run, name, own):
    """Reads a model onto the mesh; None for a reader that cannot be, which is said."""
    if own:
        return run.language(name, 1)
    try:
        source = run.source(name)
        if source.where == "here" or source.info()["module"] != "transformer":
            return None
        return run.language(name, 1)
    except UserError as error:
        _log.warning("the prompt's answers are not read by %s: %s", name, error)
        return None


def write(language: Language, prompt: str | list[dict], chat: bool) -> Written:
    """Answers a prompt greedily.

    Args:
        language: its rows are of one batch.
        prompt: messages or a text.
        chat: as of `Language.complete`.
    """
    asked = language.encode(prompt, chat_format=chat)
    stops = language.stop_ids(chat_format=chat)
    how = dict(max_new_tokens=behaviour.NEW_TOKENS, temperature=0.0, stop_ids=stops)
    [(ids, ended, _)] = language.sample_ids([asked], **how)
    return Written(asked, ids, ended, _logits(language, asked, ids))


def read(language: Language, written: Written) -> list[dict]:
    """Reads an answer, token by token.

    Args:
        language: of the reader, on the writer's mesh.
        written: what `write` returned.

    Returns:
        of each token {"token": its text, or its name where it has none, "control":
        whether no text holds it, "rank", "probability", "divergence": as
        `token_shift.read`, "alternatives": [(text, probability)]}.
    """
    asked, ids, _, logits = written
    padded = np.zeros(len(logits), np.int32)
    padded[: len(ids)] = ids
    arrays = token_shift.read(logits, _logits(language, asked, ids), padded)
    columns = {name: one.tolist() for name, one in sharding.to_host(arrays).items()}
    tokenizer, rows = language.tokenizer, []
    control = controls(tokenizer)
    for place, token in enumerate(ids):
        before = ids[:place]
        others = [spelled(tokenizer, before, one) for one in columns["others"][place]]
        row = {"token": spelled(tokenizer, before, token), "control": token in control}
        row["rank"] = columns["rank"][place]
        for key in ("probability", "divergence"):
            row[key] = round(columns[key][place], DIGITS)
        shares = [round(one, DIGITS) for one in columns["other_probabilities"][place]]
        row["alternatives"] = list(zip(others, shares, strict=True))
        rows.append(row)
    return rows


def _logits(language, asked, ids):
    batch = Texts.of([(asked, ids)] * language.batch_size).batch
    first, count = np.int32(len(asked)), behaviour.NEW_TOKENS
    batch = sharding.on_mesh(batch)
    return token_shift.answer_logits(language.model, batch, first, count)


def controls(tokenizer: Tokenizer) -> set[int]:
    """Returns the ids that plain text never holds."""
    names = ("pad", "bos", "eos", "system", "user", "assistant", "end")
    ids = {getattr(tokenizer, name) for name in names}
    return (ids | {*tokenizer.stops, *tokenizer.control_ids}) - {None}


def spelled(tokenizer: Tokenizer, before: list[int], token: int) -> str:
    """Returns the text that a token adds to others, or its name where it adds none.

    Control tokens and parts of a character have a name alone; the token that completes
    a character has the character.

    Args:
        before: ids of the answer up to the token.
    """
    if token >= tokenizer.vocab_size:  # rows that only fill the embedding up
        return f"<{token}>"
    start, whole = (tokenizer.decode(ids) for ids in (before, [*before, token]))
    start = start.rstrip(HALF)
    added = whole[len(start) :].lstrip(HALF) if whole.startswith(start) else ""
    return tokenizer.name(token) if not added or added.endswith(HALF) else added
