"""The page of verdicts: what it says first, where marks stand, and data as data."""

import re

import pytest

from stagecraft import claims_lab
from stagecraft.anatomy import claims
from stagecraft.report import claims_page
from tests.report import fake_run


def asked(values, controls=(), **changes):
    header = dict(name="mine", number=1, claim="b is above a", source="nobody")
    header |= dict(primary="b.x - a.x", effect=0.5, control="a itself")
    claim = claims.Claim(**header | changes)
    outcome = claims.decide(claim, values, controls)
    return claims_lab.Asked(claim, [*values], [*controls], outcome, "0123456789abc", 3)


def test_the_first_sentence_counts_verdicts(tmp_path):
    table = [
        asked([1.5, 1.6, 1.4], [0.1, 0.2, 0.1]),
        asked([0.1, 0.2, 0.1], number=2),
        asked([0.5, 0.9, 0.4], number=3),
    ]
    path = claims_page.write(tmp_path, table, 3)
    text = path.read_text()
    assert "Of 3 claims over 3 seeds: 1 holds, 1 refuted, 1 undecided." in text
    assert re.search(r"\d+ seeds would do", text)
    assert "by seed 1.50, 1.60, 1.40" in text and "0123456789ab;" in text
    assert text.count('<circle class="seed"') == 9
    assert text.count('<circle class="control"') == 3


def test_what_was_measured_besides_is_shown_as_such(tmp_path):
    also = {"rl.peak": (1.25, 0.5), "rl.<b>": (2.0, None)}
    one = asked([1.5, 1.6, 1.4])._replace(also=also)
    text = claims_page.write(tmp_path, [one], 3).read_text()
    assert "Measured as well: 2 figures of which nothing was stated before" in text
    row = '<th scope="row"><code>rl.peak</code></th><td>1.25</td><td>0.500</td>'
    assert row in text and "rl.&lt;b&gt;" in text
    assert (
        "Measured as well"
        not in claims_page.write(tmp_path, [asked([1.5, 1.6, 1.4])], 3).read_text()
    )


def test_marks_stand_where_the_numbers_are():
    one = asked([1.0, 2.0, 3.0], [0.0, 0.5, -1.0])
    shown = claims_page.picture(one.claim, one.outcome, one.values, one.controls)
    low, high = min(one.outcome.low, -1.0), max(one.outcome.high, 3.0)

    def place(x):
        inner = claims_page.WIDTH - 2 * claims_page.PAD
        return pytest.approx(
            claims_page.PAD + inner * (x - low) / (high - low), abs=0.1
        )

    assert shown["values"] == [place(x) for x in one.values]
    assert shown["controls"] == [place(x) for x in one.controls]
    assert shown["zero"] == place(0) and shown["effects"] == [place(0.5)]
    assert shown["low"] == place(one.outcome.low)
    alike = asked([0.1, 0.0, 0.05], alike=True)
    shown = claims_page.picture(alike.claim, alike.outcome, alike.values, [])
    assert len(shown["effects"]) == 2
    assert claims_page.picture(one.claim, one.outcome, [], []) is None


def test_words_of_a_claim_are_data(tmp_path):
    hostile = asked([1.5, 1.6, 1.4], claim="<script>alert(1)</script>", checks=("a<b",))
    text = claims_page.write(tmp_path, [hostile], 3).read_text()
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    fake_run.check_scripts(text)
    assert "<code>a&lt;b</code>" in text


def test_the_table_of_a_page_of_results():
    held, open_ = asked([1.5, 1.6, 1.4], [0.1, 0.2, 0.1]), asked([0.5, 0.9, 0.4])
    head, rule, first, second = claims_page.markdown([held, open_]).splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == 6
    assert "**holds**" in first and "1.50 (1.25 to 1.75); beyond 0.5?" in first
    assert first.endswith("| 0.133 |")
    assert "**undecided**: " in second and "seeds would do" in second
