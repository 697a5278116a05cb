"""The end of a run on the terminal: eight figures, stages across, and a verdict."""

import io

from stagecraft.report import terminal
from stagecraft.report.notebook import Summary

WIDTH = 80
STAGES = ["pretrain", "sft", "dpo", "reward", "ppo", "ppo_hard", "sft_scratch"]
FIGURES = [
    "heldout_accuracy",
    "gold_win_rate",
    "pair_accuracy",
    "gold_mean",
    "reward_mean",
    "kl",
    "length",
    "cloze_accuracy",
    "words",
    "entropy",
]


def shown(summary, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    out = io.StringIO()
    terminal.show_summary(summary, file=out)
    return out.getvalue()


def summary(**more):
    stages = {name: dict.fromkeys(FIGURES, -1.5) for name in STAGES}
    return stages | {"comparisons": {}, "seconds": {"total": 312.4}} | more


def test_stages_are_columns_of_one_table_that_fits(monkeypatch):
    lines = shown(summary(), monkeypatch).splitlines()
    assert max(map(len, lines)) <= WIDTH
    rows = [line for line in lines if "−1.5" in line and "after" not in line]
    assert len(rows) == 8
    assert all(line.split()[-7:] == [rows[0].split()[-1]] * 7 for line in rows[:5])
    assert rows[0].lstrip().startswith("Held-out accuracy ↑")
    assert not any("Words" in line or "comparisons" in line for line in lines)


def test_more_stages_than_fit_are_several_tables(monkeypatch):
    many = {f"stage{number}": {"kl": 1.0} for number in range(12)}
    text = shown(many, monkeypatch)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(name in text for name in many)
    assert text.count("KL") == 2


def test_the_verdict_is_the_last_line(monkeypatch):
    bounds = {
        "ppo.gold_mean": {"must": "> sft.gold_mean", "short": "> 1", "holds": True},
        "seconds.total": {"must": "≤ 1", "short": "≤ 1", "holds": False},
    }
    text = " ".join(shown(summary(bounds=bounds), monkeypatch).split())
    end = "1 of 1 bounds hold: held-out accuracy −1.500 after pretrain;"
    assert end in text and text.endswith("312 s. Seconds total must be ≤ 1.")
    bounds["ppo.gold_mean"]["holds"] = False
    text = " ".join(shown(summary(bounds=bounds), monkeypatch).split())
    failed = "1 of 1 bounds does not hold: Gold score of ppo is −1.500, must be > 1."
    assert failed in text


def test_a_run_without_figures_says_what_it_was(monkeypatch):
    text = shown({"sft": {}, "seconds": {"total": 3.0}}, monkeypatch)
    assert text.strip() == "1 stage (sft). 3 s."
    text = shown({"sft": {"mine": 2.0}, "seconds": {"total": 3.0}}, monkeypatch)
    assert "mine" in text and "2.000" in text


def test_a_notebook_shows_the_same_as_a_table_and_all_of_it_as_data(tmp_path):
    one = Summary({"<b>": {"kl": 0.25}, "dpo": {"kl": 1.5, "<i>": 2.0}}, tmp_path)
    page = one._repr_html_()
    heads = "".join(
        f'<th style="text-align:right">{h}</th>' for h in ("&lt;b&gt;", "dpo")
    )
    assert heads in page and "<b>" not in page and "<i>" not in page
    kl, own = page.split("<tbody>")[1].split("</tr>")[:2]
    assert kl.split(">")[2:] and [kl.count(t) for t in (">0.25", ">1.5")] == [1, 1]
    # What a stage lacks is an empty cell.
    assert '"></td>' in own and ">2.000<" in own
    assert f"<code>{tmp_path / 'report.html'}</code>" in page
    assert one == {"<b>": {"kl": 0.25}, "dpo": {"kl": 1.5, "<i>": 2.0}}


def test_the_table_of_an_experiment_has_its_figures_with_intervals(monkeypatch):
    own = {
        "harmless": 0.8,
        "heldout_accuracy": 1.0,
        "gold_win_rate": 0.5,
        "kl": 2.0,
        "n": {"harmless": 10, "heldout_accuracy": 20, "gold_win_rate": 40, "kl": 40},
        "draws": {"count": 2, "standard_error": {"gold_win_rate": 0.1}},
    }
    table = ["gold_win_rate", "harmless", "heldout_accuracy", "kl", "gflops"]
    cost = {"dpo": {"flops": 3.25e12, "share": 0.1}}
    stages, rows = terminal.summary_rows({"dpo": own, "cost": cost, "table": table})
    texts = {title: cells["dpo"] for title, cells in rows}
    assert stages == ["dpo"] and list(texts.values()) == [
        "0.500",  # sampled: its error is that over draws
        "0.800\n0.49–0.94",  # Wilson
        "1.000\n0.84–1.00",
        "2.00",
        "3,250",
    ]
    _, rows = terminal.summary_rows({"dpo": own, "cost": cost})
    assert "0.800" in [cells["dpo"] for _, cells in rows]
