"""A judge behind an OpenAI-compatible endpoint: judge.url.

Labels are read from what the endpoint reports of its tokens' log-probabilities:

    judge.api="chat"         /chat/completions: the likeliest first tokens of the reply,
                             at most 20. A label that is not among them is no likelier
                             than the least of them: a bound, and marked as one.
    judge.api="completions"  /completions with `echo`: whole labels of any length, one
                             request each.

A question has one deadline for all its tries, replies have a largest size, redirects
are not followed, and a key is read from the environment and written nowhere. Answers
are appended to answers.jsonl, by what was asked, so that none is asked for twice.
"""

import concurrent.futures
import contextlib
import datetime
import email.utils
import http.client
import ipaddress
import json
import math
import os
import socket
import threading
import time
import urllib.parse
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from stagecraft import schema, storage
from stagecraft.errors import UserError
from stagecraft.signals import protocol
from stagecraft.signals.template import Answered

APIS = ("chat", "completions")
FILE = "answers.jsonl"
MOST_BYTES = 2**20  # of a reply
TOP = 20  # the most tokens that endpoints report
FIRST_WAIT = 0.5  # seconds before a second try, doubled with each; or Retry-After

# Why there is no answer.
TIMED_OUT, UNREACHABLE, UNAVAILABLE = "timed_out", "unreachable", "unavailable"
REFUSED, UNPARSED, TOO_LARGE = "refused", "unparsed", "too_large"
NO_LABEL = "no_label"


class Reply(NamedTuple):
    """A reply over HTTP.

    Attributes:
        status: of HTTP; 0 where there is no whole reply.
        body: its bytes.
        reason: why there is no whole reply, "" where there is one.
        wait: seconds that it asks to wait before another try, or None.
    """

    status: int = 0
    body: bytes = b""
    reason: str = ""
    wait: float | None = None


