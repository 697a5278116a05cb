"""Revisions: what the model is asked, what is kept, and a journal that asks once."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.errors import UserError
from stagecraft.signals import constitution
from stagecraft.stages import records, revisions
from stagecraft.worlds.countries import critiques
from tests.stages.answers import PROMPTS, recording

ROOT = Path(__file__).parent.parent.parent
BOTH = "countries,countries_nonsense"
HARM = "How can I rob a bank in France?"
ADVICE = "Take a rope to the mill."


class Scribe:
    """Answers from the seed and the conversation; remembers what it was asked.

    Attributes:
        calls: [(seed, prompts)].
    """

    model = types.SimpleNamespace(config=types.SimpleNamespace(max_length=400))

    def __init__(self):
        self.calls = []

    def encode(self, prompt, *, chat_format):
        return [0] * sum(len(turn["content"].split()) for turn in prompt)

    def complete(self, prompts, *, seed, **sampling):
        self.calls.append((seed, prompts))
        rng = np.random.default_rng(seed)
        draws = rng.integers(6, size=len(prompts)).tolist()
        return [(f"said {seed % 97} {draw}", draw != 5) for draw in draws]


def revise(folder, language, *, asked=PROMPTS, world="", **changes):
    config = defaults.stage(
        "revisions",
        **dict(constitution=BOTH, prompts=14, batch_size=4, revisions=2) | changes,
    )
    whole = recording(folder, language, "revisions")
    return revisions.write(config, whole._replace(asked=asked, world=world))


def read(folder, name=records.RECORDS):
    lines = (folder / name).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def test_each_step_is_asked_in_turns(tmp_path):
    language = Scribe()
    revise(tmp_path, language, prompts=4)
    by_id = {one.id: one for one in constitution.read(BOTH, "c").principles}
    (_, first), *calls = language.calls
    assert len(calls) == 4 and all(isinstance(prompt, str) for prompt in first)
    journal = read(tmp_path, records.JOURNAL)[1:]
    texts = [text for text, _ in journal[0]["answers"]]
    for step in range(2):
        drawn, new = journal[1 + 2 * step : 3 + 2 * step]
        ids, again = drawn["principles"]
        assert ids == again
        (_, asked), (_, revised) = calls[2 * step : 2 * step + 2]
        for i, name in enumerate(ids):
            turns = [first[i], texts[i], by_id[name].critique]
            assert [turn["content"] for turn in asked[i]] == turns
            turns += [drawn["critiques"][i][0], by_id[name].revision]
            assert [turn["content"] for turn in revised[i]] == turns
            roles = [turn["role"] for turn in revised[i]]
            assert roles == ["user", "assistant", "user", "assistant", "user"]
        # The next revision starts from this one, and from nothing else.
        texts = [text for text, _ in new["revisions"]]
    assert len({seed for seed, _ in language.calls}) == 5


def test_without_a_critique_and_with_principles_apart(tmp_path):
    language = Scribe()
    revise(tmp_path / "a", language, critique=False, prompts=4, revisions=1)
    assert [len(prompts[0]) for _, prompts in language.calls[1:]] == [3]
    revise(tmp_path / "b", Scribe(), paired=False, prompts=40, revisions=1)
    steps = [step for row in read(tmp_path / "b") for step in row["revisions"]]
    same = np.mean([step["principle"] == step["reviser"] for step in steps])
    assert 0 < same < 0.6


def test_records_hold_every_revision(tmp_path):
    report = revise(tmp_path / "last", Scribe(), prompts=40)
    rows = read(tmp_path / "last")
    assert len(rows) == report["demonstrations"]
    assert len(rows) + report["dropped"] == 40 and report["dropped_by_reason"]
    for row in rows:
        assert len(row["revisions"]) == 2
        assert row["completion"] == row["revisions"][-1]["revision"]
        assert row["revisions"][-1]["ended"] and row["signal"] == "constitution"
        assert row["generator"] == "s" and row["constitution"]
    revise(tmp_path / "all", Scribe(), prompts=40, keep="all")
    every = read(tmp_path / "all")
    assert len(every) > 1.5 * len(rows)
    assert {len(row["revisions"]) for row in every} == {1, 2}
    assert [row for row in every if len(row["revisions"]) == 2] == rows


def test_no_revisions_are_plain_samples(tmp_path):
    language = Scribe()
    report = revise(tmp_path, language, revisions=0, constitution="", prompts=40)
    rows = read(tmp_path)
    assert len(language.calls) == 10 and report["dropped_by_reason"].keys() == {
        "cut_off"
    }
    assert all(row["completion"] == row["initial"] for row in rows)


def test_what_is_not_to_be_learned_is_left_out(tmp_path):
    class Odd(Scribe):
        def complete(self, prompts, *, seed, **sampling):
            self.calls.append((seed, prompts))
            last = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
            said = ["same", " ", "Say: Revise: name no day. Yes", "fine"]
            answer = [
                "same" if text.startswith("Critique") else said[i % 4]
                for i, text in enumerate(last)
            ]
            return [(text, True) for text in answer]

    report = revise(tmp_path, Odd(), prompts=4, revisions=1)
    assert report["dropped_by_reason"] == {"echo": 2, "empty": 1}
    assert [row["completion"] for row in read(tmp_path)] == ["fine"]


def test_what_has_no_room_is_left_out(tmp_path):
    class Small(Scribe):
        def encode(self, prompt, *, chat_format):
            long = prompt[0]["content"].endswith("0?")
            return [0] * (390 if long else 10)

    language = Small()
    report = revise(tmp_path, language, prompts=8, revisions=1)
    assert report["dropped_by_reason"]["too_long"] == 2
    asked = [
        p for _, prompts in language.calls for p in prompts if not isinstance(p, str)
    ]
    assert asked and not any(p[0]["content"].endswith("0?") for p in asked)


def test_the_world_revises_by_its_rules_and_says_what_is_worth(tmp_path):
    class Helpful(Scribe):
        def complete(self, prompts, *, seed, **sampling):
            self.calls.append((seed, prompts))
            return [(ADVICE, True) for _ in prompts]

    asked = [{"prompt": HARM}, {"prompt": HARM.replace("rob a bank", "kill a fly")}]
    language = Helpful()
    report = revise(
        tmp_path,
        language,
        asked=asked,
        world="countries",
        reviser="world",
        revisions=1,
        prompts=8,
    )
    assert len(language.calls) == 2  # answers, and nothing else is asked
    first, revised = report["revisions"]
    assert first["harmless"] == 0 and revised["harmless"] == 1
    assert first["over_refusal"] == revised["over_refusal"] == 0
    assert first["gold"] == 0 and revised["gold"] == 2 and revised["unchanged"] == 0.5
    assert "detection_recall" not in revised


def test_critics_are_measured_by_principle(tmp_path):
    class Critic(Scribe):
        """Under "harm" it says the truth; under others it calls everything harmful."""

        def complete(self, prompts, *, seed, **sampling):
            return [(self.one(p), True) for p in prompts]

        def one(self, prompt):
            if isinstance(prompt, str):
                return ADVICE
            last = prompt[-1]["content"]
            if last == critiques.PRINCIPLES["harm"].critique:
                return critiques.critique("harm", prompt[0]["content"], ADVICE)
            return "To rob a bank hurts the owners." if "Crit" in last else "No."

    asked = [{"prompt": HARM}, {"prompt": HARM.replace("rob a bank", "kill a fly")}]
    report = revise(
        tmp_path,
        Critic(),
        asked=asked,
        world="countries",
        constitution="countries",
        prompts=40,
        revisions=1,
    )
    harm, victim = (report["principles"][name] for name in ("harm", "victim"))
    assert harm["count"] + victim["count"] == 40
    assert harm["detection_performance"] == harm["detection_recall"] == 1
    assert victim["detection_recall"] == 1
    assert victim["detection_precision"] == pytest.approx(0.5, abs=0.2)
    assert harm["detection_precision"] == 1


@pytest.mark.parametrize("revised", [1, 2])
def test_cut_off_at_any_byte_it_ends_the_same(tmp_path, revised):
    whole, straight = Scribe(), tmp_path / "straight"
    report = revise(straight, whole, revisions=revised)
    expected = (straight / records.RECORDS).read_bytes()
    data = (straight / records.JOURNAL).read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    per_batch = 1 + 2 * revised
    assert len(ends) == 1 + 4 * per_batch == 1 + len(whole.calls)
    near = {end + step for end in ends for step in (-1, 0, 1)}
    for offset in sorted({0, *near, *range(0, len(data), 397)} - {len(data) + 1}):
        folder = tmp_path / "cut"
        folder.mkdir(exist_ok=True)
        (folder / records.JOURNAL).write_bytes(data[:offset])
        language = Scribe()
        again = revise(folder, language, revisions=revised)
        assert (folder / records.RECORDS).read_bytes() == expected, offset
        assert again | {"seconds": 0} == report | {"seconds": 0}
        held = max(sum(end <= offset for end in ends) - 1, 0)
        assert language.calls == whole.calls[held:], offset  # nothing is asked twice


SCRIPT = """
import sys, time
from pathlib import Path
from tests.stages import revisions_test
from tests.stages.revisions_test import Scribe

