"""This process: which of a program's processes it is, its memory, programs and end."""

import contextlib
import ctypes
import functools
import hashlib
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

# glibc's mallopt: parameters by number, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


_cache: Path | None = None  # --cache


def is_first() -> bool:
    """Returns whether this process writes for all: process 0 of a program of several.

    Starts no backend: a worker that only reads and writes files must not take the
    accelerator.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return True
    return jax.process_index() == 0


def keep_memory() -> None:
    """Lets freed memory stay in the process, where glibc is the allocator.

    On a CPU backend every step frees and asks again for the same large buffers. glibc
    hands each back to the system and gets it zeroed page by page: about 44,000 page
    faults and a quarter of the step for the quickstart's model. Does nothing on other
    systems. Call it before the first computation.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_ARENA_MAX, 1)


def cache_in(folder: str | Path) -> None:
    """Keeps what can be made again in a folder of this machine: --cache."""
    global _cache
    _cache = Path(folder).absolute() if folder else None


def cache(name: str, default: Path | None = None) -> Path:
    """Returns the folder for what can be made again: compiled, tokens, workdirs.

    That in the folder of --cache; without it `default`, else ~/.cache/stagecraft (or
    $XDG_CACHE_HOME).
    """
    if _cache is None and default is not None:
        return default
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (_cache or Path(home) / "stagecraft") / name


def reuse_programs() -> None:
    """Keeps compiled programs in one folder for all of a user's runs and commands.

    That of --cache, else $JAX_COMPILATION_CACHE_DIR where it is set, else
    ~/.cache/stagecraft/compiled, apart by processor: a program for a CPU holds the
    instructions of the machine that compiled it. On a CPU small programs are kept too,
    which many commands consist of.
    """
    import jax

    if jax.config.jax_compilation_cache_dir and _cache is None:
        return
    folder = cache("compiled") / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.default_backend() == "cpu":
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _processor():
    """Returns a name of this machine's kind of processor."""
    name = f"{platform.machine()} {platform.processor()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(name.encode()).hexdigest()[:12]


@functools.cache
def made_with() -> dict[str, str]:
    """Returns what a stage is made with: versions, device, and the command.

    The commit is there where the package is a git clone, a "+" behind it where files
    differ from it; the command where `stagecraft` was one.
    """
    import jax

    import stagecraft

    devices = jax.devices()
    provenance = {"stagecraft": stagecraft.__version__, "commit": _commit()}
    provenance |= {"jax": jax.__version__}
    provenance |= {"device": f"{len(devices)} × {devices[0].device_kind}"}
    program = Path(sys.argv[0])
    if "stagecraft" in (program.stem, program.parent.name):
        provenance["command"] = shlex.join(["stagecraft", *sys.argv[1:]])
    return {key: value for key, value in provenance.items() if value}


@functools.cache
def code() -> dict[str, str]:
    """Returns what decides what a program does: versions, a digest of the sources."""
    import importlib.metadata

    total, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root)}\n".encode())
        total.update(path.read_bytes())
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        versions[name] = importlib.metadata.version(name)
    commit = _commit()
    sources = total.hexdigest()[:12] + (f" (commit {commit})" if commit else "")
    return versions | {"stagecraft": sources}


def _commit():
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty=+",
        "--abbrev=12",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


class Stopped(KeyboardInterrupt):
    """The user or the system asked this process to stop, and it has.

    Attributes:
        text: what was saved and what goes on from it, for the user.
        signal: the signal's number.
    """

    def __init__(self, text: str, number: int = signal.SIGINT):
        super().__init__(text)
        self.text, self.signal = text, number


class Stopping:
    """A request to stop: the number of the signal, or None."""

    def __init__(self):
        self.signal = None

    def __bool__(self):
        return self.signal is not None


@contextlib.contextmanager
def stoppable(note):
    """Turns the first ctrl-C or SIGTERM into a request; a second one stops at once.

    Outside the main thread, which alone gets signals, nothing is changed.

    Args:
        note: called with the signal's number when a request arrives.

    Yields:
        a `Stopping`.
    """
    request, before = Stopping(), {}

    def ask(number, frame):
        if request:
            raise Stopped("", number)
        request.signal = number
        note(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def end_with_parent() -> None:
    """Ends a worker process when its parent is gone, killed or not, and only then.

    Otherwise a worker that waits to hand over a batch would wait forever. A terminal
    sends ctrl-C to workers too, which the parent may still need. Does nothing in a
    process that is not a worker.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