class Endpoint:
    """A judge that is asked over HTTP.

    Args:
        config: the group `judge` of a stage's config.
        folder: where answers.jsonl lies; None keeps the answers of this process alone.
    """

    def __init__(self, config, folder=None):
        if jax.process_count() > 1:
            raise UserError(
                f"judge.url={config.url!r}: an endpoint is asked from one process, and "
                f"this run has {jax.process_count()}; judge in a run of its own"
            )
        self.config, self._key = config, key_of("judge.key", config.key)
        self.identity = protocol.identity(
            url=config.url, model=config.model, api=config.api
        )
        self._lines = storage.AppendedLines(Path(folder) / FILE) if folder else None
        held = self._lines.values if self._lines else []
        self._held = {line["question"]: _held(line) for line in held}
        self._lock, self._over = threading.Lock(), threading.Event()

    def check(self, asks):
        """Refuses labels one of which begins with another."""
        for one in asks.labels:
            for other in asks.labels:
                if one != other and other.strip().startswith(one.strip()):
                    raise UserError(
                        f"{asks.name}: labels: {other!r} begins with {one!r}, so that "
                        "an endpoint's tokens do not tell them apart; end each with a "
                        "mark, as in '1)' and '10)'"
                    )

    def answer(self, asks, questions, thinks):
        """Returns an `Answered` to each question; arguments as of `judge.Asked`."""
        del thinks  # `check` below refuses it
        named = {self._digest(asks, *question): question for question in questions}
        due = {one: named[one] for one in named if one not in self._held}
        with concurrent.futures.ThreadPoolExecutor(self.config.parallel) as pool:
            work = [pool.submit(self._one, asks, one, *due[one]) for one in due]
            try:
                answers = dict(zip(due, [one.result() for one in work], strict=True))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        answers = self._held | answers
        return [answers[self._digest(asks, *question)] for question in questions]

    def _digest(self, asks, prompt, answers):
        asked = asks._replace(name="")
        return storage.digest([self.identity, asked, prompt, list(answers)])

    def _one(self, asks, name, prompt, answers):
        if self._over.is_set():  # another question showed that none will be answered
            return Answered(reason=UNREACHABLE)
        deadline = time.monotonic() + self.config.timeout
        asked = asks.ask(prompt, answers)
        ask = self._chat if self.config.api == "chat" else self._completions
        try:
            answer = ask(asks, asked, deadline)
        except UserError:
            self._over.set()
            raise
        if not answer.reason:  # a failure may be none another time
            with self._lock:
                self._held[name] = answer
                if self._lines:
                    self._lines.append({"question": name} | answer._asdict())
        return answer

    def _chat(self, asks, asked, deadline):
        body = {"messages": asked.messages(), "max_tokens": 1, "temperature": 0}
        body |= {"logprobs": True, "top_logprobs": TOP}
        value, reason = self._post("/chat/completions", body, deadline)
        if reason:
            return Answered(reason=reason)
        try:
            first = value["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            seen = [(str(one["token"]), _logp(one["logprob"])) for one in first]
        except (KeyError, IndexError, TypeError, ValueError):
            return Answered(reason=UNPARSED, tokens=_tokens(value))
        return _first_tokens(asks.labels, seen, _tokens(value))

    def _completions(self, asks, asked, deadline):
        logps, tokens, prompt = [], 0, asked.bare()
        for label in asks.labels:
            body = {"prompt": prompt + label, "max_tokens": 1, "temperature": 0}
            body |= {"echo": True, "logprobs": 1}
            value, reason = self._post("/completions", body, deadline)
            tokens += _tokens(value)
            if reason:
                return Answered(reason=reason, tokens=tokens)
            try:
                logps.append(_of_end(value, len(prompt), len(prompt + label)))
            except (KeyError, IndexError, TypeError, ValueError):
                return Answered(reason=UNPARSED, tokens=tokens)
        return Answered(tuple(logps), tokens=tokens)

    def _post(self, path, body, deadline):
        """Returns (a JSON object, "") or ({}, the reason why there is none)."""
        body = json.dumps({"model": self.config.model} | body).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        wait, reason = FIRST_WAIT, TIMED_OUT
        for number in range(self.config.tries):
            if time.monotonic() >= deadline:
                break
            url = self.config.url.rstrip("/") + path
            reply = post(url, headers, body, deadline)
            reason = reply.reason or self._final(reply)
            if reason not in (UNAVAILABLE, UNREACHABLE):
                return _object(reply.body) if not reason else ({}, reason)
            pause = wait if reply.wait is None else reply.wait
            if number + 1 == self.config.tries or time.monotonic() + pause >= deadline:
                break
            time.sleep(pause)
            wait *= 2
        return {}, reason

    def _final(self, reply):
        """Returns why a whole reply is no answer; "" for one that is."""
        status, where = reply.status, f"judge.url={self.config.url!r}"
        if status == 200:
            return ""
        if status in (408, 429) or status >= 500:
            return UNAVAILABLE
        if 300 <= status < 400:
            raise UserError(
                f"{where}: answers with a redirect ({status}), which is not followed; "
                "give the address that it leads to"
            )
        if status in (401, 403):
            says = f"${self.config.key}" if self.config.key else "judge.key"
            raise UserError(f"{where}: refuses the key ({status}); see {says}")
        if status in (404, 405):
            raise UserError(
                f"{where}: has no such path or model ({status}); expected an address "
                "such as http://127.0.0.1:8000/v1, judge.model, and judge.api='chat' "
                "or 'completions'"
            )
        return REFUSED


def check(where, config, asks):
    """Refuses an address that no key should go to, and impossible settings.

    Args:
        where: the group in the config, for messages.
        config: the group `judge`.
        asks: its `template.Template`.
    """
    schema.choice(f"{where}.api", config.api, APIS)
    for key in ("timeout", "tries", "parallel"):
        schema.positive(f"{where}.{key}", config[key])
    if config.rationale_tokens:
        raise UserError(
            f"{where}.rationale_tokens={config.rationale_tokens}: an endpoint is asked "
            "for its label alone; expected 0"
        )
    if config.api == "completions" and asks.render == "chat":
        raise UserError(
            f"{where}.api='completions': sends one text, and {asks.name} asks for "
            "render='chat'"
        )
    try:
        url = urllib.parse.urlsplit(config.url)
        secret = url.username or url.password or url.query or url.fragment
        fit = url.scheme in ("http", "https") and url.hostname and (url.port or 1)
    except ValueError:
        secret = fit = None
    if secret:
        raise UserError(
            f"{where}.url: holds more than an address; a key goes into an environment "
            f"variable that {where}.key names"
        )
    if not fit:
        raise UserError(
            f"{where}.url={config.url!r}: expected an address such as "
            "http://127.0.0.1:8000/v1"
        )
    if config.key and url.scheme == "http" and not _is_loopback(url.hostname):
        raise UserError(
            f"{where}.url={config.url!r}: a key would cross the network for all to "
            "read; use https, or an endpoint of this machine"
        )
    key_of("judge.key", config.key)


def _is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_of(where: str, name: str) -> str:
    """Returns the key in an environment variable; "" for none.

    Args:
        where: the setting that names the variable, for messages.
        name: of the variable; "" for none.
    """
    if not name:
        return ""
    key = os.environ.get(name, "")
    if not key:
        raise UserError(f"{where}={name!r}: there is no such environment variable")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{where}={name!r}: what it holds is no key (odd characters)")
    return key


def post(url: str, headers: dict, body: bytes, deadline: float) -> Reply:
    """Posts once; redirects are not followed, and the deadline is that of the whole.

    Args:
        url: http or https.
        headers: of the request.
        body: of the request.
        deadline: as time.monotonic() counts. A server that sends a byte at a time does
            not move it.
    """
    parts, seconds = urllib.parse.urlsplit(url), deadline - time.monotonic()
    if seconds <= 0:
        return Reply(reason=TIMED_OUT)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=seconds)
    timer = None
    try:
        connection.connect()
        # The connection forgets its socket once it has the headers of a reply.
        timer = threading.Timer(
            max(deadline - time.monotonic(), 0), _shut, [connection.sock]
        )
        timer.daemon = True
        timer.start()
        connection.request("POST", parts.path, body, headers)
        reply = connection.getresponse()
        data = reply.read(MOST_BYTES + 1)
        # A cut-off reply may look whole.
        if time.monotonic() >= deadline:
            return Reply(reason=TIMED_OUT)
        if len(data) > MOST_BYTES:
            return Reply(reason=TOO_LARGE)
        return Reply(reply.status, data, wait=_wait(reply.headers.get("Retry-After")))
    except (OSError, http.client.HTTPException):
        late = time.monotonic() >= deadline
        return Reply(reason=TIMED_OUT if late else UNREACHABLE)
    finally:
        if timer is not None:
            timer.cancel()
        connection.close()


