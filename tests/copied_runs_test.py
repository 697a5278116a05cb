"""Work directories that were copied, whole or in part, and data that grew since."""

import json
import shutil

import pytest

from stagecraft import defaults, exchange, run, tree
from stagecraft.errors import UserError
from tests import tiny
from tests.exchange_test import folders  # noqa: F401, a fixture


def demonstrations(path, count):
    lines = [{"prompt": f"{i}?", "completion": f"{i + 1}."} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def experiment(folders):  # noqa: F811
    c = defaults.experiment()
    c.mesh.data = 1
    shared = dict(steps=1, batch_size=4, optimizer=dict(warmup_steps=0))
    shared |= dict(lora=dict(rank=2))
    c.stages.sft = defaults.stage(
        "language_model",
        start_from=f"hf:{folders / 'model'}",
        data=dict(format="demonstrations", files=str(folders / "sft.jsonl"), length=32),
        **shared,
    )
    c.stages.dpo = defaults.stage(
        "preference",
        start_from="sft",
        data=dict(files=str(folders / "pairs.jsonl"), length=32),
        **shared,
    )
    return c


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):  # noqa: F811
    demonstrations(folders / "sft.jsonl", 16)
    root = tmp_path_factory.mktemp("made") / "run"
    run.run(experiment(folders), root)
    return root


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made, tmp_path / "elsewhere" / "run")
    return tmp_path / "elsewhere" / "run"


def test_a_copy_is_the_run_itself(made, copied, folders):  # noqa: F811
    one, two = run.open_run(made), run.open_run(copied)
    away = made.with_name("away")
    expected = tree.digest(one.model("dpo", tiny.single()))
    made.rename(away)
    try:
        assert tree.digest(two.model("dpo", tiny.single())) == expected
        exchange.export(copied, "dpo", copied.parent / "out")
        (copied / "summary.json").unlink()
        run.run(experiment(folders), copied)
    finally:
        away.rename(made)
    assert (copied / "summary.json").exists()


def test_data_may_grow_once_their_stage_is_finished(copied, folders):  # noqa: F811
    before = tree.digest(run.open_run(copied).model("sft", tiny.single()))
    demonstrations(folders / "sft.jsonl", 40)
    try:
        (copied / "summary.json").unlink()
        run.run(experiment(folders), copied)
        again = run.open_run(copied).model("sft", tiny.single())
        assert tree.digest(again) == before
        record = json.loads((copied / "sft" / "stage.json").read_text())
        (copied / "sft" / "stage.json").write_text(
            json.dumps(record | {"finished": False})
        )
        with pytest.raises(UserError, match="sft: its data changed since the stage be"):
            run.run(experiment(folders), copied)
    finally:
        demonstrations(folders / "sft.jsonl", 16)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("sft", "dpo/../sft, which is not there|no stage here"),
        ("sft/checkpoints", "sft: no checkpoints here; copy the whole folder"),
        ("sft/checkpoints/1", "no complete checkpoint; copy the whole folder"),
        ("sft/checkpoints/1/model", "cannot be read .*only a part of it was copied"),
        ("sft/checkpoints/1/model/manifest.ocdbt", "cannot be read .*only a part"),
        ("sft/checkpoints/1/model/d", "cannot be read .*only a part"),
        ("sft/stage.json", "no stage here .no stage.json"),
        ("lineage.json", "which no lineage.json names; copy the whole work directory"),
        ("config.json", "no run here .no config.json"),
        ("tokenizer", "no tokenizer here"),
        ("tokenizer/chat_template.jinja", "not the tokenizer that sft was trained"),
    ],
)
def test_what_is_missing_in_half_a_copy_is_one_line(copied, lost, words):
    path = copied / lost
    assert path.exists()
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=words) as caught:
        run.open_run(copied).model("dpo", tiny.single())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_training_state_that_is_half_there(copied, folders):  # noqa: F811
    record = json.loads((copied / "dpo" / "stage.json").read_text())
    text = json.dumps(record | {"finished": False})
    (copied / "dpo" / "stage.json").write_text(text)
    shutil.rmtree(copied / "dpo" / "checkpoints" / "1" / "train")
    with pytest.raises(UserError, match="dpo/checkpoints: cannot be read .*only a par"):
        run.run(experiment(folders), copied)
