"""The records that verdicts of people come to: a function of the journal alone.

records.jsonl    {"prompt", "chosen", "rejected"}: one verdict a pair, the mean of
                 its raters', with "preference" where it is not certain (a tie is
                 .5) and "margin" where strength was given; a ranking is all its
                 pairs
unpaired.jsonl   {"prompt", "completion", "label": false}: the answers of items that
                 most of their raters call bad
"""

import collections
import itertools
import statistics

from stagecraft.serve.labelling import Labelling
from stagecraft.stages import records

UNPAIRED = "unpaired.jsonl"


def write(given: Labelling) -> dict[str, int]:
    """Writes records.jsonl and unpaired.jsonl, each whole; returns their lines."""
    pairs, unpaired = of(given)
    records.write(given.folder, pairs)
    records.write(given.folder, unpaired, UNPAIRED)
    return {records.RECORDS: len(pairs), UNPAIRED: len(unpaired)}


def of(given: Labelling) -> tuple[list[dict], list[dict]]:
    """Returns the pairs and the judged answers of all verdicts, by item."""
    by_item = collections.defaultdict(lambda: collections.defaultdict(list))
    for rater in given.raters():
        for showing, entry in given.verdicts(rater):
            by_item[showing.item][rater].append(entry)
    pairs, unpaired = [], []
    for number in sorted(by_item):
        item, said = given.items[number], list(by_item[number].values())
        compared = [
            entries for entries in said if any(ranks(e) is not None for e in entries)
        ]
        bad = sum(_all_bad(entries) for entries in said)
        source = {"signal": "people", "raters": len(compared) + bad}
        source |= {"generator": given.generator} if given.generator else {}
        if bad and bad >= len(compared):
            unpaired += [
                {"prompt": item.prompt, "completion": text, "label": False} | source
                for text, _ in item.answers
            ]
        elif compared:
            for one, two in itertools.combinations(range(len(item.answers)), 2):
                pairs.append(_record(item, one, two, compared) | source)
    return pairs, unpaired


def ranks(entry: dict) -> list[int] | None:
    """Returns the rank of each answer by its number, 0 for the best, ties alike.

    None where the verdict does not compare them.

    >>> ranks({"choice": "rank", "shown": [2, 0, 1], "order": [1]})
    [0, 1, 1]
    """
    shown, choice = entry["shown"], entry["choice"]
    order = {"first": [0], "second": [1], "tie": []}.get(choice, entry.get("order"))
    if order is None:
        return None
    out = [len(order)] * len(shown)
    for rank, place in enumerate(order):
        out[shown[place]] = rank
    return out


def chance(entry: dict, one: int, two: int) -> float | None:
    """Returns what a verdict says of two answers: 1 where `one` is better, .5, 0, None.

    Args:
        entry: of the journal.
        one, two: numbers of answers.
    """
    places = ranks(entry)
    if places is None:
        return None
    return 0.5 + 0.5 * ((places[one] < places[two]) - (places[one] > places[two]))


def _all_bad(entries):
    """Whether a rater calls an item bad, each time but for skips."""
    bad = any(entry["choice"] == "both_bad" for entry in entries)
    return bad and not any(ranks(e) is not None for e in entries)


def _record(item, one, two, compared):
    """Returns the record of two answers: the mean of what each rater says on average.

    Args:
        compared: of each rater the verdicts on the item, one at least compares.
    """
    chances, strengths = [], []
    for entries in compared:
        of_one = [c for e in entries if (c := chance(e, one, two)) is not None]
        chances.append(statistics.fmean(of_one))
        signed = [
            entry["strength"] * (1 if chance(entry, one, two) == 1 else -1)
            for entry in entries
            if entry["strength"]
        ]
        strengths += [statistics.fmean(signed)] if signed else []
    probability = statistics.fmean(chances)
    better, worse = (one, two) if probability >= 0.5 else (two, one)
    sides = (("chosen", item.answers[better]), ("rejected", item.answers[worse]))
    record = {"prompt": item.prompt, **{side: text for side, (text, _) in sides}}
    certain = record["probability"] = max(probability, 1 - probability)
    if certain < 1:
        record["preference"] = certain
    if strengths:
        margin = statistics.fmean(strengths) * (1 if better == one else -1)
        record["margin"] = max(margin, 0.0)
    for side, (_, ended) in sides:
        if not ended:  # an answer that was cut off is not learned as one that ended
            record[f"{side}_ended"] = False
    return record
