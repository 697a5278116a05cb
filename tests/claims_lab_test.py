"""The claims lab: what ships runs, files are held to their headers, tables say why."""

import contextlib
import functools
import re
import shutil
import types

import numpy as np
import pytest

from stagecraft import claims_lab, config_files, experiment, runs, storage
from stagecraft.errors import UserError
from stagecraft.report import terminal
from tests.command_line import stagecraft
from tests.conftest import ROOT

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
        base = str(ROOT / "experiments" / "quickstart.py")
        monkeypatch.setattr(claims_lab, "BASE", base)
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
    out = " ".join(capsys.readouterr().out.split())
    assert "1 holds b is above a b.x - a.x = 1.5 (" in out
    assert "3 seeds); beyond 0.5? its header was in no commit" in out


def test_what_is_measured_besides_has_an_interval_over_seeds(lab, tmp_path):
    for seed, slope in enumerate((1.0, 2.0, 3.0)):
        known = {"curve": {"slope": slope, "form": "rl"}}
        known["curve"] |= {"peak": 1.0} if seed else {}
        folder = tmp_path / "lab" / "mine" / f"seed{seed}"
        folder.mkdir(parents=True)
        storage.write_json(folder / claims_lab.MEASURED, known)
    text = f"{CLAIM}\n\ndef measure(base, own):\n    raise AssertionError\n"
    (one,) = lab(text, figures(2.5, 2.6, 2.4))
    # 4.303 is t of two degrees of freedom; what a seed lacks has no interval.
    assert one.also == {"curve.slope": (2.0, pytest.approx(4.3027 / 3**0.5, abs=1e-4))}
    (stored,) = storage.read_json(tmp_path / "lab" / "claims.json")["claims"]
    assert stored["also"]["curve.slope"] == [*one.also["curve.slope"]]


def test_seconds_are_those_of_runs_and_of_measuring(lab, tmp_path, monkeypatch):
    chains = types.SimpleNamespace(mesh=lambda: contextlib.nullcontext())
    monkeypatch.setattr(claims_lab.run, "open_run", lambda root: chains)
    monkeypatch.setattr(claims_lab.jax, "set_mesh", lambda mesh: mesh)
    clock = iter([100.0, 107.0, 200.0, 203.0])
    own_time = types.SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(claims_lab, "time", own_time)
    text = f"{CLAIM}\n\ndef measure(base, own):\n    return {{'c': {{'x': 1.0}}}}\n"
    (one,) = lab(text, figures(2.5, 2.6))
    assert one.seconds == 7 + 3 and one.also == {"c.x": (1.0, 0.0)}
    # Asked again nothing is measured, and it has still taken as long.
    (again,) = lab(text, figures(2.5, 2.6))
    assert again.seconds == 10
    # Of a claim that was measured before seconds were kept, runs alone count.
    for seed in range(2):
        (tmp_path / "lab" / "mine" / f"seed{seed}" / claims_lab.SPENT).unlink()
    (old,) = lab(text, figures(2.5, 2.6))
    assert old.seconds == 0


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
    (tmp_path / "broken.py").write_text("def")
    with pytest.raises(UserError, match="broken.py: cannot be read as Python"):
        claims_lab.read(tmp_path / "broken.py")


def test_an_unknown_claim_is_named(tmp_path):
    with pytest.raises(UserError, match="over_optimized: no such claim; did you mean"):
        claims_lab.ask(tmp_path, ["over_optimized"])


def test_what_ships_is_asked_of_a_finished_chain(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "base" / "seed0")
    # One seed is enough of a look, and of no verdict.
    status, out, error = stagecraft(
        *("claims", f"--workdir={tmp_path}", "--seeds=1", "--tiny"),
        "--only=compute_share,dpo_like_ppo,sft_moves_little",
    )
    assert status == 0, error
    table = storage.read_json(tmp_path / "claims.json")["claims"]
    by_name = {one["name"]: one for one in table}
    assert by_name["compute_share"]["verdict"] == "refuted"  # exact, far from it here
    assert by_name["dpo_like_ppo"]["verdict"] == "no verdict"
    assert "1 seeds: an interval that decides needs 3" in " ".join(out.split())
    base = runs.read(tmp_path / "base" / "seed0").summary
    gap = base["dpo"]["gold_mean"] - base["ppo"]["gold_mean"]
    assert by_name["dpo_like_ppo"]["values"] == [gap]
    # What no summary holds is measured once.
    measured = tmp_path / "sft_moves_little" / "seed0" / claims_lab.MEASURED
    moved = storage.read_json(measured)["weights"]["continued"]["relative_change"]
    ratio = np.log(moved / base["weights"]["sft"]["relative_change"])
    assert by_name["sft_moves_little"]["values"] == pytest.approx([ratio])
    before = measured.stat().st_mtime_ns
    claims_lab.ask(tmp_path, ["sft_moves_little"], 1, tiny=True)
    assert measured.stat().st_mtime_ns == before


