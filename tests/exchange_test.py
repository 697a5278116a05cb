"""Models in and out of work directories, from the commands down."""

import json
import shutil

import jax
import numpy as np
import pytest

from stagecraft import defaults, exchange, run, tree
from stagecraft.errors import UserError
from stagecraft.models import huggingface
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.text import byte_tokenizer, tokenizer_export
from tests import tiny
from tests.command_line import stagecraft

CONFIG = tiny.config(vocab_size=264, layers=2, max_length=128, init_std=0.02)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model and a reward model as somebody else's folders."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = byte_tokenizer.ByteTokenizer()
    body = Transformer(CONFIG, jax.random.key(0))
    for name, model in {
        "model": body,
        "reward": ScalarModel(body, jax.random.key(1)),
    }.items():
        ends = {"eos_token_id": [tokenizer.end, tokenizer.eos]}
        ids = {"pad_token_id": tokenizer.pad}
        huggingface.save(model, root / name, ids=ids, generation=ends)
        for file, data in tokenizer_export.files(tokenizer)[0].items():
            (root / name / file).write_bytes(data)
    pairs = [
        {"prompt": f"{i}?", "chosen": f"{i + 1}.", "rejected": "No."} for i in range(16)
    ]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (root / "pairs.jsonl").write_text(lines)
    return root


