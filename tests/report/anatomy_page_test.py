"""The page of what changed in the weights: findings, nulls, escaping, no scripts."""

import re

import pytest

from stagecraft.anatomy import changes
from stagecraft.report import anatomy_page, terminal
from tests.command_line import stagecraft
from tests.report import fake_run


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    base = fake_run.model(0, "base")
    sft = fake_run.model(1, "<b>sft</b>", base)
    dpo = fake_run.model(2, "dpo", sft)
    control = fake_run.model(3, "shuffled", sft)
    pairs = [
        changes.Pair(sft.name, "base", changes.PARENT, base, sft, {}),
        changes.Pair("dpo", sft.name, changes.PARENT, sft, dpo, {"shuffled": control}),
        changes.Pair("dpo", "base", changes.PRETRAINING, base, dpo, {}),
    ]
    to = tmp_path_factory.mktemp("anatomy")
    return changes.write(pairs, to, notes=["ppo & others are left out."])


def test_each_figure_stands_beside_its_nulls(tables):
    text = anatomy_page.write(tables).read_text()
    for one in tables["comparisons"]:
        assert f"{100 * one['relative_change']:.3g}%" in text
    found = tables["comparisons"][1]
    low, mean, high = found["null"]["isotropic"]["effective_rank"]
    assert f"noise {anatomy_page._text(mean, '')}" in text
    ratio = found["effective_rank"] / found["null"]["shuffled"]["effective_rank"][1]
    assert f"ratio {ratio:.3g}" in text and "shuffled " in text
    titles = re.findall(r'id="fig-\w+"><figcaption>.*?<b>(.*?)</b>', text)
    assert len(titles) >= 6
    assert all("noise of its size gives" in title for title in titles[1:])
    assert low < high and anatomy_page._text(low, "") in text


def test_the_page_is_data_alone(tables):
    text = anatomy_page.write(tables).read_text()
    assert "<b>sft</b>" not in text and "&lt;b&gt;sft&lt;/b&gt;" in text
    assert "ppo &amp; others" in text
    fake_run.check_scripts(text)
    assert not re.findall(r"(?:src|href)=\"(?!#)", text)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert changes.read(tables.folder) == dict(tables)
    assert anatomy_page.write(changes.read(tables.folder)).read_text() == text


def test_the_title_is_of_the_stage_farthest_from_noise():
    band = {"isotropic": {"rank": [9.0, 10.0, 11.0]}}
    rows = [
        {"stage": "near", "rank": 10.5, "null": band},
        {"stage": "far", "rank": 2.0, "null": band},
    ]
    text = anatomy_page._finding(rows, "rank", "", "rank {}")
    assert text == "far: rank 2.00; noise of its size gives 10.0 (9.00 to 11.0)"


def test_parts_of_a_change_stand_beside_their_own_nulls(tables):
    one = tables["comparisons"][1]
    stages = {"dpo": {"name": "dpo", "index": 0}}
    row = next(row for row in anatomy_page.FIGURES if row[0] == "effective_rank")
    shown = anatomy_page.parts(one, stages, row)
    assert [line["part"] for line in shown["rows"]] == [
        *("layer 0", "layer 1"),
        *one["kinds"],
    ]
    own = one["kinds"]["query"]
    line = next(line for line in shown["rows"] if line["part"] == "query")
    assert line["text"] == anatomy_page._text(own["effective_rank"], "")
    mean = own["null"]["isotropic"]["effective_rank"][1]
    assert line["nulls"][0]["ratio"] == f"{own['effective_rank'] / mean:.3g}"
    assert shown["title"].startswith("dpo, ")
    assert anatomy_page.parts(one | {"layers": {}, "kinds": {}}, stages, row) is None


def test_the_terminal_shows_a_line_a_comparison(tables, capsys):
    terminal.show_anatomy(tables)
    out = capsys.readouterr().out
    assert "dpo" in out and "ppo & others" in out


def test_the_command_says_what_is_missing(tmp_path):
    for flags, line in (
        ([], "give --workdir=RUN, or --before=A --after=B"),
        (["--before=hf:a"], "--before and --after go together"),
        (["--before=hf:a", "--after=hf:b"], "--to is missing"),
        ([f"--workdir={tmp_path}"], "no run here"),
    ):
        status, _, error = stagecraft("anatomy", *flags)
        assert status == 2 and line in error
