"""A tokenizer, and data built from records written on the spot."""

import functools
import json

import pytest
from ml_collections import ConfigDict

from stagecraft import defaults
from stagecraft.data import stage_data
from stagecraft.stages import kinds
from stagecraft.text.tokenizer import SentencePiece


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    words = ["The capital of France is Paris. What is 12 + 30? It is 42."] * 20
    return SentencePiece.train(words, 320, tmp_path_factory.mktemp("t") / "t.model")


@pytest.fixture
def build(tokenizer, tmp_path):
    """(kind, records, **settings) -> the data of one stage whose file holds them."""
    return functools.partial(_build, tokenizer, tmp_path)


def _build(tokenizer, root, kind, records, *, max_length=64, **settings):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (root / "data.jsonl").write_text(lines)
    stage = defaults.stage(kind)
    stage.batch_size = settings.pop("batch_size", 4)
    if "max_new_tokens" in settings:
        stage.sampling.max_new_tokens = settings.pop("max_new_tokens")
    if "oversample" in settings:
        stage.oversample = settings.pop("oversample")
    stage.data.update({"files": str(root / "data.jsonl")} | settings)
    shape = {"max_length": max_length}
    config = ConfigDict({"seed": 0, "model": shape, "stages": {}})
    return stage_data.build(stage, tokenizer, root, config, kinds.of(stage).data)
