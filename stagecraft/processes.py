"""The processes of one program: their start, their barriers, their common end.

A run on several processes is one run. Process 0 writes every file, and the others wait
where they read what it wrote. What one cannot go on from ends all of them, with its
line and its number: it goes through the key-value store of JAX's coordination service,
which a thread of every process looks at twice a second.

In a program of one process all of this does nothing.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import logging
import os
import secrets
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from stagecraft import native_lines, schema, storage, stores
from stagecraft.errors import UserError

T = TypeVar("T")

CONNECTING = 50  # seconds until a process that does not reach process 0 gives up
GATHERING = 300  # seconds until all must be there
LEAVING = 10  # seconds that a process waits for the others to end with it
SEEING = 10  # seconds in which a shared file system must show a new file
LOST = 30  # seconds without a sign of life
LOOKING = 0.5  # seconds between two looks at the store
SILENT = 4 * LOOKING  # seconds after which a process is not just between two
GONE = 128 + signal.SIGABRT  # exit status where a process is lost, that of JAX's own
_FAILED, _AT = "stagecraft/failed", "stagecraft/at/"
_FOREVER = 10 * 365 * 24 * 3600 * 1000  # milliseconds

_log = logging.getLogger("stagecraft")
_numbers = itertools.count()  # of barriers, the same in all processes
_turn = threading.local()
_ending = threading.Event()


def several() -> bool:
    """Returns whether this program is of several processes. Starts no backend."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and _state()[1] > 1


def here() -> tuple[int, int]:
    """Returns this process's number and how many there are. Starts no backend."""
    return _state() if several() else (0, 1)


def _state():
    from jax._src.distributed import global_state

    return global_state.process_id, global_state.num_processes


def _store():
    """Returns the key-value store of the coordination service.

    JAX offers it to libraries nowhere else; Orbax takes it from here too.
    """
    from jax._src.distributed import global_state

    return global_state.client


def start(coordinator: str = "", index: int | None = None, count: int | None = None):
    """Joins the other processes of this program, if there are any.

    Args:
        coordinator: HOST:PORT of process 0; "" where a cluster's environment says it.
        index, count: which of how many processes this is; None likewise.

    Raises:
        UserError: the flags do not go together, or the others cannot be reached.
    """
    given = [bool(coordinator), index is not None, count is not None]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator=HOST:PORT, --process=I and --processes=N go together; on "
            "SLURM, Open MPI, Kubernetes and TPU pods leave all three away"
        )
    # Told by flags, a process takes all devices of its machine, wherever it runs.
    detection = "deactivate"
    if not any(given):
        if (cluster := _cluster()) is None:
            return
        coordinator, index, count = cluster
        detection = None
    if not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of process 0")
    if not 0 <= index < count:
        raise UserError(
            f"--process={index} --processes={count}: processes are numbered from 0 to "
            f"{count - 1}"
        )
    if count > 1:
        _join(coordinator, index, count, detection)


def _cluster():
    """Returns (coordinator, index, count) of the cluster that JAX sees, or None."""
    from jax._src import clusters

    for one in clusters.ClusterEnv._cluster_types:
        # A pod that is of no indexed Job is a machine like any other.
        single = "K8s" in one.__name__ and "JOB_COMPLETION_INDEX" not in os.environ
        if one.opt_in_only_method or single:
            continue
        try:
            if not one.is_env_present():
                continue
            if one.get_process_count() == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = one.get_coordinator_address(CONNECTING, port)
            return address, one.get_process_id(), one.get_process_count()
        except Exception as error:  # of the cluster's client, too
            line = " ".join(str(error).split())
            raise UserError(
                f"this looks like {one.name or one.__name__}, but its processes cannot "
                f"be told ({line}); say them with --coordinator, --process, --processes"
            ) from error
    return None


def _join(coordinator, index, count, detection):
    import jax

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    native_lines.divert()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM from Python; processes agree on a last step by themselves.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    if index:
        _reach(coordinator, index, count)
    # By itself JAX ends the process with a stack trace.
    alarm = threading.Timer(GATHERING, _give_up, (coordinator, index, count))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method=detection,
            initialization_timeout=2 * GATHERING,
            heartbeat_timeout_seconds=LOST,
            shutdown_timeout_seconds=LEAVING,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"process {index} of {count} cannot start at --coordinator={coordinator} "
            f"({reason}); give a port of process 0's machine that is free"
        ) from error
    finally:
        alarm.cancel()
    if index:
        # The lines of process 0 are the run's.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    threading.Thread(target=_look, daemon=True).start()


