"""The files of a run, typed: read, written back the same, refused in a line."""

import json

import jax
import pytest
from ml_collections import ConfigDict

from stagecraft import metrics, process, runs, schema, storage, trackers
from stagecraft.errors import UserError
from stagecraft.lineage import Lineage, LineageEntry, StageRecord
from stagecraft.models import locate

# As runs wrote them before these files had types: order of keys included.
TRAINED = {
    "kind": "preference",
    "start_from": "sft",
    "finished": True,
    "format": "chat",
    "tokenizer": "88",
    "data": {"pairs": 7045, "dropped": 0},
    "lora": {"rank": 4},
    "base": {"name": "../sft", "id": "ad"},
    "module": "transformer",
    "model": {"width": 16, "rope_arguments": []},
    "steps": 20,
    "seconds": {"compile": 1.5, "total": 2.0},
    "seconds_this_time": 2.0,
    "tokens": {"trained": 4.5},
    "peak_memory_bytes": 123,
}
RECORDS = {
    "kind": "comparisons",
    "start_from": "sft",
    "format": "records",
    "pairs": 7045,
    "dropped": 955,
    "tokens": {"sampled": 544000},
    "seconds": {"total": 17.761},
    "finished": True,
}
LINEAGE = {
    "stages": {
        "sft": {
            "kind": "language_model",
            "start_from": "hf:models/ü",
            "tokenizer": "88",
            "parents": {"start_from": {"stage": "hf:models/ü", "id": "37"}},
            "id": "00",
        },
        "dpo": {
            "kind": "preference",
            "start_from": "sft",
            "config": "f4",
            "tokenizer": "88",
            "data": {"stage:comparisons": "28"},
            "parents": {"reference_from": {"stage": "sft", "id": "00"}},
            "id": "59",
            "from_later": [1],
        },
    },
    "version": 2,
}


@pytest.mark.parametrize(
    "values",
    [TRAINED, RECORDS, RECORDS | {"later": None, "peak_memory_bytes": None}],
)
def test_a_stages_record_is_written_back_as_it_was(tmp_path, values):
    path = tmp_path / "stage.json"
    storage.write_json(path, values)
    before = path.read_bytes()
    record = StageRecord.read(tmp_path)
    assert record.kind == values["kind"] and record.tokens == values["tokens"]
    record.write(tmp_path)
    assert path.read_bytes() == before


def test_lineage_is_written_back_as_it_was(tmp_path):
    path = tmp_path / "lineage.json"
    storage.write_json(path, LINEAGE)
    before = path.read_bytes()
    lineage = Lineage.read(tmp_path)
    assert lineage.stages["dpo"].data == {"stage:comparisons": "28"}
    assert lineage.id_of("sft") == "00" and lineage.id_of("gone") == ""
    lineage.write(tmp_path)
    assert path.read_bytes() == before
    assert Lineage.read(tmp_path / "nowhere").stages == {}


def test_a_new_record_has_the_order_of_the_old_ones():
    begun = {k: v for k, v in TRAINED.items() if k in list(TRAINED)[:8]}
    record = StageRecord(**begun | {"finished": False})
    assert list(record.to_json()) == list(begun)
    record = StageRecord(**dict(reversed(TRAINED.items())))
    assert list(record.to_json()) == list(TRAINED)


def test_an_id_is_the_digest_of_all_the_rest():
    entry = dict(LINEAGE["stages"]["sft"])
    del entry["id"]
    made = LineageEntry(**entry)
    assert made.id == storage.digest(entry)
    assert made.to_json() == entry | {"id": made.id}


def test_real_files_are_written_back_as_they_were(tiny_run):
    texts = {p: p.read_text() for p in tiny_run.rglob("stage.json")}
    assert len(texts) > 5
    for path, text in texts.items():
        assert storage.json_text(StageRecord.read(path.parent).to_json()) == text
    lineage = storage.json_text(Lineage.read(tiny_run).to_json())
    assert lineage == (tiny_run / "lineage.json").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"kind": "reward", ', "not a JSON file"),
        ("[]", "is no JSON object"),
        ('{"kind": "reward", "start_from": ""}', "lacks finished"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, text, says):
    (tmp_path / "stage.json").write_text(text)
    with pytest.raises(UserError, match=rf"stage\.json: {says}.*restore it") as error:
        StageRecord.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"lineage\.json: not a JSON file"),
        ("{}", r"lineage\.json: lacks stages"),
        ('{"stages": {"a": {"kind": "reward"}}}', "lineage.json: a: lacks start_from"),
        ('{"stages": {"a": 3}}', "lineage.json: a: is no JSON object"),
    ],
)
def test_a_damaged_lineage_is_one_line(tmp_path, text, says):
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        Lineage.read(tmp_path)
    assert "\n" not in str(error.value)


def test_only_a_finished_stage_is_read(tmp_path):
    with pytest.raises(UserError, match=r"no stage here \(no stage.json\)"):
        StageRecord.read_finished(tmp_path)
    storage.write_json(tmp_path / "stage.json", TRAINED | {"finished": False})
    with pytest.raises(UserError, match="not finished; run it again to resume"):
        StageRecord.read_finished(tmp_path)


