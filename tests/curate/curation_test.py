"""A whole curation on planted faults: what is found, and that bytes never differ."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import common
from stagecraft import defaults, experiment, run, storage
from stagecraft.curate import curation, engine
from stagecraft.data import readers, shards, stage_data
from stagecraft.errors import UserError
from stagecraft.report import curation as page
from stagecraft.stages import kinds
from stagecraft.text import chat
from stagecraft.text.tokenizer import SentencePiece
from tests.curate import prose

ROOT = Path(__file__).parent.parent.parent
SECRET = "write to ann.lee@firm.org today or call 212-555-0187 from 8.8.8.8, she said."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files with every kind of fault; {name: path or rows}."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    found = prose.planted(rng, 260)
    clean = [p for p in found if p.fault == "clean"]
    leaked, personal = clean[10], clean[20]
    found[found.index(personal)] = personal._replace(text=f"{personal.text} {SECRET}")
    half = len(found) // 2
    prose.write(root / "a.jsonl.gz", found[:half])
    prose.write(root / "b.jsonl", found[half:], source="web")
    with (root / "b.jsonl").open("ab") as file:
        file.write(b'{"text": "<script>alert(1)</script>\n{"text": "\xff"}\n[1]\n')
        hostile = "<script>alert(1)</script> & <img src=x> " * 3
        file.write(json.dumps({"text": hostile, "fault": "hostile"}).encode())
    question = " ".join(leaked.text.split()[20:40])
    (root / "test.jsonl").write_text(json.dumps({"question": question}) + "\n")
    words = prose.vocabulary(rng)
    good = [{"text": prose.document(rng, words)} for _ in range(30)]
    bad = prose.planted(np.random.default_rng(1), 200)
    bad = [{"text": p.text} for p in bad if p.fault in ("boilerplate", "noise")]
    for name, rows in (("good", good), ("bad", bad)):
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (root / f"{name}.jsonl").write_text(text)
    SentencePiece.train([p.text for p in clean], 320, root / "t.model")
    return {"root": root, "found": found, "leaked": leaked, "personal": personal}


def config(corpus, out, **changes):
    root = corpus["root"]
    return {
        "files": f"{root / 'a.jsonl.gz'},{root / 'b.jsonl'}",
        "out": str(out),
        "task_bytes": 20_000,
        "quality": {
            "good": str(root / "good.jsonl"),
            "bad": str(root / "bad.jsonl"),
            "threshold": 0.5,
        },
        "contamination": {"files": str(root / "test.jsonl")},
        "tokenizer": str(root / "t.model"),
        **changes,
    }


@pytest.fixture(scope="module")
def result(corpus, tmp_path_factory):
    """(folder, summary) of a curation with every step on two workers."""
    out = tmp_path_factory.mktemp("curated") / "out"
    summary = curation.curate(config(corpus, out), workers=2)
    page.write(out)
    return out, summary


def test_every_fault_is_found_and_nothing_else(corpus, result):
    out, told = result
    rows = prose.read(out)
    assert {r["fault"] for r in rows} <= {"clean", "exact", "near"}
    groups = {p.origin for p in corpus["found"] if p.fault == "clean"}
    lost = groups - {r["origin"] for r in rows}
    assert lost == {corpus["leaked"].origin}
    assert len(rows) == len({r["origin"] for r in rows})  # one of each group
    by = {step["name"]: step for step in told["steps"]}
    assert sum(by["read"]["removed"].values()) == 3
    assert by["gopher_quality"]["kept"] < 0.97 * by["gopher_quality"]["documents"]
    assert by["quality"]["removed"]["quality"] < 5  # the rules found the others
    assert by["contamination"]["removed"] == {"overlaps evaluation": 1}
    assert by["personal data"]["changed"] == {
        "e-mail replaced": 1,
        "IP address replaced": 1,
        "phone number replaced": 1,
    }
    [scrubbed] = [r for r in rows if r["origin"] == corpus["personal"].origin]
    assert "ann.lee" not in scrubbed["text"]
    assert told["documents"] == len(rows)
    counted = {name: s["kept"] for name, s in told["sources"].items()}
    assert counted["web"] == sum(r["source"] == "web" for r in rows)
    for before, after in zip(told["steps"], told["steps"][1:], strict=False):
        assert after["documents"] == before["kept"]
        gone = sum(after["removed"].values())
        assert after["documents"] == after["kept"] + gone


def test_of_duplicates_the_best_stays_and_its_score_is_a_column(corpus, result):
    out, _ = result
    rows = prose.read(out)
    assert all(0 <= r["score"] <= 1 for r in rows)
    [model] = out.glob("quality-*.npy")
    assert re.fullmatch(r"quality-[0-9a-f]{16}\.npy", model.name)
    # The order of the result is that of the files.
    places = [
        (r["where"].rpartition(":")[0], int(r["where"].rpartition(":")[2]))
        for r in rows
    ]
    assert places == sorted(places)


def test_pretraining_reads_the_text_and_the_shards(corpus, result):
    out, told = result
    texts = [r["text"] for r in prose.read(out)]
    assert [*readers.texts(out / "text")] == texts
    model = SentencePiece.load(corpus["root"] / "t.model")
    found = shards.Shards(out / "shards").check_tokenizer(model.digest, 320).verify()
    assert len(found) == len(texts) and found.tokens == told["tokens"]
    for i in (0, 7, len(texts) - 1):
        assert found[i].tolist() == chat.document(texts[i], model)[0]
    scores = [r["score"] for r in prose.read(out)]
    np.testing.assert_array_equal(found.column("score"), scores)


def test_a_pretraining_stage_takes_the_shards_as_they_are(corpus, result, tmp_path):
    out, told = result
    c = defaults.experiment()
    c.mesh = dict(data=1, fsdp=1, tensor=1)
    c.tokenizer.path = str(corpus["root"] / "t.model")
    c.model.update(common.tiny_model())
    c.stages.pretrain = defaults.stage(
        "language_model",
        data=dict(files=str(out / "shards"), length=32),
        optimizer=dict(warmup_steps=0),
        steps=2,
        batch_size=4,
    )
    run.run(c, tmp_path / "run")
    info = json.loads((tmp_path / "run" / "pretrain" / "stage.json").read_text())
    assert info["finished"] and info["format"] == "text"
    made = info["data"]
    assert (made["documents"], made["tokens"]) == (told["documents"], told["tokens"])
    # Whose page tells what was left out, and why.
    assert made["curations"] == [told["identity"]]
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert told["identity"][:12] in html and str(out / "shards") in html
    # Shards and text are the same batches.
    resolved, model = (
        experiment.resolve(c),
        SentencePiece.load(c.tokenizer.path),
    )
    stage, found = resolved.stages.pretrain, []
    for name in ("shards", "text"):
        stage.data.files = str(out / name)
        builder, root = kinds.of(stage).data, tmp_path / "run"
        dataset = stage_data.build(stage, model, root, resolved, builder).dataset
        found.append([dataset.batch_at(step) for step in range(20)])
    for one, two in zip(*found, strict=True):
        assert all((one[k] == two[k]).all() for k in one)


def test_the_page_shows_everything_as_data(result):
    out, _ = result
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "http://" not in html and "src=" not in html.replace("src=x", "")
    for said in ("near duplicate", "stays:", "overlaps evaluation", "not UTF-8", "web"):
        assert said in html
    quarantine = [json.loads(x) for x in (out / "quarantine.jsonl").open()]
    assert [q["reason"] for q in quarantine] == [
        "not JSON",
        "not UTF-8",
        "no JSON object",
    ]
    assert all(re.search(r"b\.jsonl:\d+$", q["where"]) for q in quarantine)


def test_no_example_tells_of_anybody(tmp_path):
    """Neither what is removed nor what stays beside it, whole or cut off."""
    padding = "the words of which there are many and then some more of them " * 20
    long = f"{padding[: 600 - 12]} {SECRET}"  # its address is cut in two
    rows = [{"text": f"one of us said: {SECRET}"}] * 2 + [{"text": long}] * 2
    rows.append({"text": f"Der Mann und die Frau mit dem Kind sagen: {SECRET}"})
    lines = [json.dumps(row) for row in rows] + [f'{{"text": "{SECRET}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    made = dict(files=f"{tmp_path}/a.jsonl", out=f"{tmp_path}/out", rules=("language",))
    made |= dict(minhash={"on": False}, personal=dict(emails=False, phones=False))
    told = curation.curate(made, workers=1)
    html = page.write(tmp_path / "out").read_text(encoding="utf-8")
    assert html.count("said: write to email@example.com") == 2  # and what stays
    assert "sagen: write to email@example.com" in html
    for part in ("ann.l", "firm", "555-0187", "8.8.8"):
        assert part not in html
    by = {step["name"]: sum(step["removed"].values()) for step in told["steps"]}
    assert (by["read"], by["language"], by["exact duplicate"]) == (1, 1, 2)
    # The text is as the settings have it.
    assert "ann.lee@firm.org" in prose.read(tmp_path / "out")[0]["text"]


def test_one_worker_writes_the_same_bytes(corpus, result, tmp_path):
    out, _ = result
    curation.curate(config(corpus, tmp_path / "one"), workers=1)
    page.write(tmp_path / "one")
    assert prose.files(tmp_path / "one") == prose.files(out)
    assert not (tmp_path / "one.work").exists()


def test_remote_files_are_curated_like_local_ones(corpus, result, tmp_path):
    root = corpus["root"]
    files = f"file://{root / 'a.jsonl.gz'},file://{root / 'b.jsonl'}"
    test = f"file://{root / 'test.jsonl'}"
    made = config(corpus, tmp_path / "out", files=files)
    made["contamination"] = {"files": test}
    assert curation.curate(made, workers=2)["documents"] == result[1]["documents"]
    texts = [row["text"] for row in prose.read(tmp_path / "out")]
    assert texts == [row["text"] for row in prose.read(result[0])]
    assert prose.read(tmp_path / "out")[0]["where"].startswith("file:///")


def test_done_is_done_and_another_config_is_other_work(corpus, result, caplog):
    out, told = result
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with caplog.at_level("INFO"):
        assert curation.curate(config(corpus, out)) == told
    assert "finished already" in caplog.text
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def command(corpus, out):
    """The same work through the command line, as a process."""
    root = corpus["root"]
    spec = ",".join(
        [
            f"in={root / 'a.jsonl.gz'},{root / 'b.jsonl'}",
            f"out={out},good={root / 'good.jsonl'},bad={root / 'bad.jsonl'}",
            f"evaluation={root / 'test.jsonl'},tokenizer={root / 't.model'}",
        ]
    )
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "stagecraft", "curate", "--workers=2"),
            *(f"--config=experiments/curate.py:{spec}", "--config.task_bytes=20000"),
            "--config.quality.threshold=0.5",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(process):
    """Ids of a process's pool workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            line = (path.parent / "cmdline").read_text()
        except OSError:
            continue  # it ended while we looked
        if parent == process.pid and "spawn_main" in line:
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_and_started_again_the_bytes_are_the_same(corpus, result, tmp_path):
    out, _ = result
    other = tmp_path / "out"

    def done():
        return len(list(tmp_path.glob("out.work/*/logs/filter/completions/*")))

    # A worker is killed: one line, status 2, no waiting for ever.
    process = command(corpus, other)
    wait_for(lambda: done() >= 1)
    os.kill(workers(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2, error
    line = error.splitlines()[-1]
    assert (
        line.startswith("stagecraft: ")
        and "a worker was killed in 'filter'" in line
        and "Traceback" not in error
    )
    assert not other.exists()
    # All of it is killed: the workers end too.
    before = done()
    process = command(corpus, other)
    wait_for(lambda: done() > before)
    pool = workers(process)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{p}/cmdline").exists() for p in pool), 10)
    assert not other.exists() and done() > before
    # The same command again goes on.
    process = command(corpus, other)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert prose.files(other) == prose.files(out)
    assert not (tmp_path / "out.work").exists()


def test_a_share_is_kept_by_score(corpus, tmp_path):
    quality = config(corpus, "")["quality"] | {"threshold": 0.0, "share": 0.3}
    changes = dict(rules=(), minhash={"on": False}, exact=False, tokenizer="")
    made = config(corpus, tmp_path / "out", quality=quality, **changes)
    told = curation.curate(made, workers=1)
    [step] = [s for s in told["steps"] if s["name"] == "quality"]
    assert step["kept"] == int(np.ceil(0.3 * step["documents"]))
    kinds = [r["fault"] for r in prose.read(tmp_path / "out")]
    assert kinds.count("boilerplate") == kinds.count("noise") == 0
    assert not (tmp_path / "out" / "shards").exists()


def test_a_step_that_removes_all_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(
        "Nur deutsche Worte sind in der Datei und das ist so."
    )
    with pytest.raises(
        UserError, match="language removed 1 of 1 .most: language is de"
    ):
        curation.curate({"files": f"{tmp_path}/a.txt", "out": f"{tmp_path}/out"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(files=""), "files: is empty"),
        (dict(out=""), "out: is empty"),
        (dict(minhsh={}), "minhsh: unknown key; did you mean 'minhash'"),
        (dict(rules=("langauge",)), "did you mean 'language'"),
        (dict(rules=("c4", "c4")), "names one twice"),
        (dict(language={"keep": "xx"}), "language.keep='xx'"),
        (dict(minhash={"buckets": 0}), "minhash.buckets=0: expected more than 0"),
        (dict(quality={"good": "a.txt"}), "name both, or neither"),
        (dict(quality={"share": 0.5}), "no score to choose by"),
        (dict(quality={"share": 0.0}), "expected above 0, up to 1"),
        (dict(quality={"model": "no.npy"}), "no.npy: not a classifier"),
        (dict(tokenizer="no.model"), "no.model: no such tokenizer"),
        (dict(contamination={"files": "no.jsonl"}), "no.jsonl: no such file"),
    ],
)
def test_configs_that_are_wrong(tmp_path, changes, says):
    (tmp_path / "a.txt").write_text("a text")
    made = {"files": f"{tmp_path}/a.txt", "out": f"{tmp_path}/out"} | changes
    with pytest.raises(UserError, match=re.escape(says)):
        curation.curate(made)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(minhsh={}), "curation.minhsh: unknown key; did you mean 'minhash'"),
        (dict(rules=("c4", "c4")), "curation.rules=('c4', 'c4'): names one twice"),
        (dict(files=""), "curation.files: is empty"),
        (dict(out="x"), "curation.out='x': leave it out; a run curates into WORKDIR"),
    ],
)
def test_what_a_run_is_to_curate_is_checked_first(changes, says):
    c = defaults.experiment()
    c.stages.pretrain = defaults.stage("language_model", data=dict(files="a.txt"))
    c.curation = {"files": "a.txt"} | changes
    with pytest.raises(UserError, match=re.escape(says)):
        experiment.resolve(c)


