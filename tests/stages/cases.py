"""Tiny models and batches that the tests of all stages share."""

import jax
import numpy as np

from stagecraft import defaults, mesh
from stagecraft.models.config import ModelConfig
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.stages import language_model, policy, preference, reward

CONFIG = ModelConfig(
    vocab_size=64,
    width=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ff_width=64,
    max_length=64,
    init_std=0.2,  # large enough that wrong masks and pairs show in the numbers
)
STOP = 5


def single():
    """A mesh of one device."""
    return mesh.make(1, 1, 1, devices=jax.devices()[:1])


def models(shared_mesh):
    """{"policy", "reference", "reward"}: three different models on a mesh."""

    def make(key):
        keys = jax.random.split(key, 3)
        return {
            "policy": Transformer(CONFIG, keys[0]),
            "reference": Transformer(CONFIG, keys[1]),
            "reward": ScalarModel(Transformer(CONFIG, keys[2]), keys[2]),
        }

    return mesh.born(make, shared_mesh)(jax.random.key(7))


def documents(rows=16, length=24, seed=0):
    """A packed language-model batch: two documents a row, some padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(8, 64, (rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    for row in range(rows):
        cut, end = rng.integers(4, 10), rng.integers(16, length + 1)
        segments[row, cut:] = 2
        positions[row, cut:] -= cut
        segments[row, end:] = 0
    mask = (segments > 0) & (rng.random((rows, length)) < 0.7)
    return dict(ids=ids, mask=mask, segments=segments, positions=positions)


def pairs(rows=16, length=16, seed=0):
    """A batch of comparisons: prompts of 4 tokens, answers of different lengths."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(6, length + 1, (rows, 2, 1))
    column = np.arange(length)[None, None]
    return dict(
        ids=rng.integers(8, 64, (rows, 2, length)).astype(np.int32),
        mask=(column >= 4) & (column < ends),
        segments=(column < ends).astype(np.int32) * np.ones((rows, 2, 1), np.int32),
        positions=np.tile(column.astype(np.int32), (rows, 2, 1)),
    )


def prompts(rows=16, length=8, seed=0):
    """A batch of left-padded prompts."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 5, (rows, 1))
    return dict(
        prompt_ids=rng.integers(8, 64, (rows, length)).astype(np.int32),
        prompt_mask=np.arange(length)[None] >= starts,
    )


OPTIMIZER = dict(name="sgd", lr=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=0.0)


def stage(kind, shared_mesh, **changes):
    """A stage of one kind, its raw batch, and its config."""
    changes = dict(optimizer=OPTIMIZER, steps=10, batch_size=16) | changes
    parents = models(shared_mesh)
    start = parents["policy"]
    if kind == "language_model":
        config = defaults.stage(kind, **changes)
        made = language_model.make(config, CONFIG, shared_mesh, {"start": start})
        return made, documents(), config
    if kind == "reward":
        config = defaults.stage(kind, **changes)
        made = reward.make(config, CONFIG, shared_mesh, {"start": start})
        return made, pairs(), config
    if kind == "preference":
        config = defaults.stage(kind, **changes)
        roles = {"start": start, "reference": parents["reference"]}
        return preference.make(config, CONFIG, shared_mesh, roles), pairs(), config
    sampling = dict(max_new_tokens=10, temperature=0.7)
    changes = dict(epochs=2, minibatches=2, sampling=sampling) | changes
    config = defaults.stage(kind, **changes)
    roles = {
        "start": start,
        "reference": parents["reference"],
        "reward": parents["reward"],
        "value": parents["reward"],
    }
    made = policy.make(config, CONFIG, shared_mesh, roles, stop_id=STOP)
    return made, prompts(), config


KINDS = ("language_model", "reward", "preference", "policy")
