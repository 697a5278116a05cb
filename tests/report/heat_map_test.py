"""The map of layers by kinds: its numbers, its budget, and what a table says."""

import json

import numpy as np
import pytest

from stagecraft.report import heat_map, page, render
from tests.report import fake_run
from tests.report.fake_run import EVIL

NAMES = ["base", "tuned", "policy"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return fake_run.write_anatomy(tmp_path_factory.mktemp("run"))


def cells_of(shown):
    """{(figure, stage, layer, kind): (value, noise, low, high)} as the script reads."""
    names, columns = shown["data"]["names"], shown["data"]["columns"]
    lines = zip(*columns.values(), strict=True)
    rows = [dict(zip(columns, line, strict=True)) for line in lines]
    cells = {}
    for row in rows:
        row |= {key: texts[row[key]] for key, texts in names.items()}
        where = tuple(row[k] for k in ("figure", "stage", "layer", "kind"))
        cells[where] = tuple(row[k] for k in ("value", "noise", "low", "high"))
    return cells


def test_a_cell_is_its_matrix_beside_noise(tables):
    cells = cells_of(heat_map.build(tables, NAMES))
    for line in tables["matrices"]:
        if (line["stage"], line["against"]) == ("policy", "base"):
            continue  # a stage against pretraining is not in the map
        place = (line["stage"], line["layer"], line["kind"])
        band = line["null"]["isotropic"]["effective_rank"]
        value, noise, low, high = cells["Eff. rank", *place]
        assert value == pytest.approx(line["effective_rank"], rel=1e-3)
        assert (low, noise, high) == pytest.approx(tuple(band), rel=1e-3)
        share = cells["Change, %", *place][0]
        assert share == pytest.approx(100 * line["relative_change"], rel=1e-3)
    assert len({place[1:] for place in cells}) == 2 * 2 * 2


def test_two_matrices_of_a_cell_are_their_mean(tables):
    twice = [
        line
        | {"kind": "query", "effective_rank": 3.0 + 4.0 * (line["kind"] == "query")}
        for line in tables["matrices"]
    ]
    cells = cells_of(heat_map.build(dict(tables, matrices=twice), NAMES))
    assert cells["Eff. rank", "tuned", 1, "query"][0] == 5.0


def test_the_title_is_the_cell_farthest_from_noise(tables):
    shown = heat_map.build(tables, NAMES)
    ratios = {
        place[1:]: abs(np.log(value / noise))
        for place, (value, noise, *_) in cells_of(shown).items()
        if place[0] == "Eff. rank"
    }
    stage, layer, kind = max(ratios, key=ratios.get)
    start = f"Farthest from noise of its size is {stage}, layer {layer}, {kind}: "
    assert shown["title"].startswith(start + "eff. rank ")
    assert shown["rows"][0][:4] == ("Eff. rank", stage, str(layer), kind)
    assert len({row[0] for row in shown["rows"]}) == len(shown["rows"]) > 4


def test_what_does_not_fit_is_named(tables, monkeypatch):
    whole = heat_map.build(tables, NAMES)
    assert whole["left_out"] == []
    monkeypatch.setattr(heat_map, "BUDGET", 500)
    short = heat_map.build(tables, NAMES)
    assert {place[0] for place in cells_of(short)} == {"Eff. rank"}
    titles = {place[0].removesuffix(", %") for place in cells_of(whole)}
    assert {name.partition(",")[0] for name in short["left_out"]} == {
        title.partition(",")[0] for title in titles - {"Eff. rank"}
    }
    assert heat_map.build(tables, ["base"]) is None


def test_scripts_are_in_the_page_of_a_map(run):
    fake_run.write_anatomy(run)
    text = page.write(run).read_text()
    assert text.count('<script type="text/plain" data-library>') == 3
    assert text.count("Redistribution and use in source") == 1
    fake_run.check_scripts(text)
    assert text.index("Of each figure the cell") < text.index("data-library")
    libraries = text.partition("data-library")[2]
    assert len(text) - len(libraries) < 500_000
    assert len(libraries) < 832_000 + 10_000  # with the licence and what runs them


def test_texts_in_the_data_end_no_script():
    text = str(render._json({"stage": f"</script>{EVIL}"}))
    assert "<" not in text and json.loads(text) == {"stage": f"</script>{EVIL}"}
