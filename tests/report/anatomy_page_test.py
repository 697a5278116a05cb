"""The page of what changed in the weights: findings, nulls, escaping, no scripts."""

import re

import numpy as np
import pytest

from stagecraft.anatomy import changes
from stagecraft.anatomy.stored import Matrix, Weights
from stagecraft.report import anatomy_page, terminal
from tests import tiny
from tests.command_line import stagecraft

NAMES = ("query", "output")


def model(seed, name, start=None):
    random = np.random.default_rng(seed)
    matrices = {}
    for layer in range(2):
        for kind in NAMES:
            path = f"layers/{layer}/attention/{kind}"
            array = random.normal(size=(24, 16)).astype(np.float32)
            if start:
                array = start.matrices[path].read() + np.float32(0.01) * array
            one = Matrix(path, kind, layer, array.shape, "F32", lambda a=array: a)
            matrices[path] = one
    return Weights(name, tiny.config(layers=2), matrices, name)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    base = model(0, "base")
    sft = model(1, "<b>sft</b>", base)
    dpo = model(2, "dpo", sft)
    control = model(3, "shuffled", sft)
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
    titles = re.findall(r'id="fig-\w+"><figcaption><b>(.*?)</b>', text)
    assert len(titles) >= 6
    assert all("noise of its size gives" in title for title in titles[1:])
    assert low < high and anatomy_page._text(low, "") in text


def test_the_page_is_data_alone(tables):
    text = anatomy_page.write(tables).read_text()
    assert "<b>sft</b>" not in text and "&lt;b&gt;sft&lt;/b&gt;" in text
    assert "ppo &amp; others" in text
    assert "<script" not in text and "default-src 'none'" in text
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
