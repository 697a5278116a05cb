"""Best-of-n and rejection sampling: which answers are kept, and what is reported."""

import json

import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.errors import UserError
from stagecraft.stages import records, selection
from tests.stages.answers import recording

HERE = "tests.stages.selection_test"


class Language:
    """Answers n = 0, 1, 2 ... to one prompt after the other; some do not end."""

    def __init__(self):
        self.asked = []

    def complete(self, prompts, *, seed, **sampling):
        start = len(self.asked)
        self.asked += prompts
        return [
            (f"{p} {start + i}", (start + i) % 5 != 4) for i, p in enumerate(prompts)
        ]


def last(prompts, completions):
    """Pays the last number modulo 7, and cannot judge some."""
    numbers = [int(c.split()[-1]) for c in completions]
    return [None if n % 6 == 5 else float(n % 7) for n in numbers]


def write(folder, language=None, verifiers=f"{HERE}:last", **changes):
    config = defaults.stage(
        "selection",
        verifiers=verifiers,
        prompts=6,
        batch_size=8,
        samples=4,
        **changes,
    )
    asked = [{"prompt": f"p{i}"} for i in range(4)]
    language = language or Language()
    report = selection.write(config, recording(folder, language, "best", asked=asked))
    lines = (folder / records.RECORDS).read_text().splitlines()
    return language, report, [json.loads(line) for line in lines]


def answers(language):
    """(prompt number, answer, reward or None if it may not be kept), in order."""
    found = []
    for n, prompt in enumerate(language.asked):
        fit = n % 5 != 4 and n % 6 != 5
        found.append((n // 4, f"{prompt} {n}", float(n % 7) if fit else None))
    return found


def test_the_best_finished_answer_of_each_prompt(tmp_path):
    language, report, kept = write(tmp_path)
    every, expected = answers(language), []
    for group in range(6):
        own = [a for a in every if a[0] == group and a[2] is not None]
        expected.append(max(own, key=lambda a: a[2]))
    assert [r["completion"] for r in kept] == [a[1] for a in expected]
    assert [r["reward"] for r in kept] == [a[2] for a in expected]
    assert all(r["completion"].startswith(r["prompt"] + " ") for r in kept)
    scored = [n % 7 for n in range(24) if n % 6 != 5]  # those that were cut off, too
    assert report["demonstrations"] == 6 and report["dropped"] == 18
    cut = sum(n % 5 == 4 for n in range(24))
    unscored = sum(n % 5 != 4 and n % 6 == 5 for n in range(24))
    reasons = {"cut_off": cut, "unscored": unscored, "outscored": 18 - cut - unscored}
    assert report["dropped_by_reason"] == reasons
    assert report["reward_mean"] == pytest.approx(np.mean(scored))
    assert report["kept_reward_mean"] == pytest.approx(
        np.mean([a[2] for a in expected])
    )
    assert report["tokens"] == {"sampled": 24 * 32}


def test_all_prompts_come_before_any_comes_again(tmp_path):
    language, _, _ = write(tmp_path)
    assert language.asked == [p for p in language.asked[::4] for _ in range(4)]
    assert set(language.asked[:16]) == {"p0", "p1", "p2", "p3"}


def test_all_answers_above_a_threshold(tmp_path):
    language, report, kept = write(tmp_path, keep="above", threshold=3.0)
    expected = [a for a in answers(language) if a[2] is not None and a[2] > 3]
    assert [r["completion"] for r in kept] == [a[1] for a in expected]
    assert report["demonstrations"] == len(expected) == 24 - report["dropped"]


def parity(prompts, completions):
    return [float(int(c.split()[-1]) % 2) for c in completions]


def test_rewards_are_weighed(tmp_path):
    both = f"{HERE}:last, {HERE}:parity"
    language, _, kept = write(tmp_path, verifiers=both, reward_weights=(0.5, -2.0))
    for group, record in enumerate(kept):
        own = [
            0.5 * a[2] - 2.0 * (n % 2)
            for n, a in enumerate(answers(language))
            if a[0] == group and a[2] is not None
        ]
        assert record["reward"] == pytest.approx(max(own))


def test_nothing_kept_is_one_line(tmp_path):
    says = "best: none of the 24 answers was kept; .* threshold=99.0"
    with pytest.raises(UserError, match=says):
        write(tmp_path, keep="above", threshold=99.0)
    assert not (tmp_path / records.RECORDS).exists()
