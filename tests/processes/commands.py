"""Commands that run on several processes of this machine."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Program:
    """One command on several processes, each with virtual CPU devices of its own.

    Args:
        folder: for their output.
        arguments: of `stagecraft`: a list, or (process) -> a list.
        processes, devices: how many, and how many devices each has.
        port: of process 0; one that is free by default.
        started: numbers of those that are started; all by default.
    """

    def __init__(
        self, folder, arguments, processes, devices, *, port=None, started=None
    ):
        self.folder, self.processes = Path(folder), processes
        self.folder.mkdir(parents=True, exist_ok=True)
        port = port or free_port()
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
        }
        self.running = {}
        for index in range(processes) if started is None else started:
            own = arguments(index) if callable(arguments) else arguments
            flags = [] if processes == 1 else flags_of(port, index, processes)
            with self.path(index).open("wb") as log:
                self.running[index] = subprocess.Popen(
                    [sys.executable, "-m", "stagecraft", *own, *flags],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=environment,
                )

    def path(self, index):
        """The file of what a process wrote."""
        return self.folder / f"{index}.log"

    def text(self, index):
        """What a process has written so far."""
        return self.path(index).read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text, index=0, seconds=600):
        """Waits until a process has written a text."""
        until = time.monotonic() + seconds
        while text not in self.text(index):
            ended = self.running[index].poll()
            assert ended is None, f"ended with {ended}:\n{self.text(index)}"
            assert time.monotonic() < until, self.text(index)
            time.sleep(0.05)

    def statuses(self, seconds=900):
        """Exit statuses by process, once all have ended."""
        until = time.monotonic() + seconds
        for one in self.running.values():
            one.wait(max(until - time.monotonic(), 0.1))
        return {index: one.returncode for index, one in self.running.items()}

    def lines(self, index):
        """The lines of a process that say why it ended."""
        text = self.text(index)
        assert "Traceback" not in text and "Check failure" not in text, text
        lines = [one for one in text.splitlines() if one.startswith("stagecraft: ")]
        return [one.removeprefix("stagecraft: ") for one in lines]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                one.kill()
            one.wait()


def flags_of(port, index, processes):
    """The flags that say which of several processes this is."""
    return [
        f"--coordinator=127.0.0.1:{port}",
        f"--process={index}",
        f"--processes={processes}",
    ]


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
