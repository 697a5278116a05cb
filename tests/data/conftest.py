"""A tokenizer, and data built from records written on the spot."""

import functools
import json
import logging

import pytest
from ml_collections import ConfigDict

from stagecraft import defaults
from stagecraft.data import readers, stage_data
from stagecraft.stages import kinds
from stagecraft.text.tokenizer import SentencePiece, load
from tests.text import families


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


@pytest.fixture(scope="session")
def chatml(tmp_path_factory):
    return load(families.folder(tmp_path_factory.mktemp("chatml") / "f", "chatml"))


@pytest.fixture
def data(chatml, tmp_path, caplog):
    """(kind, records, **data keys) -> (StageData, [lines that were said])."""

    def read(kind, records, tokenizer=chatml, max_length=256, **keys):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        stage = defaults.stage(kind)
        stage.batch_size = 1
        keys = {"files": str(path)} | keys
        if kind == "language_model":
            keys = {"format": "demonstrations", "packing": "none"} | keys
        stage.data.update(keys)
        config = {"seed": 0, "model": {"max_length": max_length}, "stages": {}}
        builder = kinds.of(stage).data
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="stagecraft.data"):
            readers._log_once.cache_clear()
            made = stage_data.build(
                stage,
                tokenizer,
                tmp_path,
                ConfigDict(config),
                builder,
                "s",
            )
        return made, caplog.messages

    return read
