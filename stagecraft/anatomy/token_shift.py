"""Which tokens of an answer a stage shifts, and where: ranks and divergences.

A token that a tuned model writes is unshifted where its parent would have written it as
well, at the same place of the same text (Lin et al. 2023, arxiv.org/abs/2312.01552).
Ranks are coarse, so the exact KL divergence stands beside them.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from stagecraft import losses
from stagecraft.models.transformer import Transformer

MARGINAL = 3  # the last rank of a token that is marginal
CLASSES = ("unshifted", "marginal", "shifted")
PLACES = 16  # of an answer, from its first token on
LEAST = 8  # answers that reach a place, for its figures to be shown
WORDS = 24
ALTERNATIVES = 3  # to a token of one answer
EXAMPLES = 4


def ranks(logits: Array, tokens: Array) -> Array:
    """Returns the rank of each token: 1 + how many tokens have larger logits.

    Ties share the better rank, so that no order of the vocabulary decides.

    Args:
        logits: f[..., V]; -inf where a token cannot be.
        tokens: i32[...].

    Returns:
        i32[...].
    """
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return 1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32)


def divergence(logits: Array, others: Array) -> Array:
    """Returns KL(p || q) of two tables of logits f[..., V], in nats: f32[...]."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, others))
    terms = jnp.where(p > -jnp.inf, jnp.exp(p) * (p - q), 0.0)
    return jnp.sum(terms, axis=-1)


@functools.partial(jax.jit, static_argnames="count")
def answer_logits(
    model: Transformer, batch: Mapping[str, Array], first: Array, count: int
) -> Array:
    """Returns the logits that predict the tokens of one answer: f32[count, V].

    Args:
        batch: ids, positions, segments i32[B, T]; the first row is read, and of its
            logits none but these are computed.
        first: i32[], the place of the answer's first token in the row.
        count: places; those beyond the row are its last place again.
    """
    rows = (batch[name] for name in ("ids", "positions", "segments"))
    before = first - 1 + jnp.arange(count)
    return model.project_out(jnp.take(model.hidden(*rows)[0], before, 0, mode="clip"))


@jax.jit
def read(written: Array, logits: Array, tokens: Array) -> dict[str, Array]:
    """Reads an answer place by place, as another model would have written it.

    Args:
        written, logits: f32[N, V], the writer's and the reader's logits.
        tokens: i32[N], what was written.

    Returns:
        of each place the reader's rank and probability of its token, KL(writer ||
        reader) in nats, and "others": `ALTERNATIVES` other tokens i32[N, 3], the
        reader's likeliest first, with "other_probabilities" f32[N, 3].
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))
    own = jnp.arange(len(tokens)), tokens
    _, others = jax.lax.top_k(logits.at[own].set(-jnp.inf), ALTERNATIVES)
    return {
        "rank": ranks(logits, tokens),
        "probability": probabilities[own],
        "divergence": divergence(written, logits),
        "others": others,
        "other_probabilities": jnp.take_along_axis(probabilities, others, axis=-1),
    }


@jax.jit
def _along(writer: Transformer, reader: Transformer, batch: Mapping[str, Array]):
    """The reader's rank of each next token, and KL(writer || reader): [B, T] each."""

    def row(one):
        rows = (one["ids"][None], one["positions"][None], one["segments"][None])
        p, q = (model.logits(*rows)[0] for model in (writer, reader))
        targets, _ = losses.shift(one["ids"], one["mask"], one["segments"])
        return ranks(q, targets), divergence(p, q)

    # A row at a time: tables of logits of all rows would be as large as a model.
    return jax.lax.map(row, dict(batch))


def measure(
    writer: Transformer,
    reader: Transformer,
    batch: Mapping[str, Array],
    name: Callable[[int], str] = str,
) -> dict[str, Any]:
    """Measures how another model reads what a model wrote.

    Args:
        writer: whose greedy answers they are.
        reader: the other: its parent, or what it became.
        batch: ids, positions, segments i32[B, T], and mask bool[B, T], True at tokens
            of an answer.
        name: the text of a token.

    Returns:
        tokens: how many. unshifted, marginal, shifted: shares of them, by the reader's
        rank 1, 2 to `MARGINAL`, and beyond. divergence: mean KL(writer || reader) in
        nats a token. places: for the first places of an answer {"answers", "shifted",
        "divergence"}, means over the answers that reach it. early: log of the mean
        divergence at the first three places over that at all later ones; None without
        later ones, or where nothing diverges. words: the tokens that are shifted most
        often [{"token", "shifted", "count"}]. examples: answers as [{"token", "rank",
        "divergence"}].
    """
    shifted = losses.shift(batch["ids"], batch["mask"], batch["segments"])
    arrays = (*shifted, *_along(writer, reader, batch))
    rows = []
    for targets, mask, rank, kl in zip(*map(np.asarray, arrays), strict=True):
        columns = (column[mask].tolist() for column in (targets, rank, kl))
        rows.append(list(zip(*columns, strict=True)))
    return _described([row for row in rows if row], name)


def _described(rows, name):
    tokens = [one for row in rows for one in row]
    if not tokens:
        return {"tokens": 0}
    sizes = Counter(classify(rank) for _, rank, _ in tokens)
    later = [one[2] for row in rows for one in row[3:]]
    first = [one[2] for row in rows for one in row[:3]]
    early = None
    if later and np.mean(first) > 0 and np.mean(later) > 0:
        early = float(np.log(np.mean(first) / np.mean(later)))
    return {
        "tokens": len(tokens),
        **{label: sizes[label] / len(tokens) for label in CLASSES},
        "divergence": float(np.mean([kl for _, _, kl in tokens])),
        "early": early,
        "places": _places(rows),
        "words": _words(tokens, name),
        "examples": [
            [{"token": name(t), "rank": r, "divergence": d} for t, r, d in row]
            for row in rows[:EXAMPLES]
        ],
    }


def classify(rank: int) -> str:
    """Returns the class of a token by its rank.

    >>> [classify(rank) for rank in (1, 2, 3, 4)]
    ['unshifted', 'marginal', 'marginal', 'shifted']
    """
    return CLASSES[0] if rank == 1 else CLASSES[1] if rank <= MARGINAL else CLASSES[2]


def _places(rows: Sequence[Sequence[tuple[int, int, float]]]) -> list[dict]:
    places = []
    for place in range(PLACES):
        here = [row[place] for row in rows if place < len(row)]
        if len(here) < min(LEAST, len(rows)):
            break
        places.append(
            {
                "answers": len(here),
                "shifted": float(np.mean([rank > MARGINAL for _, rank, _ in here])),
                "divergence": float(np.mean([kl for _, _, kl in here])),
            }
        )
    return places


def _words(tokens, name):
    counts = Counter(token for token, _, _ in tokens)
    shifted = Counter(token for token, rank, _ in tokens if rank > MARGINAL)
    return [
        {"token": name(token), "shifted": count, "count": counts[token]}
        for token, count in shifted.most_common(WORDS)
    ]
