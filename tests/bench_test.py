"""What `stagecraft bench` prints, of a model so small that little else takes time."""

import functools
import json
import sys

import jax
import pytest

from stagecraft import chips, sharding
from stagecraft.anatomy import cost
from stagecraft.bench import peer, presets, table, timing
from stagecraft.errors import UserError
from tests import tiny

SMALL = dict(vocab_size=512, width=64, layers=2, heads=2, kv_heads=1, ff_width=128)


MARK = table.MARKS["peers"]


@pytest.fixture
def small(monkeypatch):
    laptop = presets.PRESETS["laptop"]
    small = laptop._replace(model=laptop.model | SMALL, samples=(2, 8))
    monkeypatch.setitem(presets.PRESETS, "laptop", small)
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
    page.write_text(f"before\n{MARK}\nold\n{table.END}\nafter\n")
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


@pytest.fixture
def device(monkeypatch):
    """A chip in the place of this CPU, and a large preset that is small."""
    slow = dict(peaks={"float32": 1e9}, bandwidth=1e8)  # so that shares have digits
    chip = chips.CHIPS["v5e"]._replace(**slow)
    monkeypatch.setattr(chips, "of_device", lambda device: chip)
    short = presets.of_length(presets.PRESETS["8b"], 64)
    model = short.model | SMALL | dict(head_dim=32, remat="none")
    short = short._replace(model=model, dtype="float32", samples=(8,))
    monkeypatch.setitem(presets.PRESETS, "8b", short)
    return chip


def test_a_preset_on_a_chip_of_the_table(small, device, tmp_path):
    page, mark = tmp_path / "page.md", table.MARKS["accelerator"]
    page.write_text(f"{MARK}\nours\n{table.END}\n{mark}\nold\n{table.END}\n")
    what = ["sft", "grpo", "sample"]
    lines = timing.bench(what, preset="8b", steps=1, page=str(page))
    sft, grpo, sample = lines
    assert [line["shape"] for line in lines] == [[8, 64], [8, 8], [8, 8, 2]]
    for line in lines:
        rate = line["gflops_per_s"] * 1e9 / line["devices"]
        assert line["mfu"] == pytest.approx(rate / device.peaks["float32"], 0.01)
    model = presets.PRESETS["8b"].model
    moved = cost.decode_bytes(model, 1, 8, 2, 4)  # a row a device
    seconds = moved / device.bandwidth
    share = seconds / sample["step_s"]
    assert sample["share_of_bandwidth"] == pytest.approx(share, rel=0.01)
    # An adapter is trained, so backward is one forward and not two.
    whole = timing.bench(["sft"], steps=1, length=64)[0]
    ratio = sft["gflops_per_s"] * sft["step_s"] / whole["gflops_per_s"]
    rows = sft["shape"][0] / whole["shape"][0]
    expected = 2 / 3 * rows * _flops(model) / _flops(presets.PRESETS["laptop"].model)
    assert ratio / whole["step_s"] == pytest.approx(expected, rel=0.02)
    # What a step of a stage that samples is made of; the first step does not count.
    assert {"sample", "update"} <= set(grpo["sections"]) and "score" in grpo["sections"]
    assert sum(grpo["sections"].values()) == pytest.approx(1, abs=0.05)

    text = page.read_text()
    assert "\nours\n" in text and "old" not in text
    assert "| grpo [8, 8] |" in text and "preset 8b, dtype float32" in text


def _flops(model):
    return cost.forward_flops(model, 1, 32.5)


def test_impossible_places_are_refused(tmp_path):
    with pytest.raises(UserError, match="--peers=.*expected the folder"):
        timing.bench(["dpo"], peers=str(tmp_path))
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(UserError, match="--page=.*expected a file with the lines"):
        timing.bench(["dpo"], page=str(tmp_path / "page.md"))


@pytest.mark.parametrize(
    ("what", "settings", "message"),
    [
        (["dpoo"], {}, "--what=.*dpo"),
        (["dpo"], dict(steps=0), "--steps=0: expected 1"),
        ((), dict(preset="2b"), "--preset=.*1b"),
        ((), dict(length=16), "--length=16: expected 32"),
        ((), dict(peers="env", length=512), "--peers=env: the other side knows"),
    ],
)
def test_wrong_requests_are_refused(what, settings, message):
    with pytest.raises(UserError, match=message):
        timing.bench(what, **settings)


def test_lengths_are_in_proportion():
    preset = presets.of_length(presets.PRESETS["1b"], 8192)
    assert preset.pair == (4096, 1024) and preset.sampled == (1024, 256)
    assert preset.model["max_length"] == 8192
    laptop = presets.PRESETS["laptop"]
    assert presets.of_length(laptop, laptop.length) == laptop


def test_growth_is_beside_that_of_the_flops(small, tmp_path):
    page, mark = tmp_path / "page.md", table.MARKS["growth"]
    page.write_text(f"{mark}\n{table.END}\n")
    lines = timing.bench(["reward", "sample"], growth=True, steps=1, page=str(page))
    by_size = {tuple(line["grown"]): line for line in lines if line["what"] == "reward"}
    base = by_size["", 1]
    assert base["shape"] == [8, 2, 225]
    assert by_size["rows", 4]["shape"] == [32, 2, 225]
    assert by_size["length", 2]["shape"] == [8, 2, 450]
    flops = {
        size: line["gflops_per_s"] * line["step_s"] for size, line in by_size.items()
    }
    assert flops["rows", 4] / flops["", 1] == pytest.approx(4, rel=0.01)
    assert 4 < flops["length", 4] / flops["", 1] < 8
    assert 8 < flops["width", 4] / flops["", 1] < 16
    header, _, reward, *samples = page.read_text().splitlines()[1:5]
    assert header.endswith("| width × 2 | width × 4 |") and header.count("|") == 9
    cell = reward.split("|")[6]  # rows × 4
    seconds = by_size["rows", 4]["cpu_s"] / base["cpu_s"]
    assert cell.strip() == f"{seconds:.1f} ({seconds / 4:.2f})"
    assert [line.split(" [")[0] for line in samples] == ["| sample"]


@pytest.mark.parametrize("name", ["1b", "8b"])
def test_the_programs_of_the_large_presets_fit_their_shapes(name):
    preset, mesh = presets.PRESETS[name], tiny.single()

    def shapes(make, mesh):
        return lambda key: sharding.abstract(make, mesh, key)

    with jax.set_mesh(mesh):
        for case in preset.cases:
            if case in presets.CASES:
                stage, raw = timing.build(case, preset, mesh, shapes)
                for program in stage.programs(raw).values():
                    assert jax.eval_shape(program.function, *program.arguments)


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.236), ("8b", 8.03)])
def test_the_large_presets_have_the_sizes_of_llamas(name, billions):
    count = cost.parameters(presets.PRESETS[name].model)["total"]
    assert count / 1e9 == pytest.approx(billions, abs=2e-3)
