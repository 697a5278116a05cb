"""What each step did to how much, from which source, and examples of it.

Each task of each step writes a tally of its own, whole, when it is done; added up in
the order of the tasks they are the same however many workers there were.
"""

from pathlib import Path

from stagecraft import storage
from stagecraft.curate import personal

_SHOWN = 600  # characters of an example
_LOOKED_AT = 100_000  # of its text, so that none that is cut off is half a secret


class Tally:
    """Counts of one step in one task, or of a whole step.

    Args:
        limit: examples kept of each reason.

    Attributes:
        flow: {source: [documents in, characters in, documents out, characters out]}.
        removed: {reason: {source: [documents, characters]}}.
        changed: {what: {source: [documents, times]}}.
        examples: {reason: [{"where", "text", "note", ...}]}.
    """

    def __init__(self, limit):
        self.limit = limit
        self.flow, self.removed, self.changed, self.examples = {}, {}, {}, {}

    def took(self, source, text):
        """Counts a document that comes in."""
        _add(self.flow, source, [1, len(text), 0, 0])

    def passed(self, source, text):
        """Counts a document that goes on, with this text."""
        _add(self.flow, source, [0, 0, 1, len(text)])

    def dropped(self, source, text, reason, **about):
        """Counts a document that is removed; its example gets `about`: where, note."""
        _add(self.removed.setdefault(reason, {}), source, [1, len(text)])
        self._example(reason, text, about)

    def altered(self, source, what, times):
        """Counts how often something in a document was changed."""
        _add(self.changed.setdefault(what, {}), source, [1, times])

    def save(self, folder, rank):
        """Writes the tally of a task."""
        parts = [self.flow, self.removed, self.changed, self.examples]
        storage.write_json(Path(folder) / f"{rank:05d}.json", parts)

    def add(self, parts):
        """Adds what `save` wrote."""
        flow, removed, changed, examples = parts
        for source, counts in flow.items():
            _add(self.flow, source, counts)
        for mine, theirs in ((self.removed, removed), (self.changed, changed)):
            for reason, sources in theirs.items():
                for source, counts in sources.items():
                    _add(mine.setdefault(reason, {}), source, counts)
        for reason, more in examples.items():
            own = self.examples.setdefault(reason, [])
            own += more[: self.limit - len(own)]

    def total(self):
        """Returns [documents in, characters in, documents out, characters out]."""
        columns = zip([0] * 4, *self.flow.values(), strict=True)
        return [sum(column) for column in columns]

    def removed_from(self):
        """Returns {source: documents removed}."""
        removed = {}
        for sources in self.removed.values():
            for source, (documents, _) in sources.items():
                removed[source] = removed.get(source, 0) + documents
        return removed

    def _example(self, reason, text, about):
        examples = self.examples.setdefault(reason, [])
        if len(examples) < self.limit:
            if "note" in about:
                about["note"] = shown(about["note"])
            examples.append({**about, "text": shown(text)})


def shown(text):
    """Returns the beginning of a text for the page, personal data replaced.

    Also where the text itself keeps it, and where it was removed: a page is passed on.
    """
    text, _ = personal.scrub(text[:_LOOKED_AT])
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def merged(folder, tasks, limit):
    """Returns the Tally of a step over all its tasks."""
    total = Tally(limit)
    for rank in range(tasks):
        total.add(storage.read_json(Path(folder) / f"{rank:05d}.json"))
    return total


def _add(table, key, counts):
    old = table.get(key, [0] * len(counts))
    table[key] = [a + b for a, b in zip(old, counts, strict=True)]
