"""Verdicts of people: what is shown, what is stored, what becomes of it."""

import json

import pytest

from stagecraft import storage
from stagecraft.data import readers, stage_data
from stagecraft.errors import UserError
from stagecraft.serve import agreement_report, label_records, labelling
from stagecraft.serve.items import Item, read
from stagecraft.serve.labelling import Labelling, schedule


def items(count):
    return [Item(f"q{i}", [(f"a{i}", True), (f"b{i}", False)]) for i in range(count)]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(tmp_path, clock):
    """(count, **settings) -> Labelling in one folder, closed at the end."""
    open_ = []

    def make(count=20, **settings):
        settings = dict(seed=1, repeats=0.25, clock=clock) | settings
        open_.append(Labelling(tmp_path / "l", items(count), **settings))
        return open_[-1]

    yield make
    for one in open_:
        one.close()


def side(showing, answer):
    """The choice that calls an answer better, where it stands in a showing."""
    return "first" if showing.shown[0] == answer else "second"


def test_what_a_rater_is_shown():
    plan = schedule([2] * 200, "ann", seed=0, repeats=0.2)
    once = [s for s in plan if not s.again]
    again = {s.item: (place, s) for place, s in enumerate(plan) if s.again}
    assert sorted(s.item for s in once) == list(range(200)) and len(again) == 40
    for place, showing in enumerate(plan):
        if not showing.again and showing.item in again:
            later, swapped = again[showing.item]
            assert later - place > labelling.APART or later == len(plan) - 1
            assert swapped.shown == showing.shown[::-1]
    assert 70 < sum(s.shown[0] for s in once) < 130
    assert plan == schedule([2] * 200, "ann", seed=0, repeats=0.2)
    assert plan != schedule([2] * 200, "bob", seed=0, repeats=0.2)
    assert plan != schedule([2] * 200, "ann", seed=1, repeats=0.2)


def test_the_records_are_a_function_of_the_journal(opened, tmp_path):
    first = opened(6, repeats=0.0)
    said = [("first", 3), ("second", None), ("tie", None), ("both_bad", 2), ("skip", 1)]
    by_item = {}
    for choice, strength in said:
        place, showing = first.next("ann", "tab")
        first.say("ann", place, choice, strength=strength, reason="r", seconds=1.234)
        by_item[showing.item] = (showing, choice)
    label_records.write(first)
    first.close()
    lines = (first.folder / "journal.jsonl").read_bytes()
    written = {p.name: p.read_bytes() for p in first.folder.glob("*.jsonl")}
    # Killed in the middle of a line: the line is asked again, the others are there.
    (first.folder / "journal.jsonl").write_bytes(lines[:-7])
    again = opened(6, repeats=0.0)
    assert again.progress("ann") == (4, 6)
    place, showing = again.next("ann", "tab")
    assert by_item[showing.item] == (showing, "skip")
    again.say("ann", place, "skip", strength=1, reason="r", seconds=1.234)
    label_records.write(again)
    assert written == {p.name: p.read_bytes() for p in first.folder.glob("*.jsonl")}

    rows = [json.loads(x) for x in written["records.jsonl"].splitlines()]
    rows = {int(row["prompt"][1:]): row for row in rows}
    unpaired = [json.loads(x) for x in written["unpaired.jsonl"].splitlines()]
    for number, (showing, choice) in by_item.items():
        texts = [f"a{number}", f"b{number}"]
        if choice in ("first", "second"):
            better = showing.shown[choice == "second"]
            row = rows[number]
            assert (row["chosen"], row["rejected"]) == (
                texts[better],
                texts[1 - better],
            )
            assert "preference" not in row
            assert row.get("margin") == (3 if choice == "first" else None)
            cut = "rejected_ended" if better == 0 else "chosen_ended"
            assert row[cut] is False  # and the other one ended
            assert sum(key.endswith("_ended") for key in row) == 1
        elif choice == "tie":
            assert rows[number]["preference"] == 0.5
        elif choice == "both_bad":
            assert sorted(one["completion"] for one in unpaired) == texts
            assert not any(one["label"] for one in unpaired)
    assert len(rows) == 3 and len(unpaired) == 2
    # Both are read as they are.
    spec = stage_data.locate("labels:sft", tmp_path)
    assert spec == str(tmp_path / "labels" / "sft" / "records.jsonl")
    pairs = readers.comparisons(str(first.folder / "records.jsonl"))
    assert sorted(p.preference or 0 for p in pairs) == [0, 0, 0.5]
    assert len(readers.judgements(str(first.folder / "unpaired.jsonl"))) == 2