def _reach(coordinator, index, count):
    """Waits until process 0 listens: by itself the service would only time out."""
    host, _, port = coordinator.rpartition(":")
    until, why = time.monotonic() + CONNECTING, ""
    while time.monotonic() < until:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(0.2)
    raise UserError(
        f"process {index} of {count} cannot reach process 0 at {coordinator} ({why}) "
        f"for {CONNECTING} s: start all {count} processes with one --coordinator, a "
        "port of process 0's machine that the others may connect to"
    )


def _give_up(coordinator, index, count):
    print(
        f"stagecraft: process {index} of {count}: not all {count} came to "
        f"--coordinator={coordinator} within {GATHERING} s; start each with its own "
        "--process, and the same --coordinator and --processes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


# -- waiting for each other ------------------------------------------------------------


def barrier(name: str) -> None:
    """Returns once every process has come here; all pass the same ones in one order.

    It waits as long as it takes: whatever ends one process ends the others. On an
    object store they then see what process 0 had written when it came here.
    """
    if not several() or getattr(_turn, "inside", False):
        return
    key = f"stagecraft/{next(_numbers)}/{name}"
    first = here()[0] == 0
    if first:
        _store().key_value_set(f"{key}/files", json.dumps(stores.shared()))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # In a thread, since a signal's handler only runs where Python waits.
        pool.submit(_store().wait_at_barrier, key, _FOREVER).result()
    if not first and stores.mirrored():
        state = _store().blocking_key_value_get(f"{key}/files", _FOREVER)
        stores.follow(json.loads(state))


def in_turn(make: Callable[[], T], name: str) -> T:
    """Calls a function in process 0, then in all others; returns what it returns.

    For work that leaves files, and that does nothing where these are there already.

    Args:
        make: the function.
        name: of the work, for the barrier.
    """
    if not several() or getattr(_turn, "inside", False):
        return make()
    index, _ = here()
    if index:
        barrier(name)
    _turn.inside = True
    try:
        result = make()
    finally:
        _turn.inside = False
    if not index:
        barrier(name)
    return result


def of_first(value: Any) -> Any:
    """Returns the value that process 0 has, which is a JSON value."""
    if not several():
        return value
    key = f"stagecraft/value/{next(_numbers)}"
    if here()[0] == 0:
        _store().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_store().blocking_key_value_get(key, _FOREVER))


def check_same(name: str, value: dict[str, Any]) -> None:
    """Refuses a process whose value differs from that of process 0.

    Args:
        name: of what is compared, as in "config".
        value: a dict of JSON values.
    """
    if not several():
        return
    value = json.loads(json.dumps(value))
    if changed := schema.difference(of_first(value), value):
        raise UserError(
            f"has another {name} than process 0 ({changed}), on "
            f"{socket.gethostname()}; start all processes with the same"
        )
    barrier(name)


def check_shared(root: Path) -> None:
    """Refuses a work directory that is not the same folder for every process."""
    if not several():
        return
    index, _ = here()
    mark = root / of_first(f"processes-{secrets.token_hex(8)}")
    if index == 0:
        storage.write_text(mark, "")
    barrier("mark")
    try:
        until = time.monotonic() + SEEING
        while not stores.seen(mark):
            if time.monotonic() > until:
                raise UserError(
                    f"does not see what process 0 writes to --workdir={root}, on "
                    f"{socket.gethostname()}; give a folder that all share, or a bucket"
                )
            time.sleep(0.2)
            os.listdir(root) if root.is_dir() else None  # what NFS remembers is stale
        barrier("seen")
    finally:
        if index == 0:
            mark.unlink(missing_ok=True)
            stores.push(mark)


# -- the common end --------------------------------------------------------------------


def fail(text: str, status: int) -> None:
    """Ends all processes with this one's line and exit status; alone it returns.

    Args:
        text: the line, without the process's number.
        status: of all processes.
    """
    _wait_for_end()
    if not several():
        return
    index, count = here()
    _publish(f"process {index} of {count}: {text}", status)


def _wait_for_end():
    """Waits where this process is about to end already: its reason has been said."""
    if _ending.is_set():
        time.sleep(2 * LEAVING)


def _publish(text, status):
    with contextlib.suppress(Exception):  # another was first
        _store().key_value_set(_FAILED, json.dumps([text, status]))
    # The thread that looks ends this process.
    time.sleep(LEAVING + 4 * LOOKING)
    os._exit(status)


