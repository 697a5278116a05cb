"""Batches of records that are not there yet: their shapes follow from the config."""

import numpy as np
from ml_collections import ConfigDict

from stagecraft.data import comparisons, prompts
from stagecraft.stages import kinds

_TOKENS = ("ids", "segments", "positions")


def batch(stage: ConfigDict, config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns an empty raw batch of the longest rows that a stage may see.

    Args:
        stage: the stage's resolved config, of a kind that trains.
        config: the experiment's.

    Returns:
        {name: zeros}: "ids", "segments", "positions" i32[B, T] and "mask" bool[B, T],
        with an axis of two answers in pairs and "label" bool[B] with judgements; of
        stages that sample "prompt_ids" i32[B, P], "prompt_mask" and "index".
    """
    builder, data, rows = kinds.of(stage).data, stage.data, stage.batch_size
    if builder in (prompts.build, prompts.groups):
        rows *= stage.oversample if builder is prompts.groups else 1
        shape = (rows, prompts.limit(stage, config.model.max_length))
        arrays = {
            "prompt_ids": np.zeros(shape, np.int32),
            "prompt_mask": np.ones(shape, bool),
            "index": np.arange(rows, dtype=np.int32),
        }
        if data.get("ptx_rows"):
            arrays |= _rows((data.ptx_rows, data.ptx_length), "ptx_")
        return arrays
    pairs = builder in (comparisons.pairs, comparisons.rankings)
    arrays = _rows((rows, *(2,) * pairs, data.length))
    if builder is comparisons.judgements:
        arrays["label"] = np.zeros(rows, bool)
    return arrays


def _rows(shape, prefix=""):
    arrays = {f"{prefix}{name}": np.zeros(shape, np.int32) for name in _TOKENS}
    return arrays | {f"{prefix}mask": np.zeros(shape, bool)}
