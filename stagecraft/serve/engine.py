"""A thread that decodes what arrives together, together: continuous batching.

Each completion gets a row of one cache (`models.slots`) between two blocks of steps and
leaves it when it ends or is given up, so that none waits for another's end. Shapes are
of few sizes, and compiled when first needed. What is only scored, or answered by one
token, needs no row.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from stagecraft import runs, sharding
from stagecraft.errors import UserError
from stagecraft.models import slots
from stagecraft.models.language import Language, padded

STEPS = 8  # of decoding between two looks at who came and who left
# Prompts that are read at once, if they are of about one length.
READ = 8
MOST_READ = 2**14  # tokens of them
ROOM = 64  # slots of the smallest cache
WAITING = 1024  # completions that may wait for a row
STOPPING = "the server is stopping"

_log = logging.getLogger("stagecraft")


class Busy(UserError):
    """More is asked for than the engine takes."""


class Token(NamedTuple):
    """A token of a text.

    Attributes:
        id: its number.
        logp: its log-probability in nats at temperature 1; None of a first token.
        top: [(id, log-probability)] of the likeliest tokens in its place, at most as
            many as were asked for.
    """

    id: int
    logp: float | None
    top: list[tuple[int, float]]


class Part(NamedTuple):
    """What became of a completion since the last part.

    Attributes:
        tokens: the next of them.
        finish: "stop" where the last one ends the text, "length" at the limit, "" where
            more will come.
        prompt: in the first part of one with `echo`, the prompt's tokens.
        error: why there will be no more; "" where there is no error.
    """

    tokens: tuple[Token, ...] = ()
    finish: str = ""
    prompt: tuple[Token, ...] = ()
    error: str = ""


@dataclasses.dataclass(eq=False)
class Completion:
    """One text to complete.

    Attributes:
        ids: of the prompt, at least one.
        limit: tokens to draw at most; 0 only scores the prompt.
        deliver: called with each `Part`, in the engine's thread.
        stop_ids: tokens that end it.
        temperature, top_p: see `slots.Draws`.
        seed: of what is drawn; any integer.
        echo: whether the prompt's tokens are scored.
        tops: alternatives to report of each token; None for no log-probabilities.
        given_up: set where nobody waits for it any more.
    """

    ids: list[int]
    limit: int
    deliver: Callable[[Part], None]
    stop_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    echo: bool = False
    tops: int = 0
    given_up: bool = False


@dataclasses.dataclass
class _Row:
    """A completion in a row: its last token, tokens in the cache, tokens drawn."""

    asked: Completion
    token: int
    length: int
    drawn: int


class Engine:
    """Completes texts with one model.

    Args:
        language: a `models.language.Language`.
        mesh: the mesh its parameters are on.
        rows: texts that are decoded at once.
        context: the most tokens of a prompt and its completion; 0 for as many as the
            model holds.
    """

    def __init__(self, language: Language, mesh, *, rows: int = 16, context: int = 0):
        self.language, self.mesh = language, mesh
        limit = language.model.config.max_length
        self.context = min(context or limit, limit)
        self.rows = runs.whole_rows(rows, mesh)
        self._single = runs.whole_rows(1, mesh)
        self._several = runs.whole_rows(READ, mesh)
        self._waiting: collections.deque[Completion] = collections.deque()
        self._live: dict[int, _Row] = {}
        self._cache, self._room = None, 0
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # -- from other threads ------------------------------------------------------------

    def submit(self, completions: list[Completion]) -> None:
        """Takes completions on, all or none.

        Raises:
            Busy: too many wait already.
        """
        with self._changed:
            if self._closed:
                raise Busy(STOPPING)
            if len(self._waiting) + len(completions) > WAITING:
                raise Busy(f"{len(self._waiting)} completions wait already; try later")
            self._waiting.extend(completions)
            self._changed.notify()

    def busy(self) -> int:
        """Counts the rows in use and the completions that wait."""
        with self._changed:
            return len(self._live) + len(self._waiting)

    def stop(self) -> None:
        """Asks the thread to end after the block it is in; what is not done fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def close(self) -> None:
        """Stops the thread and waits for its end."""
        self.stop()
        self._thread.join()

    # -- the engine's own thread -------------------------------------------------------

    def _work(self):
        with jax.set_mesh(self.mesh):
            while self._next():
                pass
        live = [row.asked for row in self._live.values()]
        for asked in (*live, *self._waiting):
            asked.deliver(Part(error=STOPPING))

    def _next(self):
        """Does one round of work; returns whether there will be another."""
        with self._changed:
            while not (self._closed or self._waiting or self._live):
                self._changed.wait()
            if self._closed:
                return False
            self._leave()
            group = self._group()
        try:
            if group:
                self._read(group)
            if self._live:
                self._advance()
        except Exception as error:  # of the device: others go on with a new cache
            line = (str(error) or type(error).__name__).splitlines()[0]
            _log.exception("the engine failed: %s", line)
            failed = [*group, *(row.asked for row in self._live.values())]
            self._live, self._cache, self._room = {}, None, 0
            for asked in dict.fromkeys(failed):
                asked.deliver(Part(error=line))
        return True

    def _leave(self):
        """Frees the rows of those who hung up."""
        gone = [number for number, row in self._live.items() if row.asked.given_up]
        for number in gone:
            del self._live[number]

    def _group(self):
        """Takes the next completions whose prompts are read together."""
        free, group, length = self.rows - len(self._live), [], 0
        while self._waiting and len(group) < self._several:
            asked = self._waiting[0]
            if asked.given_up:
                self._waiting.popleft()
                continue
            needs = asked.limit > 1
            if needs and not free:
                break
            own = min(padded(len(asked.ids)), self.context)
            if group and (own != length or asked.echo != group[0].echo):
                break
            if (len(group) + 1) * own > MOST_READ and group:
                break
            group.append(self._waiting.popleft())
            length, free = own, free - needs
        return group

    def _read(self, group):
        """Reads prompts, tells their first tokens, and puts them into rows."""
        length = min(padded(len(group[0].ids)), self.context)
        size = self._single if len(group) <= self._single else self._several
        ids = np.zeros((size, length), np.int32)
        mask = np.zeros((size, length), bool)
        mask[:, 0] = True
        for i, asked in enumerate(group):
            ids[i, : len(asked.ids)] = asked.ids
            mask[i, : len(asked.ids)] = True
        draws = _draws(dict(enumerate((asked, 0) for asked in group)), size)
        arrays = sharding.on_mesh((ids, mask, draws))
        first, read, prompts = slots.read(
            self.language.model, *arrays, echo=group[0].echo
        )
        first, read = jax.device_get((first, read))
        places = np.full(size, self.rows, np.int32)
        free = (i for i in range(self.rows) if i not in self._live)
        joins = {}
        for i, asked in enumerate(group):
            tokens = () if not asked.limit else (_token(first, (i,), asked.tops),)
            finish = _finish(asked, tokens, len(tokens))
            prompt = _prompt(read, i, asked) if asked.echo else ()
            asked.deliver(Part(tokens, finish, prompt))
            if not finish:
                places[i] = next(free)
                joins[int(places[i])] = _Row(asked, tokens[0].id, len(asked.ids), 1)
        if joins:
            self._make_room(max(length, *(r.length + STEPS for r in joins.values())))
            self._cache = slots.insert(self._cache, prompts, places)
            self._live |= joins

    def _advance(self):
        """Draws some tokens of every row, and tells them."""
        self._make_room(max(row.length for row in self._live.values()) + STEPS)
        token, length = (np.zeros(self.rows, np.int32) for _ in range(2))
        left = np.zeros(self.rows, np.int32)
        most = max(len(row.asked.stop_ids) for row in self._live.values())
        # Few shapes: as many places for stops as any tokenizer has, mostly.
        stops = np.full((self.rows, max(8, most)), -1, np.int32)
        for i, row in self._live.items():
            token[i], length[i] = row.token, row.length
            left[i] = row.asked.limit - row.drawn
            stops[i, : len(row.asked.stop_ids)] = row.asked.stop_ids
        draws = _draws(
            {i: (row.asked, row.drawn) for i, row in self._live.items()}, self.rows
        )
        rows = sharding.on_mesh(slots.Rows(token, length, left, stops, draws))
        tops = any(row.asked.tops for row in self._live.values())
        cache, self._cache = self._cache, None  # its arrays are given away
        drawn, real, self._cache = slots.advance(
            self.language.model, rows, cache, np.bool_(tops), steps=STEPS
        )
        drawn, real = jax.device_get((drawn, real))
        for i, row in list(self._live.items()):
            count, asked = int(real[:, i].sum()), row.asked
            tokens = tuple(_token(drawn, (n, i), asked.tops) for n in range(count))
            row.token, row.length = tokens[-1].id, row.length + count
            row.drawn += count
            finish = _finish(asked, tokens, row.drawn)
            if finish:
                del self._live[i]
            asked.deliver(Part(tokens, finish))

    def _make_room(self, least):
        """Gives the rows of the cache `least` slots or more, and few sizes."""
        room = ROOM
        while room < least:
            room *= 2
        room = min(room, self.context + STEPS)
        if self._room > room and not self._live:
            self._cache = None  # a long text left it wide
        if self._cache is None:
            self._cache = slots.empty_cache(self.language.model, self.rows, room)
        elif room <= self._room:
            return
        else:
            self._cache = slots.widened(self._cache, room=room)
        self._room = room


