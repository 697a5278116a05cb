"""The models that `stagecraft bench` times, and the batches it times them on."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from stagecraft.errors import UserError


class Preset(NamedTuple):
    """A model, and the sizes of what it is timed on.

    Attributes:
        model: sizes of the model, as `ModelConfig` takes them.
        rows: {case: rows of a batch}; more where the devices are more.
        length: tokens of a row of text.
        document: tokens of each document packed into a row.
        pair: tokens of each side of a pair, and of its prompt.
        prompt, new: tokens of a prompt, and of the completions that are trained on.
        samples: batch sizes of "sample".
        sampled: tokens of its prompts and of its completions.
        dtype: of the computation.
        lora: rank of the adapter that is trained in the place of the model; 0 for none.
        cases: what is timed by default.
    """

    model: dict[str, Any]
    rows: dict[str, int]
    length: int
    document: int
    pair: tuple[int, int]
    prompt: int
    new: int
    samples: tuple[int, ...]
    sampled: tuple[int, int] = (32, 128)
    dtype: str = "float32"
    lora: int = 0
    cases: tuple[str, ...] = ()


class Case(NamedTuple):
    """What one figure is measured on.

    Attributes:
        kind: a stage's kind.
        raw: (preset, rows, rng) -> a raw batch.
        changes: (preset) -> of the stage's defaults.
    """

    kind: str
    raw: Callable
    changes: Callable[[Preset], dict] = lambda preset: {}


def _rows(preset, rows, rng, length=0, prompt=0, sides=()):
    """Rows of one document each; what comes after `prompt` tokens is learned."""
    shape = (rows, *sides, length or preset.length)
    column = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    return dict(
        ids=rng.integers(5, preset.model["vocab_size"], shape).astype(np.int32),
        mask=column >= prompt,
        segments=np.ones(shape, np.int32),
        positions=column.copy(),
    )


def _packed(preset, rows, rng):
    """Rows of several documents, two thirds of each learned."""
    batch, document = _rows(preset, rows, rng), preset.document
    column = batch["positions"]
    return batch | dict(
        mask=column % document >= document // 3,
        segments=column // document + 1,
        positions=column % document,
    )


def prompts(preset: Preset, rows: int, rng: np.random.Generator, length: int = 0):
    """Returns a raw batch of prompts: prompt_ids i32[rows, P], prompt_mask bool.

    Args:
        preset: the `Preset`.
        rows: of the batch.
        rng: draws the ids.
        length: P; 0 for the preset's.
    """
    shape = (rows, length or preset.prompt)
    ids = rng.integers(5, preset.model["vocab_size"], shape).astype(np.int32)
    return dict(prompt_ids=ids, prompt_mask=np.ones(shape, bool))


def _pairs(preset, rows, rng):
    return _rows(preset, rows, rng, *preset.pair, sides=(2,))


def _labelled(preset, rows, rng):
    return _rows(preset, rows, rng, *preset.pair) | {"label": np.arange(rows) % 2 == 0}


def _samples(preset, **more):
    return dict(sampling=dict(max_new_tokens=preset.new)) | more


CASES = {
    "pretrain": Case("language_model", _rows),
    "sft": Case("language_model", _packed),
    "reward": Case("reward", _pairs),
    "dpo": Case("preference", _pairs),
    "kto": Case("unpaired_preference", _labelled),
    "grpo": Case(
        "group_policy", prompts, partial(_samples, group_size=4, kl_coef=0.04)
    ),
    "online": Case("online_preference", prompts, _samples),
    "ppo": Case("policy", prompts, partial(_samples, epochs=4, minibatches=1)),
}
NAMES = (*CASES, "sample")

# 4M parameters: small enough for a laptop.
_LAPTOP = Preset(
    model=dict(
        vocab_size=4096,
        width=256,
        layers=4,
        heads=8,
        kv_heads=4,
        head_dim=32,
        ff_width=688,
        max_length=1024,
        qk_norm=False,
        tied=True,
    ),
    rows=dict(pretrain=16, sft=16, reward=8, dpo=8, kto=16, grpo=4, online=8, ppo=16),
    length=256,
    document=85,
    pair=(225, 60),
    prompt=32,
    new=64,
    samples=(1, 16, 64),
    cases=NAMES,
)
_LLAMA = dict(
    vocab_size=128256, kv_heads=8, qk_norm=False, rope_theta=5e5, max_length=4096
)
_LARGE = dict(
    rows=dict(pretrain=8, sft=8, reward=4, dpo=4, kto=8, grpo=4, online=8, ppo=16),
    samples=(1, 16, 128),
    dtype="bfloat16",
)
PRESETS = {
    "laptop": _LAPTOP,
    # The shape of Llama 3.2 1B.
    "1b": Preset(
        model=_LLAMA
        | dict(width=2048, layers=16, heads=32, head_dim=64, ff_width=8192, tied=True)
        | dict(remat="names"),
        **_LARGE,
        **dict(length=4096, document=1365, pair=(2048, 512), prompt=512, new=512),
        sampled=(512, 128),
        cases=("pretrain", "sft", "dpo", "grpo", "ppo", "sample"),
    ),
    # The shape of Llama 3.1 8B. With weights, gradients and moments in float32 it is
    # 128 GB whole, so what is trained is an adapter.
    "8b": Preset(
        model=_LLAMA
        | dict(width=4096, layers=32, heads=32, head_dim=128, ff_width=14336)
        | dict(tied=False, remat="full"),
        **_LARGE,
        **dict(length=4096, document=1365, pair=(2048, 512), prompt=512, new=512),
        sampled=(512, 128),
        lora=16,
        cases=("sft", "dpo", "grpo", "sample"),
    ),
}


def of_length(preset: Preset, length: int) -> Preset:
    """Returns a preset with rows of another length, its other lengths in proportion.

    Raises:
        UserError: a length that leaves no room for a prompt and its answer.
    """
    if length < 32:
        raise UserError(f"--length={length}: expected 32 tokens or more")

    def scaled(tokens):
        return max(tokens * length // preset.length, 2)

    return preset._replace(
        model=preset.model | {"max_length": max(length, preset.model["max_length"])},
        length=length,
        document=scaled(preset.document),
        pair=(scaled(preset.pair[0]), scaled(preset.pair[1])),
        prompt=scaled(preset.prompt),
        new=scaled(preset.new),
        sampled=(scaled(preset.sampled[0]), scaled(preset.sampled[1])),
    )


AXES = ("length", "rows", "width")


def grown(preset: Preset, axis: str, factor: int) -> Preset:
    """Returns a preset of which one axis, of `AXES`, is larger.

    A wider model has more heads of the same size.
    """
    if axis == "length":
        return of_length(preset, factor * preset.length)
    if axis == "rows":
        rows = {case: factor * rows for case, rows in preset.rows.items()}
        samples = tuple(factor * rows for rows in preset.samples)
        return preset._replace(rows=rows, samples=samples)
    keys = ("width", "heads", "kv_heads", "ff_width")
    wider = {key: factor * preset.model[key] for key in keys}
    return preset._replace(model=preset.model | wider)