# Claims that train arms of their own and measure them: the rest are quick.
LONG = ("over_optimised", "pretraining_knows", "shape_not_knowledge")
LONGER = ("emergence", "judge_bias", "constitution_for_raters")


def measuring(tiny_run, root, names):
    """Asks claims that measure of one tiny chain; {name: what was asked}."""
    shutil.copytree(tiny_run, root / "base" / "seed0")
    asked = {one.claim.name: one for one in claims_lab.ask(root, names, 1, tiny=True)}
    for name, one in asked.items():
        assert np.isfinite(one.values).all() and one.outcome.verdict == "no verdict"
        assert bool(one.claim.control_primary) == bool(one.controls)
        measures = "\ndef measure(" in claims_lab.shipped()[name].read_text()
        assert measures == (root / name / "seed0" / claims_lab.MEASURED).exists()
    return asked


def test_claims_that_measure_find_what_their_headers_name(tiny_run, tmp_path):
    names = [
        name
        for name, path in claims_lab.shipped().items()
        if "def measure(base, own)" in path.read_text()
        and name not in ("sft_moves_little", *LONG, *LONGER)
    ]
    assert len(names) == 6
    measuring(tiny_run, tmp_path, names)


def test_claims_with_arms_that_measure_them(tiny_run, tmp_path):
    asked = measuring(tiny_run, tmp_path, LONG)
    # Best of n is of answers alone; the path of two steps is too short for a curve.
    curve = asked["over_optimised"].also
    assert curve["best_of_n.points"] == (6.0, None) and "rl.alpha" not in curve
    assert {"shown_1.known", "shown_30.answered"} <= {
        *asked["shape_not_knowledge"].also
    }


@pytest.mark.parametrize("name", LONGER)
def test_claims_with_ladders_doses_or_a_chain_of_their_own(tiny_run, tmp_path, name):
    (one,) = measuring(tiny_run, tmp_path, (name,)).values()
    if name == "emergence":
        assert {"sharp.small_800", "nats.pretrain", "seeds_400.sd"} <= {*one.also}
    elif name == "judge_bias":
        # All arms are read where the one that went least far ends.
        ends = [one.also[f"matched.{arm}.kl_at_end"][0] for arm in ("style", "first")]
        assert one.also["matched.kl"][0] <= max(min(ends), 0.0) + 1e-9
        assert one.values == [one.also["slope.style"][0]]
    else:
        arms = runs.read(tmp_path / name / "seed0").summary
        net = [arms[a]["harmless"] - arms[a]["over_refusal"] for a in ("sl", "sl_gold")]
        assert one.values == [pytest.approx(net[0] - net[1])]


def test_arms_of_shipped_claims_are_of_stages_that_can_run(tiny_run):
    headers = {
        name: claims_lab.read(path) for name, path in claims_lab.shipped().items()
    }
    numbers = [header.number for header in headers.values()]
    assert numbers == sorted({*numbers})
    figures = runs.read(tiny_run).summary
    for name, path in claims_lab.shipped().items():
        arms = {}
        if "def get_config(" in path.read_text():
            config = config_files.load(path, f"tiny,base={tiny_run}")
            arms = dict.fromkeys(experiment.resolve(config).stages)
        if "def measure(" in path.read_text():  # its figures: the test above
            continue
        for expression in (headers[name].primary, headers[name].control_primary):
            for stage in re.findall(r"(?<![\w.])([a-z]\w*)\.", expression):
                assert stage in figures or stage in arms, (name, stage)
    gold = config_files.module(claims_lab.shipped()["over_optimised"]).gold
    asked = "What is the capital of France?"
    right, wrong = gold([asked] * 2, ["The capital of France is Paris.", "Rome."])
    assert right > wrong
