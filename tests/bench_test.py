"""What `stagecraft bench` prints, of a model so small that little else takes time."""

import functools
import json
import sys

import pytest

from stagecraft.bench import peer, table, timing
from stagecraft.errors import UserError

SMALL = dict(vocab_size=512, width=64, layers=2, heads=2, kv_heads=1, ff_width=128)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(timing, "MODEL", timing.MODEL | SMALL)
    monkeypatch.setattr(timing, "SAMPLES", (2, 8))
    rate = functools.partial(timing.matmul_rate, size=128)
    monkeypatch.setattr(timing, "matmul_rate", rate)


def test_a_line_of_each_figure(small, capsys):
    lines = timing.bench(["dpo", "sample"], steps=1)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == lines and [line["what"] for line in lines] == ["dpo", "sample_8"]
    for line in lines:
        rate = line["gflops_per_s"] / line["matmul_gflops_per_s"]
        assert line["share_of_matmul"] == pytest.approx(rate, abs=1e-2)
        assert 0 < line["fastest_s"] <= line["step_s"] < line["first_s"]

    step = lines[0]
    programs = step["programs"]
    assert set(programs) == {"reference", "update", "evaluate"}
    # The compiler counts what the ledger counts, and the elementwise work beside it.
    counted = programs["reference"]["gflops"] + programs["update"]["gflops"]
    counted *= step["devices"]  # of which each takes its rows
    assert 0.7 < counted / (step["gflops_per_s"] * step["step_s"]) < 1.4
    assert 2.5 < programs["update"]["gflops"] / programs["reference"]["gflops"] < 3.5
    for costs in programs.values():
        assert costs["peak_bytes"] > costs["temporary_bytes"] > 0 < costs["gbytes"]


SIDE = """
import json, sys
print(json.dumps({"torch": "9.9"}), flush=True)
for number, line in enumerate(sys.stdin):
    took = dict(seconds=10.0 + number, cpu_seconds=20.0, tokens=1000)
    print(json.dumps(took), flush=True)
"""


@pytest.fixture
def other_side(tmp_path, monkeypatch):
    """An environment, and a program in place of the peers' that takes long."""
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    script = tmp_path / "side.py"
    script.write_text(SIDE)
    monkeypatch.setattr(peer, "__file__", str(script))
    return script


def test_two_sides_take_turns_and_a_page_gets_the_table(small, other_side, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    peers = str(tmp_path / "env")
    (line,) = timing.bench(["sample"], steps=2, peers=peers, page=str(page))
    peer = line["peer"]
    # The first of theirs compiles and does not count.
    assert (peer["fastest_s"], peer["slowest_s"], peer["with"]) == (11, 12, "torch 9.9")
    low, high = peer["ratio_range"]
    tokens = 8 * 128
    assert low <= peer["ratio"] <= high
    assert 11 / 1000 * tokens / line["slowest_s"] <= high * 1.01
    assert low * 0.99 <= 12 / 1000 * tokens / line["fastest_s"]
    assert peer["cpu_ratio"] == pytest.approx(20 / 1000 * tokens / line["cpu_s"], 0.3)

    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old" not in text and "| sample_8 [8, 32, 128] |" in text
    assert f"| {peer['ratio']:.3g} ({low:.3g} to {high:.3g}) |" in text


def test_another_side_that_ends_is_said(small, other_side, tmp_path):
    other_side.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="sample_8 ended with 3; to see why"):
        timing.bench(["sample"], steps=1, peers=str(tmp_path / "env"))


def test_impossible_places_are_refused(tmp_path):
    with pytest.raises(UserError, match="--peers=.*expected the folder"):
        timing.bench(["dpo"], peers=str(tmp_path))
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(UserError, match="--page=.*expected a file with the lines"):
        timing.bench(["dpo"], page=str(tmp_path / "page.md"))


@pytest.mark.parametrize("what, steps", [(["dpoo"], 1), (["dpo"], 0)])
def test_wrong_requests_are_refused(what, steps):
    with pytest.raises(UserError):
        timing.bench(what, steps=steps)
