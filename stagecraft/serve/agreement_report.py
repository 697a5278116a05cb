"""What a labelling shows of its raters: agreement, sides, time."""

import itertools
import statistics

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagecraft import storage
from stagecraft.anatomy import agreement
from stagecraft.serve import labelling

FILE = "report.json"


def measure(given: labelling.Labelling) -> dict:
    """Returns how raters agree with themselves and with one another.

    Returns:
        {"raters": {name: {"verdicts", "ties", "both_bad", "skips", "first" (how often
        what stood first was the better one, of decided verdicts), "self" (how often a
        pair shown again got the same verdict), "seconds" (the median)}}, "pairs":
        [{"raters", "n", "kappa"}], "alpha", "alpha_interval", "items"}; the shares as
        {"count", "n", "share", "low", "high"} with their Wilson intervals.
    """
    raters = {name: _rater(given.verdicts(name)) for name in given.raters()}
    firsts = {name: _labels(given.verdicts(name)) for name in raters}
    numbers = range(len(given.items))
    pairs = []
    for one, other in itertools.combinations(raters, 2):
        ours, theirs = ([firsts[r].get(i) for i in numbers] for r in (one, other))
        both = sum(None not in pair for pair in zip(ours, theirs, strict=True))
        kappa = agreement.cohen(ours, theirs)
        pairs.append({"raters": [one, other], "n": both, "kappa": kappa})
    table = [[firsts[name].get(i) for name in raters] for i in numbers]
    several = sum(sum(label is not None for label in row) > 1 for row in table)
    out = {"raters": raters, "pairs": pairs, "items": several}
    out["alpha"] = agreement.krippendorff(table)
    known = out["alpha"] is not None
    out["alpha_interval"] = agreement.over_items(table) if known else None
    return out


def _rater(verdicts):
    choices = [entry["choice"] for _, entry in verdicts]
    decided = [c for c in choices if c in ("first", "second")]
    seconds = [e["seconds"] for _, e in verdicts if e["seconds"] is not None]
    before, same, again = {}, 0, 0
    for showing, entry in verdicts:
        label = _label(entry)
        if label is None:
            continue
        if showing.item in before:
            again += 1
            same += before[showing.item] == label
        before.setdefault(showing.item, label)
    return {
        "verdicts": len(verdicts),
        "ties": choices.count("tie"),
        "both_bad": choices.count("both_bad"),
        "skips": choices.count("skip"),
        "first": agreement.rate(decided.count("first"), len(decided))._asdict(),
        "self": agreement.rate(same, again)._asdict(),
        "seconds": statistics.median(seconds) if seconds else None,
    }


def _labels(verdicts):
    """Returns {item: the first verdict on it}, skips left out."""
    out = {}
    for showing, entry in verdicts:
        label = _label(entry)
        if label is not None:
            out.setdefault(showing.item, label)
    return out


def _label(entry):
    """Returns which answer a verdict says is better, whatever side it stood on."""
    if entry["choice"] in ("tie", "both_bad"):
        return entry["choice"]
    chance = labelling.chance(entry)
    return None if chance is None else ("answer 0" if chance == 1 else "answer 1")


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
