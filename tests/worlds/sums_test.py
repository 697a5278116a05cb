"""Sums: a knob that moves no other file, and demonstrations that add up as they say."""

import json
import re

import numpy as np

from stagecraft import worlds
from stagecraft.signals.verify import number
from stagecraft.worlds.countries import sums


def test_the_knob_moves_no_other_file(tmp_path):
    worlds.write("countries", tmp_path / "off", 3, "tiny")
    worlds.write("countries", tmp_path / "on", 3, "tiny", digits=2)
    off, on = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("off", "on")
    )
    assert off.items() <= on.items()
    added = {"sums.jsonl", "heldout_sums.jsonl", "sum_demonstrations.jsonl"}
    assert on.keys() - off.keys() == added


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def operands(prompt):
    a, b = re.findall(r"\d+", prompt)
    return min(int(a), int(b)), max(int(a), int(b))


def test_no_heldout_sum_is_asked_or_demonstrated(tmp_path):
    worlds.write("countries", tmp_path / "w", 1, "full", digits=2)
    train, heldout, shown = (
        read(tmp_path / "w" / f"{name}.jsonl")
        for name in ("sums", "heldout_sums", "sum_demonstrations")
    )
    assert len(train) == len(shown) == 3000 and len(heldout) == 400
    seen = {operands(row["prompt"]) for row in train + shown}
    unseen = {operands(row["prompt"]) for row in heldout}
    assert len(unseen) == 400 and not seen & unseen
    for row in train + heldout:
        a, b = operands(row["prompt"])
        assert a >= 10 and b <= 99 and row["answer"] == a + b
    pairs = [operands(row["prompt"]) for row in heldout]
    assert 0.6 < np.mean([sums.carries(a, b) for a, b in pairs]) < 0.9


def test_demonstrations_are_right_but_for_one_in_ten(tmp_path):
    worlds.write("countries", tmp_path / "w", 1, "full", digits=2)
    rows = read(tmp_path / "w" / "sum_demonstrations.jsonl")
    golds = [sum(operands(row["prompt"])) for row in rows]
    verify = number.number()
    right = np.array(verify([row["completion"] for row in rows], golds))
    worked = np.array(["=" in row["completion"] for row in rows])
    assert abs(worked.mean() - sums.WORKED) < 0.03
    for kind in (worked, ~worked):
        assert abs(1 - right[kind].mean() - sums.WRONG) < 0.03


def test_working_out_adds_up():
    rng = np.random.default_rng(0)
    for a, b in rng.integers(100, 1000, (300, 2)).tolist():
        text, total = sums.worked(a, b)
        assert total == a + b
        for step in re.findall(r"[\d +]+ = \d+", text):
            left, right = step.split(" = ")
            assert sum(map(int, left.split(" + "))) == int(right)
        with_carry = re.search(r"\d \+ \d \+ 1 =", text)
        assert (with_carry is None) or sums.carries(a, b)
        wrong, slipped = sums.worked(a, b, slip=1, digit=3)
        assert slipped != a + b and wrong.endswith(f"#### {slipped}")