def test_several_raters_are_averaged_and_repeats_count_once(opened):
    given = opened(20, repeats=1.0)
    # ann always prefers answer 0, also when it is shown again; bob does for even items.
    for rater in ("ann", "bob"):
        while (at := given.next(rater, "tab")) is not None:
            place, showing = at
            answer = 0 if rater == "ann" else showing.item % 2
            given.say(rater, place, side(showing, answer), strength=2)
    pairs, unpaired = label_records.of(given)
    assert len(pairs) == 20 and not unpaired
    for number, row in enumerate(pairs):
        if number % 2:
            assert (row["preference"], row["margin"]) == (0.5, 0.0)
        else:
            assert "preference" not in row and row["margin"] == 2.0
        assert row["chosen"] == f"a{number}" and row["raters"] == 2
    report = agreement_report.measure(given)
    assert report["raters"]["ann"]["self"]["share"] == 1.0
    assert report["raters"]["ann"]["self"]["n"] == 20
    assert report["pairs"][0]["n"] == 20 and report["pairs"][0]["kappa"] == 0.0


def test_who_says_it_twice_is_one_rater(opened):
    given = opened(6, repeats=1.0)
    for rater, answer in (("ann", 0), ("bob", 1)):
        for place, showing in enumerate(given.schedule(rater)):
            skipped = rater == "bob" and showing.again
            given.say(rater, place, "skip" if skipped else side(showing, answer))
    pairs, _ = label_records.of(given)
    assert [row["preference"] for row in pairs] == [0.5] * 6


@pytest.fixture
def ranked(tmp_path, clock):
    """Items of four answers, and one of two."""
    several = [Item(f"q{i}", [(f"{i}{j}", j > 0) for j in range(4)]) for i in range(6)]
    given = Labelling(
        tmp_path / "r", [*several, *items(1)], seed=1, repeats=1.0, clock=clock
    )
    yield given
    given.close()


def rank(given, rater, best_first, count):
    """Ranks items of four as a rater that likes answers in one order; ties the rest."""
    while (at := given.next(rater, rater)) is not None:
        place, showing = at
        if len(showing.shown) == 2:
            given.say(rater, place, "skip")
            continue
        order = [showing.shown.index(answer) for answer in best_first]
        given.say(rater, place, "rank", order=order[:count])


def test_a_ranking_is_all_its_pairs(ranked):
    rank(ranked, "ann", (2, 0, 3, 1), 2)  # 2, then 0, then 3 and 1 alike
    pairs, unpaired = label_records.of(ranked)
    assert len(pairs) == 6 * 6 and not unpaired
    first = {(p["chosen"], p["rejected"]): p.get("preference") for p in pairs[:6]}
    better = {("02", "00"), ("02", "03"), ("02", "01"), ("00", "03"), ("00", "01")}
    assert {pair for pair, tie in first.items() if tie is None} == better
    assert first[("01", "03")] == 0.5
    cut = {p["rejected"] for p in pairs if p.get("rejected_ended") is False}
    cut |= {p["chosen"] for p in pairs if p.get("chosen_ended") is False}
    assert cut == {f"{i}0" for i in range(6)}
    # Another one turns 2 and 0 round, and says nothing of the others.
    rank(ranked, "bob", (0, 2, 3, 1), 2)
    pairs, _ = label_records.of(ranked)
    rows = {(p["chosen"], p["rejected"]): p for p in pairs[:6]}
    assert rows[("00", "02")]["preference"] == 0.5
    assert rows[("00", "02")]["raters"] == 2 and "preference" not in rows[("02", "03")]


def test_agreement_on_rankings_is_that_of_their_pairs(ranked):
    rank(ranked, "ann", (2, 0, 3, 1), 3)
    rank(ranked, "bob", (2, 0, 1, 3), 3)
    report = agreement_report.measure(ranked)
    # Shown again in the reverse order: each of six pairs of six items, alike.
    own = report["raters"]["ann"]["self"]
    assert (own["count"], own["n"]) == (36, 36)
    labels = [report["pairs"][0], report["raters"]["ann"]["first"]]
    assert labels[0]["n"] == 36 and report["items"] == 36
    # Five of six pairs alike: p_o = 5/6, by both raters' frequencies.
    ours, theirs = {"0": 4 / 6, "1": 2 / 6}, {"0": 3 / 6, "1": 3 / 6}
    by_chance = sum(ours[x] * theirs[x] for x in ours)
    assert labels[0]["kappa"] == pytest.approx((5 / 6 - by_chance) / (1 - by_chance))
    assert labels[1]["n"] == 12 and labels[1]["count"] < 12
    assert report["alpha_interval"] == (report["alpha"],) * 2  # all items are alike