@pytest.fixture(scope="module")
def imported(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("imported") / "run"
    exchange.import_folder(folders / "model", root)
    return root


def experiment(folders, start, **changes):
    c = defaults.experiment()
    c.mesh.data = 1
    c.stages.dpo = defaults.stage(
        "preference",
        start_from=start,
        steps=1,
        batch_size=4,
        optimizer=dict(warmup_steps=0),
        data=dict(files=str(folders / "pairs.jsonl"), length=32),
        **changes,
    )
    return c


def test_an_imported_stage_is_a_finished_one(folders, imported):
    current = run.open_run(imported)
    assert current.finished("base") and current.chat_format("base")
    model = huggingface.load(folders / "model", tiny.single())
    assert tree.digest(current.model("base", tiny.single())) == tree.digest(model)
    assert current.config.model.width == CONFIG.width
    text = "naïve <|end|>"
    assert current.tokenizer.decode(current.tokenizer.encode(text)) == text
    entry = json.loads((imported / "lineage.json").read_text())["stages"]["base"]
    assert entry["parents"]["start_from"]["id"] == huggingface.digest(folders / "model")


def test_commands_work_on_an_import(folders, imported, tmp_path):
    out = tmp_path / "out"
    arguments = [f"--workdir={imported}", "--stage=base", f"--to={out}"]
    for command in (
        ["prompt", f"--workdir={imported}", "Hello", "--max_new_tokens=4"],
        ["report", f"--workdir={imported}"],
        ["export", *arguments],
    ):
        status, _, error = stagecraft(*command)
        assert status == 0, error
    one, two = (
        (path / "model.safetensors").read_bytes() for path in (folders / "model", out)
    )
    assert one == two
    for name in tokenizer_export.files(byte_tokenizer.ByteTokenizer())[0] | {
        "generation_config.json": b""
    }:
        assert (out / name).read_bytes() == (folders / "model" / name).read_bytes()


@pytest.mark.parametrize("by", ["hf", "stage"])
def test_a_stage_starts_from_a_folder(folders, imported, tmp_path, by):
    """The model, its context and its tokenizer come along; the lineage says whence."""
    start = f"hf:{folders / 'model'}" if by == "hf" else str(imported / "base")
    c = experiment(folders, start)
    c.model.dtype = "bfloat16"
    run.run(c, tmp_path / "run")
    current = run.open_run(tmp_path / "run")
    assert current.config.model.width == CONFIG.width
    assert current.config.model.max_length == CONFIG.max_length
    assert current.tokenizer.vocab_size == byte_tokenizer.ByteTokenizer.vocab_size
    entry = json.loads((tmp_path / "run" / "lineage.json").read_text())
    found = entry["stages"]["dpo"]["parents"]["start_from"]["id"]
    if by == "hf":
        assert found == huggingface.digest(folders / "model")
        assert current.model("dpo", tiny.single()).config.dtype == "bfloat16"
    assert len(found) == 64
    # The parent may be gone once the stage is finished.
    out = tmp_path / "out"
    assert exchange.export(tmp_path / "run", "dpo", out)[0].endswith("float32")
    moved = huggingface.load(out, tiny.single())
    before = huggingface.load(folders / "model", tiny.single())
    assert tree.digest(moved) != tree.digest(before)


def test_an_exported_folder_ends_where_training_did(folders, tmp_path):
    shutil.copytree(folders / "model", tmp_path / "in")
    settings = {"eos_token_id": 7, "temperature": 0.5}
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps(settings))
    exchange.import_folder(tmp_path / "in", tmp_path / "run")
    said = exchange.export(tmp_path / "run", "base", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = byte_tokenizer.ByteTokenizer()
    assert written == settings | {"eos_token_id": [ids.end, 7, ids.eos]}
    assert "eos_token_id=[262, 7, 258]" in said[1] and "not 7" in said[1]
    again = exchange.import_folder(tmp_path / "out", tmp_path / "again")
    kept = run.open_run(again.parent).tokenizer
    assert kept.digest == run.open_run(tmp_path / "run").tokenizer.digest


def test_reward_models_come_and_go(folders, tmp_path):
    exchange.import_folder(folders / "reward", tmp_path / "run", name="judge")
    said = exchange.export(tmp_path / "run", "judge", tmp_path / "out")
    assert said == [f"{tmp_path / 'out'}: Qwen3, float32"]
    current = run.open_run(tmp_path / "run")
    model = current.model("judge", tiny.single())
    assert isinstance(model, ScalarModel)
    theirs = huggingface.load(tmp_path / "out", tiny.single())
    assert tree.digest(theirs) == tree.digest(model)


# Refusals


def test_a_longer_context_is_the_runs_own(folders):
    c = experiment(folders, f"hf:{folders / 'model'}")
    c.model.max_length = 64
    assert run.experiment.resolve(c).model.max_length == 64
    c.stages.dpo.data.length = 65
    with pytest.raises(UserError, match="data.length=65.*model.max_length=64"):
        run.experiment.resolve(c)


@pytest.mark.parametrize(
    "role, name, words",
    [
        ("start_from", "reward", "expected a ...ForCausalLM"),
        ("reference_from", "reward", "expected a ...ForCausalLM"),
        ("start_from", "nowhere", "config.json: cannot be read"),
    ],
)
def test_a_folder_of_the_wrong_kind(folders, role, name, words):
    c = experiment(folders, f"hf:{folders / 'model'}")
    c.stages.dpo[role] = f"hf:{folders / name}"
    with pytest.raises(UserError, match=words):
        run.experiment.resolve(c)


def test_a_policy_needs_a_reward_model(folders):
    c = defaults.experiment()
    c.mesh.data = 1
    model = f"hf:{folders / 'model'}"
    c.stages.ppo = defaults.stage(
        "policy",
        start_from=model,
        reward_from=model,
        data=dict(files=str(folders / "pairs.jsonl")),
    )
    with pytest.raises(UserError, match="reward_from=.*ForSequenceClassification"):
        run.experiment.resolve(c)


def test_a_tokenizer_larger_than_the_embedding(folders, tmp_path):
    shutil.copytree(folders / "model", tmp_path / "in")
    tokenizer = json.loads((tmp_path / "in" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        tokenizer["added_tokens"][-1] | {"id": 270, "content": "<|more|>"}
    )
    tokenizer["model"]["vocab"] |= {f"x{i}": i for i in range(263, 271)}
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has 272 ids, its model embeds 264"):
        exchange.import_folder(tmp_path / "in", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_exported(imported, folders, tmp_path):
    for name, words in [("bass", "did you mean 'base'"), ("none", "known here: base")]:
        with pytest.raises(UserError, match=words):
            exchange.export(imported, name, tmp_path / "out")
    with pytest.raises(UserError, match="expected one of float32, bfloat16"):
        exchange.export(imported, "base", tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match="holds a run already"):
        exchange.import_folder(folders / "model", imported)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        exchange.export(imported, "base", tmp_path / "file")
    assert np.all([p.name == "file" for p in tmp_path.iterdir()])
