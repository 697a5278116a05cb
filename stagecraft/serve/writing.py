"""Tokens as text, one after the other: whole characters, and no further than a stop."""

import functools

from stagecraft.models.language import HALF
from stagecraft.text.tokenizer import Tokenizer


class Speller:
    """Spells tokens one by one.

    Args:
        tokenizer: a `Tokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Alone, some tokenizers' tokens would lose the space they begin with.
        self._before = tokenizer.encode("a")[:1]
        self._start = len(tokenizer.decode(self._before))
        self.spell = functools.lru_cache(maxsize=2**16)(self._spell)

    def _spell(self, id_: int) -> str:
        """Returns the text of a token; its name where it has none of its own."""
        text = self._tokenizer.decode([*self._before, id_])[self._start :]
        return text if text and HALF not in text else self._tokenizer.name(id_)


class Writer:
    """Writes tokens as text.

    A character is written when its last token is there; a text that may be the
    beginning of a stop is held back until it is one or is not.

    Args:
        tokenizer: a `Tokenizer`.
        stops: texts that end the text, which does not hold them.
        before: ids of what the text continues.

    Attributes:
        text: all that is written so far.
        stopped: whether a stop came.
    """

    def __init__(self, tokenizer: Tokenizer, stops=(), before=()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        # Decoded anew with each token: some whose text is known, and those whose
        # characters are not complete.
        self._ids = list(before[-4:])
        self._read = len(self._ids)
        self._known = tokenizer.decode(self._ids).rstrip(HALF)
        self._all, self.text, self.stopped = "", "", False

    @property
    def offset(self) -> int:
        """The characters that tokens have spelled, held back or not."""
        return len(self._all)

    def add(self, id_: int) -> str:
        """Takes a token, none after a stop; returns the text that can be written."""
        self._ids.append(id_)
        text = self._tokenizer.decode(self._ids)
        if len(text) > len(self._known) and not text.endswith(HALF):
            self._all += text[len(self._known) :]
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
            self._known = self._tokenizer.decode(self._ids)
        return self._written(self._held())

    def finish(self) -> str:
        """Returns what was held back, where no token follows and no stop came."""
        text = self._tokenizer.decode(self._ids)
        self._all += text[len(self._known) :]
        self._known = text
        return self._written(0)

    def _written(self, held):
        start = len(self.text)
        places = [self._all.find(stop, start) for stop in self._stops]
        places = [place for place in places if place >= 0]
        self.stopped = bool(places)
        end = min(places) if places else len(self._all) - held
        piece = self._all[start:end]
        self.text += piece
        return piece

    def _held(self):
        """Counts the last characters that may begin a stop."""
        for count in range(min(self._longest - 1, len(self._all)), 0, -1):
            end = self._all[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
