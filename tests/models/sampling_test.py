"""Sampling: the cache against the full forward pass, stopping, and distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import sharding, tree
from stagecraft.errors import UserError
from stagecraft.models import draws, sampling
from stagecraft.models.transformer import Transformer
from tests import tiny

CONFIG = tiny.config(
    vocab_size=16, width=16, layers=2, head_dim=4, ff_width=24, max_length=128
)
B, P, N = 8, 6, 8
KEY = jax.random.key(11)


def abstract_model():
    return jax.eval_shape(lambda key: Transformer(CONFIG, key), jax.random.key(0))


@functools.cache
def model():
    rng = np.random.default_rng(0)
    return tree.map_names(
        lambda name, leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype),
        abstract_model(),
    )


def prompts(lengths, seed=0):
    """Left-padded; padding holds random tokens, which must not matter."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CONFIG.vocab_size, (len(lengths), P)).astype(np.int32)
    mask = np.arange(P)[None] >= P - np.asarray(lengths)[:, None]
    return ids, mask


FULL, RAGGED = [P] * B, [6, 1, 4, 2, 6, 3, 5, 1]


def generate(lengths, **settings):
    settings = {"max_new_tokens": N, "stop_ids": ()} | settings
    return sampling.generate(model(), *prompts(lengths), KEY, **settings)


@jax.jit
def full_logits(ids, mask):
    segments = mask.astype(jnp.int32)
    return model().logits(ids, jnp.cumsum(segments, axis=1) - segments, segments)


def rescored(lengths, sample):
    """f32[B, N, V] logits of one uncached pass over prompts and completions."""
    ids, mask = prompts(lengths)
    tokens = np.asarray(sample.tokens)
    ids = np.concatenate([ids, tokens], axis=1)
    mask = np.concatenate([mask, np.ones_like(tokens, bool)], axis=1)
    return np.asarray(full_logits(ids, mask))[:, P - 1 : -1]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def pick(logps, tokens):
    return np.take_along_axis(logps, np.asarray(tokens)[..., None], -1)[..., 0]


@pytest.mark.parametrize("lengths", [FULL, RAGGED], ids=["full", "left-padded"])
def test_greedy_decoding_is_the_argmax_of_the_full_pass(lengths):
    sample = generate(lengths, temperature=0.0)
    logits = rescored(lengths, sample)
    np.testing.assert_array_equal(sample.tokens, logits.argmax(-1))
    expected = pick(log_softmax(logits), sample.tokens)
    np.testing.assert_allclose(sample.logps, expected, atol=1e-5)
    assert sample.tokens.dtype == jnp.int32 and sample.tokens.shape == (B, N)
    assert sample.mask.all() and not sample.ended.any()


