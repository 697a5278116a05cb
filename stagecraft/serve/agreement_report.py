"""What a labelling shows of its raters: agreement, sides, time."""

import itertools
import statistics

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagecraft import storage
from stagecraft.anatomy import agreement
from stagecraft.serve import label_records, labelling

FILE = "report.json"


def measure(given: labelling.Labelling) -> dict:
    """Returns how raters agree with themselves and with one another.

    What is agreed on is a pair of answers; a ranking says something of each of its
    pairs.

    Returns:
        {"raters": {name: {"verdicts", "ties", "both_bad", "skips", "first" (how often
        what stood first was the better one, or the best, of decided verdicts), "self"
        (how often a pair shown again got the same verdict), "seconds" (the median)}},
        "pairs": [{"raters", "n", "kappa"}], "alpha", "alpha_interval" (over items drawn
        with replacement), "items" (pairs with several raters)}; the shares as {"count",
        "n", "share", "low", "high"} with their Wilson intervals, those of rankings as
        if their pairs were independent.
    """
    raters = {name: _rater(given.verdicts(name)) for name in given.raters()}
    firsts = {name: _labels(given.verdicts(name)) for name in raters}
    keys = sorted({key for labels in firsts.values() for key in labels})
    pairs = []
    for one, other in itertools.combinations(raters, 2):
        ours, theirs = ([firsts[r].get(key) for key in keys] for r in (one, other))
        both = sum(None not in pair for pair in zip(ours, theirs, strict=True))
        kappa = agreement.cohen(ours, theirs)
        pairs.append({"raters": [one, other], "n": both, "kappa": kappa})
    table = [[firsts[name].get(key) for name in raters] for key in keys]
    several = sum(sum(label is not None for label in row) > 1 for row in table)
    out = {"raters": raters, "pairs": pairs, "items": several}
    out["alpha"] = agreement.krippendorff(table)
    known, items = out["alpha"] is not None, [key[0] for key in keys]
    out["alpha_interval"] = agreement.over_items(table, items) if known else None
    return out


def _rater(verdicts):
    choices = [entry["choice"] for _, entry in verdicts]
    best = [_best(entry) for _, entry in verdicts]
    decided = [place for place in best if place is not None]
    seconds = [e["seconds"] for _, e in verdicts if e["seconds"] is not None]
    before, same, again = {}, 0, 0
    for showing, entry in verdicts:
        for key, label in _pairs(showing, entry):
            if key in before:
                again += 1
                same += before[key] == label
            before.setdefault(key, label)
    return {
        "verdicts": len(verdicts),
        "ties": choices.count("tie"),
        "both_bad": choices.count("both_bad"),
        "skips": choices.count("skip"),
        "first": agreement.rate(decided.count(0), len(decided))._asdict(),
        "self": agreement.rate(same, again)._asdict(),
        "seconds": statistics.median(seconds) if seconds else None,
    }


def _best(entry):
    """Returns the place, as shown, of the answer that is better than all others."""
    if entry["choice"] == "rank":
        return entry["order"][0]
    return {"first": 0, "second": 1}.get(entry["choice"])


def _labels(verdicts):
    """Returns {(item, answer, answer): the first verdict on it}, skips left out."""
    out = {}
    for showing, entry in verdicts:
        for key, label in _pairs(showing, entry):
            out.setdefault(key, label)
    return out


def _pairs(showing, entry):
    """Yields ((item, answer, answer), what a verdict says) of each pair it is about."""
    for one, two in itertools.combinations(range(len(showing.shown)), 2):
        chance = label_records.chance(entry, one, two)
        if entry["choice"] == "both_bad":
            yield (showing.item, one, two), "both_bad"
        elif chance is not None:
            yield (showing.item, one, two), f"{chance:g}"


def show(given: labelling.Labelling, lines: dict[str, int]) -> None:
    """Writes report.json and prints it.

    Args:
        given: the labelling.
        lines: {file: how many records it holds}.
    """
    report = measure(given)
    storage.write_json(given.folder / FILE, report)
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("rater", overflow="fold")
    heads = ("verdicts", "ties", "both bad", "skips", "first side", "with itself", "s")
    for head in heads:
        table.add_column(head, justify="right")
    for name, row in report["raters"].items():
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.1f}"
        counts = [str(row[key]) for key in ("verdicts", "ties", "both_bad", "skips")]
        shares = [_share(row["first"]), _share(row["self"])]
        table.add_row(*map(Text, (name, *counts, *shares, seconds)))
    if report["raters"]:
        console.print(table)
    for pair in report["pairs"]:
        names = " and ".join(pair["raters"])
        kappa = "is not defined" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        console.print(Text(f"{names}: {pair['n']} pairs in common, Cohen's κ {kappa}"))
    if report["alpha"] is not None:
        low, high = report["alpha_interval"] or (float("nan"),) * 2
        console.print(
            f"Krippendorff's α {report['alpha']:.2f} ({low:.2f} to {high:.2f}) over "
            f"{report['items']} pairs"
        )
    for name, count in lines.items():
        print(f"{count} in {given.folder / name}")


def _share(rate):
    if rate["share"] is None:
        return "–"
    return f"{rate['share']:.0%} ({rate['low']:.0%}–{rate['high']:.0%})"
