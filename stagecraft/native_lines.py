"""What JAX's coordination service writes when a process is lost, as one line.

Its C++ code ends every process within moments of losing one, by `abort`, and writes a
stack trace that names no cause. No callback of Python can change that: text and end
come from a thread of its own. So a process of several lets its native standard error
go through this file, run as a program of its own, which outlives it by a moment:

    python native_lines.py < (all that native code writes)

Every other line passes through unchanged, that of other crashes too. It imports nothing
of the package, so that it starts in a moment.
"""

import os
import re
import signal
import subprocess
import sys

# gloo says so of every communicator.
_SAID_ALWAYS = re.compile(rb"^\[Gloo\] Rank \d+ is connected to ")
_SERVICE = re.compile(rb"^[EF]\d{4} .*(coordination_service|/?client\.h|distributed)")
_ENDS = b"Terminating process because the JAX distributed service detected"
_LOST = re.compile(rb"unhealthy \(stopped sending heartbeats\):\s*\n((?:\S+\n)+?)The")
_NUMBER = re.compile(rb"(\d+)\s*$")


def divert() -> None:
    """Sends what native code of this process writes through here, to standard error.

    `sys.stdout` and `sys.stderr` go on to where they went.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    output, original = os.dup(1), os.dup(2)
    command = [sys.executable, "-S", "-E", os.path.abspath(__file__)]
    reader = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=original, start_new_session=True
    )
    assert reader.stdin is not None
    for number in (1, 2):  # gloo writes to the first
        os.dup2(reader.stdin.fileno(), number)
    reader.stdin.close()
    how = dict(buffering=1, encoding="utf-8", errors="replace")
    sys.stdout = open(output, "w", **how)  # noqa: SIM115
    sys.stderr = open(original, "w", **how)  # noqa: SIM115


def main(lines, out):
    """Copies lines; those of a lost process become one."""
    held = []
    for line in lines:
        if held or _SERVICE.match(line):
            held.append(line)
        elif not _SAID_ALWAYS.match(line):
            out.write(line)
            out.flush()
    text = b"".join(held)
    out.write(lost(text) if _ENDS in text else text)
    out.flush()


def lost(text: bytes) -> bytes:
    """Returns the line for what the service wrote, by the process that it names."""
    tasks = _LOST.search(text)
    numbers = []
    for task in tasks.group(1).splitlines() if tasks else ():
        if number := _NUMBER.search(task):
            numbers.append(number.group(1).decode())
    # Process 0 runs the service: without it there is nobody to say who was lost.
    return f"stagecraft: {gone(numbers or ['0'])}\n".encode()


def gone(numbers: list[str]) -> str:
    """Returns what is to be said where these processes are lost."""
    who = f"process{'es' if len(numbers) > 1 else ''} {', '.join(numbers)}"
    return (
        f"{who} of this run is gone (killed, or its machine was lost): all end; the "
        "same command goes on from the last checkpoint"
    )


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(_number, signal.SIG_IGN)
    main(sys.stdin.buffer, sys.stderr.buffer)
