"""The tiny model that all tests share; a test says what it needs to be different."""

import dataclasses

import jax

from stagecraft import sharding
from stagecraft.models.config import ModelConfig

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


def config(**changes):
    """`CONFIG` with other values."""
    return dataclasses.replace(CONFIG, **changes)


def single():
    """A mesh of one device."""
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
