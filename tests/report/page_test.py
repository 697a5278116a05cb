"""The report of small fake runs: self-contained, escaped, whole with files missing."""

import json
import re
import sys

import numpy as np
import pytest

from stagecraft import runs
from stagecraft.errors import UserError
from stagecraft.report import anatomy_page, charts, page
from tests.report import fake_run
from tests.report.fake_run import EVIL, json_file, lines_file
from tests.report.page_text import Page


def test_nothing_is_loaded_and_only_named_scripts_run(run):
    text = page.write(run).read_text(encoding="utf-8")
    shown = Page(text)
    assert not re.search(r"https?://", text)
    assert "@import" not in text and "url(http" not in text
    names = {tag for tag, _ in shown.tags}
    assert not names & {"link", "img", "iframe", "object", "base", "form"}
    for _, attributes in shown.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href", "src"):
            assert attributes.get(name, "#").startswith("#")
    fake_run.check_scripts(text)
    assert "Beside noise" not in text and "map-data" not in text  # of anatomy.json


def _words(folder):
    shown = Page(page.write(folder).read_text(encoding="utf-8"))
    return " ".join(" ".join(shown.words).split())


def _change(path, **parts):
    json_file(path, json.loads(path.read_text()) | parts)


def test_the_first_words_are_the_answer(run):
    """Failed bounds before all else; a bound on time is none of the method's."""
    bounds = {
        "seconds.total": {"must": "≤ 480", "short": "≤ 480", "holds": False},
        "tuned.heldout_accuracy": {"must": "≥ 0.85", "short": "≥ 0.85", "holds": True},
        "policy.gold_mean": {
            "must": "> tuned.gold_mean + 0.4",
            "short": "> 1.01",
            "holds": False,
        },
        "weights.policy.relative_change": {
            "must": "< 0.05",
            "short": "< 0.05",
            "holds": False,
        },
    }
    _change(run / "summary.json", bounds=bounds)
    words = _words(run)
    answer = (
        "2 of 3 bounds do not hold: Gold score of policy is −0.500, must be > 1.01; "
        "Relative change of policy is 0.100, must be < 0.05."
    )
    picture = "policy: gold score −0.500 at 2.00 nats"
    assert f"report {run.name} {answer} {picture}" in words
    table = words[words.index("must be Gold score of policy") :]
    assert table.index("Relative change of policy") < table.index("Held-out accuracy")
    assert "> Gold score of tuned + 0.4 > 1.01" in table
    assert "Seconds total" not in words.partition("Wall time")[0]
    assert "Bounds on time" in words and "Seconds total ✗ no" in words
    for bound in bounds.values():
        bound["holds"] = True
    _change(run / "summary.json", bounds=bounds)
    assert "3 of 3 bounds hold: held-out accuracy 0.900 after tuned; gold" in _words(
        run
    )
    _change(run / "summary.json", bounds={})
    assert "4 stages, 2 of them measured (base, tuned, judge, policy): h" in _words(run)


def test_a_figure_has_its_interval_or_its_count(run):
    """Four draws of standard error .01: half is t(3) = 3.182 times that."""
    drawn = {"count": 4, "standard_error": {"gold_mean": 0.01}}
    policy = {"gold_mean": 1.5, "kl": 2.0, "draws": drawn, "n": {"gold_mean": 216}}
    tuned = {"heldout_accuracy": 0.9, "n": {"heldout_accuracy": 324}}
    _change(run / "summary.json", policy=policy, tuned=tuned)
    words = _words(run)
    assert "Gold score ↑ 1.500 ±0.032" in words
    assert "Held-out accuracy ↑ 0.900 n 324" in words
    assert "KL 2.00" in words  # no way is better


def test_all_that_a_stage_is_given_is_an_edge(run):
    stages = {
        "base": {},
        "tuned": {"start_from": "base"},
        "judge": {"start_from": "tuned", "data": {"files": "stage:pairs, mine.jsonl"}},
        "pairs": {"start_from": "tuned"},
        "policy": {
            "start_from": "tuned",
            "reward_from": "judge",
            "reference_from": "hf:models/base-1B",
            "value_from": "",
        },
    }
    _change(run / "config.json", stages=stages)
    files = {stage.name: stage for stage in runs.read(run).stages}
    assert files["judge"].parents == {"tuned": True, "pairs": False}
    assert list(files).index("pairs") < list(files).index("judge")
    text = page.write(run).read_text(encoding="utf-8")
    for edge in ("pairs leads to judge", "judge leads to policy"):
        assert edge in text
    assert "base-1B leads to policy" in text
    _change(run / "config.json", stages={})
    lineage = json.loads((run / "lineage.json").read_text())
    lineage["stages"]["judge"]["data"] = {"stage:base": "ab" * 32}
    json_file(run / "lineage.json", lineage)
    files = {stage.name: stage for stage in runs.read(run).stages}
    assert files["judge"].parents == {"base": False, "tuned": True}