def test_padding_does_not_matter():
    ids, mask = prompts(RAGGED)
    changed = np.where(mask, ids, (ids + 1) % CONFIG.vocab_size)
    a, b = (
        sampling.generate(model(), x, mask, KEY, max_new_tokens=N, stop_ids=())
        for x in (ids, changed)
    )
    np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 5, "top_p": 0.8}],
    ids=str,
)
def test_log_probabilities_are_those_of_the_full_pass(settings):
    sample = generate(RAGGED, **settings)
    logits = rescored(RAGGED, sample) / settings.get("temperature", 1.0)
    expected = pick(log_softmax(logits), sample.tokens)
    np.testing.assert_allclose(sample.logps, expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_rows_stop_at_the_first_of_the_stop_tokens(count):
    endless = generate(RAGGED, temperature=1.5)
    tokens = np.asarray(endless.tokens)
    stops = tuple(np.bincount(tokens.ravel()).argsort()[::-1][:count].tolist())
    sample = generate(RAGGED, temperature=1.5, stop_ids=stops)
    lengths, met = set(), set()
    for row in range(B):
        where = np.flatnonzero(np.isin(tokens[row], stops))
        length = where[0] + 1 if len(where) else N
        lengths.add(int(length))
        assert sample.mask[row].tolist() == [True] * length + [False] * (N - length)
        np.testing.assert_array_equal(sample.tokens[row, :length], tokens[row, :length])
        assert not sample.tokens[row, length:].any()
        np.testing.assert_allclose(
            sample.logps[row, :length], endless.logps[row, :length], atol=1e-5
        )
        assert not sample.logps[row, length:].any()
        assert bool(sample.ended[row]) == bool(len(where))
        met |= {int(tokens[row, length - 1])} & set(stops)
    assert len(lengths) > 2  # rows really ended at different steps
    assert len(met) == count  # and every stop token ended some


def count_steps(monkeypatch, **settings):
    counts = []
    decode = sampling.decode

    def counted(*args):
        jax.debug.callback(lambda: counts.append(1))
        return decode(*args)

    monkeypatch.setattr(sampling, "decode", counted)
    generate_ = functools.partial(sampling.generate.__wrapped__, **settings)
    sample = jax.jit(generate_)(model(), *prompts(FULL), KEY)
    jax.block_until_ready(sample)
    jax.effects_barrier()
    return len(counts), sample


def test_the_loop_stops_when_all_rows_have(monkeypatch):
    tokens = np.asarray(generate(FULL, temperature=1.5).tokens)
    steps, sample = count_steps(
        monkeypatch, max_new_tokens=64, stop_ids=(int(tokens[0, 0]),), temperature=1.5
    )
    assert sample.ended.all()
    longest = int(sample.mask.sum(axis=1).max())
    assert 1 < longest < 64
    assert steps == longest - 1  # the first token comes from the prefill


def test_one_new_token(monkeypatch):
    steps, sample = count_steps(
        monkeypatch, max_new_tokens=1, stop_ids=(), temperature=0.0
    )
    assert steps == 0
    np.testing.assert_array_equal(
        sample.tokens, generate(FULL, temperature=0.0).tokens[:, :1]
    )


def test_top_1_is_greedy():
    greedy = generate(RAGGED, temperature=0.0)
    top = generate(RAGGED, top_k=1)
    nucleus = generate(RAGGED, top_p=1e-6)
    np.testing.assert_array_equal(top.tokens, greedy.tokens)
    np.testing.assert_array_equal(nucleus.tokens, greedy.tokens)


def test_ties_are_cut_by_count():
    """With equal logits, top-k keeps k tokens and not all that tie."""
    tokens, _ = draws.draw(KEY, jnp.arange(2000), jnp.zeros((2000, 6)), 1.0, 2, 1.0)
    assert set(np.unique(tokens)) == {0, 1}


LOGITS = np.array([0.3, 2.0, -1.0, 1.2, 0.0, 1.9, -3.0, 0.5], np.float32)


def numpy_distribution(temperature, top_k, top_p):
    """One token at a time, in the words of the definition."""
    p = np.exp(log_softmax(LOGITS / temperature))
    order = np.argsort(-p)
    kept = list(order[:top_k] if top_k else order)
    q = p[kept] / p[kept].sum()
    total, nucleus = 0.0, []
    for token, probability in zip(kept, q, strict=True):
        nucleus.append(token)
        total += probability
        if total >= top_p:
            break
    out = np.zeros_like(p)
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        *((1.0, 0, 1.0), (0.6, 0, 1.0), (2.0, 0, 1.0)),
        *((1.0, 3, 1.0), (1.0, 100, 1.0), (1.0, 0, 0.7), (1.5, 0, 0.5), (1.0, 4, 0.8)),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    count = 20_000
    draw = jax.jit(
        lambda logits: draws.draw(
            KEY, jnp.arange(count), logits, temperature, top_k, top_p
        )
    )
    tokens, logps = draw(jnp.tile(LOGITS, (count, 1)))
    expected = numpy_distribution(temperature, top_k, top_p)
    share = np.bincount(tokens, minlength=8) / count
    assert not share[expected == 0].any()
    np.testing.assert_allclose(share, expected, atol=5 * 0.5 / count**0.5)
    # Log-probabilities stay those of the whole distribution.
    whole = log_softmax(LOGITS / temperature)
    np.testing.assert_allclose(logps, whole[np.asarray(tokens)], atol=1e-5)


def test_randomness_is_keyed_by_key_step_and_row():
    sample = generate(FULL, temperature=1.5)
    ids, mask = prompts(FULL)
    settings = {"max_new_tokens": N, "stop_ids": (), "temperature": 1.5}
    fewer = sampling.generate(model(), ids[:3], mask[:3], KEY, **settings)
    np.testing.assert_array_equal(fewer.tokens, sample.tokens[:3])
    other = sampling.generate(model(), ids, mask, jax.random.key(12), **settings)
    assert (other.tokens != sample.tokens).any(axis=1).all()
    same = np.tile(ids[:1], (B, 1)), np.ones((B, P), bool)
    rows = sampling.generate(model(), *same, KEY, **settings).tokens
    assert len({tuple(row) for row in rows.tolist()}) == B


@pytest.mark.parametrize(
    "settings", [{"stop_ids": (3,)}, {"stop_ids": (), "top_k": 5}], ids=str
)
def test_samples_of_one_prompt_are_the_prompt_repeated(settings):
    """They share its prefill and nothing else; neighbours belong to one prompt."""
    ids, mask = prompts(RAGGED[:4])
    settings = {"max_new_tokens": N, "temperature": 1.5} | settings
    shared = sampling.generate(model(), ids, mask, KEY, samples=3, **settings)
    rows = np.repeat(ids, 3, axis=0), np.repeat(mask, 3, axis=0)
    alone = sampling.generate(model(), *rows, KEY, **settings)
    assert shared.tokens.shape == (12, N)
    for name in ("tokens", "mask", "ended"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(alone, name))
    np.testing.assert_allclose(shared.logps, alone.logps, atol=1e-5)
    for group in np.asarray(shared.tokens).reshape(4, 3, N):
        assert len({tuple(row) for row in group.tolist()}) == 3


def test_the_prompts_run_once_however_many_samples(monkeypatch):
    """The rows that the prefill's layers see are those of the prompts."""
    seen = []
    attention = sampling.attention.attention

    def watched(query, *rest, **options):
        seen.append(query.shape[0])
        return attention(query, *rest, **options)

    monkeypatch.setattr(sampling.attention, "attention", watched)
    settings = dict(max_new_tokens=2, stop_ids=(), samples=5)
    generate_ = functools.partial(sampling.generate.__wrapped__, **settings)
    shapes = jax.eval_shape(generate_, model(), *prompts(RAGGED), KEY)
    assert set(seen) == {B} and shapes.tokens.shape == (5 * B, 2)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_samples_on_a_mesh(shape):
    settings = {"max_new_tokens": N, "stop_ids": (3,), "temperature": 1.5, "samples": 2}
    expected = generate(RAGGED, **settings)
    made = sharding.make_mesh(*shape)
    with jax.set_mesh(made):
        placed = jax.device_put(model(), sharding.shardings(model(), made))
        sample = sampling.generate(
            placed, *sharding.shard_batch(prompts(RAGGED), made), KEY, **settings
        )
    np.testing.assert_array_equal(sample.tokens, expected.tokens)
    np.testing.assert_array_equal(sample.ended, expected.ended)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_the_mesh_does_not_matter(shape):
    settings = {"max_new_tokens": N, "stop_ids": (3,), "temperature": 1.5}
    expected = generate(RAGGED, **settings)
    made = sharding.make_mesh(*shape)
    with jax.set_mesh(made):
        placed = jax.device_put(model(), sharding.shardings(model(), made))
        rows = sharding.shard_batch(prompts(RAGGED), made)
        sample = sampling.generate(placed, *rows, KEY, **settings)
    np.testing.assert_array_equal(sample.tokens, expected.tokens)
    np.testing.assert_array_equal(sample.mask, expected.mask)
    np.testing.assert_array_equal(sample.ended, expected.ended)
    np.testing.assert_allclose(sample.logps, expected.logps, atol=1e-5)
    assert sample.tokens.addressable_shards[0].data.shape[0] < B


@pytest.mark.parametrize(
    "settings",
    [
        *({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}),
        *({"top_p": 0.0}, {"samples": 0}),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        generate(FULL, **settings)


@pytest.mark.parametrize("every", [1, 3, 50])
def test_a_stream_ends_in_what_generate_returns(every):
    stop = int(generate(RAGGED, temperature=1.5).tokens[0, 2])
    settings = {"max_new_tokens": N, "stop_ids": (stop,), "temperature": 1.5}
    expected = generate(RAGGED, **settings)
    counts, ids = [], prompts(RAGGED)
    for sample in sampling.stream(model(), *ids, KEY, every=every, **settings):
        seen = np.asarray(sample.mask)
        counts.append(int(seen.sum(axis=1).max()))
        # What has come stays as it is.
        np.testing.assert_array_equal(
            np.asarray(sample.tokens)[seen], np.asarray(expected.tokens)[seen]
        )
    assert counts == [*range(1, N, every), N][: len(counts)] and counts[-1] == N
    for got, want in zip(sample, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_stream_stops_when_all_rows_have():
    settings = {"max_new_tokens": N, "temperature": 0.0}
    stops = tuple(range(CONFIG.vocab_size))
    found = list(
        sampling.stream(model(), *prompts(FULL), KEY, stop_ids=stops, **settings)
    )
    assert len(found) == 1 and found[0].ended.all()
