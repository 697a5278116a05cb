"""What becomes of a stage's records: read, used, cut, dropped, and why.

One rule for demonstrations, pairs, judged completions and prompts:

    data.bad         a record that is not what it should be: "refuse" or "drop"
    data.too_long    a row that is longer than it may be: "drop", "cut" or "refuse"
    data.max_loss    the share that may be lost; a stage that loses more is refused

One line a stage says it, and stage.json keeps it.
"""

import collections
import logging
import re

from stagecraft import schema
from stagecraft.data import containers
from stagecraft.errors import UserError

BAD = ("refuse", "drop")
TOO_LONG = ("drop", "cut", "refuse")
CONTROL_TOKENS = ("literal", "parse")
RENDER = ("chat", "text")
# Reasons that are named each; the others are summed up.
_NAMED = 4
_log = logging.getLogger("stagecraft.data")


class Tally:
    """Counts the records of a stage by what becomes of them.

    Args:
        data: the stage's data config; without one, what is bad is refused.

    Attributes:
        what: what is counted: "demonstrations", "pairs", "answers", "prompts".
        limit: the key that limits lengths, with its value: "data.length=64".
        read: of them, all that the files hold.
        dropped: {reason: count}.
        first: {reason: FILE:LINE of the first}.
        cut: how many lost their end, or a prompt its beginning.
        longest: tokens of the longest, before any cut.
        targets, lost: tokens to learn from in all that was read, and lost of them.
        unread: {key: records where it holds something that is not read}.
        notes: {what else was done: count}.
        recognised: (path, records, what they are) of each file of records.
    """

    def __init__(self, data=None):
        self.data, self.what, self.limit = data, "records", ""
        self.read = self.cut = self.longest = self.targets = self.lost = 0
        self.dropped, self.first = collections.Counter(), {}
        self.unread, self.notes = collections.Counter(), collections.Counter()
        self.recognised = []

    # -- counting ----------------------------------------------------------------------

    @property
    def drops_bad(self) -> bool:
        return self.data is not None and self.data.bad == "drop"

    def bad(self, where, message):
        """Counts a record that is not what it should be, or refuses it."""
        message = message.removeprefix(f"{where}: ")
        if not self.drops_bad:
            more = "" if self.data is None else "; or data.bad='drop' leaves such out"
            raise UserError(f"{where}: {message}{more}")
        self.read += 1
        self.drop(_reason(message), where)

    def unwritten(self, where, error, count=1):
        """Counts a record that its chat template refuses, or refuses it too."""
        if not self.drops_bad:
            line = f"{where}: {error}" if where else str(error)
            raise UserError(line) from error
        self.drop(_reason(str(error)), where, count)

    def drop(self, reason, where="", count=1):
        if count:
            self.dropped[reason] += count
            self.first.setdefault(reason, where)

    def seen(self, record, used, *, only=(), units=1):
        """Counts a record that was read, and its keys that were not.

        Args:
            record: as the file has it.
            used: keys that were read.
            only: of which keys it matters that they were not; () for all.
            units: how many of `what` it holds.
        """
        self.read += units
        for key, value in record.items():
            empty = value is None or value == "" or value == [] or value == {}
            if not empty and key not in used and (not only or key in only):
                self.unread[key] += 1

    def fit(self, documents, length, where="", count=1):
        """Returns the sequences of a row as `data.too_long` has them; None to drop it.

        Args:
            documents: (ids, mask) of each sequence.
            length: tokens that each may have.
            where: FILE:LINE of its record.
            count: how many of `what` the row stands for.
        """
        longest = max(len(ids) for ids, _ in documents)
        targets = sum(sum(mask) for _, mask in documents)
        self.longest = max(self.longest, longest)
        self.targets += targets
        if longest <= length:
            return documents
        if self.data.too_long == "refuse":
            raise UserError(
                f"{where or 'data.files'}: has {longest} tokens, but data.length="
                f"{length}; raise it, or say what to do with what is longer by "
                "data.too_long='drop' or 'cut'"
            )
        reason = "too long"
        if self.data.too_long == "cut":
            cut = tuple((ids[:length], mask[:length]) for ids, mask in documents)
            alike = len(cut) > 1 and any(
                a[0] == b[0] for i, a in enumerate(cut) for b in cut[:i]
            )
            if not alike and all(any(mask) for _, mask in cut):
                self.cut += count
                self.lost += targets - sum(sum(mask) for _, mask in cut)
                return cut
            reason = "alike once cut" if alike else "no target left once cut"
        self.lost += targets
        self.drop(reason, where, count)
        return None

    def short(self, longest, targets):
        """Counts rows that fit: their longest sequence, and what they teach."""
        self.longest = max(self.longest, int(longest))
        self.targets += int(targets)

    def kept_beside(self, paths) -> dict:
        """Returns what was counted of files, as JSON values to keep beside their ids.

        Args:
            paths: the files; what is kept names them by their numbers.
        """
        names = ("read", "dropped", "unread", "notes")
        values = {name: value for name in names if (value := getattr(self, name))}
        numbers = {str(path): number for number, path in enumerate(paths)}
        first = {k: list(place(w, numbers)) for k, w in self.first.items()}
        files = [[numbers[str(p)], *rest] for p, *rest in self.recognised]
        return values | {"first": first, "recognised": files}

    def add(self, beside, paths):
        """Adds what `kept_beside` returned, of files that may have other names now."""
        self.read += beside.get("read", 0)
        for reason, count in beside.get("dropped", {}).items():
            number, line = beside["first"][reason]
            where = containers.where(paths[number], line) if number >= 0 else ""
            self.drop(reason, where, count)
        for name in ("unread", "notes"):
            getattr(self, name).update(beside.get(name, {}))
        for number, *rest in beside.get("recognised", ()):
            self.recognised.append((paths[number], *rest))

    # -- saying ------------------------------------------------------------------------

    @property
    def lost_share(self) -> float:
        """Returns the share of the target tokens that was lost to the limit."""
        return self.lost / self.targets if self.targets else 0.0

    def check(self):
        """Refuses a stage that loses more than `data.max_loss`."""
        gone, most = self.dropped.total(), self.data.max_loss
        # Of what is dropped the records count: a few long ones hold many tokens.
        if gone <= most * self.read and not (self.cut and self.lost_share > most):
            return
        lost = f"{gone:,} of {self.read:,} {self.what}"
        if gone <= most * self.read:
            share = f"{self.lost_share:.0%} of the target tokens"
            lost = f"{share} of {self.read:,} {self.what}"
        if self.what == "texts" and gone <= most * self.read:
            return  # the packing that was asked for loses the ends of texts
        longest = ""
        if self.lost or self.dropped["too long"]:
            key = self.limit.partition("=")[0]
            longest = (
                f"{self.limit} but the longest has {self.longest:,}: raise {key}, "
            )
        raise UserError(
            f"data.files={self.data.files}: {lost} would be lost: "
            f"{self._reasons() or f'{self.cut} cut'}; {longest}mend the files, or "
            f"allow it with data.max_loss=1 (now {most:g})"
        )

    def lines(self) -> list[str]:
        """Returns what to say of the stage's data: a line, and one for unread keys."""
        if not self.read:
            return []
        gone = self.dropped.total()
        parts = [f"{self.read:,} {self.what} read, "]
        parts[0] += f"{self.read - gone:,} used" if gone or self.cut else "all used"
        if self.cut:
            parts[0] += f" ({self.cut:,} of them cut)"
        if gone:
            parts.append(f"{gone:,} dropped: {self._reasons()}")
        if self.longest:
            parts.append(f"the longest has {self.longest:,} tokens, {self.limit}")
        if self.lost:
            parts.append(f"{self.lost_share:.1%} of the target tokens lost")
        parts += [f"{count:,} {note}" for note, count in self.notes.items()]
        lines = ["; ".join(parts)]
        if self.unread:
            listed = [f"{key} ({n})" for key, n in self.unread.most_common(8)]
            more = len(self.unread) - len(listed)
            listed += [f"and {more} more"] if more > 0 else []
            lines.append(f"not read, though they hold something: {', '.join(listed)}")
        return lines

    def _reasons(self):
        most = self.dropped.most_common(_NAMED)
        at = {reason: w and f" (first {w})" for reason, w in self.first.items()}
        listed = [f"{count:,} {reason}{at[reason]}" for reason, count in most]
        others = self.dropped.total() - sum(count for _, count in most)
        return ", ".join(listed + ([f"{others} for other reasons"] if others else []))

    def report(self) -> dict:
        """Returns the counts as JSON values, for stage.json."""
        gone = self.dropped.total()
        values = {"read": self.read, "used": self.read - gone, "cut": self.cut}
        values |= {"longest": self.longest, "targets_lost": round(self.lost_share, 6)}
        for name in ("dropped", "unread", "notes"):
            values |= {name: dict(getattr(self, name))} if getattr(self, name) else {}
        return values | {"said": self.lines()}

    def say(self, stage):
        """Logs what became of the records of a stage."""
        for line in self.lines():
            _log.info("%s: %s", stage or f"data.files={self.data.files}", line)


def place(where, numbers):
    """Returns (number of the file, line) of FILE:LINE; line 0 for a file as a whole.

    Args:
        where: FILE:LINE; "" is (-1, 0).
        numbers: {file: its number}.

    >>> place("a:1.jsonl:20", {"a:1.jsonl": 3}), place("b", {"b": 0})
    ((3, 20), (0, 0))
    """
    if where in numbers or not where:
        return numbers.get(where, -1), 0
    path, _, line = where.rpartition(":")
    return numbers[path], int(line)


def _reason(message):
    """Returns what is wrong, alike wherever it is, without what to do about it."""
    return re.sub(r"\bmessage \d+", "a message", message.split("; ")[0])


def check(data):
    """Refuses values of the keys that this file is about."""
    for key, values in (
        ("bad", BAD),
        ("too_long", TOO_LONG),
        ("control_tokens", CONTROL_TOKENS),
        ("render", RENDER),
    ):
        if key in data:
            schema.choice(f"data.{key}", data[key], values)
    most = data.max_loss
    if isinstance(most, bool) or not 0 <= most <= 1:
        raise UserError(f"data.max_loss={most!r}: expected a share from 0 to 1")