# -- what a name means -----------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    root = tmp_path / "run"
    storage.write_json(root / "sft" / "stage.json", TRAINED)
    storage.write_json(root / "half" / "stage.json", TRAINED | {"finished": False})
    storage.write_json(root / "config.json", {})
    storage.write_json(root / "lineage.json", LINEAGE)
    for folder, name in (("model", "config.json"), ("peft", "adapter_config.json")):
        storage.write_json(tmp_path / folder / name, {})
    stages = {"sft": {"mesh": {"data": 0}}, "dpo": {"mesh": {"data": 2}}}
    mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    return runs.Run(root, ConfigDict({"stages": stages, "mesh": mesh}))


def test_what_a_name_stands_for(run, tmp_path):
    other = tmp_path / "run" / "half"
    for name, where, folder in (
        ("sft", "here", run.root / "sft"),
        (str(other), "stage", other),
        ("half", "nowhere", "half"),
        (f"hf:{tmp_path}/model", "folder", tmp_path / "model"),
        (f"hf:{tmp_path}/peft", "adapter", tmp_path / "peft"),
    ):
        source = run.source(name)
        assert (source.where, str(source.folder)) == (where, str(folder))
        assert source.outward == name.startswith("hf:")
    assert run.source("sft").tokenizer() == run.root / "tokenizer"
    assert run.source("sft").id() == "00" and run.source(str(other)).id() == ""
    assert run.source("sft").seen_from(run.root / "dpo") == "../sft"
    assert run.source("sft").seen_from(tmp_path / "b" / "dpo") == str(run.root / "sft")
    outward = run.source(f"hf:{tmp_path}/model")
    assert outward.seen_from(run.root / "dpo") == outward.name


def test_what_a_run_knows_of_its_stages(run):
    assert run.finished("sft") and not run.finished("dpo")
    assert run.finished(str(run.root / "half")) is False
    assert run.record("sft").lora == {"rank": 4} and run.record("dpo") is None
    assert run.chat_format("sft")
    assert dict(run.mesh("sft").shape) == dict(run.mesh().shape)
    assert run.mesh("dpo").shape["data"] == 2
    assert runs.whole_rows(3, run.mesh("dpo")) == 4


def test_a_stage_may_sample_on_the_last_devices(run):
    apart = {"devices": 2, "data": -1, "fsdp": 1, "tensor": 2}
    stage = {"mesh": {"data": -1}, "rollout_mesh": apart}
    run.config.stages = ConfigDict({"ppo": stage, "sft": {"mesh": {}}})
    training, rollout = run.mesh("ppo"), run.rollout_mesh(run.config.stages.ppo)
    assert list(training.devices.flat) == jax.devices()[:6]
    assert list(rollout.devices.flat) == jax.devices()[6:]
    assert (rollout.shape["data"], rollout.shape["tensor"]) == (1, 2)
    assert run.rollout_mesh(run.config.stages.sft) is None
    run.config.stages.ppo.mesh.data = 2
    assert list(run.mesh("ppo").devices.flat) == jax.devices()[:2]
    run.config.stages.ppo.mesh.data = -1
    run.devices = 4  # so many that are not here
    assert run.mesh("ppo").size == 2
    assert run.rollout_mesh(run.config.stages.ppo).size == 2


def test_which_run_a_path_leads_into(run, tmp_path):
    for path, name in (
        (run.root / "sft", "sft"),
        (run.root / "sft" / "records.jsonl", "sft"),
        (run.root / "tokenizer", "tokenizer"),
        (run.root / "world" / "text.jsonl", "world:text.jsonl"),
    ):
        assert locate.run_of(str(path)) == (run.root, name)
    assert locate.run_of("sft") is None
    assert locate.run_of(str(tmp_path / "text.jsonl")) is None


# -- only the first process writes -----------------------------------------------------


@pytest.fixture
def second(monkeypatch):
    """Makes this process the second of a program."""
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("jax.process_index", lambda: 1)


def test_a_second_process_writes_nothing(tmp_path, second):
    assert not process.is_first()
    StageRecord(**TRAINED).write(tmp_path / "dpo")
    Lineage().write(tmp_path)
    runs.write_config(tmp_path, schema.plain(ConfigDict({"seed": 0})))
    storage.write_text(tmp_path / "records.jsonl", "{}\n")
    writer = metrics.Writer(tmp_path / "dpo")
    writer.write(1, 0.5, {"loss": 1.0})
    writer.write_samples(1, [{"prompt": "a", "completion": "b"}])
    writer.close()
    with storage.new_folder(tmp_path / "world") as temporary:
        (temporary / "text.jsonl").write_text("{}\n")
    with trackers.watching("wandb", tmp_path, name="a", config={}) as watch:
        watch.scalars(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == [] and not temporary.exists()


def test_a_second_process_keeps_what_the_first_wrote(tmp_path, second):
    rows = json.dumps({"step": 9, "loss": 1.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(rows)
    metrics.Writer(tmp_path, resume_step=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_the_first_process_of_several_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("jax.process_index", lambda: 0)
    storage.write_json(tmp_path / "a.json", {})
    assert storage.read_json(tmp_path / "a.json") == {}
