"""`stagecraft judge`: a file of pairs is judged and measured, and faults are named."""

import json

import pytest

from stagecraft import defaults, judging
from stagecraft.anatomy import bias, verdicts
from stagecraft.errors import UserError
from stagecraft.report import terminal
from stagecraft.signals.template import Answered

PAIRS = [
    {"prompt": f"p{i}", "chosen": "good " * (1 + i % 4), "rejected": "bad " * (2 + i)}
    for i in range(150)
]


class Fake:
    """Likes "good" by 1 nat, ten more words by as much, and the first slot by .5."""

    identity = "fake"

    def __init__(self, stop=10_000):
        self.asked, self.stop = [], stop

    def check(self, asks):
        pass

    def answer(self, asks, questions, thinks):
        self.asked += questions
        if len(self.asked) > self.stop:
            raise KeyboardInterrupt
        return [self._one(*texts) for _, texts in questions]

    def _one(self, one, two):
        if "bad" in one and len(one.split()) == 21:
            return Answered(reason="refused")
        logit = ("good" in one) - ("good" in two) + 0.5
        logit += (len(one.split()) - len(two.split())) / 10
        return Answered((0.0, -logit), tokens=2)


def ask(folder, monkeypatch, fake, **changes):
    monkeypatch.setattr(judging, "_asked", lambda *_: fake)
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    settings, persuasion = defaults.judge(), changes.pop("persuasion", 0)
    settings.update(dict(url="http://127.0.0.1/v1") | changes)
    return judging.ask(source, folder / "out.jsonl", "", settings, persuasion)


def test_a_file_is_judged_and_its_judge_measured(tmp_path, monkeypatch, capsys):
    fake = Fake()
    counts = ask(tmp_path, monkeypatch, fake)
    assert counts == {"pairs": 149, "unrated": 1, "tokens": 2 * 2 * 149 + 2}
    rows = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row in rows:
        assert ("good" in row["chosen"]) == (row["gold"] == "chosen")
        assert ("good" in row["rejected"]) == (row["gold"] == "rejected")
    firsts = [row["first"] == row["gold"] for row in rows]
    assert 0.3 < sum(firsts) / len(firsts) < 0.7  # the gold answer's side is drawn
    read = verdicts.read(tmp_path / "out.jsonl")
    figures = bias.measure(read)
    assert len(read) == 150 and figures["abstained"].value == pytest.approx(1 / 150)
    assert figures["slot_bias"].value == pytest.approx(0.5)
    right = [1 + (1 + i % 4 - 2 - i) / 10 > 0 for i in range(150) if i != 19]
    assert figures["accuracy"].value == pytest.approx(sum(right) / 149)
    terminal.show_bias(figures)
    assert "slot_bias" in capsys.readouterr().out


def test_a_worse_answer_that_pleads(tmp_path, monkeypatch):
    ask(tmp_path, monkeypatch, Fake(), persuasion=40)
    rows = verdicts.read(tmp_path / "out.jsonl")
    figures = bias.measure(rows)
    # As many words win more nats than "good" does; it has no answer to 21 words.
    words = len(judging.PERSUASION.split())
    right = [i for i in range(40) if 1 + (i % 4 - 1 - i) / 10 > 0 and 2 + i != 21]
    again = [i for i in right if 2 + i + words != 21]
    assert (len(right), len(again)) == (12, 11) and words > 10
    assert figures["persuaded"].value == 1.0 and figures["persuaded"].count == 11
    # What it answers under pleading is no part of any other figure.
    plain = [row for row in rows if not row.persuades]
    assert len(plain) == 150 and len(rows) == 190
    assert bias.measure(plain) == {
        name: one for name, one in figures.items() if name != "persuaded"
    }


def test_killed_it_asks_nothing_twice(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    ask(whole, monkeypatch, Fake())
    with pytest.raises(KeyboardInterrupt):
        ask(cut, monkeypatch, Fake(stop=200))
    assert not (cut / "out.jsonl").exists()
    again = Fake()
    ask(cut, monkeypatch, again)
    done = 200 // (2 * judging.BATCH) * judging.BATCH
    assert done > 0 and len(again.asked) == 2 * (150 - done)
    for name in ("out.jsonl", "out_unrated.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_person_and_a_world(tmp_path):
    france = {"prompt": "What is the capital of France?"}
    told = [
        ("The capital of France is Paris.", "It is Rome.", {"first": "chosen"}),
        ("It is Rome.", "It is Paris.", {"first": "rejected"}),
        ("It is Rome.", "It is Oslo.", {}),
    ]
    rows = [france | {"chosen": one, "rejected": two} | more for one, two, more in told]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = verdicts.read(path, "countries")
    figures = bias.measure(read)
    assert [row.gold for row in read] == [0, 0, None]
    assert figures["accuracy"].value == 0.5 and figures["accuracy"].count == 2
    assert figures["first_slot"].value == pytest.approx(2 / 3)
    assert "slot_bias" not in figures


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no pair"),
        ("{", ":1: not a line of JSON"),
        ("[1]", ":1: expected an object"),
        ('{"chosen": "a"}', ":1: rejected: is missing"),
        ('{"chosen": "a", "rejected": "b", "probability": 2}', "probability=2"),
        ('{"chosen": "a", "rejected": "b", "first": "left"}', "first='left': expected"),
        (
            '{"chosen": "a", "rejected": "b", "logps": [[1]]}',
            "one or two orders of two",
        ),
        ('{"chosen": "a", "rejected": "b", "logps": [[NaN, 0]]}', "one or two orders"),
        ('{"chosen": "a", "rejected": "b", "preference": 0.5}', "holds ties alone"),
    ],
)
def test_files_that_say_nothing_are_refused_in_one_line(tmp_path, text, says):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        verdicts.read(path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_finished_stage_judges(tiny_run, tmp_path):
    template = tmp_path / "short.toml"
    template.write_text('question = "{prompt} {first} {second}"\nlabels = ["A", "B"]\n')
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:3]))
    settings = defaults.judge()
    settings.update(template=str(template), min_mass=0.0, batch_size=4)
    out = tmp_path / "out.jsonl"
    counts = judging.ask(source, out, str(tiny_run / "sft"), settings)
    assert counts["pairs"] == 3 and counts["tokens"] > 0
    figures = bias.measure(verdicts.read(out))
    assert figures["order_gap"].value >= 0


def test_settings_and_judges_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="judge.combine='mean': expected one of"):
        ask(tmp_path, monkeypatch, Fake(), combine="mean")
    monkeypatch.undo()
    with pytest.raises(UserError, match="--judge=nothing: expected hf:FOLDER or"):
        judging._asked("nothing", defaults.judge(), tmp_path / "o", None)
