"""The claims lab: what ships runs, files are held to their headers, tables say why."""

import functools
import json
import shutil

import pytest

from stagecraft import claims_lab, runs, storage
from stagecraft.errors import UserError
from stagecraft.report import terminal
from tests.command_line import stagecraft

CLAIM = '''"""A claim.

[claim]
number = 1
claim = "b is above a"
source = "nobody"
primary = "b.x - a.x"
effect = 0.5
control = "a itself"
checks = ["a.x > 0"]
"""
'''


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Asks a file of a claim, with base chains whose figures are given by seed."""
    ran = []

    def run(config, folder, figures):
        ran.append(folder)
        return figures[config.seed]

    def ask(text, figures, root="lab"):
        file = tmp_path / "mine.py"
        file.write_text(text)
        fake = functools.partial(run, figures=figures)
        monkeypatch.setattr(claims_lab.run, "run", fake)
        return claims_lab.ask(tmp_path / root, [str(file)], len(figures))

    ask.ran = ran
    return ask


def figures(*xs):
    return [{"a": {"x": 1.0}, "b": {"x": x}} for x in xs]


def test_one_number_a_seed_decides(lab, tmp_path, capsys):
    (one,) = lab(CLAIM, figures(2.5, 2.6, 2.4))
    assert one.values == pytest.approx([1.5, 1.6, 1.4]) and one.registered == ""
    assert one.outcome.verdict == "holds"
    assert [p.relative_to(tmp_path).as_posix() for p in lab.ran] == [
        f"lab/base/seed{seed}" for seed in range(3)
    ]
    (stored,) = storage.read_json(tmp_path / "lab" / "claims.json")["claims"]
    assert stored["verdict"] == "holds" and stored["values"] == one.values
    assert stored["holm"] is True and stored["name"] == "mine"
    terminal.show_claims([one])
    out = capsys.readouterr().out
    assert "holds" in out and "in no commit" in out and "b.x - a.x" in out


def test_a_check_that_fails_on_one_seed(lab):
    table = figures(2.5, 2.6, 2.4)
    table[1]["a"]["x"] = -1.0
    (one,) = lab(CLAIM, table)
    assert one.outcome.verdict == "cannot be asked here"
    assert one.outcome.reason == "seed 1: a.x > 0 does not hold"


def test_a_header_that_changed_since_is_refused(lab):
    lab(CLAIM, figures(2.5, 2.6, 2.4))
    lab(CLAIM.replace("A claim.", "Other words."), figures(2.5, 2.6, 2.4))
    with pytest.raises(UserError) as error:
        lab(CLAIM.replace("effect = 0.5", "effect = 0.4"), figures(2.5, 2.6, 2.4))
    assert "header has changed since" in str(error.value)
    assert "effect" in str(error.value) and "\n" not in str(error.value)
    lab(CLAIM.replace("effect = 0.5", "effect = 0.4"), figures(2.5, 2.6, 2.4), "new")


def test_what_is_missing_is_named(lab, tmp_path):
    with pytest.raises(UserError, match="no figure b.y in the runs"):
        lab(CLAIM.replace("b.x - a.x", "b.y - a.x"), figures(2.5, 2.6, 2.4))
    with pytest.raises(UserError, match="'c.x > 0': no such figures"):
        lab(CLAIM.replace("a.x > 0", "c.x > 0"), figures(2.5, 2.6, 2.4), "other")
    with pytest.raises(UserError, match="over_optimized: no such claim; did you mean"):
        claims_lab.ask(tmp_path, ["over_optimized"])
    (tmp_path / "broken.py").write_text("def")
    with pytest.raises(UserError, match="broken.py: cannot be read as Python"):
        claims_lab.read(tmp_path / "broken.py")


def test_shipped_claims_run(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "base" / "seed0")
    # One seed is enough of a look, and of no verdict.
    status, out, error = stagecraft(
        "claims", f"--workdir={tmp_path}", "--seeds=1", "--tiny"
    )
    assert status == 0, error
    table = storage.read_json(tmp_path / "claims.json")["claims"]
    assert [one["name"] for one in table] == list(claims_lab.shipped())
    assert [one["number"] for one in table] == sorted(one["number"] for one in table)
    verdicts = {one["name"]: one["verdict"] for one in table}
    assert verdicts.pop("compute_share") == "refuted"  # exact, and far from it here
    assert {*verdicts.values()} == {"no verdict"}
    assert "1 seeds: an interval that decides needs 3" in " ".join(out.split())
    # Figures of the base, of own arms, and of what the file measures itself.
    by_name = {one["name"]: one for one in table}
    base = runs.read(tmp_path / "base" / "seed0").summary
    own = runs.read(tmp_path / "over_optimised" / "seed0").summary
    gap = base["ppo"]["gold_mean"] - base["ppo_hard"]["gold_mean"]
    assert by_name["over_optimised"]["values"] == [gap]
    control = base["ppo"]["gold_mean"] - own["gold_hard"]["gold_mean"]
    assert by_name["over_optimised"]["controls"] == [control]
    measured = tmp_path / "sft_moves_little" / "seed0" / claims_lab.MEASURED
    moved = json.loads(measured.read_text())["weights"]["continued"]
    assert moved["relative_change"] > 0
    before = measured.stat().st_mtime_ns
    claims_lab.ask(tmp_path, ["sft_moves_little"], 1, tiny=True)
    assert measured.stat().st_mtime_ns == before
