"""Equality of mathematics, by math-verify in a child process with limits.

Only what stands in the last \\boxed{} counts, up to 200 characters. Sympy, which
decides equality, may take forever on a short text (9^9^9^9), and a thread that runs it
cannot be stopped. So one child process compares, for the whole run: the system bounds
its memory, an alarm its seconds, and a batch of completions has a budget together. What
ran out of time has failed, and is left out of training: it was not shown to be wrong.

Equality also holds for what was not worked out: 12+30 equals 42. Where the answer is a
plain number, a box with an operator in it is wrong.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from stagecraft.errors import UserError, install
from stagecraft.signals.verify import answers, number

FAILED = float("nan")  # no reward: it could not be told
LONGEST = 200  # characters in a box
MEMORY = 2 << 30  # bytes of address space the child may have
START = 120.0  # seconds until the child is ready, of which sympy takes most
# Of wall time for one of the processor, on a machine that has other work, too.
SLOWER = 5.0

_OPERATOR = re.compile(
    r"[+*^!×·÷]|(?<=[\d)\]}.])\s*[-−]"
    r"|\\(?:cdot|times|div|pm|sqrt|log|ln|exp|sin|cos|tan|binom|sum|prod|pi)"
)


class Child:
    """A process that answers whether two boxes are equal; started when it is needed.

    Args:
        seconds: of the processor that an answer may take.
    """

    def __init__(self, seconds):
        self.seconds = seconds
        self._process, self._owner, self._lines = None, None, None

    def equal(self, gold, answer, seconds):
        """Returns whether two texts are equal; None where that took too long.

        Args:
            gold, answer: what stands in a box.
            seconds: until the caller gives up, at most.

        Raises:
            ValueError: what math-verify says is wrong with them.
        """
        if self._process is None or self._owner != os.getpid():
            self._start()
        try:
            self._process.stdin.write(json.dumps([gold, answer]) + "\n")
            self._process.stdin.flush()
            line = self._line(min(seconds, self.seconds * SLOWER))
        except OSError:
            line = ""
        if not line:
            self.close()
            return None
        said = json.loads(line)
        if isinstance(said, str):
            raise ValueError(said)
        return said

    def _line(self, seconds):
        try:
            return self._lines.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            return ""

    def _start(self):
        # A process forked from the one that started a child needs one of its own.
        self._owner = os.getpid()
        program = Path(__file__).with_name("mathematics_child.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program), str(self.seconds), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
        )
        atexit.register(self.close)
        self._lines = queue.Queue()
        reader = threading.Thread(
            target=_copy, args=(self._process.stdout, self._lines), daemon=True
        )
        reader.start()
        if not self._line(START):
            self.close()
            raise UserError(
                f"verifiers='math': its process did not start within {START:.0f} s; "
                "does `import math_verify` work here?"
            )

    def close(self):
        """Ends the child; the next question starts another."""
        atexit.unregister(self.close)
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process = None


@functools.cache
def _child(seconds):
    """Returns the one process of all verifiers with the same limit."""
    return Child(seconds)


def _copy(lines, to):
    """Puts each line into a queue, and "" at the end."""
    for line in lines:
        to.put(line)
    lines.close()
    to.put("")


def boxed(text) -> str | None:
    """Returns what stands in the last \\boxed{}; None for none, or one left open.

    >>> boxed(r"\\boxed{1} or \\boxed{\\frac{1}{2}}."), boxed(r"\\boxed{5} \\boxed{")
    ('\\\\frac{1}{2}', None)
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed")
    for place in range(begin, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return text[begin + 1 : place].strip().rstrip(".,;") or None
    return None


def _expected(answer):
    """Returns the gold of a record's answer: its box, its last marker's line, or it."""
    text = str(answer)
    gold = boxed(text)
    if gold is None:
        gold = text.rpartition("####")[2].strip().rstrip(".,;")
    if not gold or len(gold) > LONGEST:
        raise ValueError(
            f"answer={text[:60]!r}: expected 1 to {LONGEST} characters of mathematics"
        )
    return gold


def math(*, seconds: float = 2.0, batch_seconds: float = 30.0):
    """1 where the completion's last box equals `answer`, by math-verify; else 0.

    Args:
        seconds: of the processor that a comparison may take.
        batch_seconds: of the clock that those of a batch may take together.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            f"verifiers='math': math-verify is not installed: {install('verify')}"
        )
    child, plain = _child(seconds), answers.marks()

    def verify(completions, answer):
        end, known = time.monotonic() + batch_seconds, {}
        return [
            None if gold is None else _reward(one, _expected(gold), end, known)
            for one, gold in zip(completions, answer, strict=True)
        ]

    def _reward(completion, gold, end, known):
        text = answers.reply(completion)
        box = None if text is None else boxed(text)
        if box is None or len(box) > LONGEST:
            return 0.0
        if number.read(gold, plain) is not None and _OPERATOR.search(box):
            return 0.0
        if (gold, box) not in known:
            left = end - time.monotonic()
            equal = child.equal(gold, box, left) if left > 0 else None
            known[gold, box] = FAILED if equal is None else float(equal)
        return known[gold, box]

    return verify
