"""What `stagecraft bench` prints, of a model so small that little else takes time."""

import functools
import json

import pytest

from stagecraft import bench
from stagecraft.errors import UserError

SMALL = dict(vocab_size=512, width=64, layers=2, heads=2, kv_heads=1, ff_width=128)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "MODEL", bench.MODEL | SMALL)
    monkeypatch.setattr(bench, "SAMPLES", (2, 8))
    rate = functools.partial(bench.matmul_rate, size=128)
    monkeypatch.setattr(bench, "matmul_rate", rate)


def test_a_line_of_each_figure(small, capsys):
    lines = bench.bench(["dpo", "sample"], steps=1)
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


@pytest.mark.parametrize("what, steps", [(["dpoo"], 1), (["dpo"], 0)])
def test_wrong_requests_are_refused(what, steps):
    with pytest.raises(UserError):
        bench.bench(what, steps=steps)
