"""What the programs of a step never hold, as their lowered text says.

No array of all tokens of a row by all tokens, none of all logits, and in bfloat16 no
float32 copy of the widest activations. Whatever device they are compiled for, these
are the programs it gets; nothing is compiled here.
"""

import functools
import math
import re

import jax
import pytest

from stagecraft import sharding
from stagecraft.models import attention, heads
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.stages import stage
from stagecraft.stages.kinds import KINDS
from tests import tiny
from tests.stages import cases

# Numbers that stand for nothing else.
LENGTH, VOCAB, WIDE, NEW = 640, 5003, 88, 20


def model_config(**changes):
    sizes = dict(vocab_size=VOCAB, ff_width=WIDE, max_length=LENGTH, layers=2)
    return tiny.config(**(sizes | changes))


def raw_batch(kind):
    if KINDS[kind].samples:
        return cases.prompts(length=LENGTH - NEW)
    return cases.BATCH[kind](length=LENGTH)


@functools.cache
def arrays(kind, changes=()):
    """{program: {(dimensions, dtype)}} of every array in a stage's lowered programs."""
    mesh, config = tiny.single(), model_config(**dict(changes))
    settings = {}
    if KINDS[kind].samples:
        settings = dict(sampling=dict(max_new_tokens=NEW))

    def models(key):
        body = Transformer(config, key)
        return {"transformer": body, "scalar": ScalarModel(body, key)}

    with jax.set_mesh(mesh):
        shapes = sharding.abstract(models, mesh, jax.random.key(0))
        parents = {
            role: shapes[wanted.models[0]] for role, wanted in KINDS[kind].roles.items()
        }
        context = stage.Context(mesh, config, parents, stop_ids=(cases.STOP,))
        made = KINDS[kind].make(cases.config(kind, **settings), context)
        texts = {
            name: program.lower().as_text()
            for name, program in made.programs(raw_batch(kind)).items()
        }
    return {
        name: {
            (tuple(map(int, sizes[:-1].split("x"))), dtype)
            for sizes, dtype in re.findall(r"tensor<((?:\d+x)+)([a-z]+\d+)>", text)
        }
        for name, text in texts.items()
    }


def squares(found):
    return [sizes for sizes, _ in found if sizes.count(LENGTH) > 1]


def logits(found, tokens):
    """Arrays of at least this many tokens by the vocabulary."""
    return [s for s, _ in found if VOCAB in s and math.prod(s) >= tokens * VOCAB]


@pytest.fixture
def small_blocks(monkeypatch):
    """Logits of all tokens are many, in proportion, as they are for a large model."""
    monkeypatch.setattr(heads, "BLOCK_ELEMENTS", 32 * VOCAB)
    monkeypatch.setattr(heads, "HELD_ELEMENTS", 64 * VOCAB)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_no_square_of_the_length_and_no_logits_of_a_batch(kind, small_blocks):
    rows = len(next(iter(raw_batch(kind).values())))
    for name, found in arrays(kind).items():
        assert any(LENGTH in sizes for sizes, _ in found), name
        assert not squares(found), name
        assert not logits(found, rows * NEW), name


def test_what_holds_them_is_seen(small_blocks, monkeypatch):
    """A large allowance holds all logits, one chunk of rows all scores."""
    monkeypatch.setattr(heads, "HELD_ELEMENTS", 2**40)
    monkeypatch.setattr(attention, "CHUNKS", 1)
    found = arrays("language_model", (("attention", "xla"),))["update"]
    assert squares(found) and logits(found, 16 * LENGTH)


@pytest.mark.parametrize("kind", ["language_model", "preference", "policy"])
def test_wide_activations_stay_in_bfloat16(kind, small_blocks):
    low = arrays(kind, (("dtype", "bfloat16"),))
    seen = set()
    for name, found in low.items():
        wide = [(s, dtype) for s, dtype in found if WIDE in s and LENGTH in s]
        wide += [(s, dtype) for s, dtype in found if s[-1:] == (WIDE,) and s[0] > 1000]
        seen |= {dtype for _, dtype in wide}
        assert not [s for s, dtype in wide if dtype == "f32"], name
    assert "bf16" in seen
    full = arrays(kind)["update"]
    assert any(WIDE in s and LENGTH in s and dtype == "f32" for s, dtype in full)
