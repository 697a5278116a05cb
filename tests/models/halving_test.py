"""Rows that have ended leave a batch of samples by halves, and no answer changes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import sharding, tree
from stagecraft.models import sampling
from stagecraft.models.transformer import Transformer
from tests import tiny

CONFIG = tiny.config(
    vocab_size=16, width=16, layers=2, head_dim=4, ff_width=24, max_length=128
)
ROWS, PROMPT, NEW = 32, 6, 12
KEY = jax.random.key(11)
SETTINGS = dict(max_new_tokens=NEW, stop_ids=(3, 7), temperature=1.5)


@functools.cache
def model():
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda key: Transformer(CONFIG, key), KEY)
    return tree.map_names(
        lambda name, leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype),
        abstract,
    )


def prompts():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (ROWS, PROMPT)).astype(np.int32)
    return ids, np.arange(PROMPT) >= rng.integers(0, PROMPT, ROWS)[:, None]


@pytest.fixture
def short(monkeypatch):
    """Halves batches of short answers, too, down to one row a device."""
    monkeypatch.setattr(sampling, "HALVED_FROM", 1)
    monkeypatch.setattr(sampling, "FEWEST_ROWS", 1)


def sampler(**settings):
    """A program of its own: `generate` keeps those of the sizes it first saw."""
    settings = SETTINGS | settings
    return jax.jit(functools.partial(sampling.generate.__wrapped__, **settings))


def loops(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count(" while[")


@functools.cache
def whole(samples=1):
    """What the batch that stays whole answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "HALVED_FROM", NEW + 1)
        generate = sampler(samples=samples)
        assert loops(generate, model(), *prompts(), KEY) == 1
        return generate(model(), *prompts(), KEY)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)], ids=str)
def test_answers_are_those_of_the_whole_batch(shape, samples, short):
    expected = whole(samples)
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model(), sharding.shardings(model(), mesh))
        rows = sharding.shard_batch(prompts(), mesh)
        generate = sampler(samples=samples)
        assert loops(generate, placed, *rows, KEY) == 3
        sample = generate(placed, *rows, KEY)
    for name in ("tokens", "mask", "ended"):
        np.testing.assert_array_equal(getattr(sample, name), getattr(expected, name))
    np.testing.assert_allclose(sample.logps, expected.logps, atol=1e-5)
    lengths = np.asarray(expected.mask).sum(axis=1)
    assert len(set(lengths)) > 5 and not expected.ended.all() and expected.ended.any()


@pytest.mark.parametrize("shards", [1, 4])
def test_each_token_is_decoded_with_no_more_rows_than_half_would_do(
    short, monkeypatch, shards
):
    """By the lengths of the answers: a device halves when no device has more to do."""
    lengths = np.asarray(whole().mask).sum(axis=1).reshape(shards, -1)
    expected, step = [], 1
    for rows, half in ((32, 16), (16, 8), (8, 0)):
        rows, half = rows // shards, half // shards
        while step < NEW and (lengths > step).sum(axis=1).max() > half:
            expected.append(rows * shards)
            step += 1
    decoded, decode = [], sampling.decode

    def watched(model, token, *rest):
        jax.debug.callback(lambda: decoded.append(len(token)), ordered=True)
        return decode(model, token, *rest)

    monkeypatch.setattr(sampling, "decode", watched)
    monkeypatch.setattr(sampling.sharding, "row_shards", lambda mesh: shards)
    with jax.set_mesh(tiny.single()):
        jax.block_until_ready(sampler()(model(), *prompts(), KEY))
    jax.effects_barrier()
    assert decoded == expected and set(decoded) == {32, 16, 8}


def exchanged(*shape):
    """The types of what devices of a mesh send each other while they sample."""
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model(), sharding.shardings(model(), mesh))
        rows = sharding.shard_batch(prompts(), mesh)
        text = sampler().lower(placed, *rows, KEY).compile().as_text()
    exchanges = r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce)"
    return [match[1] for match in re.finditer(exchanges, text)]


def test_no_row_crosses_to_another_device(short):
    """Each device halves its own rows, and samples without the others."""
    # Whether any device has more to do, which is one number of each.
    sent = exchanged(8, 1, 1)
    assert sent and all(re.fullmatch(r"\(?(pred|s32)\[1?\].*", one) for one in sent)


def test_no_head_of_the_cache_crosses_to_another_device(short):
    sent = exchanged(2, 1, 2)
    cached = re.compile(rf"\[[\d,]*\b{PROMPT + NEW},{CONFIG.head_dim}\]")
    assert sent and not [one for one in sent if cached.search(one)]


@pytest.mark.parametrize(
    ("rows", "settings", "count"),
    [
        (ROWS, dict(max_new_tokens=64), 3),
        (ROWS, dict(max_new_tokens=63), 1),
        (ROWS, dict(max_new_tokens=64, stop_ids=()), 1),
        (7, dict(max_new_tokens=64), 1),
    ],
    ids=["long", "short", "endless", "few rows"],
)
def test_only_batches_of_long_answers_are_halved(rows, settings, count):
    ids, mask = (part[:rows] for part in prompts())
    assert loops(sampler(**settings), model(), ids, mask, KEY) == count


def test_a_count_of_rows_that_has_no_half_is_not_halved(short):
    ids, mask = (part[:15] for part in prompts())
    sample = sampler()(model(), ids, mask, KEY)
    np.testing.assert_array_equal(sample.tokens, np.asarray(whole().tokens)[:15])
