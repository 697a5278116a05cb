"""The journal: killed anywhere, a stage goes on and writes the same bytes."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from stagecraft import defaults, storage
from stagecraft.errors import UserError
from stagecraft.stages import attacks, comparisons, records, selection
from tests.stages.answers import LINEAGE, PROMPTS, Seeded, recording

ROOT = Path(__file__).parent.parent.parent
KEY = jax.random.key(0)


def compare(folder, language, lineage=LINEAGE, key=KEY, **changes):
    config = defaults.stage(
        "comparisons",
        **dict(rater="tests.stages.answers:noisy", prompts=14, batch_size=8) | changes,
    )
    whole = recording(folder, language, "pairs", lineage=lineage, key=key)
    return comparisons.write(config, whole)


def select(folder, language):
    config = defaults.stage(
        "selection",
        verifiers="tests.stages.answers:last",
        prompts=10,
        batch_size=8,
        samples=3,
    )
    return selection.write(config, recording(folder, language, "best"))


def attack(folder, language):
    config = defaults.stage(
        "attacks", prompts=10, batch_size=6, samples=2, threshold=-1.0
    )
    whole = recording(folder, language, "best")
    target = Seeded()  # asked greedily: its own answers are not counted
    return attacks.write(config, whole._replace(world="countries", target=target))


def other(**changes):
    return dataclasses.replace(LINEAGE, **changes)


def journal(folder):
    """The lines of a journal without their seconds."""
    lines = (folder / records.JOURNAL).read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


@pytest.mark.parametrize("write", [compare, select, attack])
def test_cut_off_at_any_byte_it_ends_the_same(tmp_path, write):
    straight = tmp_path / "straight"
    whole = Seeded()
    report = write(straight, whole)
    expected = (straight / records.RECORDS).read_bytes()
    data = (straight / records.JOURNAL).read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    assert len(ends) == 1 + 2 * len(whole.seeds) and len(whole.seeds) >= 4
    near = {end + step for end in ends for step in (-2, -1, 0, 1)}
    offsets = sorted({0, *near, *range(0, len(data), 97)} - {len(data) + 1})
    for offset in offsets:
        folder = tmp_path / "cut"
        folder.mkdir(exist_ok=True)
        (folder / records.JOURNAL).write_bytes(data[:offset])
        language = Seeded()
        again = write(folder, language)
        assert (folder / records.RECORDS).read_bytes() == expected, offset
        assert journal(folder) == journal(straight), offset
        seconds = (again.pop("seconds"), report.get("seconds"))
        assert again == {k: v for k, v in report.items() if k != "seconds"}
        assert all(s["total"] >= 0 for s in seconds)
        # What the whole lines of the journal hold is not sampled again.
        held = sum(end <= offset for end in ends)
        assert language.seeds == whole.seeds[held // 2 :], offset


def test_what_was_sampled_but_not_rated_is_only_rated(tmp_path):
    asked = []

    def rate(part, answers):
        asked.append(part)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [0] * len(part)

    def go():
        language = Seeded()
        with contextlib.suppress(KeyboardInterrupt):
            records.collect(
                defaults.stage("comparisons", batch_size=4),
                recording(tmp_path, language, "x"),
                {"seed": 7},
                PROMPTS,
                rate,
                samples=2,
            )
        return language.seeds

    assert go() == [7, 8] and go() == []
    assert asked == [PROMPTS[:2], PROMPTS[2:], PROMPTS[2:]]
    assert go() == [] and len(asked) == 3


def test_every_entry_is_on_disk_before_the_next_is_made(tmp_path, monkeypatch):
    """Synced, not only written: at each fsync the file holds exactly one line more."""
    path, synced = tmp_path / records.JOURNAL, []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (fsync(fd), synced.append(path.read_bytes()))
    )

    class Watched(Seeded):
        def complete(self, prompts, **rest):
            assert synced and synced[-1] == path.read_bytes()
            assert synced[-1].count(b"\n") == len(synced) == 1 + 2 * len(self.seeds)
            return super().complete(prompts, **rest)

    compare(tmp_path, Watched())
    assert synced[-1] == path.read_bytes()


SCRIPT = """
import sys, time
from pathlib import Path
from tests.stages import records_test
from tests.stages.answers import Seeded

