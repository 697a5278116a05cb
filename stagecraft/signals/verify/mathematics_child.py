"""The program of the child process of `mathematics`: it needs math-verify alone.

It reads lines of JSON, [gold, answer], and answers each in a line: true, false, null
where it took too long, or a text that says what is wrong.
"""

import json
import logging
import resource
import signal
import sys


class _Late(BaseException):
    """The alarm; no `except Exception` of sympy's may swallow it."""


def _ring(*_):
    raise _Late


def _limit(memory):
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _equal(gold, answer):
    import math_verify

    # Without the other extractions: they look for a number anywhere in the text.
    how = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [
        math_verify.parse(rf"\boxed{{{text}}}", how, parsing_timeout=None)
        for text in (gold, answer)
    ]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))


def _serve(seconds, memory):
    logging.disable(logging.CRITICAL)
    _equal(r"\sqrt{2}x", r"x\frac{2}{\sqrt{2}}")  # imports all that is needed
    _limit(memory)
    print("ready", flush=True)
    signal.signal(signal.SIGPROF, _ring)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            said = _equal(gold, answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
        except (_Late, MemoryError, RecursionError):
            said = None
        except Exception as error:  # of somebody else's text
            said = f"{type(error).__name__}: {error}"[:200]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