def crash(error: Exception) -> None:
    """Ends all processes for an error that is a bug, or that a lost process caused.

    The error of a computation with a process that is gone is no news beside that, or
    beside the line that the process left. Alone this returns.
    """
    _wait_for_end()
    if not several():
        return
    with contextlib.suppress(Exception):
        before = dict(_store().key_value_dir_get(_AT))
        time.sleep(10 * LOOKING)  # in which a failure of another ends this process
        after = dict(_store().key_value_dir_get(_AT))
        gone = [key for key, word in after.items() if before.get(key) == word]
        if gone:
            _publish(native_lines.gone([key.rpartition("/")[2] for key in gone]), GONE)
    traceback.print_exception(error)
    line = " ".join(str(error).split())[:300]
    fail(f"{type(error).__name__}: {line}", 1)


def finish() -> None:
    """Leaves the other processes, once all are done."""
    if several():
        import jax

        barrier("finish")
        jax.distributed.shutdown()


def _look():
    """Looks for the failure of a process, and ends this one with it."""
    store = _store()
    while several():
        with contextlib.suppress(Exception):  # nothing there; or the service is gone
            _end(*json.loads(store.key_value_try_get(_FAILED)))
        with contextlib.suppress(Exception):
            _tell(store)
        time.sleep(LOOKING)


def _end(text, status):
    import jax

    _ending.set()
    begin = "\n" if sys.stderr.isatty() else ""  # behind a bar
    print(f"{begin}stagecraft: {text}", file=sys.stderr, flush=True)
    # All leave together: who is merely gone would be taken for lost.
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(LEAVING)
    os._exit(status)


# -- who is slow -----------------------------------------------------------------------


class Pace:
    """Watches the steps of a loop, and names who is behind where one takes long.

    Args:
        name: of the loop.

    Attributes:
        place: (step, 1 once this process has all that it computes the step from).
    """

    FACTOR, LEAST, KNOWN = 3.0, 2.0, 5  # times the median, seconds, steps before

    def __init__(self, name: str):
        self.name = name
        self.place, self._began, self._said = (0, 0), None, False
        self._seconds = collections.deque(maxlen=99)

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Times a step."""
        global _pace
        self.place, self._said = (step, 0), False
        began = self._began = time.monotonic()
        _pace = self
        try:
            yield
        finally:
            self._seconds.append(time.monotonic() - began)
            self._began = None

    def ready(self) -> None:
        """Says that this process now computes together with the others."""
        self.place = self.place[0], 1

    def late(self) -> tuple[float, float] | None:
        """Returns the seconds of a step that takes long, and the median's."""
        began = self._began
        if began is None or len(self._seconds) < self.KNOWN:
            return None
        median = statistics.median(self._seconds)
        elapsed = time.monotonic() - began
        long = elapsed > max(self.FACTOR * median, self.LEAST)
        return (elapsed, median) if long else None

    def look(self, seen: dict[int, tuple[tuple[int, int], float]]) -> None:
        """Says once a step who is behind, if anybody is.

        Args:
            seen: {process: (its place, seconds since it was last heard of)}.
        """
        late = self.late()
        if late is None or self._said:
            return
        furthest = max(place for place, _ in seen.values())
        behind = [
            f"process {index} (at step {place[0]}"
            + (f", not heard of for {silent:.0f} s)" if silent > SILENT else ")")
            for index, (place, silent) in sorted(seen.items())
            if place < furthest or silent > SILENT
        ]
        if behind:
            self._said = True
            _log.warning(
                "%s: step %d takes %.1f s so far, more than %g x the median of %.2g s; "
                "it waits for %s",
                self.name,
                self.place[0],
                late[0],
                self.FACTOR,
                late[1],
                ", ".join(behind),
            )


_pace: Pace | None = None
_heard: dict[int, tuple[str, float]] = {}  # {process: (its last word, when)}
_ticks = itertools.count()


def _tell(store):
    """Says where this process is; process 0 listens where a step takes long."""
    pace, (index, _) = _pace, here()
    word = json.dumps([*(pace.place if pace else (0, 0)), next(_ticks)])
    store.key_value_set(f"{_AT}{index}", word, allow_overwrite=True)
    if index or pace is None or not pace.late():
        return
    now = time.monotonic()
    for key, word in store.key_value_dir_get(_AT):
        number = int(key.rpartition("/")[2])
        if _heard.get(number, ("",))[0] != word:
            _heard[number] = word, now
    pace.look(
        {
            number: (tuple(json.loads(word)[:2]), now - when)
            for number, (word, when) in _heard.items()
        }
    )