def test_with_what_it_was_made_is_shown_and_hashes_are_folded(run):
    path = run / "tuned" / "stage.json"
    made = {"stagecraft": "0.1.0", "commit": "91e4399", "command": "stagecraft run"}
    _change(path, made_with=made)
    words = _words(run)
    assert "stagecraft 0.1.0 commit 91e4399 command stagecraft run" in words
    text = (run / "report.html").read_text()
    folded = text[text.index("Hashes of what") :]
    assert folded.index("c0ffee") < folded.index("</details>")


# CIE L*a*b* of linear sRGB, D65; deuteranopes by Viénot, Brettel and Mollon (1999).
_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_LMS = np.array(
    [
        [17.8824, 43.5161, 4.11935],
        [3.45565, 27.1554, 3.86714],
        [0.0299566, 0.184309, 1.46709],
    ]
)
_SEEN = {
    "all": np.eye(3),
    "deuteranopia": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
}


def _lab(linear):
    ratio = linear @ _XYZ.T / (_XYZ @ np.ones(3))
    root = np.where(
        ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116
    )
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _nearest(colours, sight):
    """The smallest CIE76 distance of two colours, rrggbb each."""
    values = [[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in colours]
    values = np.array(values)
    bent = ((values + 0.055) / 1.055) ** 2.4
    linear = np.where(values <= 0.04045, values / 12.92, bent)
    as_seen = np.linalg.inv(_LMS) @ _SEEN[sight] @ _LMS
    lab = _lab(np.clip(linear @ as_seen.T, 0, 1))
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return distances[np.triu_indices(len(lab), 1)].min()


@pytest.mark.parametrize(("sight", "least"), [("all", 25), ("deuteranopia", 20)])
@pytest.mark.parametrize("theme", [0, 1])
def test_stages_are_told_apart(run, sight, least, theme):
    """The smallest CIE76 distance of two stages' colours; 2.3 is just noticeable."""
    text = page.write(run).read_text(encoding="utf-8")
    found = re.findall(r"--s(\d): #([0-9a-f]{6})", text)
    assert len(found) == 2 * charts.COLOURS  # light and dark
    colours = [code for _, code in found][theme * charts.COLOURS :][: charts.COLOURS]
    assert _nearest(colours, sight) > least


@pytest.mark.parametrize("theme", [0, 1])
def test_numbers_of_a_map_are_read_on_its_darkest_shade(run, theme):
    """WCAG's contrast of text with what is behind it, 4.5 at least."""
    text = page.write(run).read_text(encoding="utf-8")

    def colours(name):
        found = re.findall(rf"--{name}: #([0-9a-f]{{6}})", text)
        found = found[len(found) // 2 * theme :][: len(found) // 2]
        values = [[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in found]
        return np.array(values)

    def light(values):
        linear = np.where(
            values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4
        )
        return linear @ (0.2126, 0.7152, 0.0722) + 0.05

    full = float(re.findall(r"--full: ([.\d]+)", text)[theme])
    share = anatomy_page.SHADE * full / 100
    for below in ("card", "paper"):
        mixed = share * colours(r"s\d") + (1 - share) * colours(below)
        ratio = light(mixed) / light(colours("ink"))
        assert np.maximum(ratio, 1 / ratio).min() >= 4.5


def test_what_a_stage_learned_from_is_shown(run):
    path = run / "tuned" / "stage.json"
    source = dict(files=EVIL, rows=30, epochs=1.5, share_of_examples=0.625)
    told = {"pairs": 1234, "dropped": 0, "share_by": "examples", "sources": [source]}
    info = json.loads(path.read_text())
    json_file(path, info | {"data": told | {"curations": ["c0ffee" * 10]}})
    text = page.write(run).read_text(encoding="utf-8")
    words = " ".join(" ".join(Page(text).words).split())
    assert "pairs 1,234" in words and "dropped 0" in words
    assert f"{EVIL} 62.5% of the examples, 1.50 epochs" in words
    assert "shares by examples" in words and "curated c0ffeec0ffee" in words


def test_what_a_model_wrote_is_escaped_and_keeps_its_spaces(run):
    text = page.write(run).read_text(encoding="utf-8")
    assert EVIL not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n  two" in text
    assert "Q &amp; A?" in text


def test_tokens_of_an_answer_are_shown_with_what_else_they_might_have_been(run):
    fake_run.write_readings(run)
    text = page.write(run).read_text(encoding="utf-8")
    assert EVIL not in text
    shown = Page(text)
    assert len(shown.ids) == len(set(shown.ids))
    spans = [a for tag, a in shown.tags if "tok" in a.get("class", "")]
    assert [a["class"] for a in spans if "title" in a] == [
        "tok unshifted",
        "tok marginal",
        "tok shifted",
        "tok shifted",
        "tok unshifted control",
    ]
    about = next(a["title"] for a in spans if "marginal" in a["class"])
    assert about == (
        f"“␣is”: rank 3 of tuned (16.7%), KL 0.75 nats; besides “{EVIL}” 25%, "
        "“␣a” 12.5%, “↵” 6.25%"
    )
    words = " ".join(" ".join(shown.words).split())
    title = "policy: tuned would have written 2 of 5 tokens as well; shifted: 2, first"
    assert f"{title} “↵”; KL 0.562 nats a token" in words
    assert "Rank by base-1B" in words and "tuned might have written" in words
    others = f"“{EVIL}” 25%, “␣a” 12.5%, “↵” 6.25%"
    assert f"“{EVIL}” shifted {others} 12 4.17% – 1 50% 0.250" in words
    assert f"“<|end|>” {others} 1 50% 0.250 7 7.14% 1.75" in words
    assert '↵<sup aria-hidden="true">4</sup></span>\n<span' in text


@pytest.mark.parametrize(
    "readings", [None, {}, {"tuned": []}, {"tuned": [{"token": 5}]}, {"tuned": "x"}]
)
def test_an_answer_that_no_model_read_is_shown_as_text(run, readings):
    before = page.write(run).read_text(encoding="utf-8")
    assert '<span class="tok' not in before and "token by token" not in before
    path = run / "prompt.json"
    value = json.loads(path.read_text())
    value["answers"]["tuned"][0]["readings"] = readings
    json_file(path, value)
    assert page.write(run).read_text(encoding="utf-8").count("tok ") == (
        before.count("tok ")
    )


@pytest.mark.parametrize(("sight", "least"), [("all", 25), ("deuteranopia", 20)])
@pytest.mark.parametrize("theme", [0, 1])
def test_classes_of_tokens_are_told_apart(run, sight, least, theme):
    text = page.write(run).read_text(encoding="utf-8")
    names = ("marginal", "shifted", "rule")
    codes = [re.findall(rf"--{name}: #([0-9a-f]{{6}})", text) for name in names]
    assert _nearest([code[theme] for code in codes], sight) > least


def test_the_page_is_sound_html_and_says_what_was_measured(run):
    shown = Page(page.write(run).read_text(encoding="utf-8"))
    assert len(shown.ids) == len(set(shown.ids))
    words = " ".join(shown.words)
    for told in ("≥ 0.85", "✗ ≤ 1", "own figure", "1 min 1 s", "1,234", "−0.500"):
        assert told in words
    assert "missing" not in words
    labels = [a["aria-label"] for tag, a in shown.tags if tag == "svg"]
    assert any("tuned, Loss: training from 3.00 at step 1" in one for one in labels)
    assert any("judge leads to policy" in one for one in labels)
    assert not any("flat" in one for one in labels)  # a constant is no curve


def test_the_same_files_give_the_same_bytes(run):
    first = page.write(run).read_bytes()
    assert page.write(run).read_bytes() == first


@pytest.mark.parametrize(
    "gone", ["config.json", "lineage.json", "summary.json", "prompt.json"]
)
def test_a_missing_file_is_named_and_the_rest_is_shown(run, gone):
    (run / gone).unlink()
    words = " ".join(Page(page.write(run).read_text(encoding="utf-8")).words)
    assert gone in words and "missing" in words
    assert "tuned" in words


def test_an_unfinished_run_shows_what_exists(run):
    for name in ("summary.json", "prompt.json", "policy/stage.json"):
        (run / name).unlink()
    for path in (run / "judge").iterdir():
        path.unlink()
    (run / "judge").rmdir()
    with (run / "policy" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut off in the middle of a line
    words = " ".join(Page(page.write(run).read_text(encoding="utf-8")).words)
    assert "judge: not started" in words
    assert "policy: not finished; its curves end at step 5" in words
    assert "summary.json has no part" in words


def test_damaged_files_are_named_not_fatal(run):
    (run / "summary.json").write_text('{"seconds": ')
    (run / "lineage.json").write_text("[]")
    words = " ".join(Page(page.write(run).read_text(encoding="utf-8")).words)
    assert "summary.json: cannot be read" in words
    assert "lineage.json: cannot be read" in words


def test_only_metrics(tmp_path):
    (tmp_path / "mine").mkdir()
    lines_file(tmp_path / "mine" / "metrics.jsonl", [{"step": 1, "objective/kl": 2.0}])
    words = " ".join(Page(page.write(tmp_path).read_text(encoding="utf-8")).words)
    assert "KL to the reference" in words


def test_real_tasks_are_shown_by_stage_when_there_are_any(run):
    assert "real tasks" not in page.write(run).read_text()
    asked = {"task": EVIL, "limit": 9, "shots": None, "chat": True}
    records = [
        {"stage": stage, **asked, "metrics": {"acc": {"value": v, "stderr": e}}}
        for stage, v, e in (("tuned", 0.625, 0.0125), ("base", 0.375, None))
    ]
    json_file(run / "evaluations.json", records)
    text = page.write(run).read_text()
    section = text[text.index("real tasks") :].partition("</table>")[0]
    assert EVIL not in section and "acc; chat, first 9" in section
    assert section.index("base") < section.index("tuned")  # the graph's order
    assert section.index("0.375") < section.index("0.625") and "± 0.013" in section
    (run / "evaluations.json").write_text("[{")
    assert "evaluations.json: not a JSON file" in page.write(run).read_text()


def test_what_anatomy_wrote_stands_beside_noise(run):
    tables = fake_run.write_anatomy(run)
    text = page.write(run).read_text()
    section = text[text.index("Beside noise") :]
    for one in tables["comparisons"][:2]:
        low, mean, high = one["null"]["isotropic"]["effective_rank"]
        ratio = one["effective_rank"] / mean
        assert f"noise {mean:#.3g}".rstrip(".") in section
        assert f"ratio {ratio:.3g}" in section
        assert f'id="fig-parts-{one["stage"]}"' in section
    assert "against base" in section and section.count('class="band"') > 12
    (run / "anatomy" / "anatomy.json").write_text("{")
    assert "anatomy.json: not a JSON file" in page.write(run).read_text()


@pytest.mark.parametrize("up", [0, 1, 2])
def test_verdicts_of_claims_are_shown_with_where_they_lie(tmp_path, up):
    folder = tmp_path / "base" / "seed0"
    (folder / "mine").mkdir(parents=True)
    lines_file(folder / "mine" / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    outcome = dict(verdict="holds", reason="", mean=1.5, low=1.0, high=2.0, p=0.01)
    claim = dict(name="mine", number=4, claim=f"a is b {EVIL}", effect=0.5, alike=False)
    rows = [claim | outcome | {"seeds": 4, "seeds_needed": None}]
    where = [folder, *folder.parents][up] / "claims.json"
    json_file(where, {"seeds": 4, "claims": rows})
    words = _words(folder)
    assert f"4. a is b {EVIL} holds 1.50 (1.00 to 2.00) beyond 0.5" in words
    assert f"from {'../' * up}claims.json" in words
    json_file(where, {"claims": [claim | {"effect": "?"}]})
    assert "claims.json: not what `stagecraft claims` writes" in _words(folder)


def test_each_figure_has_its_own_address(run):
    shown = Page(page.write(run).read_text(encoding="utf-8"))
    figures = [a for tag, a in shown.tags if tag == "figure" and "bars" not in a]
    ids = [a["id"] for a in figures if "id" in a]
    assert len(ids) >= len(figures) - 1  # wall time stands under its heading
    links = {a["href"] for tag, a in shown.tags if tag == "a" and "href" in a}
    assert {f"#{name}" for name in ids} <= links
    assert {"fig-tuned-loss-eval_loss", "fig-heldout_accuracy"} <= {*ids}


def test_the_title_of_bars_says_who_has_most_and_least(run):
    drawn = {"count": 4, "standard_error": {"heldout_accuracy": 0.01}}
    policy = {"heldout_accuracy": 0.5, "draws": drawn}
    _change(run / "summary.json", policy=policy, judge={"seen_accuracy": 0.25})
    text = page.write(run).read_text()
    title = "Held-out accuracy: 0.900 in tuned, the most; 0.500 ±0.032 in policy, the"
    assert f"<b>{title} least</b>" in text
    assert "<b>Accuracy, demonstrated: 0.250</b>" in text


def test_the_title_of_curves_says_from_where_to_where(run):
    """The last tenth is 1, 2, 3, 4, 5: t(4) = 2.776 times sqrt(2.5 / 5) is 1.963."""
    values = [7.0, *[6.0] * 44, 1.0, 2.0, 3.0, 4.0, 5.0]
    rows = [{"step": 2 * i + 2, "loss": v, "lr": v / 1e6} for i, v in enumerate(values)]
    rows += [{"step": 50, "eval_loss": 4.0}, {"step": 100, "eval_loss": 2.5}]
    lines_file(run / "tuned" / "metrics.jsonl", rows)
    _change(run / "tuned" / "stage.json", data={"heldout": 1640})
    text = page.write(run).read_text(encoding="utf-8")
    title = "Loss 7.000 → 3.000 ±1.963 over 100 steps (held out 2.500, n = 1,640)"
    assert f"<b>{title}</b>" in text
    assert "<b>lr 7e-06 → 3e-06 ±2e-06 over 100 steps</b>" in text
    assert "<b>Loss 3.000 → 0.750 over 4 steps (held out 0.900)</b>" in text  # policy
    for name, values in (("policy", [1.0, 4.0]), ("judge", [2.0])):
        rows = [{"step": i, "objective/kl": v} for i, v in enumerate(values)]
        lines_file(run / name / "metrics.jsonl", rows)
    text = page.write(run).read_text(encoding="utf-8")
    assert "<b>KL to the reference 1.00 → 4.00 over 1 steps</b>" in text
    assert "<b>KL to the reference 2.00</b>" in text  # one value goes nowhere
    title = "KL to the reference: 4.00 in policy, the most; 2.00 in judge, the least"
    assert f"<b>{title}</b>" in text


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        page.write(tmp_path / "typo")
    with pytest.raises(UserError, match="holds no run"):
        page.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_a_page_has_all_but_its_charts(run, monkeypatch, caplog):
    whole = page.write(run).read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    charts._without_matplotlib.cache_clear()  # what is logged once
    text = page.write(run).read_text(encoding="utf-8")
    [line] = (r.getMessage() for r in caplog.records if "Matplotlib" in r.getMessage())
    assert re.search(r"no charts, .* pip install -e '.*\[report\]'", line)
    said = re.findall(
        r"<p>No chart: it needs Matplotlib, which <code>[^<]*</code>", text
    )
    drawn = [one.count('role="img"') for one in (whole, text)]
    assert drawn[0] == drawn[1] + len(said) and len(said) > 3


def test_parents_come_before_children_whatever_the_order(run):
    lineage = json.loads((run / "lineage.json").read_text())
    config = json.loads((run / "config.json").read_text())
    config["stages"] = dict(reversed(config["stages"].items()))
    lineage["stages"] = dict(reversed(lineage["stages"].items()))
    json_file(run / "config.json", config)
    json_file(run / "lineage.json", lineage)
    stages = runs.read(run).stages
    assert [s.name for s in stages] == ["base", "tuned", "judge", "policy"]
    assert stages[3].parents == {"judge": False, "tuned": True}


def test_a_circle_of_stages_is_drawn_anyway():
    nodes = {name: {"note": "", "colour": i} for i, name in enumerate("abc")}
    edges = [("a", "b", True), ("b", "c", True), ("c", "a", False)]
    svg = charts.graph(nodes, edges)
    assert svg.count("<rect") == 3 and svg.count("<path") == 3


def test_time_never_counts_sampling_twice(run):
    path = run / "policy" / "stage.json"
    record = json.loads(path.read_text())
    record["seconds"] = {"prepare": 6.0, "sample": 2.0, "score": 3.0, "update": 4.0}
    record["seconds"]["total"] = 10.0
    json_file(path, record)
    page.write(run)
    rows = page._time(runs.read(run))["rows"]
    parts = next(row["parts"] for row in rows if row["stage"].name == "policy")
    assert parts["prepare"] == pytest.approx(1.0)
    assert sum(parts.values()) == pytest.approx(10.0)