def test_what_is_no_ranking_is_refused(ranked):
    places = {len(s.shown): i for i, s in enumerate(ranked.schedule("ann"))}
    for size, choice, order, says in (
        (4, "first", None, "choice='first': of 4 answers"),
        (4, "rank", None, "order=None: expected different places from 0 to 3"),
        (4, "rank", [0, 0], "order=.*different"),
        (4, "rank", [4], "order=.*from 0 to 3"),
        (4, "rank", [True], "order="),
        (4, "rank", [], "order="),
    ):
        with pytest.raises(UserError, match=says):
            ranked.say("ann", places[size], choice, order=order)
    ranked.say("ann", places[4], "both_bad")
    _, unpaired = label_records.of(ranked)
    assert len(unpaired) == 4 and not any(row["label"] for row in unpaired)


def test_a_rater_who_takes_the_first_side_is_seen(opened):
    given = opened(40, repeats=0.5)
    while (at := given.next("lazy", "tab")) is not None:
        given.say("lazy", at[0], "first", seconds=2.0)
    row = agreement_report.measure(given)["raters"]["lazy"]
    assert row["first"]["share"] == 1.0 and row["first"]["low"] > 0.9
    assert (row["self"]["share"], row["self"]["n"]) == (0.0, 20)
    assert row["seconds"] == 2.0 and row["verdicts"] == 60


def test_two_tabs_hold_two_pairs_and_a_lease_ends(opened, clock):
    given = opened(3, repeats=0.0)
    one, _ = given.next("ann", "one")
    two, _ = given.next("ann", "two")
    assert {one, two} == {0, 1} and given.next("ann", "one")[0] == one
    given.say("ann", one, "tie")
    with pytest.raises(UserError, match="place 0 has a verdict of 'ann' already"):
        given.say("ann", one, "first")
    assert given.next("ann", "one")[0] == 2
    assert given.next("ann", "three") is None
    # Others have places of their own.
    assert given.next("bob", "three")[0] == 0
    clock.now += labelling.LEASE + 1
    assert given.next("ann", "three")[0] == two


def test_undo_takes_the_last_verdict_back(opened):
    given = opened(4, repeats=0.0)
    assert given.undo("ann", "tab") is None
    for _ in range(2):
        given.say("ann", given.next("ann", "tab")[0], "first")
    place, showing = given.undo("ann", "tab")
    assert (place, given.progress("ann")) == (1, (1, 4))
    given.say("ann", place, "both_bad")
    given.close()
    reopened = opened(4, repeats=0.0)
    said = {s.item: entry["choice"] for s, entry in reopened.verdicts("ann")}
    assert said[showing.item] == "both_bad" and len(said) == 2


def test_what_is_no_verdict_is_refused_and_not_stored(opened):
    given = opened(3)
    for place, choice, more, says in (
        (0, "better", {}, "choice='better': expected one of first, "),
        (99, "first", {}, "place=99: expected 0 to "),
        (None, "first", {}, "place=None: expected"),
        (0, "first", {"strength": 9}, "strength=9: expected 1, 2, 3"),
    ):
        with pytest.raises(UserError, match=says):
            given.say("ann", place, choice, **more)
    given.say("ann", 0, "first", reason="x" * 9999, seconds=float("nan"))
    entry = given.verdicts("ann")[0][1]
    assert len(entry["reason"]) == 2000 and entry["seconds"] is None
    assert len((given.folder / "journal.jsonl").read_text().splitlines()) == 2


def test_another_labelling_in_the_same_folder_is_refused(opened):
    opened(3)
    with pytest.raises(UserError, match="is the journal of something else .*items"):
        opened(4)


def test_pairs_of_a_file_are_shown_without_its_verdict(tmp_path):
    rows = [
        {"prompt": f"q{i}", "chosen": "same" if i == 2 else f"a{i}", "rejected": "same"}
        for i in range(4)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(str(path))
    assert len(found) == 3  # one was identical
    shown = labelling.as_json(found[0], labelling.Showing(0, (1, 0), False))
    assert [a["text"] for a in shown["answers"]] == ["same", "a0"]
    assert set(shown) == {"prompt", "answers"}
    assert storage.digest(shown)