def _draws(rows, size):
    """Returns the `slots.Draws` of {row: (completion, tokens drawn)}; others greedy."""
    draws = slots.Draws(
        key=np.zeros((size, 2), np.uint32),
        step=np.zeros(size, np.int32),
        temperature=np.zeros(size, np.float32),
        top_p=np.ones(size, np.float32),
    )
    for i, (asked, drawn) in rows.items():
        seed = asked.seed % 2**64
        draws.key[i] = seed >> 32, seed % 2**32
        draws.step[i] = drawn
        draws.temperature[i], draws.top_p[i] = asked.temperature, asked.top_p
    return draws


def _finish(asked, tokens, drawn):
    """Returns how a completion ends with its last tokens; "" where it goes on."""
    if tokens and tokens[-1].id in asked.stop_ids:
        return "stop"
    return "length" if drawn >= asked.limit else ""


def _token(drawn, place, tops):
    """Returns the `Token` at a place of a `slots.Drawn`."""
    top = zip(
        drawn.top[place][:tops].tolist(),
        drawn.top_logps[place][:tops].tolist(),
        strict=True,
    )
    return Token(int(drawn.token[place]), float(drawn.logp[place]), list(top))


def _prompt(read, i, asked):
    """Returns the `Token`s of a prompt; nothing says how likely its first is."""
    rest = (_token(read, (i, n), asked.tops) for n in range(len(asked.ids) - 1))
    return (Token(asked.ids[0], None, []), *rest)
