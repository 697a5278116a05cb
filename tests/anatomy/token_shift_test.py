"""Token shift: ranks and divergences of planted tables, and of answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft.anatomy import lens, token_shift
from stagecraft.anatomy.texts import Texts
from stagecraft.models.transformer import Transformer
from tests import tiny


def test_ranks_count_what_is_strictly_larger():
    table = jnp.array([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0], [-jnp.inf, 0, 0, 0]])
    for token, expected in enumerate([(1, 1, 4), (2, 1, 1), (3, 4, 1), (4, 1, 1)]):
        ranks = token_shift.ranks(table, jnp.full(3, token))
        assert tuple(ranks.tolist()) == expected


def test_divergences_are_those_of_plain_numpy():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 5, 7)).astype(np.float32) * 3
    one[0, :3] = -np.inf  # cannot be, in the first of them: 0 log 0 is 0
    kl = token_shift.divergence(jnp.asarray(one), jnp.asarray(other))
    np.testing.assert_allclose(kl, lens.kl(one, other), rtol=1e-5)
    assert float(token_shift.divergence(one[1:], one[1:]).max()) == pytest.approx(0)


@pytest.fixture(scope="module")
def answers():
    """Two models, and what is to be read: (prompt, answer) of a row each."""
    config = tiny.config(layers=2)
    models = [
        jax.jit(lambda key: Transformer(config, key))(jax.random.key(n)) for n in (0, 1)
    ]
    random = np.random.default_rng(1)
    rows = [
        (random.integers(1, 64, n).tolist(), random.integers(1, 64, m).tolist())
        for n, m in ((3, 9), (5, 2), (2, 7))
    ]
    return models, rows


def table(model, row):
    """The logits that predict each token of an answer: f32[tokens, V]."""
    ids = np.asarray([[*row[0], *row[1]]], np.int32)
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    every = np.asarray(model.logits(ids, positions, np.ones_like(ids)))[0]
    return every[len(row[0]) - 1 : -1]


def test_tokens_of_answers_one_by_one(answers):
    (writer, reader), rows = answers
    batch = Texts.of(rows).batch
    figures = token_shift.measure(writer, reader, batch)
    ranks, kls = [], []
    for row in rows:
        p, q = table(writer, row), table(reader, row)
        own = q[np.arange(len(row[1])), row[1]]
        ranks.append((1 + (q > own[:, None]).sum(axis=1)).tolist())
        kls.append(lens.kl(p, q))
    flat = np.concatenate(ranks)
    assert figures["tokens"] == len(flat) == 18
    assert figures["unshifted"] == np.mean(flat == 1)
    assert figures["marginal"] == np.mean((flat > 1) & (flat <= 3))
    assert figures["shifted"] == np.mean(flat > 3)
    every = np.concatenate(kls)
    assert figures["divergence"] == pytest.approx(every.mean(), rel=1e-4)
    first = np.concatenate([kl[:3] for kl in kls]).mean()
    later = np.concatenate([kl[3:] for kl in kls]).mean()
    assert figures["early"] == pytest.approx(np.log(first / later), rel=1e-3)
    # All three answers reach the second place, and not all the third.
    assert [place["answers"] for place in figures["places"]] == [3, 3]
    second = np.mean([kl[1] for kl in kls])
    assert figures["places"][1]["divergence"] == pytest.approx(second, rel=1e-4)
    for row, rank, example in zip(rows, ranks, figures["examples"], strict=True):
        assert [one["token"] for one in example] == [str(t) for t in row[1]]
        assert [one["rank"] for one in example] == rank
    assert sum(w["shifted"] for w in figures["words"]) == np.sum(flat > 3)


def test_a_model_reads_its_own_answers_as_it_wrote_them(answers):
    (model, _), rows = answers
    greedy = []
    for prompt, _ in rows:
        answer = []
        for _ in range(4):
            answer.append(int(table(model, (prompt, [*answer, 0]))[-1].argmax()))
        greedy.append((prompt, answer))
    figures = token_shift.measure(model, model, Texts.of(greedy).batch)
    assert figures["unshifted"] == 1 and figures["words"] == []
    assert figures["divergence"] == pytest.approx(0, abs=1e-6)


def test_classes_end_at_ranks_1_and_3():
    classes = [token_shift.classify(rank) for rank in (1, 2, 3, 4)]
    assert classes == ["unshifted", "marginal", "marginal", "shifted"]


def test_no_answer_has_no_shares():
    assert token_shift._described([], str) == {"tokens": 0}
    rows = [[(1, 1, 0.0), (2, 5, 0.0)]]
    assert token_shift._described(rows, str)["early"] is None
