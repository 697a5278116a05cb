"""Models by their id on the hub: from its cache on this machine, or one line."""

import json

import jax
import pytest

from stagecraft import defaults, exchange, hub, run, tree
from stagecraft.data import files, readers
from stagecraft.errors import UserError
from stagecraft.models import huggingface, locate, peft
from stagecraft.models.transformer import Transformer
from stagecraft.text import byte_tokenizer, tokenizer_export
from stagecraft.text import tokenizer as tokenizers
from tests import tiny

CONFIG = tiny.config(vocab_size=264, layers=2, max_length=128, init_std=0.02)
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def download(cache, name, commit, revision="main", seed=0):
    """A model where the hub's client puts it: links to blobs, by their revision."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    model = Transformer(CONFIG, jax.random.key(seed))
    huggingface.save(model, root / "made")
    for file, data in tokenizer_export.files(byte_tokenizer.ByteTokenizer())[0].items():
        (root / "made" / file).write_bytes(data)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for path in list((root / "made").iterdir()):
        blob = root / "blobs" / f"{commit}-{path.name}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (root / "made").rmdir()
    if revision:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)
    return model


def test_a_model_is_read_from_the_cache(cache):
    main = download(cache, "org/small-0.1B", "abc")
    other = download(cache, "org/small-0.1B", "def", "v2", seed=1)
    for name, expected in {
        "org/small-0.1B": main,
        "org/small-0.1B@main": main,
        "org/small-0.1B@v2": other,
        "org/small-0.1B@def": other,
    }.items():
        source = locate.locate(f"hf:{name}")
        assert source.where == "folder"
        assert tree.digest(source.load(tiny.single())) == tree.digest(expected)
        assert source.seen_from("runs/a/sft") == f"hf:{name}"
        assert source.id() == huggingface.digest(source.folder)
    assert tokenizers.load("hf:org/small-0.1B").vocab_size == 263
    assert tokenizers.load("org/small-0.1B").vocab_size == 263


def test_one_downloaded_by_its_commit(cache):
    download(cache, "gpt", "abc", revision="")
    assert hub.find("gpt").name == "abc"
    download(cache, "gpt", "def", revision="", seed=1)
    assert hub.find("gpt") is None
    assert hub.find("gpt@def").name == "def"


def test_a_folder_of_that_name_comes_first(cache, tmp_path):
    download(cache, "org/small", "abc")
    mine = Transformer(CONFIG, jax.random.key(5))
    huggingface.save(mine, tmp_path / "org" / "small")
    source = locate.locate("hf:org/small")
    assert tree.digest(source.load(tiny.single())) == tree.digest(mine)


def test_what_is_not_there_is_one_line_with_the_command(cache, tmp_path):
    def experiment(name):
        c = defaults.experiment()
        c.mesh.data = 1
        data = dict(files=str(tmp_path / "x.jsonl"))
        c.stages.dpo = defaults.stage("preference", start_from=name, data=data)
        return run.experiment.resolve(c)

    for name, command in {
        "Qwen/Qwen3-0.6B": "hf download Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-0.6B@v1": "hf download Qwen/Qwen3-0.6B --revision v1",
    }.items():
        with pytest.raises(UserError) as caught:
            experiment(f"hf:{name}")
        line = str(caught.value)
        assert line.endswith(f"download it with: {command}") and "\n" not in line
        assert str(cache) in line
        with pytest.raises(UserError, match=command):
            exchange.import_folder(name, tmp_path / "run")
        with pytest.raises(UserError, match=command):
            tokenizers.load(f"hf:{name}")
    # A download that was broken off, or of the tokenizer alone.
    download(cache, "Qwen/Qwen3-0.6B", "abc")
    blobs = cache / "models--Qwen--Qwen3-0.6B" / "blobs"
    (blobs / "abc-model.safetensors").unlink()
    with pytest.raises(UserError, match="no whole model.*hf download Qwen/Qwen3-0.6B"):
        experiment("hf:Qwen/Qwen3-0.6B")
    assert tokenizers.load("Qwen/Qwen3-0.6B").vocab_size == 263


def test_an_adapter_on_a_model_of_the_hub(cache, tmp_path):
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": "org/small", "peft_type": "LORA"}
    (tmp_path / "adapter" / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="hub.s cache.*hf download org/small"):
        peft.base_of(tmp_path / "adapter")
    download(cache, "org/small", "abc")
    assert peft.base_of(tmp_path / "adapter").name == "abc"


def test_the_cache_is_where_the_client_puts_it(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache() == tmp_path / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(hub.cache()) == "/x/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "~/home")
    assert hub.cache() == tmp_path / "home/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "$HOME/cache")
    assert hub.cache() == tmp_path / "cache"


def test_what_may_be_an_id(tmp_path):
    for name in ("gpt2", "Qwen/Qwen3-0.6B", "org/a_b@refs/pr/1"):
        assert hub.is_id(name)
    for name in ("/models/x", "a/b/c", "./x", "../x", "x y", "org/", "", tmp_path):
        assert not hub.is_id(name)


def test_data_is_read_from_the_cache(cache):
    snapshot = cache / "datasets--org--set" / "snapshots" / "abc"
    (snapshot / "data").mkdir(parents=True)
    blobs = cache / "datasets--org--set" / "blobs"
    blobs.mkdir()
    for name in ("train", "test"):
        blob = blobs / name
        blob.write_text(f'{{"prompt": "Is it {name}?"}}\n')
        (snapshot / "data" / f"{name}-0.jsonl").symlink_to(f"../../../blobs/{name}")
    (snapshot / "README.md").write_text("a card")
    (cache / "datasets--org--set" / "refs").mkdir()
    (cache / "datasets--org--set" / "refs" / "main").write_text("abc")
    for name in ("hf:org/set", "hf:org/set@abc"):
        [path] = files.expand(name)
        assert path.name == "train-0.jsonl"
        assert [one.prompt for one in readers.prompts(name)] == ["Is it train?"]
    (snapshot / "data" / "test-0.jsonl").unlink()
    assert len(files.expand(f"hf:org/set, {blobs.parent}/snapshots/abc/data")) == 2


def test_data_that_is_not_there_is_named_with_its_command(cache):
    want = "hf download org/none --repo-type dataset --revision v2"
    with pytest.raises(UserError, match=want) as error:
        files.expand("hf:org/none@v2")
    assert "no whole dataset" in str(error.value) and "\n" not in str(error.value)
    download(cache, "org/model", "abc")  # a model of that name is no data
    with pytest.raises(UserError, match="no whole dataset"):
        files.expand("hf:org/model")