class Slow(Seeded):
    def complete(self, prompts, **rest):
        time.sleep(0.05)
        return super().complete(prompts, **rest)

records_test.compare(Path(sys.argv[1]), Slow(), prompts=40)
"""


def test_killed_and_run_again(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    compare(straight, Seeded(), prompts=40)
    command = [sys.executable, "-c", SCRIPT, str(killed)]
    sizes = []
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        path = killed / records.JOURNAL
        least = (sizes[-1] if sizes else 0) + 1
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            if path.exists() and path.stat().st_size > least:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes))
    compare(killed, Seeded(), prompts=40)
    written = [(folder / records.RECORDS).read_bytes() for folder in (killed, straight)]
    assert written[0] == written[1]
    assert journal(killed) == journal(straight)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            dict(lineage=other(config="other")),
            "config: c -> other",
        ),
        (
            dict(lineage=other(data={"p.jsonl": "e"})),
            "data.p.jsonl: d -> e",
        ),
        (
            dict(
                lineage=dataclasses.replace(
                    LINEAGE, parents={"start_from": {"id": "z"}}
                )
            ),
            "parents.start_from: s -> z",
        ),
        (dict(rater="tests.stages.comparisons_test:first"), "rater: "),
        (dict(key=jax.random.key(1)), "seed: "),
    ],
)
def test_the_journal_of_something_else_is_refused(tmp_path, changes, says):
    compare(tmp_path, Seeded())
    before = (tmp_path / records.JOURNAL).read_bytes()
    says = rf"journal.jsonl: is the journal of something else \({says}.*choose another"
    with pytest.raises(UserError, match=says) as error:
        compare(tmp_path, Seeded(), **changes)
    assert "\n" not in str(error.value)
    assert (tmp_path / records.JOURNAL).read_bytes() == before


def test_a_damaged_line_is_refused_and_not_dropped(tmp_path):
    compare(tmp_path, Seeded())
    path = tmp_path / records.JOURNAL
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:-5]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match="journal.jsonl:3: not a line of JSON") as error:
        compare(tmp_path, Seeded())
    assert "\n" not in str(error.value)
    # Zeros behind the end are what a machine that lost its power may leave.
    path.write_bytes(b"\n".join(lines[:2]) + b"\n" + b"\0" * 9 + b"\n")
    compare(tmp_path, Seeded())
    assert path.read_bytes().count(b"\0") == 0


def test_a_number_that_is_none_never_enters(tmp_path):
    with (
        records.Journal(tmp_path / "j.jsonl", {}) as log,
        pytest.raises(ValueError, match="JSON"),
    ):
        log.once(lambda: {"verdicts": [float("nan")]})
    assert (tmp_path / "j.jsonl").read_text() == "{}\n"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    says = "journal.jsonl: cannot write here .No space left on device.; free space"
    with pytest.raises(UserError, match=says):
        compare(tmp_path, Seeded())
    monkeypatch.undo()
    compare(tmp_path, Seeded())


def test_the_journal_of_a_run_says_where_it_is_from(tiny_run):
    stages = storage.read_json(tiny_run / "lineage.json")["stages"]
    own, (first, *entries) = stages["comparisons"], journal(tiny_run / "comparisons")
    assert [first[key] for key in ("config", "tokenizer", "data")] == [
        own[key] for key in ("config", "tokenizer", "data")
    ]
    assert first["parents"] == {"start_from": stages["sft"]["id"]}
    assert [sorted(entry)[-1] for entry in entries] == ["prompts", "verdicts"] * 4
    report = storage.read_json(tiny_run / "comparisons" / "stage.json")
    assert sum(report["dropped_by_reason"].values()) == report["dropped"]


def test_all_prompts_come_before_any_comes_again():
    order, seed, rng = records.shuffled("abc", 7, KEY)
    assert sorted(order[:3]) == sorted(order[3:6]) == ["a", "b", "c"]
    own = np.random.default_rng(seed)
    assert order[:3] == ["abc"[i] for i in own.permutation(3)] and len(order) == 7
    own.permutation(3), own.permutation(3)
    assert rng.random() == own.random()