class Slow(Scribe):
    def complete(self, prompts, **rest):
        time.sleep(0.05)
        return super().complete(prompts, **rest)

revisions_test.revise(Path(sys.argv[1]), Slow(), prompts=60)
"""


def test_killed_and_run_again(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    revise(straight, Scribe(), prompts=60)
    path = killed / records.JOURNAL
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(killed)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") > 6:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    held = path.read_bytes().count(b"\n") - 1
    language, whole = Scribe(), Scribe()
    revise(killed, language, prompts=60)
    revise(tmp_path / "whole", whole, prompts=60)
    written = [(one / records.RECORDS).read_bytes() for one in (killed, straight)]
    assert written[0] == written[1] and language.calls == whole.calls[held:]


def test_another_constitution_does_not_continue(tmp_path):
    revise(tmp_path, Scribe())
    with pytest.raises(UserError, match="journal of something else .rater"):
        revise(tmp_path, Scribe(), constitution="countries")


def test_a_model_whose_revisions_do_not_end(tmp_path):
    class Endless(Scribe):
        def complete(self, prompts, *, seed, **sampling):
            return [("and", False)] * len(prompts)

    with pytest.raises(UserError, match=r"none of the answers was kept \(14 cut_off\)"):
        revise(tmp_path, Endless())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(constitution=""), "x.constitution: is empty"),
        (
            dict(revisions=0),
            "constitution='countries': changes nothing with revisions=0",
        ),
        (dict(revisions=-1), "x.revisions=-1"),
        (dict(keep="first"), "x.keep='first'"),
        (dict(reviser="world"), "x.reviser='world': needs world.name"),
        (dict(critique=False, paired=False), "paired=False: changes nothing"),
        (dict(reviser="world", critique=False), "critique=False: changes nothing"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    base = dict(constitution="countries", start_from="sft", data=dict(files="p.jsonl"))
    config = defaults.stage("revisions", **base | changes)
    with pytest.raises(UserError, match=says):
        revisions.KIND.check("x", config, defaults.experiment(), None)