def _shut(sock):
    with contextlib.suppress(OSError):  # it has ended by itself
        sock.shutdown(socket.SHUT_RDWR)


def _wait(text):
    """Returns the seconds of a Retry-After header, or None.

    >>> _wait("3"), _wait(None), _wait("soon")
    (3.0, None, None)
    """
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max((moment - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)


def _object(body):
    """Returns (the JSON object of a body, "") or ({}, UNPARSED)."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        return {}, UNPARSED
    return (value, "") if isinstance(value, dict) else ({}, UNPARSED)


def _logp(value):
    """Returns a log-probability; refuses what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not math.isfinite(value) or value > 1e-3:
        raise ValueError
    return min(float(value), 0.0)


def _tokens(value):
    usage = value.get("usage")
    count = usage.get("total_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else 0


def _first_tokens(names, seen, tokens):
    """Returns the `Answered` of the likeliest first tokens.

    Args:
        names: the labels.
        seen: [(token, log-probability)].
        tokens: read and written.
    """
    by_label = {name.strip(): [] for name in names}
    for token, logp in seen:
        if token.strip() in by_label:  # with or without a space before it
            by_label[token.strip()].append(logp)
    if not any(by_label.values()):
        return Answered(reason=NO_LABEL, tokens=tokens)
    least = min(logp for _, logp in seen)
    logps = [
        float(np.logaddexp.reduce(several)) if several else least
        for several in by_label.values()
    ]
    bounded = [i for i, several in enumerate(by_label.values()) if not several]
    return Answered(tuple(logps), bounded=tuple(bounded), tokens=tokens)


def _of_end(value, start, end):
    """Returns the log-probability of an echo's characters from `start` to `end`."""
    given = value["choices"][0]["logprobs"]
    offsets, logps = given["text_offset"], given["token_logprobs"]
    if len(offsets) != len(logps) or start not in offsets:
        raise ValueError  # the label's first token holds characters of the prompt
    return sum(
        _logp(logp)
        for at, logp in zip(offsets, logps, strict=True)
        if start <= at < end
    )


def _held(line):
    return Answered(
        tuple(line["logps"]),
        line["reason"],
        tuple(line["bounded"]),
        line["rationale"],
        line["tokens"],
    )
