"""What a run stands on: its tokenizer, made or read once, and large enough a model."""

import types
from pathlib import Path

import pytest

from stagecraft import defaults, groundwork
from stagecraft.errors import UserError
from tests.text import families


def _tokenized(path="", files=""):
    config = defaults.experiment()
    config.tokenizer.path, config.tokenizer.files = str(path), files
    config.tokenizer.vocab_size = 300
    return config


def test_a_run_keeps_its_tokenizer_whole(tmp_path):
    folder = families.folder(tmp_path / "given", "gemma3")
    first = groundwork.tokenizer(_tokenized(folder), tmp_path / "run")
    own = tmp_path / "run" / "tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (own / name).read_bytes() == (folder / name).read_bytes()
    # From then on it is the run's own, whatever becomes of the one it came from.
    again = groundwork.tokenizer(_tokenized(tmp_path / "gone"), tmp_path / "run")
    assert again.digest == first.digest
    for path in ("bytes", folder / "tokenizer.json"):
        root = tmp_path / f"of {Path(path).name}"
        assert groundwork.tokenizer(_tokenized(path), root).stops
    with pytest.raises(UserError, match="tokenizer.path: .*no such tokenizer"):
        groundwork.tokenizer(_tokenized(tmp_path / "gone"), tmp_path / "other")
    with pytest.raises(UserError, match="set tokenizer.path or tokenizer.files"):
        groundwork.tokenizer(_tokenized(), tmp_path / "other")


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    def model(rows):
        return types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=rows))

    tokenizer = types.SimpleNamespace(vocab_size=300)
    scalar = types.SimpleNamespace(body=model(299))
    groundwork.check_vocabulary({"start": model(300), "reward": model(512)}, tokenizer)
    for role, small in (("start", model(299)), ("reward", scalar)):
        with pytest.raises(UserError, match=f"{role}_from: its model embeds 299 ids"):
            groundwork.check_vocabulary({role: small}, tokenizer)
