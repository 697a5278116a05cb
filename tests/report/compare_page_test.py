"""Runs side by side, as they are shown: the terminal, Markdown and the page."""

import io
import json
import re

import pytest

from stagecraft.report import charts, compare, compare_page, markdown, terminal
from tests.report.fake_run import EVIL, check_scripts
from tests.report.page_text import Page
from tests.report.runs_to_compare import gold, graph, make


@pytest.mark.parametrize("width", [200, 80, 40])
def test_the_table_fits_the_terminal(ablation, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    terminal.show_comparison(compare.compare(ablation), out)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for told in ("2.600 ±0.248", "+1.000 ±0.227 ▲", "0.000 ±0.045 ≈"):
        assert told in text
    assert "within noise" in text


def test_the_markdown_table_has_a_cell_for_each_mean(ablation):
    text = markdown.table(compare.compare(ablation))
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rule.count("---") == head.count("|") - 1 == len(head.split(" | "))
    assert all(row.count("|") == head.count("|") for row in rows) and len(rows) == 3
    assert [("2.600 ±0.248 ▲" in row) for row in rows] == [False, False, True]
    assert "| `dpo objective=ipo` | 3 | " in rows[2]
    assert "▲ ▼ above or below" in text


def test_the_page_loads_nothing_and_says_what_the_table_says(ablation, tmp_path):
    path = compare_page.write(
        compare.compare(ablation), tmp_path / "out" / "sides.html"
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?://", text)
    assert "@import" not in text and "url(" not in text
    names = {tag for tag, _ in page.tags}
    assert not names & {"link", "img", "iframe", "object", "base", "form"}
    check_scripts(text)
    words = " ".join(page.words)
    for told in ("2.600 ±0.248", "+1.000 (+0.773 to +1.227)", "within noise"):
        assert told in words
    titles = re.findall(r'<a href="#fig-[^"]+"><b>(.*?)</b>', text)
    name = "dpo objective=ipo, higher, against dpo objective=dpo"
    assert titles[1] == f"Gold score: +1.000 (+0.773 to +1.227) in {name}"
    assert titles[3] == "Held-out accuracy: 0.900 ±0.000 in sft"
    numbers = json.loads((tmp_path / "out" / "sides.json").read_text())
    assert numbers == compare.compare(ablation)


def test_what_runs_hold_is_escaped(tmp_path):
    run = make(tmp_path / "a&b", graph(gold(1.0), objective_args=dict(note=EVIL)))
    other = make(tmp_path / "<b>", graph(gold(1.0)))
    text = compare_page.write(
        compare.compare([run, other]), tmp_path / "c.html"
    ).read_text()
    assert EVIL not in text and "<b>/" not in text
    assert "a&amp;b" in text and "&lt;script&gt;" in text


def test_the_same_runs_give_the_same_bytes(ablation, tmp_path):
    first = compare_page.write(
        compare.compare(ablation), tmp_path / "c.html"
    ).read_bytes()
    again = compare_page.write(
        compare.compare(ablation), tmp_path / "c.html"
    ).read_bytes()
    assert first == again


def test_an_interval_wider_than_the_picture_is_cut():
    row = dict(name="dpo", detail="", text="", note="", baseline=True, apart=False)
    seeds = [1.0, 2.0]
    carets = {}
    for half in (0.2, 50.0):
        figure = dict(mean=1.5, half=half, values=seeds)
        svg = charts.intervals([row | figure], name="plot", label="a <plot>")
        assert 'aria-label="a &lt;plot&gt;"' in svg
        low, high = charts._scale([row | figure])
        assert low < 1.0 < 2.0 < high and high - low < 5.0
        carets[half] = set(re.findall(r'xlink:href="#(\w+)"', svg))
    assert carets[0.2] != carets[50.0]  # carets in place of caps


# -- bad input -------------------------------------------------------------------------