def test_a_place_that_cannot_be_written(tmp_path, corpus):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write here"):
        curation.curate(config(corpus, tmp_path / "file" / "out"))


def test_folders_that_are_somebody_elses(tmp_path, corpus):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no result of stagecraft curate"):
        curation.curate(config(corpus, tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_two_at_once_in_one_folder(tmp_path):
    with (
        curation.alone(tmp_path / "work"),
        pytest.raises(UserError, match="another stagecraft curate is at work here"),
        curation.alone(tmp_path / "work"),
    ):
        pass
    with curation.alone(tmp_path / "work"):
        pass


def test_datatroves_own_executor_runs_the_same_list(corpus, result, tmp_path):
    """What runs here runs where datatrove runs: its steps hold nothing of ours."""
    from datatrove.executor import LocalPipelineExecutor

    from stagecraft.curate import inputs, pipeline

    out, told = result
    c = curation.resolve(config(corpus, tmp_path / "out"))
    found = inputs.survey(c.files, c.text_key, c.document, c.task_bytes)
    work = tmp_path / "work"
    for rank, parts in enumerate(found.tasks):
        storage.write_json(work / "tasks" / f"{rank:05d}.json", parts)
    phases = pipeline.phases(c, work, len(found.tasks), found, told["identity"])
    engine.chain(phases, work, LocalPipelineExecutor, workers=1).run()
    page.write(tmp_path / "out")
    assert prose.files(tmp_path / "out") == prose.files(out)


def test_other_contents_are_other_work(corpus, tmp_path):
    """Changed input or samples under the same names: nothing old is taken for new."""
    rows = [{"text": f"the first text and number {i} of them"} for i in range(5)]
    path, test = tmp_path / "a.jsonl", tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = dict(files=str(path), out=str(tmp_path / "out"), rules=())
    made |= dict(
        minhash={"on": False}, contamination={"files": str(test), "n_grams": 4}
    )
    for question, left in (("nothing of what is here", 5), ("and number 3 of them", 4)):
        test.write_text(json.dumps({"question": question}))
        assert curation.curate(made, workers=1)["documents"] == left
    path.write_text(json.dumps(rows[0]))
    assert curation.curate(made, workers=1)["documents"] == 1


@pytest.mark.parametrize(
    ("executor", "says"),
    [
        ("spark", "expected local, ray:ADDRESS"),
        ("ray", "needs an address, as in ray:auto"),
        ("slurm:time=1:00:00", "needs a partition"),
        ("slurm:partition=cpu,tiem=1", "'tiem=1' is none of"),
    ],
)
def test_executors_that_are_wrong(executor, says):
    with pytest.raises(UserError, match=re.escape(says)):
        engine.check(executor)


def test_the_phases_are_chained_for_a_cluster(tmp_path):
    """One list of phases, each waiting for the one before it, as Slurm gets them."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    phases = [engine.Phase(name, [], tasks) for name, tasks in (("a", 3), ("b", 1))]
    settings = {"partition": "cpu", "time": "01:00:00", "workers": 2}
    last = engine.chain(phases, tmp_path, SlurmPipelineExecutor, **settings)
    assert (last.partition, last.tasks) == ("cpu", 1)
    assert last.logging_dir.path == str(tmp_path / "logs" / "b")
    assert last.depends.depends is None and last.depends.tasks == 3
